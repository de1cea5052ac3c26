"""Which engines a gateway worker can use, read from the settings and the replicas' state files.

Reads nothing but state files below the run directory; a replica whose file is missing, unreadable or not
`ready` is not used. `refresh` is cheap enough to be called twice a second.
"""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from gateway.config import Engine, Layout, Settings
from gateway.engine.client import EngineAddress, EnginePool
from gateway.engine.state import read_state


@dataclass(slots=True)
class Replica:
    """One place an engine answers at."""

    pool: EnginePool
    state_file: Path | None = None
    stamp: tuple[int, int] = (0, 0)
    ready: bool = False


@dataclass(slots=True)
class Target:
    """One engine as requests see it."""

    name: str
    created: int
    external: bool
    digest: str = ""
    max_model_len: int = 0
    replicas: list[Replica] = field(default_factory=list)
    turn: int = 0

    def choose(self) -> EnginePool | None:
        """The pool of a ready replica, in turn; `None` while there is none."""
        if len(self.replicas) == 1:
            only = self.replicas[0]
            return only.pool if only.ready else None
        for _ in self.replicas:
            self.turn = (self.turn + 1) % len(self.replicas)
            if self.replicas[self.turn].ready:
                return self.replicas[self.turn].pool
        return None


class EngineDirectory:
    """All engines of this host by name."""

    def __init__(self, settings: Settings, layout: Layout, *, created: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._targets = {engine.name: self._target(engine, layout, created) for engine in settings.engine}
        self.refresh()

    def get(self, name: str) -> Target | None:
        """The engine of exactly this name."""
        return self._targets.get(name)

    def names(self) -> list[str]:
        """All engine names in the order of the settings."""
        return list(self._targets)

    def refresh(self) -> None:
        """Read the state files that have changed."""
        for target in self._targets.values():
            for replica in target.replicas:
                if replica.state_file is not None:
                    self._refresh_replica(target, replica, replica.state_file)

    def close(self) -> None:
        """Close all connections."""
        for target in self._targets.values():
            for replica in target.replicas:
                replica.pool.close()

    def _refresh_replica(self, target: Target, replica: Replica, file: Path) -> None:
        try:
            status = file.stat()
            stamp = (status.st_mtime_ns, status.st_ino)
        except OSError:
            stamp = (0, 0)
        if stamp == replica.stamp:
            return
        replica.stamp = stamp
        state = read_state(file)
        replica.ready = state is not None and state.state == "ready"
        if state is not None and state.model_digest:
            target.digest = state.model_digest

    def _target(self, engine: Engine, layout: Layout, created: int) -> Target:
        target = Target(engine.name, created, engine.external)
        key = Path(engine.key_file).read_text().strip() if engine.key_file else ""
        urls = engine.urls or tuple(f"unix:{layout.engine_socket(engine.name, n)}" for n in range(engine.replicas))
        for number, url in enumerate(urls):
            pool = EnginePool(EngineAddress(url, key, engine.answer_timeout_s), self._loop)
            state_file = None if engine.external else layout.engine_state(engine.name, number)
            target.replicas.append(Replica(pool, state_file, ready=engine.external))
        return target
