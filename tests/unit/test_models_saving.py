"""What we save, plain transformers opens with the same numbers; what it saves, we open."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from model_cases import RAGGED, UNPACKABLE, backbone, build, one_by_one
from tether.core.batches import pad_rows
from tether.core.errors import UserError
from tether.models.adapters import adapter_parameters, add_adapter
from tether.models.backbone import Backbone
from tether.models.load import check_can_be_saved, load_backbone, load_scorer, save_policy, save_scorer
from tether.models.reading import Reading
from tether.models.roles import Policy, Scorer, new_head

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def prepared(family: str, tokenizer, lora: bool) -> tuple[Backbone, str | None]:
    ours = backbone(family)
    ours.tokenizer = tokenizer
    if not lora:
        return ours, None
    add_adapter(ours.hf, "mine", rank=2, alpha=4.0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter_parameters(ours.hf, "mine").values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return ours, "mine"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2"])
@torch.no_grad()
def test_a_policy_reopened_by_transformers(family: str, lora: bool, tiny_tokenizer, tmp_path: Path):
    ours, adapter = prepared(family, tiny_tokenizer, lora)
    policy = Policy(backbone=ours, adapter=adapter)
    before = policy(RAGGED).logprobs
    save_policy(policy, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.testing.assert_close(pad_rows(one_by_one(plain, RAGGED).logprobs).float(), before, **CLOSE)
    assert not any("lora" in n or "base_layer" in n for n in plain.state_dict())
    assert torch.equal(policy(RAGGED).logprobs, before), "saving changed the model"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("the cat").input_ids == tiny_tokenizer("the cat").input_ids
    assert tokenizer.chat_template == tiny_tokenizer.chat_template


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@torch.no_grad()
def test_a_scorer_reopened_by_transformers_and_by_us(lora: bool, tiny_tokenizer, tmp_path: Path):
    ours, adapter = prepared("llama_tied", tiny_tokenizer, lora)
    scorer = Scorer(backbone=ours, head=new_head(ours, zero=False), adapter=adapter)
    before = scorer(RAGGED)
    save_scorer(scorer, tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    rows = [
        torch.cat([RAGGED.prompts[p], RAGGED.tokens[i, :n]])
        for i, (p, n) in enumerate(zip(RAGGED.prompt_of.tolist(), RAGGED.lengths.tolist(), strict=True))
    ]
    alone = torch.cat([plain(input_ids=row[None]).logits[0] for row in rows])
    torch.testing.assert_close(alone, before.scores, **CLOSE)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=plain.config.pad_token_id)
    mask = pad_rows([torch.ones(len(r), dtype=torch.long) for r in rows])
    torch.testing.assert_close(plain(input_ids=ids, attention_mask=mask).logits[:, 0], before.scores, **CLOSE)

    said: list[str] = []
    again = load_scorer(str(tmp_path), device="cpu", say=said.append)
    assert again.backbone.mode == "packed" and not said
    torch.testing.assert_close(again(RAGGED).scores, before.scores, **CLOSE)
    torch.testing.assert_close(again(RAGGED).values, before.values, **CLOSE)
    save_scorer(again, tmp_path / "again")
    torch.testing.assert_close(load_scorer(str(tmp_path / "again"), device="cpu")(RAGGED).scores, before.scores)


READINGS = {
    "mean": Reading(kind="mean"),
    "outcome": Reading(kind="outcome"),
    "process": Reading(kind="process", aggregate="product", separator="\n\n"),
}


def token_scorer(reading: Reading, tokenizer, lora: bool) -> Scorer:
    ours, adapter = prepared("llama_tied", tokenizer, lora)
    head = new_head(ours, zero=False, bias=reading.has_bias)
    if reading.has_bias:
        head.bias.fill_(0.7)
    return Scorer(backbone=ours, head=head, adapter=adapter, reading=reading)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", READINGS)
@torch.no_grad()
def test_a_token_scorer_reopened_by_transformers_and_by_us(name: str, lora: bool, tiny_tokenizer, tmp_path: Path):
    scorer = token_scorer(READINGS[name], tiny_tokenizer, lora)
    ends = RAGGED.present & (RAGGED.tokens % 2 == 0)
    batch = replace(RAGGED, loss_mask=ends)
    before = scorer(batch)
    save_scorer(scorer, tmp_path)
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    assert plain.config.num_labels == 1 and plain.config.tether_reading["kind"] == name
    for i, (p, n) in enumerate(zip(batch.prompt_of.tolist(), batch.lengths.tolist(), strict=True)):
        row = torch.cat([batch.prompts[p], batch.tokens[i, :n]])
        logits = plain(input_ids=row[None]).logits[0, :, 0]
        mine = logits[len(row) - n :]
        torch.testing.assert_close(before.token_scores[i, :n], mine, **CLOSE)
        match name:
            case "mean":
                expected = mine.mean() if n else logits[-1]
            case "outcome":
                expected = logits[-1].sigmoid()
            case _:
                steps = mine[ends[i, :n]].sigmoid()
                expected = steps.prod() if len(steps) else torch.tensor(torch.nan)
        torch.testing.assert_close(before.scores[i], expected, **CLOSE, equal_nan=True)

    again = load_scorer(str(tmp_path), device="cpu", say=pytest.fail)
    assert again.reading == scorer.reading and again.backbone.mode == "packed"
    torch.testing.assert_close(again(batch).scores, before.scores, **CLOSE, equal_nan=True)
    save_scorer(Scorer(backbone=again.backbone, head=new_head(again.backbone, zero=False)), tmp_path / "plain")
    assert load_scorer(str(tmp_path / "plain"), device="cpu").reading == Reading()


@torch.no_grad()
def test_a_token_classifier_of_others_is_asked_how_it_is_read(tiny_tokenizer, tmp_path: Path):
    save_scorer(token_scorer(READINGS["outcome"], tiny_tokenizer, False), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("tether_reading", "something_else"))
    with pytest.raises(UserError, match=r"config\.json does not say how its numbers make a score"):
        load_scorer(str(tmp_path), device="cpu")


def test_what_could_not_be_saved_is_said_before_training():
    for family, reading, fits in (
        ("llama", Reading(), True),
        ("gpt2", Reading(), True),
        ("gemma2", Reading(kind="mean"), True),
        ("gpt2", Reading(kind="outcome"), False),  # its head for tokens has another name
        ("cohere2", Reading(), False),
    ):
        ours = backbone(family)
        scorer = Scorer(backbone=ours, head=new_head(ours, zero=True), reading=reading)
        if fits:
            check_can_be_saved(scorer)
            continue
        with pytest.raises(UserError, match=r"transformers has no (token|sequence) classification with a linear head"):
            check_can_be_saved(scorer)


@pytest.mark.parametrize("bos", ["<|im_start|>", None], ids=["bos", "no-bos"])
@torch.no_grad()
def test_padding_that_is_eos_does_not_hide_the_last_token(bos: str | None, tiny_tokenizer, tmp_path: Path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token, tokenizer.bos_token = tokenizer.eos_token, bos
    ours, _ = prepared("llama", tokenizer, lora=False)
    ours.hf.config.pad_token_id = tokenizer.eos_token_id
    scorer = Scorer(backbone=ours, head=new_head(ours, zero=False))
    batch = copy.deepcopy(RAGGED)
    for i, n in enumerate(batch.lengths.tolist()):
        batch.tokens[i, max(n - 1, 0)] = tokenizer.eos_token_id
    save_scorer(scorer, tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.pad_token == bos and saved.pad_token_id == plain.config.pad_token_id
    assert tokenizer.pad_token == tokenizer.eos_token, "the caller's tokenizer was changed"
    for i, (p, n) in enumerate(zip(batch.prompt_of.tolist(), batch.lengths.tolist(), strict=True)):
        row = torch.cat([batch.prompts[p], batch.tokens[i, :n]])
        torch.testing.assert_close(plain(input_ids=row[None]).logits[0, 0], scorer(batch).scores[i], **CLOSE)


def test_a_classifier_of_several_labels_is_no_reward_model(tiny_tokenizer, tmp_path: Path):
    config = build("llama").config
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a reward model"):
        load_scorer(str(tmp_path), device="cpu")


def test_weights_that_are_missing_are_not_made_up(tiny_tokenizer, tmp_path: Path):
    """A reward model has no language-model head, a language model no score: neither stands in for the other."""
    ours, _ = prepared("llama", tiny_tokenizer, lora=False)
    save_scorer(Scorer(backbone=ours, head=new_head(ours, zero=False)), tmp_path / "reward")
    with pytest.raises(UserError, match=r"not a language model: its weights lack lm_head\.weight"):
        load_backbone(str(tmp_path / "reward"), device="cpu")
    ours.hf.config.num_labels = 1
    save_policy(Policy(backbone=ours), tmp_path / "policy")
    with pytest.raises(UserError, match=r"not a reward model: its weights lack score\.weight"):
        load_scorer(str(tmp_path / "policy"), device="cpu")


def saved(family: str, tokenizer, folder: Path) -> Path:
    build(family).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", UNPACKABLE)
@torch.no_grad()
def test_an_architecture_that_cannot_be_packed(family: str, tiny_tokenizer, tmp_path: Path):
    folder = saved(family, tiny_tokenizer, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    truth = one_by_one(plain, RAGGED)
    said: list[str] = []
    ours = load_backbone(str(folder), device="cpu", say=said.append)
    said = [line for line in said if not line.startswith("compiling the kernels")]
    assert ours.mode == "padded" and said == ours.notes and len(said) == 1
    torch.testing.assert_close(Policy(backbone=ours)(RAGGED).logprobs, pad_rows(truth.logprobs).float(), **CLOSE)
    scorer = Scorer(backbone=ours, head=new_head(ours, zero=False))
    right = torch.cat([scorer.head(s) for s in truth.last])
    torch.testing.assert_close(scorer(RAGGED).scores, right, **CLOSE)

    with pytest.raises(UserError, match=r"model\.attention=packed was asked for"):
        load_backbone(str(folder), device="cpu", attention_layout="packed", say=said.append)
    quiet = load_backbone(str(folder), device="cpu", attention_layout="padded", say=pytest.fail)
    assert quiet.mode == "padded" and not quiet.notes


@pytest.mark.parametrize("layout", ["auto", "packed", "padded"])
@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
@torch.no_grad()
def test_every_layout_gives_the_same_numbers(family: str, layout: str, tiny_tokenizer, tmp_path: Path):
    folder = saved(family, tiny_tokenizer, tmp_path)
    ours = load_backbone(str(folder), device="cpu", attention_layout=layout, say=pytest.fail)
    assert ours.mode == ("padded" if layout == "padded" else "packed")
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    truth = pad_rows(one_by_one(plain, RAGGED).logprobs).float()
    torch.testing.assert_close(Policy(backbone=ours)(RAGGED).logprobs, truth, atol=5e-5, rtol=5e-5)
    assert not any(p.requires_grad for p in ours.hf.parameters()) and not ours.hf.training


@torch.no_grad()
def test_bfloat16(tiny_tokenizer, tmp_path: Path):
    folder = saved("llama", tiny_tokenizer, tmp_path)
    exact = Policy(backbone=load_backbone(str(folder), device="cpu"))(RAGGED).logprobs
    half = load_backbone(str(folder), dtype="bfloat16", device="cpu", say=pytest.fail)
    rough = Policy(backbone=half)(RAGGED).logprobs
    assert half.dtype == torch.bfloat16 and rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.5, rtol=0.1)
