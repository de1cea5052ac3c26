"""The supervisor: starts auditor, gateway workers and engines, restarts what dies, drains and leaves nothing.

Order: folders and lock, leftovers of a killed predecessor, both ports, auditor, workers, ops port, engines; the
stop runs it backwards, the auditor last. Children die with this process (PR_SET_PDEATHSIG), also after
kill -9. Nothing secret is in an argument list or an environment.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway import __version__
from gateway.audit.client import AuditClient
from gateway.audit.errors import AuditUnavailable
from gateway.config import Address, Layout, Settings
from gateway.domain import JsonObject
from gateway.engine.errors import EngineError
from gateway.engine.health import Backoff, fetch
from gateway.engine.manager import EngineManager
from gateway.engine.process import exited
from gateway.engine.state import kill_leftover, started_ticks
from gateway.identity.service import pump_outbox
from gateway.store.store import Store, StoreError
from gateway.telemetry.logs import Log

AUDITOR_READY_S = 120.0
WORKER_READY_S = 60.0
OUTBOX_S = 1.0


class SupervisorError(Exception):
    """The host cannot be brought up; the message says why and what to do."""


@dataclass(slots=True)
class Child:
    """One process that is kept running."""

    name: str
    start: Callable[[], "subprocess.Popen[bytes]"]
    process: "subprocess.Popen[bytes] | None" = None
    ready: bool = False
    ready_pipe: int = -1


@dataclass(slots=True)
class Hooks:
    """What the composition root hands in."""

    start_ops: Callable[["Supervisor", socket.socket], Any]
    make_engines: Callable[["Supervisor"], EngineManager]
    on_ready: Callable[["Supervisor"], Any] = lambda _: None
    on_progress: Callable[[str], Any] = lambda _: None
    child_output: int | None = None
    parts: frozenset[str] = field(default_factory=lambda: frozenset({"auditor", "gateway", "engines"}))


class Supervisor:
    """All processes of one host, or the part of them that a service manager wants here."""

    def __init__(self, settings: Settings, layout: Layout, hooks: Hooks) -> None:
        self.settings, self.layout, self._hooks = settings, layout, hooks
        self.log = Log("supervisor")
        self.audit: AuditClient = None  # type: ignore[assignment]
        self.engines = hooks.make_engines(self)
        self._auditor = Child("auditor", self._start_auditor)
        self._workers: list[Child] = []
        self._tasks: list[asyncio.Task[Any]] = []
        self._stop = asyncio.Event()
        self._signals = 0
        self._lock = -1
        self._events: set[asyncio.Future[Any]] = set()
        self._listener: socket.socket | None = None
        self.stopping = False

    async def run(self) -> None:
        """Bring everything up, keep it up, and take it down on SIGTERM or SIGINT; raises SupervisorError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        self._prepare()
        try:
            await self._bring_up()
            await self._stop.wait()
        finally:
            await self._take_down()

    def worker_counts(self) -> tuple[int, int]:
        """Gateway workers that are ready, and how many there should be."""
        return sum(worker.ready for worker in self._workers), self.settings.server.workers

    async def external_health(self) -> dict[str, bool]:
        """Which engines that something else runs answer now."""
        result: dict[str, bool] = {}
        for engine in self.settings.engine:
            for url in engine.urls:
                try:
                    healthy = (await fetch(url, "/health"))[0] == 200
                except (OSError, ValueError, TimeoutError):
                    healthy = False
                result[engine.name] = result.get(engine.name, False) or healthy
        return result

    def record(self, kind: str, fields: JsonObject) -> None:
        """Append a record without waiting; where it cannot be written the log says so."""
        if self.audit is None:
            return
        future = self.audit.append(kind, fields)
        self._events.add(future)
        future.add_done_callback(lambda done: self._recorded(kind, done))

    def _recorded(self, kind: str, done: "asyncio.Future[Any]") -> None:
        self._events.discard(done)
        if not done.cancelled() and done.exception() is not None:
            self.log.line("error", "record_lost", kind=kind)

    def _prepare(self) -> None:
        layout = self.layout
        for directory in (layout.home, layout.secrets, layout.run, layout.logs, layout.audit):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if layout.run.stat().st_uid != os.getuid() or layout.run.stat().st_mode & 0o077:
            raise SupervisorError(
                "the run directory belongs to somebody else or is open to others: remove it and start again"
            )
        name = "+".join(sorted(self._hooks.parts))
        self._lock = os.open(layout.run / f"lock-{name}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._lock, 32).decode(errors="replace").strip()
            raise SupervisorError(
                f"Cloister already runs on this state folder (process {holder}). "
                "Stop it, or set CLOISTER_HOME to another folder."
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)
        self._clean_leftovers()
        shutil.rmtree(layout.metrics, ignore_errors=True)
        layout.metrics.mkdir(mode=0o700)
        layout.up_file.unlink(missing_ok=True)

    def _clean_leftovers(self) -> None:
        try:
            old = json.loads(self.layout.pid_file.read_text())
        except (OSError, ValueError):
            old = {}
        killed = sum(kill_leftover(int(pid), int(ticks)) for pid, ticks in old.items())
        killed += self.engines.clean_leftovers()
        if killed:
            self.log.line("warning", "leftovers_killed", count=killed)

    def _note_children(self) -> None:
        children = [child.process.pid for child in (self._auditor, *self._workers) if child.process is not None]
        self.layout.pid_file.write_text(json.dumps({str(pid): started_ticks(pid) for pid in children}))

    async def _bring_up(self) -> None:
        parts, progress = self._hooks.parts, self._hooks.on_progress
        ops: socket.socket | None = None
        if "gateway" in parts:
            self._listener = bind(self.settings.server.address, "--port or [server] listen")
            ops = bind(self.settings.ops.address, "--ops-port or [ops] listen")
        if "auditor" in parts:
            progress("starting the auditor (it verifies the audit log first)")
            await self._launch_auditor()
            self._tasks.append(asyncio.create_task(self._keep_auditor()))
        self.audit = await AuditClient.connect(self.layout.auditor_socket, deadline_s=self.settings.audit.deadline_s)
        if "gateway" in parts and ops is not None:
            self.record(
                "gateway.start",
                {"config": self.settings.digest(), "version": __version__, "workers": self.settings.server.workers},
            )
            progress("starting the gateway")
            self._workers = [Child(f"worker-{n}", self._start_worker) for n in range(self.settings.server.workers)]
            for worker in self._workers:
                await self._launch_worker(worker)
                self._tasks.append(asyncio.create_task(self._keep_worker(worker)))
            self._tasks.append(asyncio.create_task(self._pump_outbox()))
            await self._hooks.start_ops(self, ops)
        if "engines" in parts:
            progress("starting the engines")
            try:
                self.engines.start()
            except EngineError as error:
                raise SupervisorError(str(error)) from error
        self._tasks.append(asyncio.create_task(_call(self._hooks.on_ready, self)))

    async def _take_down(self) -> None:
        self.stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._end(list(self._workers), self.settings.server.drain_s + 5.0)
        if self._listener is not None:
            self._listener.close()
        await self.engines.stop()
        if self.audit is not None:
            if "gateway" in self._hooks.parts:
                with contextlib.suppress(AuditUnavailable):
                    await self.audit.append("gateway.stop", {"version": __version__})
            await asyncio.gather(*self._events, return_exceptions=True)
            await self.audit.close()
        await self._end([self._auditor], 30.0)
        self.layout.up_file.unlink(missing_ok=True)
        if self._lock >= 0:
            if len(self._hooks.parts) > 1:
                shutil.rmtree(self.layout.run, ignore_errors=True)
            os.close(self._lock)

    def _on_signal(self) -> None:
        self._signals += 1
        self._stop.set()
        if self._signals > 1:
            for worker in self._workers:
                if worker.process is not None and worker.process.poll() is None:
                    worker.process.terminate()

    async def _end(self, children: list[Child], patience_s: float) -> None:
        running = [c.process for c in children if c.process is not None and c.process.poll() is None]
        for process in running:
            process.terminate()
        if running:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.gather(*(exited(process.pid) for process in running)), patience_s)
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()

    def _start_auditor(self) -> "subprocess.Popen[bytes]":
        layout, audit = self.layout, self.settings.audit
        command = [sys.executable, "-m", "gateway.audit.process", "--dir", str(layout.audit),
                   "--key", str(layout.audit_key), "--socket", str(layout.auditor_socket),
                   "--durability", audit.durability]  # fmt: skip
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._hooks.child_output
        )

    async def _launch_auditor(self) -> None:
        child = self._auditor
        child.process = process = child.start()
        self._note_children()
        pipe = process.stdout
        line = await asyncio.wait_for(asyncio.to_thread(pipe.readline), AUDITOR_READY_S) if pipe else b""
        if line.strip() != b"ready":
            code = process.wait()
            damaged = "the audit log is damaged: run 'cloister audit verify'" if code == 4 else "see its message above"
            raise SupervisorError(f"the auditor does not start: {damaged}")
        child.ready = True

    async def _keep_auditor(self) -> None:
        backoff = Backoff()
        while True:
            if self._auditor.process is not None:
                await exited(self._auditor.process.pid)
                self.log.line("error", "auditor_ended", code=self._auditor.process.wait())
            self._auditor.ready = False
            await asyncio.sleep(min(5.0, backoff.next_delay_s(time.monotonic())))
            with contextlib.suppress(SupervisorError, TimeoutError):
                await self._launch_auditor()

    def _start_worker(self) -> "subprocess.Popen[bytes]":
        if self._listener is None:
            raise SupervisorError("there is no listener")
        settings_out, settings_in = os.pipe()
        ready_out, ready_in = os.pipe()
        listen = self._listener.fileno()
        command = [sys.executable, "-m", "gateway.commands.worker", "--home", str(self.layout.home),
                   "--settings-fd", str(settings_out), "--listen-fd", str(listen),
                   "--ready-fd", str(ready_in)]  # fmt: skip
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(self.layout.metrics)}
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=self._hooks.child_output, env=environment,
                pass_fds=(settings_out, listen, ready_in),
            )  # fmt: skip
        finally:
            os.close(settings_out)
            os.close(ready_in)
        with os.fdopen(settings_in, "wb") as file:
            file.write(self.settings.model_dump_json().encode())
        self._pipe = ready_out
        return process

    async def _launch_worker(self, worker: Child) -> None:
        worker.process = worker.start()
        pipe, loop, ready = self._pipe, asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(pipe, ready.set)
        try:
            await asyncio.wait_for(ready.wait(), WORKER_READY_S)
            worker.ready = os.read(pipe, 1) == b"r"
        except TimeoutError:
            worker.process.kill()
        finally:
            loop.remove_reader(pipe)
            os.close(pipe)
        self._note_children()
        if not worker.ready:
            raise SupervisorError("a gateway worker does not start: see its message above")

    async def _keep_worker(self, worker: Child) -> None:
        backoff = Backoff()
        while True:
            if worker.process is not None:
                await exited(worker.process.pid)
                code = worker.process.wait()
                worker.ready = False
                self.log.line("error", "worker_ended", worker=worker.name, code=code)
            await asyncio.sleep(backoff.next_delay_s(time.monotonic()))
            with contextlib.suppress(SupervisorError):
                await self._launch_worker(worker)

    async def _pump_outbox(self) -> None:
        store = await Store.open(self.settings.store.url, self.layout.home)
        try:
            delivered = False
            while True:
                if not (store.unchanged() and delivered):
                    delivered = False
                    with contextlib.suppress(StoreError, AuditUnavailable):
                        while await pump_outbox(store, self.audit.append):
                            pass
                        delivered = True
                await asyncio.sleep(OUTBOX_S)
        finally:
            await store.close()


def bind(address: Address, setting: str) -> socket.socket:
    """A listening socket; raises SupervisorError that names the setting to change."""
    try:
        if address.path:
            path = Path(address.path)
            path.unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(str(path))
        else:
            family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address.host, address.port))
    except OSError as error:
        raise SupervisorError(
            f"cannot listen on {address}: {error.strerror}. Choose another with {setting}."
        ) from error
    listener.listen(2048)
    listener.setblocking(False)
    return listener


async def _call(hook: Callable[[Supervisor], Any], supervisor: Supervisor) -> None:
    result = hook(supervisor)
    if asyncio.iscoroutine(result):
        await result
