"""What every test shares: one thread, reproducible hypothesis, and a tiny language model that needs no download."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "tether", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tether")

# tests/data_checks reads real data that is not part of the repository: make test-data DATA=folder.
collect_ignore = [] if os.environ.get("TETHER_DATA") else ["data_checks"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = [
    "the cat sat on the mat and then the dog sat on the cat",
    "system user assistant what is this? it is the one.",
]


def build_tokenizer():
    """A byte-level BPE of 300 tokens with ChatML: any text round-trips; pad is a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(_CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<|pad|>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def build_model(seed: int = 0, vocab_size: int = 320):
    """A random two-layer Llama of hidden size 64 in float32, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Of the user's cache, tests see the converted models, and they leave nothing there."""
    from tether.models.embedded import cache_folder

    models, own = cache_folder() / "models", tmp_path_factory.mktemp("cache")
    if models.is_dir():
        (own / "models").symlink_to(models.resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TETHER_CACHE", str(own))
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return build_tokenizer()


@pytest.fixture
def tiny_model():
    """A fresh model for each test: training one does not touch another test."""
    return build_model()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and tokenizer as a Hugging Face folder, read-only by agreement."""
    folder = tmp_path_factory.mktemp("tiny-model")
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder
