"""vLLM's side of sampling: its engine for CPUs, offline and inside this process.

Float32 weights, and blocks of a size that short prompts fill, so that the completions of a prompt share them, as far as
its cache of prefixes goes; no later step does.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from benchmarks.arms.common import Conversation, serve

SETTINGS: dict[str, Any] = {"dtype": "float32", "block_size": 32}
# Tokens of a prompt and its completion, the same for every work: so the model is compiled once for all.
LONGEST = 512
# Bytes for keys and values: more than the rows of any work need, and only what is used counts as memory.
CACHE = 2**30
# The engine stays in this process, which is the one that is watched; nothing is sent, and nothing is kept.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_CACHE_ROOT": os.path.join(tempfile.gettempdir(), "vllm"),
}


def prepare() -> None:
    """Set all that vLLM reads from the environment, and start again with what it gives its own workers, and its manual
    asks for: Intel's OpenMP before all other libraries, and each thread on a core of its own."""
    library = os.path.join(sys.prefix, "lib", "libiomp5.so")
    os.environ.update(ENVIRONMENT)
    if "LD_PRELOAD" in os.environ or not os.path.exists(library):
        return
    cores = sorted(os.sched_getaffinity(0))[: int(os.environ.get("OMP_NUM_THREADS", "1"))]
    places = f"granularity=fine,explicit,proclist=[{','.join(map(str, cores))}]"
    os.environ.update(LD_PRELOAD=library, KMP_AFFINITY=places, KMP_BLOCKTIME="5", KMP_TPAUSE="0")
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.arms.vllm_arm"])


class Sampling:
    """The engine, and the token ids of the prompts."""

    def __init__(self, work: dict[str, Any]) -> None:
        # Only now that what libraries print goes to standard error.
        from transformers import AutoTokenizer
        from vllm import LLM, SamplingParams  # noqa: TID251 - this is no part of the library

        self.work, self.params = work, SamplingParams
        self.prompts: list[list[int]] = AutoTokenizer.from_pretrained(work["model"])(work["prompts"])["input_ids"]
        self.facts: dict[str, Any] = {"prompt_tokens": [len(ids) for ids in self.prompts]}
        self.engine = LLM(
            model=work["model"],
            skip_tokenizer_init=True,
            generation_config="vllm",
            max_model_len=LONGEST,
            kv_cache_memory_bytes=CACHE,
            **SETTINGS,
        )

    def ask(self, prompts: list[list[int]], **params: Any) -> list[Any]:
        given: Any = [{"prompt_token_ids": ids} for ids in prompts]
        return self.engine.generate(given, self.params(detokenize=False, **params), use_tqdm=False)

    def agree(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The log-probs of the tokens that the other arm has drawn."""
        drawn: list[list[int]] = given["tokens"]
        whole = [self.prompts[i // self.work["group"]] + tokens for i, tokens in enumerate(drawn)]
        found = []
        for tokens, answer in zip(drawn, self.ask(whole, max_tokens=1, prompt_logprobs=0), strict=True):
            slots = zip(tokens, answer.prompt_logprobs[-len(tokens) :], strict=True)
            found.append([candidates[token].logprob for token, candidates in slots])
        return {"logprobs": found}

    def steps(self, conversation: Conversation) -> None:
        group, count = self.work["group"], self.work["new_tokens"]
        seed = 0
        while True:
            if not self.engine.reset_prefix_cache():
                raise RuntimeError("vLLM kept the prompts of the step before")
            conversation.begin_step()
            # The completions of a prompt have the seeds from this one on. No token ends one.
            answers = self.ask(self.prompts, n=group, seed=seed, max_tokens=count, ignore_eos=True)
            drawn = [len(completion.token_ids) for answer in answers for completion in answer.outputs]
            conversation.end_step(drawn=sum(drawn) / len(drawn))
            seed += group


if __name__ == "__main__":
    prepare()
    serve(Sampling)
