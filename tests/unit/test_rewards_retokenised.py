"""How a reward model of another vocabulary, or one of steps, sees rollouts: prompts once, rows in their order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tether.backends.local.learner import evaluate
from tether.core.batches import Batch
from tether.core.text import Message, Prompt, Rollout
from tether.data.chat import ChatTokenizer
from tether.data.groups import share_prompts
from tether.methods import parts
from tether.models.load import load_backbone
from tether.models.reading import LAST
from tether.models.roles import Scorer, new_head

NO_VOCABULARY = SimpleNamespace(get_vocab=dict)
CAT, DOG = (Prompt(id=name, messages=(Message(role="user", content=f"the {name}?"),)) for name in ("cat", "dog"))


def rollout(prompt: Prompt, group: int, text: str) -> Rollout:
    none = torch.tensor([], dtype=torch.long)
    return Rollout(
        prompt=prompt, group=group, prompt_tokens=none, tokens=none, sampled=none.bool(), logprobs=none.float(),
        text=text, finish_reason="stop",
    )  # fmt: skip


# Groups are interleaved, and group 1 of one prompt stands beside group 2 of the same.
ROLLOUTS = [
    rollout(CAT, 0, "sat"),
    rollout(DOG, 1, "on the mat"),
    rollout(CAT, 0, "it is\n\nthe one"),
    rollout(DOG, 2, ""),
]


@pytest.mark.parametrize("separator", [None, "\n\n"])
def test_each_prompt_is_stored_once_and_rows_keep_their_order(separator, tiny_tokenizer):
    reading = SimpleNamespace(separator=separator)
    scorer: Any = SimpleNamespace(reading=reading, backbone=SimpleNamespace(tokenizer=tiny_tokenizer))
    batch = parts.rollouts_for(scorer, NO_VOCABULARY)(ROLLOUTS)
    chat = ChatTokenizer(tiny_tokenizer)
    assert len(batch.prompts) == 2 and batch.prompt_of.tolist() == [0, 1, 0, 1]
    for row, one in enumerate(ROLLOUTS):
        alone = chat.group(one.prompt, [one.text], id="")
        assert torch.equal(batch.prompts[int(batch.prompt_of[row])], alone.prompt)
        assert torch.equal(batch.tokens[row, : int(batch.lengths[row])], alone.completions[0])
    steps = [int(m.sum()) for m in batch.loss_mask]
    assert steps == ([int(n) for n in batch.lengths] if separator is None else [1, 1, 2, 1])


def test_scores_are_those_of_each_completion_by_itself(tiny_model_folder):
    backbone = load_backbone(str(tiny_model_folder), say=lambda text: None)
    scorer = Scorer(backbone=backbone, head=new_head(backbone, zero=False), reading=LAST)
    batch_of = parts.rollouts_for(scorer, NO_VOCABULARY)
    together = evaluate(scorer, batch_of(ROLLOUTS), 64).scores
    alone = [float(evaluate(scorer, batch_of([one]), 64).scores[0]) for one in ROLLOUTS]
    assert together.tolist() == pytest.approx(alone, abs=1e-5) and len(set(alone)) == 4


def test_groups_of_several_completions_are_merged_too(tiny_tokenizer):
    chat = ChatTokenizer(tiny_tokenizer)
    groups = [chat.group(p, texts, id="") for p, texts in ((CAT, ["a", "b"]), (DOG, ["c"]), (CAT, ["d"]))]
    batch, plain = share_prompts(groups), Batch.from_groups(groups)
    assert batch.prompt_of.tolist() == [0, 0, 1, 0] and torch.equal(batch.tokens, plain.tokens)
