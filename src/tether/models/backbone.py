"""A loaded Hugging Face causal language model, and the one forward pass that everything above it uses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tether.core.batches import Batch
from tether.core.errors import UserError
from tether.models import attention
from tether.models.adapters import active, low_rank
from tether.models.decoding import Passes, decoding
from tether.models.logprobs import HeadOutputs, token_logprobs
from tether.models.packed import PrefillLayout, pack

Mode = Literal["packed", "padded"]
# Names under which configs and attention modules keep the reach of their local attention.
WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size")
# Largest |difference| of hidden states, relative to their size, at which the packed pass counts as the plain one.
PACKED_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# The same of logits of one and the same state: only the rounding of one matrix product is between them.
HEAD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}


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
    # Type of the matrix products of ``hidden`` and ``head``, where it is another than that of the weights. The sampler
    # has its own (``decoding``).
    autocast: torch.dtype | None = None
    # How the sampler's passes run inside ``decoding``, and which ways were found to give this network's numbers.
    _passes: Passes | None = None
    agreed: dict[str, bool] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        return self.hf.config.get_text_config()

    @property
    def device(self) -> torch.device:
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.hf.parameters()).dtype

    @property
    def context(self) -> int:
        """Most tokens that a prompt and its completion may have together.

        Where rotary frequencies change with the length of the sequence (dynamic NTK, longrope), it ends where they
        begin to: beyond, the log-prob of a token would depend on how long its own, or another, completion goes on.
        """
        limit = int(getattr(self.config, "max_position_embeddings", None) or 10**9)
        return min(limit, self._steady_rope or limit)

    @property
    def _steady_rope(self) -> int | None:
        """Longest sequence before rotary frequencies change with length; None where they never do."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        kinds = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
        first = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}
        names = [(r, first[r["rope_type"]]) for r in kinds if r.get("rope_type") in first]
        return min((int(r.get(name) or getattr(self.config, name)) for r, name in names), default=None)

    def hidden(self, batch: Batch, adapter: str | None) -> Hidden:
        """One pass of the trunk over ``batch``."""
        if self._steady_rope is not None:
            self._check_length(batch, self._steady_rope)
        rounded = torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)
        with active(self.hf, adapter), rounded:
            return self._packed(batch) if self.mode == "packed" else self._padded(batch)

    def _check_length(self, batch: Batch, limit: int) -> None:
        prompts = [len(batch.prompts[p]) for p in batch.prompt_of.tolist()]
        longest = max((p + n for p, n in zip(prompts, batch.lengths.tolist(), strict=True)), default=0)
        if longest > limit:
            raise UserError(
                f"{self.name}: a prompt and its completion have {longest} tokens; beyond {limit} this model's rotary "
                "frequencies change with the length of the text, and log-probs would not be those of the sampler\n"
                "  lower data.max_prompt_tokens, data.max_completion_tokens or sampling.max_new_tokens"
            )

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
        """Prompt and completion of each row joined and padded on the right: slower, and right for any causal model.

        No mask is needed: what comes before never sees the padding. With one, padding that is further than a sliding
        window from the text would see nothing at all, which not every attention function answers with numbers.
        """
        rows = [
            torch.cat([batch.prompts[p], batch.tokens[i, :n]])
            for i, (p, n) in enumerate(zip(batch.prompt_of.tolist(), batch.lengths.tolist(), strict=True))
        ]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        sizes = torch.tensor([len(r) for r in rows], device=ids.device)
        states = self.hf.base_model(input_ids=ids, use_cache=False).last_hidden_state
        predicts = [
            states[i, len(r) - n - 1 : len(r) - 1]
            for i, (r, n) in enumerate(zip(rows, batch.lengths.tolist(), strict=True))
        ]
        return Hidden(predicts=torch.cat(predicts), last=states[torch.arange(len(rows), device=ids.device), sizes - 1])

    def head(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        temperature: float,
        entropy: bool,
        adapter: str | None = None,
        top_k: int | None = None,
    ) -> HeadOutputs:
        """Log-probs and entropies [K] of ``targets`` [K], and the ``top_k`` most likely tokens in their places, under
        the language-model head (and ``adapter`` on it)."""
        output = self.hf.get_output_embeddings()
        states, weight, bias = hidden, output.weight, getattr(output, "bias", None)
        if self.autocast is not None:
            # Not by torch.autocast: our own backward computes the logits again, and it must round them as here.
            states, weight = states.to(self.autocast), weight.to(self.autocast)
            bias = None if bias is None else bias.to(self.autocast)
        return token_logprobs(
            states,
            weight,
            targets,
            bias=bias,
            low_rank=low_rank(output, adapter, hidden),
            temperature=temperature,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            entropy=entropy,
            top_k=top_k,
        )

    @contextlib.contextmanager
    def decoding(self, adapter: str | None, steps: int, rounded_to: torch.dtype | None = None) -> Iterator[None]:
        """For the sampler: about ``steps`` passes run inside, under ``adapter``, their matrix products in
        ``rounded_to`` where it is given. The weights must not change, and nothing else may run the model."""
        with decoding(self, adapter, steps, rounded_to) as self._passes:
            try:
                yield
            finally:
                self._passes = None

    def prefill(self, layout: PrefillLayout, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """``run_trunk`` of prompts for the sampler, inside ``decoding``."""
        return self.passes.prefill(layout, input_ids, position_ids)

    def step(self, held: Any, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """``run_trunk`` of one new token [W, 1] of each row that is ``held``, inside ``decoding``."""
        return self.passes.step(held, input_ids, position_ids)

    @property
    def passes(self) -> Passes:
        if self._passes is None:
            raise RuntimeError("the sampler's passes run inside Backbone.decoding")
        return self._passes

    def logits(self, hidden: Tensor) -> Tensor:
        """[K, V] float32, for the sampler; under the adapter that is active."""
        head = self.hf.get_output_embeddings() if self._passes is None else self._passes.logits
        logits = head(hidden).float()
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits if self.logit_scale == 1 else logits * self.logit_scale

    @property
    def softcap(self) -> float | None:
        names = ("final_logit_softcapping", "logits_soft_cap")  # Gemma's, and RecurrentGemma's
        return next((cap for n in names if (cap := getattr(self.config, n, None))), None)

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
        attention sinks. Windows are narrowed meanwhile, so that a short group reaches beyond them. Also compares our
        head with the model's own logits: a model whose head does something we don't know is refused.
        """
        if self.hf.base_model is self.hf:
            raise UserError(
                f"{self.name}: transformers does not say which part of it is below the head; use another model"
            )
        batch = self._probe()
        own, switchable = self.hf.config._attn_implementation, self.hf._can_set_attn_implementation()
        with active(self.hf, None), self._narrow_windows(8):
            if switchable:
                self.hf.set_attn_implementation("eager")
            plain = self._padded(batch)
            if self.hf.get_output_embeddings() is not None:
                self._check_head(torch.cat([batch.prompts[0], batch.tokens[1]]))
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
        """Two completions of one prompt of random tokens, both parts longer than a narrowed window."""
        generator = torch.Generator().manual_seed(0)
        sizes = (11, 18)
        prompt, tokens = (torch.randint(0, self.config.vocab_size, (n,), generator=generator) for n in sizes)
        batch = Batch(
            prompts=(prompt,),
            prompt_of=torch.tensor([0, 0]),
            tokens=tokens.view(2, 9),
            lengths=torch.tensor([5, 9]),
            loss_mask=torch.ones(2, 9, dtype=torch.bool),
        )
        return batch.to(self.device)

    @contextlib.contextmanager
    def _narrow_windows(self, reach: int) -> Iterator[None]:
        """Every window of more than ``reach`` tokens, in the config and in the modules, is ``reach`` inside."""
        holders = [self.config, *self.hf.modules()]
        found = [(h, name, getattr(h, name, None)) for h in holders for name in WINDOWS]
        wide = [(h, name, value) for h, name, value in found if isinstance(value, int) and value > reach]
        for holder, name, _ in wide:
            setattr(holder, name, reach)
        try:
            yield
        finally:
            for holder, name, value in wide:
                setattr(holder, name, value)

    def _check_head(self, ids: Tensor) -> None:
        """Our logits against the model's own, of the same states."""
        seen: list[Tensor] = []
        hook = self.hf.base_model.register_forward_hook(lambda _m, _i, out: seen.append(out.last_hidden_state))
        try:
            own = self.hf(input_ids=ids[None], use_cache=False).logits[0].float()
        finally:
            hook.remove()
        gap = (self.logits(seen[0][0]) - own).abs().max()
        if not float(gap) <= HEAD_TOLERANCE[self.dtype] * float(own.abs().max()):
            raise UserError(
                f"{self.name}: its output head is not hidden · Wᵀ, so log-probs would be wrong; use another model"
            )
