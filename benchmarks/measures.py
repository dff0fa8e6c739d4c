"""From seconds to what is said of them: paired ratios and their spread, agreement, and slopes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

# Where two sides differ by more, they do not do the same work: of the loss, relative; of the whole gradient and of the
# worst parameter's, ‖a − b‖/‖b‖; of log-probs, nats. Twice: in float32, which shows a wrong formula, and where both
# sides round to bfloat16, each in its own places: of a reward model's gradient that alone is a fifth.
LIMITS = {False: {"loss": 1e-4, "gradient": 1e-3, "worst": 1e-2, "logprobs": 1e-3}}
LIMITS[True] = {"loss": 0.1, "gradient": 0.3, "worst": 1.0, "logprobs": 0.3}


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """theirs / ours: the median over the pairs, and the smallest and largest."""

    middle: float
    low: float
    high: float
    pairs: int


def paired_ratio(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """``pairs``: (ours, theirs), seconds of one pair each. A ratio is taken within a pair, where the machine was the
    same for both; never between medians."""
    ratios = [theirs / ours for ours, theirs in pairs]
    return Ratio(middle=median(ratios), low=min(ratios), high=max(ratios), pairs=len(ratios))


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far the two sides are apart. ``void``: in words, why there is nothing to time; empty where they agree."""

    numbers: Mapping[str, float]
    void: str = ""
    worst_name: str = ""

    def __str__(self) -> str:
        words = {
            "loss": "loss {:.0e} relative",
            "gradient": "gradient {:.0e} relative",
            "cosine": "cosine {:.6f}",
            "worst": f"worst parameter {{:.0e}} ({self.worst_name})",
            "logprobs": "log-probs of the same tokens {:.0e} nats at most",
        }
        return ", ".join(words[name].format(value) for name, value in self.numbers.items())


def agreement(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, rounded: bool) -> Agreement:
    """``ours``, ``theirs``: answers of the arms to "agree"."""
    if "logprobs" in ours:
        rows = zip(ours["logprobs"], theirs["logprobs"], strict=True)
        gaps = [abs(a - b) for x, y in rows for a, b in zip(x, y, strict=True)]
        numbers, worst_name = {"logprobs": max(gaps)}, ""
    else:
        numbers, worst_name = _of_gradients(ours["gradient"], theirs["gradient"])
        gap = abs(ours["loss"] - theirs["loss"]) / max(abs(theirs["loss"]), 1e-12)
        numbers = {"loss": gap, **numbers}
    limits = LIMITS[rounded]
    # Written so that a NaN is no agreement.
    beyond = [n for n, limit in limits.items() if n in numbers and not numbers[n] <= limit]
    void = "; ".join(f"{name} differs by {numbers[name]:.1e}, more than {limits[name]:.0e}" for name in beyond)
    missing = set(ours.get("gradient", ())) ^ set(theirs.get("gradient", ()))
    if missing:
        void = f"gradients of one side only: {', '.join(sorted(missing)[:3])}"
    return Agreement(numbers=numbers, void=void, worst_name=worst_name)


def _of_gradients(
    ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]
) -> tuple[dict[str, float], str]:
    """From sketches (norm, then products with random directions): E[(p − q)²] over directions is ‖a − b‖²."""
    distances, norms = {}, {}
    for name in ours.keys() & theirs.keys():
        a, b = ours[name], theirs[name]
        distances[name] = sum((p - q) ** 2 for p, q in zip(a[1:], b[1:], strict=True)) / (len(a) - 1)
        norms[name] = (a[0] ** 2, b[0] ** 2)
    distance = sum(distances.values())
    mine, other = (sum(pair[i] for pair in norms.values()) for i in (0, 1))
    if not mine or not other:
        return {"gradient": math.inf, "cosine": 0.0, "worst": math.inf}, ""
    # A parameter with next to no gradient has next to no digits in common: it is measured by a typical one.
    floor = other / len(norms) * 1e-4
    relative = {name: math.sqrt(d / max(norms[name][1], floor)) for name, d in distances.items()}
    worst = max(relative, key=lambda name: relative[name])
    cosine = (mine + other - distance) / (2 * math.sqrt(mine * other))
    numbers = {"gradient": math.sqrt(distance / other), "cosine": cosine, "worst": relative[worst]}
    return numbers, worst


# -- growth ------------------------------------------------------------------------------------------------------------


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The exponent k of seconds ∝ size^k, by least squares on the logarithms."""
    xs, ys = [math.log(x) for x in sizes], [math.log(y) for y in seconds]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - x_mean) ** 2 for x in xs)
    if not spread:
        raise ValueError("a slope needs two different sizes")
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread


def in_words(exponent: float) -> str:
    """What a slope means to somebody who doubles the size."""
    factor = 2**exponent
    if exponent < 0.15:
        kind = "hardly at all"
    elif exponent < 0.85:
        kind = "more slowly than in proportion"
    elif exponent <= 1.15:
        kind = "in proportion"
    else:
        kind = "faster than in proportion"
    return f"grows {kind} (exponent {exponent:.2f}: twice the size costs {factor:.2f} times as much)"
