"""The one-file examples run, learn what they claim to learn, and know nothing of Tether."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def test_dpo_learns_the_taste_from_comparisons(capsys: pytest.CaptureFixture[str]):
    before, after = load_example("dpo_from_scratch").main(pairs=120, epochs=3)
    assert after > before + 0.8, "of 5 digits, at least 0.8 more are even"
    assert "even digits per completion" in capsys.readouterr().out


def test_ppo_raises_the_reward():
    first, last = load_example("ppo_from_scratch").main(steps=6, rollouts_per_step=16)
    assert last > first + 1.0


def test_gae_of_a_worked_example():
    gae = load_example("ppo_from_scratch").gae
    # γ = 0.5, λ = 0.5. δ_2 = 4 - 2 = 2; δ_1 = 0 + 0.5·2 - 1 = 0; δ_0 = 1 + 0.5·1 - 1 = 0.5.
    # A_2 = 2; A_1 = 0 + 0.25·2 = 0.5; A_0 = 0.5 + 0.25·0.5 = 0.625.
    assert gae([1, 0, 4], [1, 1, 2], gamma=0.5, lam=0.5) == ([0.625, 0.5, 2.0], [1.625, 1.5, 4.0])


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_an_example_stands_alone(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported <= {"torch", *sys.stdlib_module_names}
