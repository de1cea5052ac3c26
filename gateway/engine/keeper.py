"""Keeps an unsealed engine from outliving us: `python -m gateway.engine.keeper COMMAND …`.

Runs the command in its own process group as this process's child, adopts what that leaves behind, and kills
all of it when the supervisor ends (the kernel sends SIGTERM then) or the command does. Source: prctl(2).
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> int:
    """Run the command to its end."""
    parent = os.getppid()
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    engine = subprocess.Popen(sys.argv[1:])

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            engine.wait(2.0 if os.getppid() == parent else 0.2)
        os.killpg(0, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    if os.getppid() != parent:
        end()
    code = engine.wait()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    return code


if __name__ == "__main__":
    sys.exit(main())
