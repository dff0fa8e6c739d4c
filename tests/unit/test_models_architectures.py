"""One answer for every layout: packed == padded == one row at a time through plain transformers, family by family."""

import pytest
import torch
import transformers as hf

from model_cases import FAMILIES, RAGGED, SMALL, UNPACKABLE, backbone, build, one_by_one, plain_twin, random_batch
from tether.core.batches import pad_rows
from tether.core.errors import UserError
from tether.models.backbone import Backbone
from tether.models.roles import Policy, Scorer, new_head

CLOSE = {"atol": 5e-5, "rtol": 5e-5}


def silent(text: str) -> None:
    raise AssertionError(f"nothing to say, but said: {text}")


@pytest.mark.parametrize("mode", ["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_is_that_of_one_row_alone(family: str, mode: str):
    ours = backbone(family, mode)
    truth = one_by_one(plain_twin(ours.hf), RAGGED, temperature=0.8)
    head = new_head(ours, zero=False)

    outputs = Policy(backbone=ours, temperature=0.8)(RAGGED, entropy=True)
    torch.testing.assert_close(outputs.logprobs, pad_rows(truth.logprobs).float(), **CLOSE)
    torch.testing.assert_close(outputs.entropy, pad_rows(truth.entropy).float(), **CLOSE)
    scored = Scorer(backbone=ours, head=head)(RAGGED)
    torch.testing.assert_close(scored.scores, torch.cat([head(s) for s in truth.last]), **CLOSE)
    torch.testing.assert_close(scored.values, pad_rows([head(s).squeeze(-1) for s in truth.states]), **CLOSE)
    assert outputs.logprobs.shape == RAGGED.tokens.shape


@pytest.mark.parametrize(
    "family", ["gpt2", "deepseek_v3", "cohere2", "granite", "phi", "phi3_longrope", "llama_rope_dynamic"]
)
def test_packed_gradients_are_those_of_one_row_alone(family: str):
    ours = backbone(family)
    twin = plain_twin(ours.hf).requires_grad_(True)
    ours.hf.requires_grad_(True)
    weights = torch.randn(RAGGED.tokens.shape, generator=torch.Generator().manual_seed(1))
    outputs = Policy(backbone=ours)(RAGGED, entropy=True)
    ((outputs.logprobs + 0.3 * outputs.entropy) * weights).sum().backward()
    truth = one_by_one(twin, RAGGED)
    ((pad_rows(truth.logprobs) + 0.3 * pad_rows(truth.entropy)) * weights).sum().backward()
    for (name, mine), theirs in zip(ours.hf.named_parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None and float(theirs.grad.abs().max()) >= 0, name
        scale = float(theirs.grad.abs().max()) + 1e-3
        torch.testing.assert_close(mine.grad / scale, theirs.grad / scale, atol=2e-4, rtol=0, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_self_test_keeps_these_packed(family: str):
    ours = Backbone(hf=build(family), tokenizer=None, name=family)
    ours.self_test(silent)
    assert ours.mode == "packed" and not ours.notes


@pytest.mark.parametrize("family", UNPACKABLE)
def test_self_test_falls_back_says_so_once_and_the_numbers_are_right(family: str):
    ours, said = Backbone(hf=build(family), tokenizer=None, name=family), []
    truth = one_by_one(plain_twin(ours.hf), RAGGED)
    ours.self_test(said.append)
    assert ours.mode == "padded" and said == ours.notes and len(said) == 1
    assert family in said[0] and "padded" in said[0] and "\n" not in said[0]
    outputs = Policy(backbone=ours)(RAGGED)
    torch.testing.assert_close(outputs.logprobs, pad_rows(truth.logprobs).float(), **CLOSE)


@pytest.mark.parametrize("mode", ["packed", "padded"])
@pytest.mark.parametrize("family", ["llama_rope_dynamic", "phi3_longrope"])
def test_text_beyond_which_frequencies_change_is_refused(family: str, mode: str):
    """A long row would change the numbers of the short ones beside it."""
    ours = Policy(backbone=backbone(family, mode))
    assert ours(random_batch((20, 3), [(0, 12), (1, 4)])).logprobs is not None
    with pytest.raises(UserError, match=rf"{family}: .* 33 tokens; beyond 32(.|\n)*data.max_prompt_tokens"):
        ours(random_batch((20, 3), [(0, 13), (1, 4)]))


def test_a_window_that_the_attention_does_not_hear_of_shows_however_wide_it_is():
    """This family builds its windows into the mask alone; no probe is as long as such a window."""
    config = hf.PhimoeConfig(**SMALL, sliding_window=100, num_local_experts=2, num_experts_per_tok=1)
    ours, said = Backbone(hf=hf.AutoModelForCausalLM.from_config(config), tokenizer=None, name="phimoe"), []
    ours.self_test(said.append)
    assert ours.mode == "padded" and len(said) == 1 and ours.config.sliding_window == 100


def test_gradients_of_short_rows_beside_long_ones_in_a_window():
    """Padding further than the window from the text sees nothing; that must not make gradients of NaN."""
    model = build("mistral_window").double().requires_grad_(True)
    model.set_attn_implementation("eager")  # whose softmax is float32, where the mask's smallest float64 is -inf
    ours = Backbone(hf=model, tokenizer=None, name="mistral", mode="padded")
    Policy(backbone=ours)(random_batch((2,), [(0, 1), (0, 30)])).logprobs.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_a_completion_without_tokens_is_scored_at_its_prompt():
    ours = backbone("llama")
    batch = random_batch((3, 5), [(0, 0), (1, 0)])
    scorer = Scorer(backbone=ours, head=new_head(ours, zero=False))
    truth = one_by_one(plain_twin(ours.hf), batch)
    torch.testing.assert_close(scorer(batch).scores, torch.cat([scorer.head(s) for s in truth.last]), **CLOSE)
    assert Policy(backbone=ours)(batch).logprobs.shape == (2, 0)


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="zero tokens"):
        Policy(backbone=backbone("llama"))(random_batch((0,), [(0, 3)]))


@pytest.mark.parametrize("name", ["logit_scale", "softcap"])
def test_a_head_we_do_not_know_is_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    ours = backbone("llama")
    monkeypatch.setattr(Backbone, name, {"logit_scale": 1.001, "softcap": 30.0}[name])
    with pytest.raises(UserError, match="output head"):
        ours.self_test(silent)
