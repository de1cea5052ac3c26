"""All replicas of this host: started together, watched by progress, restarted with backoff, stopped together."""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gateway.config import Engine, Layout, Settings
from gateway.engine import health
from gateway.engine.errors import EngineError
from gateway.engine.launch import Flavour, Replica, command, flavour
from gateway.engine.process import exited
from gateway.engine.state import (
    FAILED,
    HUNG,
    READY,
    STARTING,
    STOPPED,
    EngineState,
    kill_leftover,
    read_state,
    started_ticks,
    write_state,
)

BUSY_S, IDLE_S = 2.0, 5.0
STOP_S = 5.0

Event = Callable[[str, dict[str, Any]], None]
Build = Callable[[Engine, Path, Path, str], list[str]]


class EngineManager:
    """Runs the engines that the settings describe."""

    def __init__(
        self,
        settings: Settings,
        layout: Layout,
        *,
        model_dir: Callable[[str], Path],
        digest: Callable[[Path], str],
        on_event: Event,
        only: str | None = None,
        build: Build = command,
    ) -> None:
        self._layout, self._model_dir, self._digest, self._on_event, self._build = (
            layout,
            model_dir,
            digest,
            on_event,
            build,
        )
        self._engines = [e for e in settings.engine if not e.external and only in (None, e.name)]
        self._tasks: list[asyncio.Task[None]] = []
        self._states: dict[tuple[str, int], EngineState] = {}
        self._stopping = False

    def clean_leftovers(self) -> int:
        """Kill the replicas that a killed supervisor left; returns how many there were."""
        killed = 0
        for engine in self._engines:
            for number in range(engine.replicas):
                file = self._layout.engine_state(engine.name, number)
                old = read_state(file)
                if old is not None:
                    killed += kill_leftover(old.pid, old.pid_started)
                file.unlink(missing_ok=True)
        return killed

    def start(self) -> None:
        """Start every replica, each in its own task; raises EngineError at once for what can never work."""
        which = flavour() if self._engines and self._build is command else Flavour("cpu", "", "")
        for engine in self._engines:
            model = self._model_dir(engine.model)
            self._build(engine, model, Path("sock"), which.device)
            for number in range(engine.replicas):
                self._set(engine, number, STARTING)
                self._tasks.append(asyncio.create_task(self._keep(engine, number, model, which)))

    async def stop(self) -> None:
        """Stop all replicas."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def snapshot(self) -> list[EngineState]:
        """All replicas as they are now."""
        return list(self._states.values())

    async def _keep(self, engine: Engine, number: int, model: Path, which: Flavour) -> None:
        backoff = health.Backoff()
        digest = await asyncio.to_thread(self._digest, model)
        while True:
            replica = Replica(
                engine,
                model,
                self._layout.engine_run(engine.name, number),
                self._layout.engine_socket(engine.name, number),
                self._layout.engine_log(engine.name, number),
                self._build,
                which.device,
            )
            try:
                await self._run_once(replica, number, digest, which)
            except (EngineError, OSError) as error:
                self._set(engine, number, FAILED, detail=str(error), digest=digest)
                self._on_event("engine.failed", {"engine": engine.name, "replica": number, "reason": str(error)[:300]})
            finally:
                loading = not replica.socket.exists()
                await replica.stop(0.0 if loading else STOP_S)
                if self._stopping:
                    self._set(engine, number, STOPPED, digest=digest)
                    self._on_event("engine.stop", {"engine": engine.name, "replica": number})
            await asyncio.sleep(backoff.next_delay_s(time.monotonic()))

    async def _run_once(self, replica: Replica, number: int, digest: str, which: Flavour) -> None:
        engine = replica.engine
        await replica.start()
        pid = replica.process.pid if replica.process else 0
        common: dict[str, Any] = {"digest": digest, "pid": pid, "version": which.version, "replica": replica}
        self._set(engine, number, STARTING, **common)
        await replica.wait_ready(engine.start_timeout_s)
        self._set(engine, number, READY, **common)
        arguments = hashlib.sha256("\0".join(replica.arguments).encode()).hexdigest()
        fields = {
            "arguments": f"sha256:{arguments}",
            "device": which.device,
            "engine": engine.name,
            "model": digest,
            "replica": number,
            "seal": "sealed" if replica.report else "none",
            "seal_probe": replica.report.as_fields() if replica.report else {},
            "version": which.version,
        }
        self._on_event("engine.start", fields)
        watch = health.ProgressWatch(engine.hang_timeout_s)
        while replica.alive:
            seen = await health.observe(f"unix:{replica.socket}")
            if watch.observe(seen, time.monotonic()) == "hung":
                self._set(engine, number, HUNG, **common)
                self._on_event("engine.hung", {"engine": engine.name, "replica": number})
                raise EngineError("the engine made no progress with work at hand and is restarted")
            await self._pause(replica, BUSY_S if seen.running else IDLE_S)
        raise EngineError(f"the engine ended: {replica.last_words()}")

    async def _pause(self, replica: Replica, seconds: float) -> None:
        process = replica.process
        if process is None:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(exited(process.pid), seconds)

    def _set(
        self,
        engine: Engine,
        number: int,
        state: str,
        *,
        digest: str = "",
        detail: str = "",
        pid: int = 0,
        version: str = "",
        replica: Replica | None = None,
    ) -> None:
        report = replica.report if replica else None
        entry = EngineState(
            name=engine.name,
            replica=number,
            state=state,
            socket=str(self._layout.engine_socket(engine.name, number)),
            seal="sealed" if report else ("pending" if engine.seal == "required" else "none"),
            since=int(time.time()),
            pid=pid,
            pid_started=started_ticks(pid) if pid else 0,
            model_digest=digest,
            engine_version=version,
            detail=detail,
            seal_detail=report.as_fields() if report else {},
        )
        self._states[engine.name, number] = entry
        write_state(self._layout.engine_state(engine.name, number), entry)
