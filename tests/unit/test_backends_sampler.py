"""The sampler: what it reports is what the policy says; a draw depends on (seed, prompt, index) and weights alone."""

from dataclasses import replace

import pytest
import torch

from draw_cases import PROMPTS, Letters, nucleus
from model_cases import FAMILIES, UNPACKABLE, backbone, plain_twin
from tether.backends.local import cache
from tether.backends.local.draw import uniforms
from tether.backends.local.sampler import LocalSampler
from tether.core.batches import rollout_batch
from tether.core.errors import UserError
from tether.core.protocols import SamplingSettings
from tether.core.text import Prompt, Rollout
from tether.data.chat import ChatTokenizer
from tether.models import decoding
from tether.models.adapters import adapter_parameters, add_adapter
from tether.models.backbone import Backbone
from tether.models.roles import Policy

LONG = SamplingSettings(max_new_tokens=14)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are packed, and caches grow, for completions as short as these, too."""
    monkeypatch.setattr(decoding, "PACKING_PAYS", 2)
    monkeypatch.setattr(cache, "FIRST_ROOM", 3)


def sampler(policy: Policy | None = None, *stop_ids: int, width: int = 64) -> LocalSampler:
    policy = policy or Policy(backbone=backbone("llama"))
    return LocalSampler(policy=policy, chat=Letters(*stop_ids), width=width)  # type: ignore[arg-type]


def same(left: list[Rollout], right: list[Rollout]) -> None:
    key = {(r.prompt.id, i): r for rs in _groups(right) for i, r in enumerate(rs)}
    seen = 0
    for rollouts in _groups(left):
        for i, rollout in enumerate(rollouts):
            other = key[rollout.prompt.id, i]
            assert rollout.tokens.tolist() == other.tokens.tolist()
            torch.testing.assert_close(rollout.logprobs, other.logprobs, atol=1e-4, rtol=1e-4)
            assert (rollout.text, rollout.finish_reason) == (other.text, other.finish_reason)
            seen += 1
    assert seen


def _groups(rollouts: list[Rollout]) -> list[list[Rollout]]:
    found: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        found.setdefault(rollout.group, []).append(rollout)
    return list(found.values())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("family", "mode"),
    [(f, "packed") for f in FAMILIES] + [(f, "padded") for f in ("llama", "mistral_window", "gemma2", *UNPACKABLE)],
)
def test_its_log_probs_are_the_policys(family: str, mode: str, temperature: float):
    """Up to 14 new tokens after up to 15: beyond every window of 5, in prompts and in completions."""
    policy = Policy(backbone=backbone(family, mode), temperature=temperature)
    settings = replace(LONG, temperature=temperature)
    rollouts = sampler(policy, 7, 8, 9, width=5).sample(PROMPTS, n=3, settings=settings, seed=1)
    with torch.no_grad():
        scored = policy(rollout_batch(rollouts)).logprobs
    for rollout, row in zip(rollouts, scored, strict=True):
        torch.testing.assert_close(rollout.logprobs, row[: len(rollout.tokens)], atol=2e-4, rtol=2e-4)
    assert max(len(r.tokens) for r in rollouts) > 8


@torch.no_grad()
def test_its_draws_are_those_of_a_loop_over_plain_transformers():
    """One completion at a time, the whole text run again for every token."""
    policy = Policy(backbone=backbone("gemma2"))
    plain, chat = plain_twin(policy.backbone.hf), Letters(7)
    rollouts = sampler(policy, 7, width=3).sample(PROMPTS[:3], n=2, settings=LONG, seed=5)
    for rollouts_of_prompt in _groups(rollouts):
        for index, rollout in enumerate(rollouts_of_prompt):
            ids, u = chat.prompt(rollout.prompt), uniforms(5, rollout.prompt.id, index, 14)
            for t in range(14):
                probs = plain(input_ids=ids[None]).logits[0, -1].softmax(-1)
                token = int((probs.cumsum(0) > u[t]).nonzero()[0])
                ids = torch.cat([ids, torch.tensor([token])])
                if token == 7:
                    break
            assert rollout.tokens.tolist() == ids[len(rollout.prompt_tokens) :].tolist()


@pytest.mark.parametrize(
    "family", ["llama", "qwen3_rope_yarn", "gemma2", "gemma3", "phi", "olmo3", "gpt2", "deepseek_v3"]
)
def test_width_and_order_change_no_draw(family: str):
    policy = Policy(backbone=backbone(family))
    whole = sampler(policy, 7, 8).sample(PROMPTS, n=4, settings=LONG, seed=2)
    for width in (1, 3, 8):
        mixed = PROMPTS[width % 5 :] + PROMPTS[: width % 5]
        same(sampler(policy, 7, 8, width=width).sample(mixed, n=4, settings=LONG, seed=2), whole)


def test_a_draw_does_not_depend_on_what_shares_the_batch():
    policy = Policy(backbone=backbone("mistral_window"))
    whole = sampler(policy, 7, 8).sample(PROMPTS, n=4, settings=LONG, seed=2)
    for width in (1, 3, 7, 8):
        same(sampler(policy, 7, 8, width=width).sample(PROMPTS, n=4, settings=LONG, seed=2), whole)
    same(sampler(policy, 7, 8, width=6).sample(PROMPTS[::-1], n=4, settings=LONG, seed=2), whole)
    same(sampler(policy, 7, 8).sample(PROMPTS[1:2], n=4, settings=LONG, seed=2), whole)
    same(sampler(policy, 7, 8).sample(PROMPTS, n=2, settings=LONG, seed=2), whole)
    padded = Policy(backbone=backbone("mistral_window", "padded"))
    same(sampler(padded, 7, 8, width=3).sample(PROMPTS, n=4, settings=LONG, seed=2), whole)
    other = sampler(policy, 7, 8).sample(PROMPTS, n=4, settings=LONG, seed=3)
    assert [r.tokens.tolist() for r in other] != [r.tokens.tolist() for r in whole]
    assert len({tuple(r.tokens.tolist()) for r in whole}) > 15


@pytest.mark.parametrize(("width", "passes"), [(64, 1), (4, 1), (1, 12)])
def test_a_prompt_is_computed_once_while_completions_of_it_go_on(width: int, passes: int, monkeypatch):
    """Twelve rows of one prompt, four at a time: the later ones find what the first have left. One at a time, nobody
    is left to hold it."""
    computed, real = [], Backbone.prefill

    def prefill(self, layout, ids, positions):
        computed.extend(layout.lengths)
        return real(self, layout, ids, positions)

    monkeypatch.setattr(Backbone, "prefill", prefill)
    stops = range(3, 20)  # enough of them for rows to end at different times
    rollouts = sampler(None, *stops, width=width).sample(PROMPTS[1:2], n=12, settings=LONG, seed=1)
    assert len(rollouts) == 12 and computed == [len("a longer prompt")] * passes


def test_what_a_rollout_holds():
    rollouts = sampler(None, 7, 8, 9).sample(PROMPTS, n=3, settings=LONG, seed=0)
    assert [r.group for r in rollouts] == [g for g in range(5) for _ in range(3)]
    for rollout in rollouts:
        assert rollout.prompt is PROMPTS[rollout.group]
        assert rollout.tokens.dtype == torch.int64 and rollout.logprobs.dtype == torch.float32
        assert rollout.sampled.all() and len(rollout.sampled) == len(rollout.tokens) == len(rollout.logprobs)
        assert torch.equal(rollout.prompt_tokens, Letters().prompt(rollout.prompt))
        stopped = rollout.tokens[-1].item() in (7, 8, 9)
        assert rollout.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(rollout.tokens) == 14
        assert not set(rollout.tokens[:-1].tolist()) & {7, 8, 9}
        assert len(rollout.text) == len(rollout.tokens) - stopped
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_the_first_token_may_be_the_last(mode: str):
    policy = Policy(backbone=backbone("llama", mode))
    for width in (1, 4):
        one = sampler(policy, width=width).sample(PROMPTS, n=3, settings=SamplingSettings(max_new_tokens=1), seed=0)
        assert [len(r.tokens) for r in one] == [1] * 15 and {r.finish_reason for r in one} == {"length"}
        all_stop = sampler(policy, *range(96), width=width).sample(PROMPTS, n=3, settings=LONG, seed=0)
        assert [r.tokens.tolist() for r in all_stop] == [r.tokens.tolist() for r in one]
        assert {r.finish_reason for r in all_stop} == {"stop"} and {r.text for r in all_stop} == {""}


def test_a_stop_string_cuts_the_text_and_keeps_the_tokens():
    policy = Policy(backbone=backbone("llama"))
    free = sampler(policy).sample(PROMPTS, n=2, settings=LONG, seed=4)
    stops = (free[0].text[3:6], free[3].text[:2], free[4].text[9:12])
    rollouts = sampler(policy).sample(PROMPTS, n=2, settings=replace(LONG, stop=stops), seed=4)
    cut = 0
    for rollout, whole in zip(rollouts, free, strict=True):
        found = [(whole.text.find(s), s) for s in stops if s in whole.text]
        if not found:
            assert rollout.tokens.tolist() == whole.tokens.tolist() and rollout.finish_reason == "length"
            continue
        cut += 1
        start, stop = min(found, key=lambda f: f[0] + len(f[1]))
        assert rollout.finish_reason == "stop" and rollout.text == whole.text[:start]
        assert rollout.tokens.tolist() == whole.tokens[: start + len(stop)].tolist()
    assert cut >= 3


def test_a_stop_string_of_many_bytes_is_found(tiny_tokenizer):
    """Three signs of four bytes each are twelve tokens of this tokenizer, more than the string's length."""
    chat = ChatTokenizer(tiny_tokenizer)
    row = type("R", (), {"tokens": tiny_tokenizer("ab 🙂🙃🙂", add_special_tokens=False).input_ids})()
    lonely = LocalSampler(policy=Policy(backbone=backbone("llama")), chat=chat)
    assert lonely._stopped(row, ("🙂🙃🙂",)) == "ab "
    assert lonely._stopped(row, ("🙃🙃",)) is None


@pytest.mark.parametrize(("top_p", "top_k"), [(0.6, 0), (1.0, 3), (0.8, 20)])
@pytest.mark.parametrize("family", ["gemma2", "cohere2", "phi"])
@torch.no_grad()
def test_log_probs_of_a_cut_distribution(family: str, top_p: float, top_k: int):
    """Temperature, then top-k, then top-p of the model's own logits, one text at a time."""
    policy = Policy(backbone=backbone(family), temperature=1.3)
    plain = plain_twin(policy.backbone.hf)
    settings = replace(LONG, temperature=1.3, top_p=top_p, top_k=top_k)
    for rollout in sampler(policy, 7, width=3).sample(PROMPTS, n=2, settings=settings, seed=6):
        table = plain(input_ids=torch.cat([rollout.prompt_tokens, rollout.tokens])[None]).logits[0].double() / 1.3
        for t, token in enumerate(rollout.tokens.tolist()):
            probs = nucleus(table[len(rollout.prompt_tokens) - 1 + t].softmax(-1).tolist(), top_p, top_k)
            assert float(rollout.logprobs[t].exp()) == pytest.approx(probs[token], rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_greedy_is_what_transformers_generates_and_its_log_prob_zero(family: str):
    policy = Policy(backbone=backbone(family))
    rollouts = sampler(policy, 7, 8, 9).sample(PROMPTS, n=2, settings=replace(LONG, temperature=0.0), seed=0)
    plain = plain_twin(policy.backbone.hf)
    for first, second in zip(rollouts[::2], rollouts[1::2], strict=True):
        theirs = plain.generate(
            first.prompt_tokens[None], do_sample=False, max_new_tokens=14, eos_token_id=[7, 8, 9], pad_token_id=0
        )
        expected = theirs[0, len(first.prompt_tokens) :].tolist()
        assert first.tokens.tolist() == second.tokens.tolist() == expected
        assert not first.logprobs.any()


def test_a_prompt_that_fills_the_context_is_refused_and_a_long_one_is_cut_short():
    room = Prompt(id="long", text="x" * 124)
    (rollout,) = sampler().sample([room], n=1, settings=LONG, seed=0)
    assert len(rollout.tokens) == 128 - 124 and rollout.finish_reason == "length"
    with pytest.raises(UserError, match=r"full: 128 tokens(.|\n)*128\n(.|\n)*data.max_prompt_tokens"):
        sampler().sample([PROMPTS[0], Prompt(id="full", text="x" * 128)], n=1, settings=LONG, seed=0)


@pytest.mark.parametrize("family", ["llama_rope_dynamic", "phi3_longrope"])
def test_frequencies_that_change_with_length_end_the_context(family: str):
    """Both begin to change beyond 32 tokens; to there, the sampler's numbers are the policy's."""
    policy = Policy(backbone=backbone(family))
    prompts = [Prompt(id="a", text="x" * 25), PROMPTS[0]]
    long = replace(LONG, max_new_tokens=40)
    rollouts = sampler(policy).sample(prompts, n=1, settings=long, seed=0)
    assert [len(r.prompt_tokens) + len(r.tokens) for r in rollouts] == [32, 32]
    with torch.no_grad():
        scored = policy(rollout_batch(rollouts)).logprobs
    for rollout, row in zip(rollouts, scored, strict=True):
        torch.testing.assert_close(rollout.logprobs, row[: len(rollout.tokens)], atol=2e-4, rtol=2e-4)
    with pytest.raises(UserError, match=r"32 tokens(.|\n)*of 32"):
        sampler(policy).sample([Prompt(id="full", text="x" * 32)], n=1, settings=LONG, seed=0)


def test_nothing_asked_nothing_drawn():
    assert sampler().sample([], n=3, settings=LONG, seed=0) == []


def test_the_adapter_and_live_weights_are_sampled():
    ours = backbone("qwen2")
    add_adapter(ours.hf, "policy", rank=2, alpha=4.0)
    policy = Policy(backbone=ours, adapter="policy")
    bare, live = sampler(Policy(backbone=ours)), sampler(policy)
    before = bare.sample(PROMPTS, n=2, settings=LONG, seed=0)
    same(live.sample(PROMPTS, n=2, settings=LONG, seed=0), before)
    parameters = list(adapter_parameters(ours.hf, "policy").values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for _ in range(2):  # the first step moves B alone, whose start is zero
        optimizer.zero_grad()
        policy(rollout_batch(before)).logprobs.mean().backward()
        optimizer.step()
    after = live.sample(PROMPTS, n=2, settings=LONG, seed=0)
    with torch.no_grad():
        scored = policy(rollout_batch(after)).logprobs
    for rollout, row in zip(after, scored, strict=True):
        torch.testing.assert_close(rollout.logprobs, row[: len(rollout.tokens)], atol=2e-4, rtol=2e-4)
    assert [r.tokens.tolist() for r in after] != [r.tokens.tolist() for r in before]
    same(bare.sample(PROMPTS, n=2, settings=LONG, seed=0), before)


@pytest.mark.parametrize(
    ("family", "dtype", "target"),
    [
        ("gpt2", torch.float32, "c_attn"),
        ("qwen2", torch.bfloat16, "q_proj"),
        ("phi", torch.float32, "lm_head"),
        ("phi", torch.bfloat16, "lm_head"),
    ],
)
@torch.no_grad()
def test_an_adapter_is_sampled_from_however_its_layer_is_computed(family: str, dtype: torch.dtype, target: str):
    """Enough tokens for weights to be packed, on layers that can be and layers that can't."""
    ours = backbone(family)
    ours.hf.to(dtype)
    add_adapter(ours.hf, "policy", rank=2, alpha=4.0, targets=(target,))
    for i, parameter in enumerate(adapter_parameters(ours.hf, "policy").values()):
        parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    rollouts = sampler(policy := Policy(backbone=ours, adapter="policy")).sample(
        PROMPTS, n=2, settings=replace(LONG, max_new_tokens=20), seed=0
    )
    gaps = [torch.zeros(0), torch.zeros(0)]
    for i, adapter in enumerate(("policy", None)):
        scored = replace(policy, adapter=adapter)(rollout_batch(rollouts)).logprobs
        rows = zip(rollouts, scored, strict=True)
        gaps[i] = torch.cat([(r.logprobs - row[: len(r.tokens)]).abs() for r, row in rows])
    assert float(gaps[0].mean()) < (1e-4 if dtype == torch.float32 else 0.05) < 0.1 < float(gaps[1].mean())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
@torch.no_grad()
def test_weights_rounded_to_bfloat16_draw_what_the_policy_says_within_rounding(family: str):
    """Written out, through the network's own layers, and where nothing is packed; then as before."""
    live = sampler(policy := Policy(backbone=backbone(family)))
    exact = live.sample(PROMPTS, n=4, settings=LONG, seed=0)
    rounded = live.sample(PROMPTS, n=4, settings=replace(LONG, autocast="bfloat16"), seed=0)
    scored = policy(rollout_batch(rounded)).logprobs
    gaps = torch.cat([(r.logprobs - row[: len(r.tokens)]).abs() for r, row in zip(rounded, scored, strict=True)])
    assert 1e-5 < float(gaps.mean()) < 0.02
    assert float(gaps.max()) < 0.2
    same(live.sample(PROMPTS, n=4, settings=LONG, seed=0), exact)
