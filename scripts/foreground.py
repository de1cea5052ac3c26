"""Run a command under `make` so that Ctrl-C and SIGTERM end it as they would without `make`.

`make` dies of an interrupt itself, however cleanly its recipe ended, and does not pass on one that it alone got.
So on a terminal the command gets a process group of its own in the foreground: Ctrl-C reaches it and not `make`,
which then ends with the command's exit code. SIGINT, SIGTERM and SIGHUP sent here or to `make` are passed on, and
the command is told to end when `make` is gone. Standard library only; Linux.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOK_EVERY_S = 1.0


def start(command: list[str], terminal: bool, mask: set[int]) -> int:
    """Fork and exec; both sides set the group, so that it holds whoever runs first."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        if terminal:
            os.tcsetpgrp(0, os.getpid())
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        try:
            os.execvp(command[0], command)  # noqa: S606
        except OSError as error:
            print(f"{command[0]}: {error.strerror}", file=sys.stderr)
            os._exit(127)
    with contextlib.suppress(OSError):  # it has set it itself, and is past exec
        os.setpgid(pid, pid)
    return pid


def interrupted(parent: int) -> bool:
    """Whether `make` has taken an interrupt: it then waits for us, with SIGINT no longer caught."""
    try:
        status = Path(f"/proc/{parent}/status").read_text()
    except OSError:
        return False
    caught = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "SigCgt: ffffffff")
    return not int(caught.split()[1], 16) & 1 << (signal.SIGINT - 1)


def watch(pid: int, parent: int) -> int:
    """Pass signals on until the command has ended; return its wait status."""
    make_catches = not interrupted(parent)
    told = False
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if ended and os.WIFSTOPPED(status):
            os.kill(pid, signal.SIGCONT)  # nobody here could resume it: Ctrl-Z does nothing
        elif ended:
            return status
        caught = signal.sigtimedwait({*PASSED_ON, signal.SIGCHLD}, LOOK_EVERY_S)
        if caught is not None and caught.si_signo in PASSED_ON:
            told = True
            os.kill(pid, caught.si_signo)
        elif not told and os.getppid() != parent:
            told = True
            os.kill(pid, signal.SIGTERM)
        elif not told and make_catches and interrupted(parent):
            told = True
            os.kill(pid, signal.SIGINT)


def main() -> NoReturn:
    """Run the command line; exit as it did."""
    parent = os.getppid()
    mask = set(signal.pthread_sigmask(signal.SIG_BLOCK, {*PASSED_ON, signal.SIGCHLD}))
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    terminal = os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp()
    pid = start(sys.argv[1:], terminal, mask)
    try:
        status = watch(pid, parent)
    finally:
        if terminal:
            os.tcsetpgrp(0, os.getpgrp())
    sys.exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
