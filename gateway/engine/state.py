"""State files: what whoever runs a replica tells the gateway about it, and what to clean after a crash."""

import contextlib
import json
import os
import signal
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

MAX_STATE_BYTES = 64 << 10
READY, STARTING, HUNG, FAILED, STOPPED = "ready", "starting", "hung", "failed", "stopped"


@dataclass(frozen=True, slots=True)
class EngineState:
    """One replica as it is now."""

    name: str
    replica: int
    state: str
    socket: str
    seal: str
    since: int
    pid: int = 0
    pid_started: int = 0
    model_digest: str = ""
    engine_version: str = ""
    detail: str = ""
    seal_detail: dict[str, Any] = field(default_factory=dict)


def write_state(path: Path, state: EngineState) -> None:
    """Replace the state file atomically (not durably: it means nothing after a reboot)."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_suffix(".tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(asdict(state), file)
    temporary.rename(path)


def read_state(path: Path) -> EngineState | None:
    """The state, or `None` when there is none that can be read."""
    try:
        with path.open("rb") as file:
            table = json.loads(file.read(MAX_STATE_BYTES))
        known = {item.name for item in fields(EngineState)}
        return EngineState(**{name: value for name, value in table.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def started_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 when there is none. Tells a reused pid."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def kill_leftover(pid: int, ticks: int) -> bool:
    """Kill what an earlier run left, if it is still that process; never by name."""
    if pid <= 1 or not ticks or started_ticks(pid) != ticks:
        return False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
    return True
