"""What every arm shares: the conversation with the benchmark, peak memory, and gradients small enough to send.

torch and the standard library only: arms run in environments of their own.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

LEARNING_RATE = 1e-7  # the weights move, as they do in a run, and the numbers stay those of the start
# Random directions that a parameter's gradient is projected on, and how many numbers of it are taken at a time.
DIRECTIONS, PIECE = 4, 2**20
# Relative size of the noise that makes a policy differ from its reference, as they do after some steps.
NOISE = 0.02


class Closed(Exception):
    """Nothing more is asked of this work."""


class Arm(Protocol):
    """One work, opened. ``facts``: what the benchmark should know of it (parameters, tokens of a step)."""

    facts: dict[str, Any]

    def agree(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Loss and gradient (or log-probs) on the work's rows at the initial weights, which it leaves as they were."""
        ...

    def steps(self, conversation: Conversation) -> None:
        """A loop that calls ``conversation.begin_step`` before each step and ``end_step`` after it."""
        ...


class Conversation:
    """Commands as JSON lines on standard input, one answer each on standard output; what libraries print goes to
    standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def hear(self) -> dict[str, Any]:
        """The next command. Raises Closed at the end."""
        line = sys.stdin.readline()
        if not line:
            raise Closed
        return json.loads(line)

    def say(self, **answer: Any) -> None:
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()

    def begin_step(self) -> None:
        """Wait until a step is asked for, and start its clock. Raises Closed where there is to be none."""
        self._command = self.hear()
        if self._command["do"] != "step":
            raise Closed
        self._started = time.perf_counter()

    def end_step(self, **more: Any) -> None:
        """Where the step has drawn some, ``drawn``: tokens of a mean completion; ``drawing``: the seconds it took."""
        seconds = time.perf_counter() - self._started
        peak = peak_memory()
        if self._command.get("rest"):
            release_memory()
        self.say(seconds=seconds, peak=peak, **more)
        reset_peak_memory()


def serve(open_work: Callable[[dict[str, Any]], Arm]) -> None:
    """Open the work that is asked for, say how it agrees, and do steps until the benchmark has had enough."""
    conversation = Conversation()
    try:
        command = conversation.hear()
        torch.set_num_threads(command["threads"])
        arm = open_work(command["work"])
        conversation.say(facts=arm.facts)
        answer = arm.agree(conversation.hear())
        conversation.say(**answer, peak=peak_memory())
        reset_peak_memory()
        arm.steps(conversation)
    except Closed:
        pass
    except Exception as error:
        traceback.print_exc()
        conversation.say(error=f"{type(error).__name__}: {error}")


# -- memory ------------------------------------------------------------------------------------------------------------


def peak_memory() -> int:
    """Bytes: the most this process has held since the last reset."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def reset_peak_memory() -> None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def release_memory() -> None:
    """Give free memory back to the system, so that another arm has room."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


# -- agreement ---------------------------------------------------------------------------------------------------------


def perturb(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Add noise of ``NOISE`` times its standard deviation to every matrix, the same for a name in every process."""
    with torch.no_grad():
        for name, parameter in parameters:
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=_generator(f"noise {plain_name(name)}"))
                parameter.add_(noise * (NOISE * float(parameter.std())))


def plain_name(name: str) -> str:
    """A parameter's name without what differs between the ways in which libraries wrap a model."""
    for prefix in ("module.", "_orig_mod.", "model."):
        name = name.removeprefix(prefix)
    return name


def sketch(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, list[float]]:
    """Of each gradient its norm and its products with ``DIRECTIONS`` random directions (Johnson & Lindenstrauss 1984):
    the mean square of two sketches' difference is the squared distance of the gradients."""
    found = {}
    for name, parameter in parameters:
        if parameter.grad is None:
            continue
        flat = parameter.grad.detach().reshape(-1)
        generator = _generator(f"direction {plain_name(name)}")
        products = torch.zeros(DIRECTIONS, dtype=torch.float64)
        for piece in flat.split(PIECE):
            products += (torch.randn(DIRECTIONS, len(piece), generator=generator) @ piece.float()).double()
        norm = torch.linalg.vector_norm(flat, dtype=torch.float64)
        found[plain_name(name)] = [float(norm), *products.tolist()]
    return found


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def score_weight(size: int) -> Tensor:
    """[1, size] the head of a fresh reward model or critic, the same in every arm."""
    return torch.randn(1, size, generator=_generator("score")) / (size + 1) ** 0.5


def distinct_share(ids: list[int]) -> float:
    """The reward of the policy-gradient works: it costs nothing, and completions differ in it."""
    return len(set(ids)) / max(len(ids), 1)
