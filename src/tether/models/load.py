"""Open and save models, by embedded name, local folder or hub id; saves are normal Hugging Face folders."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import ParseResult, urlparse
from urllib.request import getproxies, proxy_bypass

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tether.core.errors import MissingModel, UserError, nearest
from tether.core.machine import keep_freed_memory
from tether.models.adapters import merged_state
from tether.models.backbone import Backbone
from tether.models.decoding import prepare
from tether.models.embedded import EMBEDDED, embedded_folder
from tether.models.fused import use_fused
from tether.models.linear import use_fast_linear
from tether.models.native.layer import use_native_layers
from tether.models.reading import KEY, LAST, Reading
from tether.models.roles import Policy, Scorer, new_head

Say = Callable[[str], None]
# Where a model's config.json says that its labels are heads of one reward model, and how many.
HEADS = "tether_heads"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve(name: str, *, revision: str | None = None, say: Say = print) -> str:
    """A folder that transformers can open for ``name``. Never waits for a hub that is not there."""
    if name in EMBEDDED:
        return str(embedded_folder(name, say))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            inner = path / "final"
            if (inner / "config.json").exists():
                return str(inner)
            raise MissingModel(
                f"{name}: this folder holds no config.json, so it is not a model\n  a run's model is in RUN/final"
            )
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise MissingModel(f"{name}: no such folder")
    return _from_hub(name, revision, say)


def _from_hub(name: str, revision: str | None, say: Say) -> str:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    fetch = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    with contextlib.suppress(Exception):
        return snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=patterns)
    hint = nearest(name, list(EMBEDDED))
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        raise MissingModel(
            f"{name}: not on this machine, and HF_HUB_OFFLINE is set{hint}\n"
            f"  fetch it where there is a network: {fetch}"
        )
    endpoint = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection(_first_hop(endpoint), timeout=3).close()
    except OSError as error:
        raise MissingModel(
            f"{name}: not on this machine, and the hub at {endpoint.netloc} can't be reached ({error}){hint}\n"
            f"  fetch it where there is a network: {fetch}\n"
            f"  or use the embedded model (--model {next(iter(EMBEDDED))}) or a local folder"
        ) from error
    say(f"downloading {name}")
    try:
        return snapshot_download(name, revision=revision, allow_patterns=patterns)
    except Exception as error:
        raise MissingModel(f"{name}: the hub does not give it: {error}\n  try: {fetch}") from error


def _first_hop(endpoint: ParseResult) -> tuple[str, int]:
    """Host and port that a request to ``endpoint`` connects to: those of a proxy where one is set for it."""
    host = endpoint.hostname or ""
    proxy = None if proxy_bypass(host) else getproxies().get(endpoint.scheme)
    # A proxy may be given without its scheme.
    hop = urlparse(proxy if "//" in proxy else f"//{proxy}") if proxy else endpoint
    return hop.hostname or host, hop.port or (80 if hop.scheme == "http" else 443)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no advice from below: what matters is said by us."""
    from transformers import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False, say: Say = print) -> Any:
    """The fast tokenizer of a model; UserError where there is only a slow one (offsets are needed for loss masks)."""
    from transformers import AutoTokenizer

    folder = resolve(name, revision=revision, say=say)
    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise UserError(f"{name}: its tokenizer can't be opened: {error}") from error
    if not tokenizer.is_fast:
        raise UserError(
            f"{name}: only a slow tokenizer; loss masks need character offsets, so a tokenizer.json is needed"
        )
    return tokenizer


def pick_device(device: str) -> torch.device:
    """ "auto" is the first GPU, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def load_backbone(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attention_layout: str = "auto",
    scorer: bool = False,
    say: Say = print,
) -> Backbone:
    """Open ``name`` for training or scoring. ``scorer``: open it as a sequence- or token-classification model,
    whichever it was saved as."""
    from transformers import AutoModelForCausalLM

    folder = resolve(name, revision=revision, say=say)
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code, say=say)
    auto = _classifier(_classifies_tokens(folder)) if scorer else AutoModelForCausalLM
    with _quiet():
        try:
            loaded: Any = auto.from_pretrained(
                folder,
                dtype=DTYPES[dtype],
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{name}: can't be opened: {error}") from error
        except (OSError, SafetensorError) as error:
            raise UserError(f"{name}: can't be opened: {error}\n  weights must be safetensors, and whole") from error
    network, found = loaded
    if missing := sorted(found["missing_keys"]):
        # transformers would fill them with random numbers and go on.
        kind = "a reward model" if scorer else "a language model"
        raise UserError(
            f"{name}: not {kind}: its weights lack {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}"
        )
    network.to(pick_device(device)).eval()
    network.requires_grad_(False)
    if network.device.type == "cpu":
        keep_freed_memory()
    use_fast_linear(network)
    use_fused(network)
    backbone = Backbone(
        hf=network, tokenizer=tokenizer, name=name, mode="padded" if attention_layout == "padded" else "packed"
    )
    # Before the self-test, whose passes would have them compiled in silence.
    prepare(backbone, say)
    backbone.self_test(say)
    if backbone.mode == "packed":
        use_native_layers(network.base_model)
    if attention_layout == "packed" and backbone.mode == "padded":
        raise UserError(f"{name}: model.attention=packed was asked for, but {backbone.notes[-1]}")
    return backbone


def load_scorer(folder: str, *, dtype: str = "float32", device: str = "auto", say: Say = print) -> Scorer:
    """Open a reward model (or critic) saved by us, of one head or several, or any sequence-classification folder with
    one label."""
    backbone = load_backbone(folder, dtype=dtype, device=device, scorer=True, say=say)
    head = getattr(backbone.hf, "score", None)
    heads = heads_in(backbone.hf.config)
    if not isinstance(head, nn.Linear) or head.out_features != heads:
        outputs = "one output" if heads == 1 else f"{heads} outputs, as {HEADS} in its config.json says"
        raise UserError(f"{folder}: not a reward model: it has no linear head `score` with {outputs}")
    per_token = type(backbone.hf).__name__.endswith("ForTokenClassification")
    reading = Reading.of(backbone.hf.config, folder) if per_token else LAST
    own = new_head(backbone, zero=True, bias=head.bias is not None, heads=heads)
    own.load_state_dict(head.state_dict())
    return Scorer(backbone=backbone, head=own, reading=reading)


def heads_in(config: Any) -> int:
    """How many heads of a reward model a config speaks of."""
    return getattr(config, HEADS, 1)


def heads_of(folder: Path) -> int:
    """How many heads the reward model in a folder has. Opens no weights."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get(HEADS, 1)


def save_policy(policy: Policy, folder: Path) -> None:
    """A causal language model folder; an adapter is folded in, so that anything opens it."""
    from transformers import AutoModelForCausalLM

    hf = policy.backbone.hf
    _write(AutoModelForCausalLM, hf.config, merged_state(hf, policy.adapter), policy.backbone, folder)


def save_scorer(scorer: Scorer, folder: Path) -> None:
    """A classification folder with one label a head: of sequences, which transformers reads at the last token as we do;
    or of tokens, where our score is read off more than that, with the reading in its config."""
    hf, dtype = scorer.backbone.hf, scorer.backbone.dtype
    prefix = hf.base_model_prefix + "."
    state = {k: v for k, v in merged_state(hf, scorer.adapter).items() if k.startswith(prefix)}
    backbone = replace(scorer.backbone, tokenizer=_with_safe_pad(scorer.backbone.tokenizer))
    config = _scorer_config(scorer)
    config.get_text_config().pad_token_id = config.pad_token_id = backbone.tokenizer.pad_token_id
    state |= {f"score.{n}": p.detach().to(dtype) for n, p in scorer.head.named_parameters()}
    if scorer.reading.per_token:
        state.setdefault("score.bias", torch.zeros(scorer.heads, dtype=dtype))
    _write(_classifier(scorer.reading.per_token), config, state, backbone, folder)


def check_can_be_saved(scorer: Scorer) -> None:
    """Raises UserError, before anything is trained, where transformers has no such head for the architecture."""
    per_token = scorer.reading.per_token
    auto, config = _classifier(per_token), _scorer_config(scorer)
    if type(config) in auto._model_mapping:
        with _quiet(), torch.device("meta"):
            head = getattr(auto.from_config(config), "score", None)
        shape = (scorer.heads, per_token)
        if isinstance(head, nn.Linear) and (head.out_features, head.bias is not None) == shape:
            return
    raise UserError(
        f"{scorer.backbone.name}: transformers has no {'token' if per_token else 'sequence'} classification with a "
        f"linear head `score` for {type(config).__name__}, so this reward model could not be saved for others to open\n"
        + (
            "  train one that reads the last token (pool=last, and a loss on pairs or rankings), or "
            if per_token
            else "  "
        )
        + "use another architecture"
    )


def _scorer_config(scorer: Scorer) -> Any:
    config = copy.deepcopy(scorer.backbone.hf.config)
    config.num_labels = scorer.heads
    for key in (KEY, HEADS):
        if hasattr(config, key):
            delattr(config, key)
    if scorer.heads > 1:
        setattr(config, HEADS, scorer.heads)
        config.id2label = {k: f"head-{k}" for k in range(scorer.heads)}
        config.label2id = {name: k for k, name in config.id2label.items()}
    if scorer.reading.per_token:
        setattr(config, KEY, scorer.reading.as_config())
    return config


def _classifier(tokens: bool) -> Any:
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    return AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification


def _classifies_tokens(folder: str) -> bool:
    """Whether a folder says that it holds a token classifier."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return any(name.endswith("ForTokenClassification") for name in config.get("architectures") or ())


def _with_safe_pad(tokenizer: Any) -> Any:
    """The tokenizer with a padding token that no completion ends with.

    transformers pools at the last token that is not padding: where padding is EOS, it would pass over the EOS that
    our score is read at. Without such a token there is no padding, and transformers refuses batches, loudly.
    """
    ends = {tokenizer.eos_token, None}
    if tokenizer.pad_token not in ends:
        return tokenizer
    safe = copy.deepcopy(tokenizer)
    safe.pad_token = next((t for t in (tokenizer.bos_token, tokenizer.unk_token) if t not in ends), None)
    return safe


def _write(auto: Any, config: Any, state: dict[str, Tensor], backbone: Backbone, folder: Path) -> None:
    with _quiet():
        with torch.device("meta"):
            shell = auto.from_config(config)
        shell.config.architectures = [type(shell).__name__]
        shell.save_pretrained(folder, state_dict=state)
        backbone.tokenizer.save_pretrained(folder)
        generation = getattr(backbone.hf, "generation_config", None)
        if generation is not None and hasattr(shell, "generation_config"):
            generation.save_pretrained(folder)


def clone_frozen(backbone: Backbone) -> Backbone:
    """A copy of the network with weights of its own, frozen: the reference of a fully trained policy."""
    hf = copy.deepcopy(backbone.hf).requires_grad_(False).eval()
    return replace(backbone, hf=hf)


def fingerprint(policy: Policy) -> str:
    """16 hex digits over the weights a forward pass of ``policy`` uses: names, shapes and a sample of the values."""
    import hashlib

    digest = hashlib.sha256()
    for name, value in sorted(merged_state(policy.backbone.hf, policy.adapter).items()):
        flat = value.reshape(-1)
        stride = max(1, flat.numel() // 4096)
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(flat[::stride].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
