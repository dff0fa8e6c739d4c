"""The benchmark's rivals do Tether's work: plain PPO, the plain sampler, and vLLM's arm on an engine of a few lines."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.arms import common  # noqa: E402
from benchmarks.measures import agreement  # noqa: E402
from benchmarks.works import GENERATE  # noqa: E402


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from conftest import build_model, build_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def tiny_work(kind: str, folder: str) -> dict[str, Any]:
    prompts = ["the cat sat on the mat", "what is this?"]
    completions = [[[5, 6, 7, 8]], [[30, 31, 32, 33]]]
    return {
        "kind": kind, "model": folder, "prompts": prompts, "group": 1, "new_tokens": 4, "epochs": 2,
        "completions": completions, "checked_tokens": 3,
    }  # fmt: skip


def test_plain_ppo_is_our_ppo(tiny_folder: str):
    from benchmarks.arms import plain_arm, tether_arm

    work = tiny_work("ppo", tiny_folder)
    ours, theirs = tether_arm.Online(work), plain_arm.PPO(work)
    found = agreement(ours.agree({}), theirs.agree({}), rounded=False)
    assert not found.void, found
    assert ours.facts["prompt_tokens"] == theirs.facts["prompt_tokens"]


def test_the_sampler_draws_from_the_plain_models_distribution(tiny_folder: str):
    from benchmarks.arms import plain_arm, tether_arm

    work = tiny_work("sampling", tiny_folder)
    drawn = tether_arm.Sampling(work).agree({})
    assert [len(row) for row in drawn["tokens"]] == [3, 3]
    assert not agreement(drawn, plain_arm.Sampling(work).agree(drawn), rounded=GENERATE.rounded).void


class FakeVLLM:
    """An engine with vLLM's manners: log-probs of every prompt token but the first, each among candidates."""

    def __init__(self, model: str, max_model_len: int, **options: Any) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.options, self.longest, self.asked, self.resets = options, max_model_len, [], 0

    def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return True

    @torch.no_grad()
    def generate(self, prompts: Any, params: Any, use_tqdm: bool) -> list[Any]:
        self.asked.append(params)
        assert all(len(p["prompt_token_ids"]) + params.max_tokens <= self.longest for p in prompts)
        return [self.answer(p["prompt_token_ids"], params) for p in prompts]

    def answer(self, ids: list[int], params: Any) -> Any:
        logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        scored = [{t: SimpleNamespace(logprob=float(logprobs[i, t])), 0: SimpleNamespace(logprob=1.0)}
                  if t else {t: SimpleNamespace(logprob=float(logprobs[i, t]))}
                  for i, t in enumerate(ids[1:])]  # fmt: skip
        drawn = [SimpleNamespace(token_ids=[0] * params.max_tokens) for _ in range(getattr(params, "n", 1))]
        return SimpleNamespace(prompt_logprobs=[None, *scored], outputs=drawn)


def test_vllm_scores_the_tokens_that_were_drawn_and_never_finds_an_old_prompt(
    tiny_folder: str, monkeypatch: pytest.MonkeyPatch
):
    from benchmarks.arms import plain_arm, vllm_arm

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=FakeVLLM, SamplingParams=SimpleNamespace))
    work = {**tiny_work("sampling", tiny_folder), "group": 2}
    drawn = {"tokens": [[5, 6, 7], [8, 9, 10], [11, 12, 13], [14, 15, 16]]}
    theirs = vllm_arm.Sampling(work)
    plain = plain_arm.Sampling(work)
    assert not agreement(plain.agree(drawn), theirs.agree(drawn), rounded=False).void
    assert theirs.facts["prompt_tokens"] == plain.facts["prompt_tokens"]
    engine: Any = theirs.engine
    assert engine.options["dtype"] == "float32" and engine.resets == 0

    class Three(common.Conversation):
        def __init__(self) -> None:
            self.resets: list[int] = []

        def begin_step(self) -> None:
            self.resets.append(engine.resets)
            if len(self.resets) > 3:
                raise common.Closed

        def end_step(self, **more: Any) -> None:
            assert more == {"drawn": 4.0} and engine.resets == len(self.resets)

    with pytest.raises(common.Closed):
        theirs.steps(Three())
    steps = engine.asked[1:]
    # The two completions of a prompt have the seed and the one after it: no step repeats one.
    assert [(p.n, p.seed, p.max_tokens, p.ignore_eos) for p in steps] == [(2, 2 * i, 4, True) for i in range(3)]
    assert not any(p.detokenize for p in engine.asked)
