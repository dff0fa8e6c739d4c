"""A model's folder, printed: that of a name, or of a random Llama that is made here.

``python -m benchmarks.arms.model_folder NAME FOLDER``; NAME: an embedded name, a folder, a hub id, or
``llama:WIDTHxLAYERS``, which is written into FOLDER with the embedded model's tokenizer.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tether.models.embedded import EMBEDDED
from tether.models.load import load_tokenizer, resolve

RANDOM = re.compile(r"llama:(\d+)x(\d+)")


def folder_of(name: str, folder: Path) -> str:
    made = RANDOM.fullmatch(name)
    return random_llama(int(made[1]), int(made[2]), folder) if made else resolve(name, say=lambda text: None)


def random_llama(width: int, layers: int, folder: Path) -> str:
    """Heads of 64, three or more to a key head, and inner width 8/3 of the width, as Llama has it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(next(iter(EMBEDDED)), say=lambda text: None)
    torch.manual_seed(0)
    heads = width // 64
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=round(width * 8 / 3 / 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=next(n for n in range(max(1, heads // 3), 0, -1) if heads % n == 0),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    print(folder_of(sys.argv[1], Path(sys.argv[2])))
