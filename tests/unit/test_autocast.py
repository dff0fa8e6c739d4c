"""Training in bfloat16 with float32 weights: log-probs near the exact ones, gradients consistent, one choice a run."""

import json

import pytest
import torch
from pydantic import ValidationError

from method_cases import (
    Killed,
    config,
    demonstrations,
    go,
    kill_at,
    questions,
    reward_file,
    same_weights,
    series,
    unclocked,
)
from model_cases import RAGGED, backbone
from tether.backends.local import ceiling
from tether.backends.local.learner import AdamWSettings, LocalLearner
from tether.config.load import load
from tether.config.schema import OptimConfig, RLConfig
from tether.core.errors import UserError
from tether.losses import CrossEntropy
from tether.methods import parts
from tether.models.adapters import add_adapter
from tether.models.digest import exact_digest
from tether.models.load import clone_frozen
from tether.models.roles import Policy
from tether.runs.folder import RunFolder


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "matmul_rate", lambda device, dtype, width: 1e12)


def rounded(family: str = "llama", mode: str = "packed"):
    made = backbone(family, mode)
    made.autocast = torch.bfloat16
    return made


def learner_of(policy: Policy) -> LocalLearner:
    return LocalLearner(policy, AdamWSettings(learning_rate=lambda step: 0.05), tokens_per_micro_batch=99)


@pytest.mark.parametrize(
    ("family", "mode"), [("llama", "packed"), ("gemma2", "packed"), ("gpt2", "packed"), ("llama", "padded")]
)
def test_log_probs_are_rounded_and_no_more(family: str, mode: str):
    with torch.no_grad():
        exact = Policy(backbone=backbone(family, mode))(RAGGED, entropy=True)
        coarse = Policy(backbone=rounded(family, mode))(RAGGED, entropy=True)
    for name in ("logprobs", "entropy"):
        found, want = getattr(coarse, name), getattr(exact, name)
        assert found.dtype == torch.float32
        gap = (found - want)[RAGGED.present].abs()
        assert 1e-5 < gap.mean() < 0.1


def test_gradients_reach_float32_weights_and_are_those_of_float32_within_rounding():
    found = {}
    for made in (backbone("llama_tied"), rounded("llama_tied")):
        learner = learner_of(Policy(backbone=made))
        learner.forward_backward(RAGGED, CrossEntropy())
        assert all(p.dtype == torch.float32 for p in learner.parameters.values())
        found[made.autocast] = torch.cat([p.grad.flatten() for p in learner.parameters.values()])
        assert found[made.autocast].dtype == torch.float32
    exact, coarse = found[None], found[torch.bfloat16]
    assert torch.cosine_similarity(exact, coarse, dim=0) > 0.995
    assert 0.98 < coarse.norm() / exact.norm() < 1.02


def test_the_head_rounds_in_the_backward_as_in_the_forward():
    """Σ over the vocabulary of ∂ log p(y) / ∂ logit is 0, so the rows of the head's gradient sum to 0. With other
    logits in the backward than in the forward the probabilities would not sum to 1, nor these to 0."""
    made = rounded("llama")
    head = made.hf.get_output_embeddings().weight.requires_grad_(True)
    states = 8 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    logprobs = made.head(states, torch.arange(64), temperature=1.0, entropy=False).logprobs
    logprobs.sum().backward()
    assert float(head.grad.sum(0).abs().max()) < 0.02 * float(head.grad.abs().max())
    exact = backbone("llama").head(states, torch.arange(64), temperature=1.0, entropy=False).logprobs
    assert float((logprobs - exact).detach().abs().max()) > 1e-3, "it does round"


def test_a_reference_rounds_as_its_policy_does_and_is_kept_apart_on_disk():
    policy = Policy(backbone=rounded())
    reference = Policy(backbone=clone_frozen(policy.backbone))
    with torch.no_grad():
        assert torch.equal(policy(RAGGED).logprobs, reference(RAGGED).logprobs)
    assert exact_digest(policy) != exact_digest(Policy(backbone=backbone("llama")))


def test_adapters_are_trained_in_it():
    made = rounded("qwen2")
    add_adapter(made.hf, "policy", rank=2, alpha=4.0)
    learner = learner_of(Policy(backbone=made, adapter="policy"))
    first = learner.forward_backward(RAGGED, CrossEntropy())["loss"].value()
    learner.optim_step()
    for _ in range(15):
        last = learner.forward_backward(RAGGED, CrossEntropy())["loss"].value()
        learner.optim_step()
    assert last < 0.8 * first


def online(model, folder, name: str, **optim):
    return config(
        "rl", model, questions(folder), folder / name, algorithm="grpo", steps=2, prompts_per_step=2,
        completions_per_prompt=3, sampling={"max_new_tokens": 8}, optim={"learning_rate": 1e-3, **optim},
        reward=reward_file(folder, "return [float(len(set(c))) for c in completions]"),
    )  # fmt: skip


def test_an_online_run_in_bfloat16_agrees_with_its_sampler(tiny_model_folder, tmp_path):
    run = go(online(tiny_model_folder, tmp_path, "r", autocast="bfloat16"))
    gaps = series(run, "sampler/gap")
    assert all(1e-6 < gap < 0.02 for gap in gaps)
    assert not (run / "autocast.json").exists(), "nothing was chosen"


def test_a_sampler_that_rounds_is_corrected_by_the_learner_and_the_gap_is_told(tiny_model_folder, tmp_path):
    given = online(tiny_model_folder, tmp_path, "r")
    rounding = given.model_copy(update={"sampling": given.sampling.model_copy(update={"autocast": "bfloat16"})})
    run = go(rounding)
    assert all(1e-6 < gap < 0.02 for gap in series(run, "sampler/gap"))
    assert "autocast: bfloat16" in (run / "config.yaml").read_text()


@pytest.mark.parametrize(("gain", "chosen"), [(1.5, torch.bfloat16), (1.05, None), (0.6, None)])
def test_auto_takes_what_is_faster_here_and_says_so(gain, chosen, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "bfloat16_gain", lambda device, width: gain)
    made, said = backbone("llama"), []
    with RunFolder.create(tmp_path / "r", config_yaml="method: rl\n", method="rl", resume=False) as folder:
        parts.settle_autocast(made, OptimConfig(autocast="auto"), folder, said.append)
    name = "bfloat16" if chosen else "off"
    assert made.autocast is chosen
    assert json.loads((tmp_path / "r" / "autocast.json").read_text()) == {"autocast": name, "gain": gain}
    assert said == [f"autocast: {name}; training in bfloat16 would be {gain:.2g} times as fast as in float32 here"]


def test_the_ceiling_is_that_of_the_type_the_run_computes_in(monkeypatch):
    monkeypatch.setattr(parts, "matmul_rate", lambda device, dtype, width: (dtype, width))
    for made in (backbone("llama"), rounded()):
        assert parts.machine_ceiling(Policy(backbone=made)) == (made.autocast or torch.float32, 32)


def test_a_resumed_run_keeps_its_choice_whatever_the_probe_says_now(tiny_model_folder, tmp_path, monkeypatch):
    data = demonstrations(tmp_path)

    def made(name: str):
        return config(
            "sft", tiny_model_folder, data, tmp_path / name, prompts_per_step=2, run={"checkpoint_every": 2},
            optim={"learning_rate": 1e-3, "autocast": "auto"},
        )  # fmt: skip

    monkeypatch.setattr(parts, "bfloat16_gain", lambda device, width: 2.0)
    straight = go(made("straight"))
    with monkeypatch.context() as inside:
        kill_at(inside, 3)
        with pytest.raises(Killed):
            go(made("killed"))
    monkeypatch.setattr(parts, "bfloat16_gain", lambda device, width: 0.5)
    resumed = go(made("killed"), resume=True)
    assert same_weights(straight, resumed) and unclocked(straight) == unclocked(resumed)
    assert not same_weights(straight, go(made("other"))), "the probe did decide"


def test_it_is_refused_where_it_would_change_nothing(tiny_model_folder, tmp_path):
    with pytest.raises(ValidationError, match=r"optim.autocast=auto would be ignored.*model.dtype=bfloat16"):
        config("sft", tiny_model_folder, "d", tmp_path, optim={"autocast": "auto"}, model={"dtype": "bfloat16"})
    with pytest.raises(ValidationError, match=r"sampling.autocast=bfloat16 would be ignored.*model.dtype=bfloat16"):
        RLConfig(reward="math", data={"train": "d"}, sampling={"autocast": "bfloat16"}, model={"dtype": "bfloat16"})  # type: ignore[arg-type]


def test_the_probe_compares_the_two_types(monkeypatch):
    """On a machine whose bfloat16 steps take 2 ms and whose float32 steps take 3 ms."""
    real, enabled = torch.autocast, []
    monkeypatch.setattr(torch, "autocast", lambda *kind, **how: enabled.append(how["enabled"]) or real(*kind, **how))

    def best(device, work):
        work()
        return 0.002 if enabled[-1] else 0.003

    monkeypatch.setattr(ceiling, "_best", best)
    state = torch.random.get_rng_state()
    assert ceiling.bfloat16_gain(torch.device("cpu"), 16) == pytest.approx(1.5)
    assert sorted(enabled) == [False, True]
    assert torch.equal(torch.random.get_rng_state(), state), "a probe draws nothing from the run's generator"


def test_a_rule_over_two_sections_is_told_in_words_by_the_command_line():
    given = ["sampling.autocast=bfloat16", "model.dtype=bfloat16", "reward=math", "data.train=d"]
    with pytest.raises(UserError, match=r"sampling.autocast=bfloat16 would be ignored"):
        load("rl", [], given)
