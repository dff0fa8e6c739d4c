"""The demo's own parts besides its judge: how answers become scores, pairs and win rates."""

import torch

from tether.core.batches import Batch
from tether.core.text import Rollout
from tether.methods.demo.measure import Measured, measure, outcomes
from tether.methods.demo.world import GoldReward, asked, draw_pairs, questions


def rollout(group: int, text: str, tokens: list[int], finish: str = "stop", logprob: float = -1.0) -> Rollout:
    ids = torch.tensor(tokens)
    return Rollout(
        prompt=asked(f"q{group}", f"question {group}"),
        group=group,
        prompt_tokens=torch.tensor([group + 1, 1]),
        tokens=ids,
        sampled=torch.ones(len(ids), dtype=torch.bool),
        logprobs=torch.full((len(ids),), logprob),
        text=text,
        finish_reason=finish,
    )


def per_prompt(batch: Batch) -> torch.Tensor:
    """Log-probs that tell which prompt a row was scored under, with rubbish on the padding."""
    first = torch.stack([p[0] for p in batch.prompts])[batch.prompt_of].float()
    rows = -first[:, None].expand(batch.tokens.shape)
    return torch.where(batch.present, rows, float("nan"))


def test_splits_share_no_question():
    train, held_out = questions("train"), questions("heldout")
    assert len(train) >= 200 and len(held_out) >= 64
    assert not {p.question for p in train} & {p.question for p in held_out}


def test_gold_hands_the_judge_sums_under_both_prompts():
    seen = []

    class Judge:
        def score(self, **facts: object) -> object:
            seen.append(facts)
            return type("Score", (), {"total": 1.0, "style": 0.0, "fluency": 0.0, "relevance": 1.0})

    gold = GoldReward(judge=Judge(), logprobs=per_prompt, generic=torch.tensor([9]))  # type: ignore[arg-type]
    gold([rollout(0, "a", [5, 6, 7]), rollout(2, "b", [5, 6], finish="length")])
    assert [s["logprob_given_question"] for s in seen] == [-3.0, -6.0]
    assert [s["logprob_given_generic"] for s in seen] == [-27.0, -18.0]
    assert [s["tokens"] for s in seen] == [3, 2]
    assert [s["finished"] for s in seen] == [True, False]


def test_pairs_are_best_against_worst_and_equal_answers_are_left_out():
    rollouts = [rollout(0, t, [i]) for i, t in enumerate("abcd")] + [rollout(1, "same", [8]), rollout(1, "same", [8])]
    # Gaps far above the noise, so that the ranking is the gold order.
    pairs = draw_pairs(rollouts, [0.0, 100.0, 50.0, -100.0, 1.0, 2.0], seed=0)
    assert [[int(c[0]) for c in p.completions] for p in pairs] == [[1, 3], [2, 0]]
    assert [p.id for p in pairs] == ["q0:0", "q0:1"]


def test_every_answer_meets_every_start_answer_of_its_question():
    def side(name: str, gold: list[float], n: int) -> Measured:
        rows = [rollout(i // n, str(i), [1] * (i + 1)) for i in range(len(gold))]
        zeros = torch.zeros(len(gold))
        return Measured(name=name, rollouts=rows, gold=torch.tensor(gold), proxy=zeros, kl=zeros, per_question=n)

    asked_of = [asked("q0", "question 0"), asked("q1", "question 1")]
    wins, gaps, of = outcomes(side("ours", [1.0, 5.0], 1), side("start", [0.0, 1.0, 9.0, 4.0], 2), asked_of)
    assert wins.tolist() == [1.0, 0.5, 0.0, 1.0]
    assert of == ["q0", "q0", "q1", "q1"]
    assert gaps.tolist() == [0.0, -1.0, -1.0, -2.0]


def test_kl_is_sampler_minus_start_over_the_tokens_present():
    rollouts = [rollout(0, "a", [5, 6, 7], logprob=-0.5), rollout(1, "b", [5], logprob=-0.5)]

    def reward(rows: object) -> object:
        return type("Scores", (), {"total": torch.zeros(2)})

    found = measure("PPO", rollouts, 1, gold=reward, proxy=reward, start_logprobs=per_prompt)  # type: ignore[arg-type]
    assert found.kl.tolist() == [-1.5 + 3.0, -0.5 + 2.0]
