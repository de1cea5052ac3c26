"""scripts/foreground.py under a real `make`: who gets the signal, how `make` ends, what is left running."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

FOREGROUND = Path(__file__).resolve().parents[2] / "scripts" / "foreground.py"
GIVE_UP_S = 20.0
CHILD = """\
import signal, sys, time
got = []
def drain(number, frame):
    with open("log", "a") as log:
        log.write(signal.Signals(number).name + "\\n")
    time.sleep(1.3)  # longer than foreground.py takes to look again: a second signal would be seen
    with open("log", "a") as log:
        log.write("drained\\n")
    sys.exit(int(sys.argv[1]))
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, drain)
with open("log", "a") as log:
    log.write("up\\n")
time.sleep(60)
"""


class Run:
    """A folder with a Makefile like ours, and what the command wrote."""

    def __init__(self, folder: Path, code: int) -> None:
        self.folder = folder
        (folder / "child.py").write_text(CHILD)
        command = f"exec {sys.executable} -S {FOREGROUND} {sys.executable} child.py {code}"
        (folder / "Makefile").write_text(f"run:\n\t@{command}\n")

    def log(self) -> list[str]:
        path = self.folder / "log"
        return path.read_text().split() if path.exists() else []

    def wait_for(self, word: str) -> None:
        deadline = time.monotonic() + GIVE_UP_S
        while word not in self.log():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, 0)


@pytest.fixture
def piped(run: Run) -> Iterator[subprocess.Popen[str]]:
    """`make run` without a terminal, in a process group of its own."""
    with subprocess.Popen(
        ["make", "--no-print-directory", "run"],
        cwd=run.folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        run.wait_for("up")
        yield process


def on_terminal(folder: Path, act: Callable[[int, int], None], ready: Callable[[], None]) -> tuple[int, str]:
    """`make run` on a terminal; its wait status and what it printed."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execvp("make", ["make", "--no-print-directory", "run"])
    ready()
    act(pid, terminal)
    printed = b""
    try:
        while block := os.read(terminal, 4096):
            printed += block
    except OSError:
        pass  # how a pseudo-terminal says that the other side is closed
    status = os.waitpid(pid, 0)[1]
    os.close(terminal)
    return status, printed.decode()


# pty.fork warns where threads run: only on newer interpreters, and the child execs at once
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
class TestOnATerminal:
    def test_control_c_drains_and_make_ends_well(self, run: Run) -> None:
        status, printed = on_terminal(
            run.folder, lambda _, tty: void(os.write(tty, b"\x03")), lambda: run.wait_for("up")
        )
        assert status == 0
        assert run.log() == ["up", "SIGINT", "drained"]
        assert "***" not in printed

    def test_sigterm_to_make_drains(self, run: Run) -> None:
        status, printed = on_terminal(
            run.folder, lambda pid, _: os.kill(pid, signal.SIGTERM), lambda: run.wait_for("up")
        )
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert run.log() == ["up", "SIGTERM", "drained"]
        assert "***" not in printed

    def test_a_failure_is_makes_failure(self, tmp_path: Path) -> None:
        run = Run(tmp_path, 3)
        status, printed = on_terminal(
            run.folder, lambda _, tty: void(os.write(tty, b"\x03")), lambda: run.wait_for("up")
        )
        assert os.waitstatus_to_exitcode(status) == 2
        assert "Error 3" in printed


def void(_: object) -> None:
    return None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_make_alone_reaches_the_command(number: int, run: Run, piped: "subprocess.Popen[str]") -> None:
    piped.send_signal(number)
    printed, _ = piped.communicate(timeout=GIVE_UP_S)
    assert piped.returncode == -number
    assert run.log() == ["up", signal.Signals(number).name, "drained"]
    assert "***" not in printed


def test_an_interrupt_of_the_whole_group_arrives_once(run: Run, piped: "subprocess.Popen[str]") -> None:
    os.killpg(piped.pid, signal.SIGINT)
    piped.communicate(timeout=GIVE_UP_S)
    assert run.log() == ["up", "SIGINT", "drained"]


def test_the_command_ends_when_make_was_killed(run: Run, piped: "subprocess.Popen[str]") -> None:
    piped.kill()
    run.wait_for("drained")
    assert run.log() == ["up", "SIGTERM", "drained"]


def test_a_command_that_is_not_there_is_said() -> None:
    command = [sys.executable, str(FOREGROUND), "no-such-command"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 127
    assert "no-such-command: No such file" in done.stderr
