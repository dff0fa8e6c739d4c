"""A loaded Hugging Face causal language model, and the one forward pass that everything above it uses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tether.core.batches import Batch
from tether.core.errors import UserError
from tether.models import attention
from tether.models.adapters import active
from tether.models.logprobs import token_logprobs
from tether.models.packed import pack

Mode = Literal["packed", "padded"]
# Largest |difference| of hidden states, relative to their size, at which the packed pass counts as the plain one.
PACKED_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True, kw_only=True, eq=False)
class Hidden:
    """Hidden states of a batch where something is asked of them.

    ``predicts`` [K, d]: the state before each present completion token, row after row; ``last`` [B, d]: the state at
    each completion's last token.
    """

    predicts: Tensor
    last: Tensor


@dataclass(kw_only=True, eq=False)
class Backbone:
    """The network, its tokenizer and its layout. ``mode`` is decided once, when it is loaded, by ``self_test``."""

    hf: Any
    tokenizer: Any
    name: str
    mode: Mode = "packed"
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> Any:
        return self.hf.config.get_text_config()

    @property
    def device(self) -> torch.device:
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.hf.parameters()).dtype

    def hidden(self, batch: Batch, adapter: str | None) -> Hidden:
        """One pass of the trunk over ``batch``."""
        with active(self.hf, adapter):
            return self._packed(batch) if self.mode == "packed" else self._padded(batch)

    def run_trunk(self, layout: attention.Layout, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Hidden states [b, N, d] under ``layout``. A mask that is already 4-D is passed through untouched by
        transformers, so this empty one keeps it from building an N x N mask that the layout would ignore."""
        mask: Any = torch.zeros(1, 1, 1, 1, device=input_ids.device, dtype=torch.bool)
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if len(kinds) > 1:
            mask = dict.fromkeys(kinds, mask)
        out = self.hf.base_model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=False,
            tether_layout=layout,
        )
        return out.last_hidden_state

    def _packed(self, batch: Batch) -> Hidden:
        row = pack(batch)
        states = self.run_trunk(row.layout, row.input_ids, row.position_ids)[0]
        return Hidden(predicts=states[row.predicts], last=states[row.last])

    def _padded(self, batch: Batch) -> Hidden:
        """Prompt and completion of each row joined and padded on the right: slower, and right for any causal model."""
        rows = [
            torch.cat([batch.prompts[p], batch.tokens[i, :n]])
            for i, (p, n) in enumerate(zip(batch.prompt_of.tolist(), batch.lengths.tolist(), strict=True))
        ]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        sizes = torch.tensor([len(r) for r in rows], device=ids.device)
        mask = torch.arange(ids.shape[1], device=ids.device) < sizes[:, None]
        states = self.hf.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        predicts = [
            states[i, len(r) - n - 1 : len(r) - 1]
            for i, (r, n) in enumerate(zip(rows, batch.lengths.tolist(), strict=True))
        ]
        return Hidden(predicts=torch.cat(predicts), last=states[torch.arange(len(rows), device=ids.device), sizes - 1])

    def head(self, hidden: Tensor, targets: Tensor, *, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [K] of ``targets`` [K] under the language-model head."""
        output = self.hf.get_output_embeddings()
        return token_logprobs(
            hidden,
            output.weight,
            targets,
            bias=getattr(output, "bias", None),
            temperature=temperature,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            entropy=entropy,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[K, V] float32, for the sampler."""
        output = self.hf.get_output_embeddings()
        logits = torch.nn.functional.linear(hidden, output.weight, getattr(output, "bias", None)).float()
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits * self.logit_scale

    @property
    def softcap(self) -> float | None:
        return getattr(self.config, "final_logit_softcapping", None)

    @property
    def logit_scale(self) -> float:
        # Cohere multiplies its logits, Granite divides them.
        return float(getattr(self.config, "logit_scale", None) or 1.0) / float(
            getattr(self.config, "logits_scaling", None) or 1.0
        )

    @torch.no_grad()
    def self_test(self, say: Callable[[str], None]) -> None:
        """Run one small group both ways; an architecture the packed pass can't serve falls back to padding, said once.

        The measure is the architecture's own eager attention: ours and transformers' SDPA know nothing of, say,
        attention sinks. Also compares our head with the model's own logits: a model whose head does something we
        don't know is refused.
        """
        batch = self._probe()
        own, switchable = self.hf.config._attn_implementation, self.hf._can_set_attn_implementation()
        with active(self.hf, None):
            if switchable:
                self.hf.set_attn_implementation("eager")
            plain = self._padded(batch)
            if self.hf.get_output_embeddings() is not None:
                self._check_head(torch.cat([batch.prompts[0], batch.tokens[1]]), plain.last[1:])
            if self.mode == "packed":
                if switchable and self._packs(batch, plain):
                    return
                self.mode = "padded"
                note = f"{self.name}: this architecture can't run packed; using padded batches (slower, same numbers)"
                self.notes.append(note)
                say(note)
        if switchable:
            self.hf.set_attn_implementation(own)

    def _packs(self, batch: Batch, plain: Hidden) -> bool:
        """Switch to our attention and see whether the packed pass gives ``plain``."""
        self.hf.set_attn_implementation(attention.NAME)
        # Whatever an architecture raises when it is laid out in a way it does not know, it means "no".
        with contextlib.suppress(Exception):
            packed = self._packed(batch)
            gap = (packed.predicts - plain.predicts).abs().max() / plain.predicts.abs().mean()
            return float(gap) < PACKED_TOLERANCE[self.dtype] * 10
        return False

    def _probe(self) -> Batch:
        """Two completions of one prompt of random tokens; the prompt is longer than a short sliding window."""
        generator = torch.Generator().manual_seed(0)
        window = getattr(self.config, "sliding_window", None) or 8
        sizes = (min(window, 48) + 3, 18)
        prompt, tokens = (torch.randint(0, self.config.vocab_size, (n,), generator=generator) for n in sizes)
        batch = Batch(
            prompts=(prompt,),
            prompt_of=torch.tensor([0, 0]),
            tokens=tokens.view(2, 9),
            lengths=torch.tensor([5, 9]),
            loss_mask=torch.ones(2, 9, dtype=torch.bool),
        )
        return batch.to(self.device)

    def _check_head(self, ids: Tensor, hidden: Tensor) -> None:
        own = self.hf(input_ids=ids[None], use_cache=False).logits[:, -1].float()
        if not torch.allclose(self.logits(hidden), own, atol=PACKED_TOLERANCE[self.dtype] * 50, rtol=1e-2):
            raise UserError(
                f"{self.name}: its output head is not hidden · Wᵀ, so log-probs would be wrong; use another model"
            )
