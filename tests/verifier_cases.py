"""Rollouts for the tests of verifiers; and what a test of sandlock is worth on a kernel that can't confine."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tether.core.errors import UserError
from tether.core.text import Message, Prompt, Rollout

LANDLOCK_CREATE_RULESET, VERSION_ONLY = 444, 1  # the number of the system call is the same on every architecture


def rollout(text: str, name: str = "p", question: str = "what?", **metadata: Any) -> Rollout:
    """A completion ``text`` of the prompt ``name``, which carries ``metadata``."""
    return Rollout(
        prompt=Prompt(id=name, messages=(Message(role="user", content=question),), metadata=metadata),
        group=0,
        prompt_tokens=torch.tensor([1]),
        tokens=torch.tensor([5]),
        sampled=torch.tensor([True]),
        logprobs=torch.tensor([0.0]),
        text=text,
        finish_reason="stop",
    )


def scores(rule: Any, texts: list[str], **metadata: Any) -> list[float]:
    """What ``rule`` says of each text, all of one prompt."""
    return rule([rollout(text, **metadata) for text in texts]).total.tolist()


def kernel_confines() -> bool:
    """Whether this kernel has the Landlock that sandlock needs; the kernel is asked itself, not through sandlock."""
    if sys.platform != "linux":
        return False
    import sandlock

    return ctypes.CDLL(None).syscall(LANDLOCK_CREATE_RULESET, None, 0, VERSION_ONLY) >= sandlock.min_landlock_abi()


def with_sandlock(test: Callable[..., None]) -> Callable[..., None]:
    """A test of sandlock (or of the sandbox that its argument ``sandbox`` names). Where the kernel lacks what sandlock
    needs, the test is that sandlock says so, and that nothing runs in its place."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        if "sandlock" not in arguments.get("sandbox", "sandlock") or kernel_confines():
            return test(**arguments)
        with pytest.raises(UserError, match=r"the sandbox sandlock needs .*the sandbox monty"):
            test(**arguments)

    return run
