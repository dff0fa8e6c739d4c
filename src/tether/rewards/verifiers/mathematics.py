"""Mathematics: whether two expressions, in LaTeX or plain, are equal. The comparing is math-verify's (Hugging Face)."""

from __future__ import annotations

import atexit
import json
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from tether.core.errors import RewardFailure, UserError
from tether.core.protocols import Scores
from tether.core.text import Rollout
from tether.rewards.verifiers.base import CannotJudge, Undecided, column, inside, needs_package, score_each

_START = 60.0  # seconds in which SymPy must have been imported, on however busy a machine


@dataclass(frozen=True, kw_only=True)
class Mathematics:
    """1 where the final expression of the completion equals the prompt's ``column``, symbolically, else 0.

    LaTeX in $…$ or \\boxed{…}, or a plain number or fraction; sets, intervals, equations and matrices too. ``within``:
    judge only what the last tag of this name holds. A comparison that takes longer than ``seconds`` or needs more than
    1 GB (9^{9^{9^9}}) is ``undecided``: "stop" is a RewardFailure, "unscored" is left to the run.
    Needs ``tether-rlhf[math]``.
    """

    beside: ClassVar[int] = 1
    column: str = "answer"
    within: str = ""
    seconds: float = 5.0
    undecided: Undecided = "stop"

    def __post_init__(self) -> None:
        needs_package("mathematics", "math_verify", "math")
        if not 0.0 < self.seconds <= 600.0:
            raise UserError(f"reward.seconds must be above 0 and at most 600, got {self.seconds}")

    def __call__(self, rollouts: Sequence[Rollout]) -> Scores:
        return Scores(total=score_each("mathematics", rollouts, self._right, self.undecided))

    def _right(self, rollout: Rollout) -> float:
        answer = str(column(rollout, self.column))
        found = _worker().ask({"answer": answer, "text": inside(rollout.text, self.within)}, self.seconds)
        if found["verdict"] == "no expression":
            raise RewardFailure(f"its column {self.column!r} holds no expression: {answer!r}")
        if found["verdict"] == "undecided":
            raise CannotJudge(f"the comparison with {answer!r} ended after {self.seconds:g} s or 1 GB: {found['why']}")
        return float(found["verdict"] == "right")


class _Worker:
    """A process of its own that compares: SymPy can't be interrupted in a thread, a process can. Started when first
    asked and again after it was ended; one question at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, question: dict[str, str], seconds: float) -> dict[str, Any]:
        with self._lock:
            try:
                line = self._reply(json.dumps(question).encode() + b"\n", seconds)
            except BrokenPipeError:
                line = b""
            except BaseException:  # a reply that nobody waits for would be taken for that to the next question
                self.end()
                raise
            if line is None or not line.endswith(b"\n"):
                self.end()
                return {"verdict": "undecided", "why": "too slow" if line is None else "the comparing process died"}
            return json.loads(line)

    def _reply(self, question: bytes, seconds: float) -> bytes | None:
        if self._process is not None and self._process.poll() is not None:
            self.end()  # it died before this question, which is no word about the question
        process = self._process or self._start()
        assert process.stdin
        process.stdin.write(question)
        process.stdin.flush()
        return self._line(process, seconds)

    def end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: the folder of the script is no place to import from.
        command = [sys.executable, "-P", str(Path(__file__).with_name("mathematics_child.py"))]
        # A session of its own: Ctrl-C is for the run, which ends this process itself.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        if self._line(self._process, _START) != b"ready\n":
            self.end()
            raise RewardFailure("the process that compares expressions does not start; does `import math_verify` work?")
        return self._process

    @staticmethod
    def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """The next line; None where it does not come in time. The child writes whole lines, one per question."""
        assert process.stdout
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline() if ready else None


@lru_cache(maxsize=1)
def _worker() -> _Worker:
    worker = _Worker()
    atexit.register(worker.end)
    return worker
