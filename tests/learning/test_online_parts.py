"""What the online loop carries from step to step: a running mean, the KL's coefficient, a reference that follows, text
that is not to be forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from method_cases import (
    Killed,
    config,
    demonstrations,
    go,
    kill_at,
    lines,
    questions,
    reward_file,
    series,
    spied,
    write_rows,
)
from tether.advantages import MovingAverage
from tether.config.schema import MovingReferenceConfig
from tether.config.sections import LoraConfig, ModelConfig
from tether.core.batches import Batch
from tether.core.errors import UserError
from tether.core.text import Message, Prompt
from tether.data.chat import ChatTokenizer
from tether.losses import CrossEntropy
from tether.methods import rl
from tether.methods.parts import adapt, open_backbone
from tether.methods.reference import MovingReference, open_reference
from tether.methods.rl_parts import Endless
from tether.models.load import load_tokenizer
from tether.models.roles import Policy

SHARE = "return [(c.count('t') + c.count('a')) / 8 for c in completions]"


def made(model: Path, folder: Path, name: str = "r", /, **settings):
    return config(
        "rl", model, questions(folder), folder / name,
        **{"reward": reward_file(folder, SHARE), "prompts_per_step": 4, "sampling": {"max_new_tokens": 6},
           "optim": {"learning_rate": 1e-2}, "steps": 4, **settings},
    )  # fmt: skip


def test_the_running_mean_is_of_earlier_steps_and_of_what_was_optimised(tiny_model_folder, tmp_path, monkeypatch):
    seen = spied(monkeypatch)
    row = {"kl_in_reward": 0.5, "advantage": {"type": "moving_average", "decay": 0.75}}
    out = go(made(tiny_model_folder, tmp_path, algorithm="reinforce", overrides=row, completions_per_prompt=2))
    mean = None
    for number, batch in enumerate(seen):
        rows = [r for r in lines(out / "samples.jsonl") if r["step"] == number + 1]
        assert batch.ref_logprobs is not None
        kl = torch.where(batch.loss_mask, batch.old_logprobs - batch.ref_logprobs, 0.0)
        returns = torch.tensor([r["reward"] for r in rows]) - 0.5 * kl.sum(1)
        # The first token's reward to go is the return.
        assert torch.allclose(batch.advantages[:, 0], returns - (mean or 0.0), atol=1e-5)
        mean = float(returns.mean()) if mean is None else 0.75 * mean + 0.25 * float(returns.mean())
    steps = [r["values"] for r in lines(out / "metrics.jsonl")]
    assert "reward/baseline" not in steps[0] and all("reward/baseline" in row for row in steps[1:])
    assert isinstance(rl.choose_algorithm("reinforce", row).advantage, MovingAverage)


def test_the_coefficient_of_the_kl_follows_its_equation(tiny_model_folder, tmp_path, monkeypatch):
    """Ziegler 2019, section 2.2, from the logged KL; and each step's reward was taken off with that step's own."""
    seen = spied(monkeypatch)
    control = {"type": "adaptive", "target": 0.5, "horizon": 20}
    row = {"kl_in_reward": 0.2, "kl_control": control, "advantage": "rewards_to_go"}
    out = go(made(tiny_model_folder, tmp_path, algorithm="reinforce", overrides=row, completions_per_prompt=2))
    expected = 0.2
    rewards = [r["reward"] for r in lines(out / "samples.jsonl")]
    for number, (kl, used) in enumerate(zip(series(out, "kl/reference"), series(out, "kl/coefficient"), strict=True)):
        assert used == pytest.approx(expected, rel=1e-9)
        batch = seen[number]
        assert batch.ref_logprobs is not None
        penalty = torch.where(batch.loss_mask, batch.old_logprobs - batch.ref_logprobs, 0.0).sum(1)
        score = torch.tensor(rewards[number * 8 : number * 8 + 8])
        assert torch.allclose(batch.advantages[:, 0], score - used * penalty, atol=1e-5)
        expected *= 1 + max(-0.2, min(0.2, kl / 0.5 - 1)) * 8 / 20
    assert len(set(series(out, "kl/coefficient"))) == 4


def test_a_linear_coefficient_ends_where_it_should(tiny_model_folder, tmp_path):
    row = {"kl_in_reward": 0.4, "kl_control": {"type": "linear", "final": 0.0}}
    out = go(made(tiny_model_folder, tmp_path, algorithm="rloo", overrides=row, completions_per_prompt=2))
    assert series(out, "kl/coefficient") == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_the_greedy_baseline_is_what_the_model_says_where_nothing_is_drawn(tiny_model_folder, tmp_path, monkeypatch):
    """Against a plain argmax loop over the model as transformers opens it."""
    from transformers import AutoModelForCausalLM

    seen = spied(monkeypatch)
    reward = reward_file(tmp_path, "return [float(len(c)) for c in completions]", name="lengths.py")
    options = made(
        tiny_model_folder, tmp_path, algorithm="remax", overrides={"kl_in_reward": 0.0}, reward=reward, steps=1,
        completions_per_prompt=2,
    )  # fmt: skip
    out = go(options)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    chat = ChatTokenizer(load_tokenizer(str(tiny_model_folder)))
    expected, lengths = [], []
    for prompt in seen[0].prompts:
        tokens = prompt.tolist()
        while len(tokens) < len(prompt) + 6 and not (len(tokens) > len(prompt) and tokens[-1] in chat.stop_ids):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        expected += [float(len(chat.decode(tokens[len(prompt) :])))] * 2
        lengths.append(len(tokens) - len(prompt))
    scores = torch.tensor([r["reward"] for r in lines(out / "samples.jsonl")])
    assert torch.allclose(seen[0].advantages[:, 0], scores - torch.tensor(expected), atol=1e-5)
    values = lines(out / "metrics.jsonl")[0]["values"]
    assert values["reward/greedy"] == pytest.approx(sum(expected) / len(expected))
    assert values["rollout/greedy_length"] == pytest.approx(sum(lengths) / len(lengths)) and values["time/baseline"] > 0


# -- a reference that follows -----------------------------------------------------------------------------------------


def opened(model: Path, lora: bool, **settings) -> tuple[Policy, MovingReference]:
    options = ModelConfig(name=str(model), lora=LoraConfig(rank=2) if lora else None)
    backbone = open_backbone(options, print)
    policy = Policy(backbone=backbone, adapter=adapt(backbone, options.lora, "policy"))
    reference = open_reference(policy, MovingReferenceConfig(**settings), options, 512, print)
    assert isinstance(reference, MovingReference)
    return policy, reference


def some_batch(policy: Policy):
    chat = ChatTokenizer(policy.backbone.tokenizer)
    asked = Prompt(id="x", messages=(Message(role="user", content="what is this?"),))
    return Batch.from_groups([chat.group(asked, ["it is the one.", "the cat sat on the mat"], id="x")])


def moved(policy: Policy, by: float) -> None:
    """Every tensor of the policy takes a step of its own."""
    generator = torch.Generator().manual_seed(int(by * 1000))
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("lora", [False, True])
def test_an_average_of_the_policy_is_where_the_equation_says(lora, tiny_model_folder):
    policy, reference = opened(tiny_model_folder, lora, update="ema", rate=0.25)
    batch = some_batch(policy)
    assert torch.equal(reference(batch), policy(batch).logprobs)
    path = [{n: p.detach().clone() for n, p in policy.parameters().items()}]
    for step in (1, 2):
        moved(policy, 0.1 * step)
        path.append({n: p.detach().clone() for n, p in policy.parameters().items()})
        reference.follow(step)
    theirs = reference.frozen.parameters()
    assert len(theirs) == len(path[0]) and not any(p.requires_grad for p in theirs.values())
    for name, parameter in theirs.items():
        a, b, c = (at[name.replace(".reference.", ".policy.")] for at in path)
        torch.testing.assert_close(parameter, 0.75 * (0.75 * a + 0.25 * b) + 0.25 * c)
    # The policy is where it was moved to, and the two are no longer the same.
    assert all(torch.equal(p, path[-1][n]) for n, p in policy.parameters().items())
    assert not torch.allclose(reference(batch), policy(batch).logprobs, atol=1e-3)


@pytest.mark.parametrize("lora", [False, True])
def test_a_copy_every_so_many_steps_and_none_between(lora, tiny_model_folder, tmp_path):
    policy, reference = opened(tiny_model_folder, lora, update="resync", every=2)
    batch = some_batch(policy)
    start = reference(batch)
    moved(policy, 0.1)
    reference.follow(1)
    assert torch.equal(reference(batch), start)
    reference.follow(2)
    assert torch.equal(reference(batch), policy(batch).logprobs) and not torch.allclose(reference(batch), start)
    # What is saved comes back bit for bit, also into a model that was opened anew.
    reference.save(tmp_path)
    kept = reference(batch)
    moved(policy, 0.2)
    reference.follow(4)
    assert not torch.equal(reference(batch), kept)
    _, other = opened(tiny_model_folder, lora, update="resync", every=2)
    other.load(tmp_path)
    assert torch.equal(other(batch), kept)
    assert len(load_file(tmp_path / "reference.safetensors")) == len(policy.parameters())


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_against_a_policy_of_some_steps_ago(lora, tiny_model_folder, tmp_path, capsys):
    """Copied after every second step, the KL is 0 in steps 1, 3 and 5, and elsewhere it is not."""
    options = made(
        tiny_model_folder, tmp_path, algorithm="rloo", completions_per_prompt=4,
        reference={"update": "resync", "every": 2}, model={"lora": {"rank": 4}} if lora else {},
        optim={"learning_rate": 3e-2}, steps=5,
    )  # fmt: skip
    kl = series(rl.run(options), "kl/reference")
    assert [abs(k) < 1e-4 for k in kl] == [True, False, True, False, True]
    assert "follows the policy: resync every 2 steps" in capsys.readouterr().out


# -- text that is not to be forgotten ---------------------------------------------------------------------------------


def test_every_optimizer_step_takes_the_next_rows_of_the_text(tiny_model_folder, tmp_path, monkeypatch):
    from tether.backends.local.learner import LocalLearner

    calls: list = []
    real = LocalLearner.forward_backward

    def spy(self, batch, loss, weight=1.0):
        calls.append((loss, weight, [tuple(t[:n].tolist()) for t, n in zip(batch.tokens, batch.lengths, strict=True)]))
        return real(self, batch, loss, weight)

    monkeypatch.setattr(LocalLearner, "forward_backward", spy)
    text = write_rows(tmp_path / "text.jsonl", ({"text": f"the cat {'sat ' * (i + 1)}on {i}"} for i in range(5)))
    row = {"ptx_weight": 0.5, "kl_in_reward": 0.0, "minibatches": 2, "loss": "ppo_clip"}
    given = {"pretraining": {"data": text, "rows_per_update": 2}}
    out = go(made(tiny_model_folder, tmp_path, algorithm="rloo", overrides=row, steps=3, **given))
    kinds = [(type(loss).__name__, weight) for loss, weight, _ in calls]
    assert kinds == [("PPOClip", 1.0), ("CrossEntropy", 0.5)] * 6
    rows = [row for loss, _, tokens in calls if isinstance(loss, CrossEntropy) for row in tokens]
    # Twelve rows of five: two whole epochs, each row once in each, and two more.
    assert len(set(rows[:5])) == len(set(rows[5:10])) == 5 and set(rows[:5]) == set(rows[5:10])
    assert all(value > 0 for value in series(out, "ptx/nll"))


def test_the_text_is_kept_where_nothing_else_pulls(tiny_model_folder, tmp_path):
    """A reward that is always the same: the pretraining term alone moves the policy, and its loss falls."""
    same = reward_file(tmp_path, "return [1.0 for c in completions]", name="same.py")
    text = demonstrations(tmp_path)
    row = {"ptx_weight": 2.0, "kl_in_reward": 0.0}
    given = {"pretraining": {"data": text}, "reward": same, "optim": {"learning_rate": 1e-2}, "steps": 8}
    out = go(made(tiny_model_folder, tmp_path, algorithm="rloo", overrides=row, completions_per_prompt=2, **given))
    nll = series(out, "ptx/nll")
    assert nll[-1] < 0.6 * nll[0]


def test_changed_pretraining_text_is_refused_on_resume(tiny_model_folder, tmp_path, monkeypatch):
    text = Path(demonstrations(tmp_path))
    options = made(
        tiny_model_folder, tmp_path, algorithm="rloo", overrides={"ptx_weight": 0.1}, completions_per_prompt=2,
        pretraining={"data": str(text)}, run={"checkpoint_every": 1},
    )  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 2)
        go(options)
    text.write_text(text.read_text().replace("the one", "another"))
    with pytest.raises(UserError, match="data has changed since this run began"):
        go(options, resume=True)


def test_positions_of_an_endless_stream_are_its_whole_state():
    items = Endless(list("abcde"), seed=4)
    assert items(0, 12) == [Endless(list("abcde"), seed=4)(at, 1)[0] for at in range(12)]
    assert sorted(items(5, 5)) == list("abcde") and items(0, 5) != items(5, 5)


def test_a_reward_that_the_advantage_can_not_read_is_an_error_for_people(tiny_model_folder, tmp_path):
    bad = reward_file(tmp_path, "return [-1.0 for c in completions]", name="below.py")
    row = {"advantage": "maxrl", "loss": {"kl_weight": 0.0}}
    options = made(tiny_model_folder, tmp_path, algorithm="grpo", overrides=row, reward=bad, completions_per_prompt=2)
    with pytest.raises(UserError, match="grpo: MaxRL is for returns between 0"):
        go(options)
