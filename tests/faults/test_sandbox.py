"""Hostile code: no file, socket, process or endless loop gets out; what a kernel can't give is named."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tether.core.errors import RewardFailure, UserError
from tether.rewards import sandbox_cpython
from tether.rewards.sandbox import Check, Limits, Outcome, open_sandbox
from tether.rewards.verifiers.program import CodeTests
from verifier_cases import kernel_confines, rollout, with_sandlock

LIMITS = Limits(seconds=0.5, megabytes=96)
DONE = [Check(code="assert done")]
CONFINED = ["monty", "sandlock"]


def attack(sandbox: str, code: str) -> Outcome:
    """Runs ``code``, whose variable ``done`` must not come true. What it can't do may raise: that is no way out."""
    started = time.perf_counter()
    outcome = open_sandbox(sandbox)(code, DONE, LIMITS)  # type: ignore[arg-type]
    assert time.perf_counter() - started < 15.0
    assert not any(outcome.passed), outcome
    return outcome


def children() -> set[str]:
    """Processes whose parent this one is, that still run."""
    own = str(os.getpid())
    found = subprocess.run(["ps", "-o", "pid=,stat=,comm=", "--ppid", own], capture_output=True, text=True).stdout
    rows = [line.split() for line in found.splitlines()]
    return {pid for pid, state, name in rows if not state.startswith("Z") and not name.startswith(("ps", "monty"))}


@with_sandlock
@pytest.mark.parametrize("sandbox", CONFINED)
@pytest.mark.parametrize(
    "code",
    [
        "text = open('/etc/passwd').read()\ndone = 'root' in text",
        "from pathlib import Path\ndone = bool(Path('/etc/passwd').read_text())",
        "import os\ndone = bool(os.listdir('/home') or os.listdir('/root') or os.listdir('/tmp'))",
        "import os\ndone = bool(os.listdir('/proc'))",
        "import os\ndone = bool(os.popen('id').read())",
        "import os\nos.symlink('/etc/passwd', 'link')\ndone = bool(open('link').read())",
        "import ctypes\ndone = ctypes.CDLL(None).open(b'/etc/passwd', 0) >= 0",
    ],
)
def test_files_are_not_read(sandbox, code):
    attack(sandbox, code)


@with_sandlock
@pytest.mark.parametrize("sandbox", CONFINED)
def test_no_file_is_written(sandbox, tmp_path):
    before = set(Path("/tmp").iterdir())
    for target in (tmp_path / "out", Path("/tmp/escaped"), Path("out")):
        attack(sandbox, f"f = open({str(target)!r}, 'w')\nf.write('x')\nf.close()\ndone = True")
        attack(sandbox, f"import os\nos.mkdir({str(target)!r})\ndone = True")
    attack(sandbox, f"import os\nos.remove({__file__!r})\ndone = True")
    assert not list(tmp_path.iterdir()) and Path(__file__).exists() and not Path("out").exists()
    assert not [p for p in set(Path("/tmp").iterdir()) - before if p.name in ("escaped", "out")]


@with_sandlock
@pytest.mark.parametrize("sandbox", CONFINED)
def test_no_socket_connects_or_listens(sandbox):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        port = server.getsockname()[1]
        attack(sandbox, f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\ndone = True")
        attack(
            sandbox, f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}', None, 1)\ndone = True"
        )
        attack(sandbox, "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()\ndone = True")
        udp = "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        attack(sandbox, f"{udp}s.sendto(b'x', ('127.0.0.1', {port}))\ndone = True")
        with pytest.raises(TimeoutError):
            server.accept()


@with_sandlock
@pytest.mark.parametrize("sandbox", CONFINED)
@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True:\n    os.fork()",
        "import os\nif os.fork() == 0:\n    while True: pass\ndone = True",
        "import subprocess\nsubprocess.run(['/bin/true'])\ndone = True",
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'while True: pass'])\ndone = True",
        "import multiprocessing\np = multiprocessing.Process(target=print)\np.start()\ndone = True",
        "import os\nos.posix_spawn('/bin/sleep', ['sleep', '60'], {})\ndone = True",
    ],
)
def test_no_second_process_starts(sandbox, code):
    before = children()
    attack(sandbox, code)
    assert children() <= before


@with_sandlock
@pytest.mark.parametrize("sandbox", CONFINED)
@pytest.mark.parametrize(
    "code",
    [
        "while True:\n    pass",
        "try:\n    while True:\n        pass\nexcept BaseException:\n    done = True",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass\n",
        "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except Exception: pass\n"
        "while True: pass",
        "import time\ntime.sleep(1000)\ndone = False",
        "x = 0\nfor i in range(10 ** 12):\n    x += i\ndone = True",
        "import os\nos.setpgid(0, os.getpgid(os.getppid()))\nwhile True: pass",
        "import os\nos.setsid()\nwhile True: pass",
        "import threading\nfor i in range(8):\n    threading.Thread(target=lambda: [1 for _ in iter(int, 1)]).start()",
    ],
)
def test_endless_loops_end_and_leave_nothing_behind(sandbox, code):
    before = children()
    attack(sandbox, code)
    assert children() <= before


@with_sandlock
@pytest.mark.parametrize("sandbox", CONFINED)
@pytest.mark.parametrize(
    "code",
    [
        "x = []\nwhile True:\n    x.append('a' * 10_000_000)",
        "x = 'a' * 10 ** 10\ndone = True",
        "x = [0] * 10 ** 10\ndone = True",
        "x = 10 ** 10 ** 9\ndone = True",
        "def f(n): return f(n + 1)\nf(0)\ndone = True",
    ],
)
def test_memory_is_bounded(sandbox, code):
    assert attack(sandbox, code).stop in ("memory", "error", "time")


@with_sandlock
@pytest.mark.parametrize("sandbox", [*CONFINED, "unsafe_subprocess"])
def test_megabytes_of_output_are_dropped(sandbox, capfd):
    code = "for i in range(200):\n    print('x' * 100_000)\n"
    outcome = open_sandbox(sandbox)(code, [Check(code="assert i == 199")], Limits(seconds=20))
    assert outcome.passed == (True,)
    assert capfd.readouterr() == ("", "")


@with_sandlock
def test_megabytes_of_results_end_the_program():
    check = Check(code="'x' * 10_000_000", judged=True, equals="x")
    assert open_sandbox("sandlock")("", [check], Limits()).passed == (False,)


@with_sandlock
@pytest.mark.parametrize("sandbox", [*CONFINED, "unsafe_subprocess"])
@pytest.mark.parametrize(
    "code",
    ["import sys\nsys.exit(0)", "raise SystemExit", "import os\nos._exit(0)", "raise KeyboardInterrupt", "quit()"],
)
def test_leaving_early_is_wrong_and_does_not_leave_us(sandbox, code):
    attack(sandbox, code)


# A program in CPython finds what reports its tests a few frames up.
FORGER = """import sys
frame = sys._getframe()
while 'tell' not in frame.f_locals:
    frame = frame.f_back
tell, leave = frame.f_locals['tell'], frame.f_locals['leave']
"""


@with_sandlock
@pytest.mark.parametrize("sandbox", ["sandlock", "unsafe_subprocess"])
def test_a_program_that_reports_for_its_tests_fakes_no_value_that_is_compared_outside(sandbox):
    """It can fake an assert, as the documentation says: that is why there is ``equals``."""
    code = FORGER + (
        "tell(event='code', ok=True)\n"
        "tell(event='check', index=0, ok=True)\n"
        "tell(event='check', index=1, ok=True, value=5)\n"
        "tell(event='end')\n"
        "leave(0)\n"
    )
    checks = [Check(code="assert f() == 3"), Check(code="f()", judged=True, equals="what is expected")]
    assert not open_sandbox(sandbox)(code, checks, LIMITS).passed[1]
    assert open_sandbox("monty")(code, checks, LIMITS).passed == (False, False)
    # Nor does it find the value to report: that never enters the sandbox.
    seen = f"{FORGER}seen = repr([frame.f_locals, sys.argv, sys.stdin])\n"
    look = Check(code="'what is ' 'expected' in seen", judged=True, equals=False)
    assert open_sandbox(sandbox)(seen, [look, checks[1]], LIMITS).passed == (True, False)


@pytest.mark.parametrize(
    "report",
    [
        "event='check', index=99, ok=True",
        "event='check', index=-1, ok=True, value=1",
        "event='check', index='0', ok=True, value=1",
        "event='check', index=True, ok=True, value=1",
        "event='check', ok=True",
        "event='check', index=0",
        "event='check', index=0, ok=True",
        "event='check', index=0, ok=False, error='MemoryError'",
        "event='check', index=0, ok=False, error=3, words=[]",
        "event='code'",
        "event='end', error='KeyError'",
        "event='check 0', error='KeyError'",
        "event='nosuch', ok=True",
        "event=['check'], index=0, ok=True, value=1",
        "ok=True",
    ],
)
def test_reports_that_make_no_sense_are_wrong_and_stop_nothing(report):
    checks = [Check(code="1", judged=True, equals=1), Check(code="2", judged=True, equals=2)]
    run = open_sandbox("unsafe_subprocess")
    assert run(f"{FORGER}tell({report})\n", checks, LIMITS).passed == (False, False)


def test_a_program_has_one_guess_per_value():
    guess = FORGER + "tell(event='code', ok=True)\nfor n in range(9): tell(event='check', index=0, ok=True, value=n)\n"
    for more in ("", "leave(0)\n"):
        outcome = open_sandbox("unsafe_subprocess")(guess + more, [Check(code="8", judged=True, equals=8)], LIMITS)
        assert outcome.passed == (False,) and outcome.detail == "the program wrote a report of its own"


@with_sandlock
@pytest.mark.parametrize("sandbox", [*CONFINED, "unsafe_subprocess"])
def test_no_secret_of_the_environment_is_seen(sandbox, monkeypatch):
    monkeypatch.setenv("TETHER_TEST_SECRET", "hunter2")
    attack(sandbox, "import os\ndone = os.environ['TETHER_TEST_SECRET'] == 'hunter2'")


@with_sandlock
@pytest.mark.parametrize("sandbox", CONFINED)
@pytest.mark.parametrize(
    "code", ["\0", "\ud800", "(" * 100_000, "x = " + "-" * 100_000 + "1", "if 1:\n" * 500, "#" * 10**6]
)
def test_text_that_is_hardly_a_program_is_wrong_and_no_failure(sandbox, code):
    attack(sandbox, code)


def test_one_programs_state_is_not_the_nexts():
    run = open_sandbox("monty")
    run("done = True", DONE, LIMITS)
    assert run("pass", DONE, LIMITS).passed == (False,)
    attack("monty", "x = []\nwhile True:\n    x.append('a' * 10_000_000)")
    assert run("done = True", DONE, LIMITS).passed == (True,)


@with_sandlock
def test_endless_loops_do_not_add_up_where_programs_run_at_once():
    loops = [rollout("while True: pass", name=str(i), tests="assert True") for i in range(4)]
    started = time.perf_counter()
    found = CodeTests(sandbox="sandlock", seconds=1.0, workers=4)(loops)
    assert found.total.tolist() == [0, 0, 0, 0] and time.perf_counter() - started < 3.5


def test_the_bare_process_has_an_empty_folder_a_group_of_its_own_and_limits():
    run = open_sandbox("unsafe_subprocess")
    code = "import os\nfolder = os.listdir('.')\nleader = os.getpid() == os.getpgrp()\n"
    checks = [Check(code="folder", judged=True, equals=[]), Check(code="leader", judged=True, equals=True)]
    assert run(code, checks, LIMITS).passed == (True, True)
    assert run("x = 'a' * 10 ** 9", DONE, LIMITS).stop == "memory"
    assert run("f = open('big', 'w')\nf.write('x' * 2_000_000)\nf.flush()", DONE, LIMITS).passed == (False,)
    before = children()
    outcome = run("import os\nos.fork()\nwhile True: pass", DONE, LIMITS)
    assert outcome.passed == (False,) and children() <= before


# -- what a machine can't give is named, and nothing stands in for it --------------------------------------------------


def test_a_kernel_without_landlock_is_named(monkeypatch):
    import sandlock

    assert (sandlock.landlock_abi_version() >= sandlock.min_landlock_abi()) is kernel_confines()
    monkeypatch.setattr(sandlock, "landlock_abi_version", lambda: -1)
    for name in ("sandlock", "monty_then_sandlock"):
        with pytest.raises(UserError, match=r"this kernel .* has none: choose the sandbox monty"):
            CodeTests(sandbox=name)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sandlock", None)
    with pytest.raises(UserError, match=r"pip install 'tether-rlhf\[sandlock\]'"):
        CodeTests(sandbox="sandlock")


@with_sandlock
def test_a_sandbox_that_does_not_start_is_a_failure_that_names_the_sample(monkeypatch):
    broken = [*sandbox_cpython._command()[:-1], "raise OSError('no luck')"]
    monkeypatch.setattr(sandbox_cpython, "_command", lambda: broken)
    for name in ("sandlock", "unsafe_subprocess"):
        with pytest.raises(RewardFailure, match=r"(?s)of prompt q: the sandboxed Python did not start: .*no luck"):
            CodeTests(sandbox=name)([rollout("pass", name="q", tests="assert True")])


@with_sandlock
def test_a_confinement_that_fails_is_a_failure_and_runs_nothing(monkeypatch, tmp_path):
    from sandlock import Sandbox

    def refuse(*args, **kwargs):
        raise RuntimeError("seccomp says no")

    monkeypatch.setattr(Sandbox, "popen", refuse)
    with pytest.raises(RewardFailure, match=r"prompt q: sandlock can't confine a process here: .*seccomp says no"):
        CodeTests(sandbox="sandlock")([rollout("pass", name="q", tests="assert True")])


@with_sandlock
@pytest.mark.parametrize("sandbox", CONFINED)
def test_sandboxes_work_from_threads(sandbox):
    run, other = open_sandbox(sandbox), open_sandbox("monty")
    found: list[bool] = []

    def work(run):
        found.extend(run("done = True", DONE, LIMITS).passed)

    threads = [threading.Thread(target=work, args=(one,)) for one in [run, other] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 6
