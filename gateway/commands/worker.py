"""One gateway worker: `python -m gateway.commands.worker`; puts the rooms together and serves the data port.

Reads its settings as JSON from an inherited file descriptor, listens on an inherited socket, writes one byte
to an inherited pipe when it is ready. SIGTERM drains: running requests finish, new ones get 503.
"""

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
import time
from email.utils import formatdate
from pathlib import Path

import uvloop
from prometheus_client import CollectorRegistry
from uvicorn.config import Config

from gateway.app import Gateway
from gateway.audit.client import AuditClient
from gateway.audit.process import die_with_parent
from gateway.config import Layout, Settings
from gateway.engine.directory import EngineDirectory
from gateway.guard.protocol import Bounds, Front
from gateway.guard.records import Records
from gateway.identity.credentials import load_pepper
from gateway.identity.keyring import KeyRing
from gateway.store.store import Store
from gateway.telemetry.logs import Log
from gateway.telemetry.metrics import Telemetry

REFRESH_S = 0.5
BACKLOG = 2048
GC_OBJECTS = 3_000  # requests leave few cycles behind: look for them seldom


class Worker:
    """A running gateway worker."""

    def __init__(self, settings: Settings, layout: Layout, listener: socket.socket) -> None:
        self._settings, self._layout, self._listener = settings, layout, listener
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self, ready: int) -> None:
        """Serve until told to stop, then drain."""
        settings, layout = self._settings, self._layout
        loop = asyncio.get_running_loop()
        pepper = load_pepper(layout.pepper)
        store = await Store.open(settings.store.url, layout.home)
        ring = KeyRing(store, pepper)
        await ring.refresh()
        audit = await AuditClient.connect(layout.auditor_socket, deadline_s=settings.audit.deadline_s)
        telemetry = Telemetry(CollectorRegistry())
        records = Records(audit, telemetry)
        directory = EngineDirectory(settings, layout, created=int(time.time()))
        gateway = Gateway(
            ring=ring,
            directory=directory,
            records=records,
            telemetry=telemetry,
            log=Log("gateway"),
            salt_key=pepper,
            max_body_bytes=settings.server.max_body_bytes,
        )
        front = self._front(gateway)
        server = await loop.create_server(front.connect, sock=self._listener, backlog=BACKLOG)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set if number == signal.SIGTERM else lambda: None)
        refresh = asyncio.create_task(self._refresh(ring, directory, front))
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_OBJECTS, 20, 50)
        os.write(ready, b"r")
        os.close(ready)
        await self._stop.wait()
        gateway.draining = True
        server.close()
        loop.add_signal_handler(signal.SIGTERM, self._hurry.set)
        await self._drain(front)
        refresh.cancel()
        records.flush()
        telemetry.flush()
        await asyncio.sleep(0)
        directory.close()
        await audit.close()
        await store.close()

    def _front(self, gateway: Gateway) -> Front:
        server = self._settings.server
        config = Config(
            gateway, loop="none", http="httptools", ws="none", lifespan="off", interface="asgi3", log_config=None,
            proxy_headers=False, server_header=False, backlog=BACKLOG,
        )  # fmt: skip
        config.load()
        bounds = Bounds(
            server.max_header_count,
            server.max_header_bytes,
            server.max_body_bytes,
            server.request_deadline_s,
            server.keep_alive_s,
            server.max_connections,
        )
        return Front(config, bounds, gateway.new_request_id, gateway.protocol_refused)

    async def _refresh(self, ring: KeyRing, directory: EngineDirectory, front: Front) -> None:
        """Twice a second: keys that changed, engines that came or went, the Date header."""
        while True:
            front.state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]
            await ring.refresh()
            directory.refresh()
            await asyncio.sleep(REFRESH_S)

    async def _drain(self, front: Front) -> None:
        for connection in list(front.state.connections):
            connection.shutdown()
        deadline = time.monotonic() + self._settings.server.drain_s
        while front.state.tasks and time.monotonic() < deadline and not self._hurry.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), 0.05)
        for task in list(front.state.tasks):
            task.cancel()
        for connection in list(front.state.connections):
            connection.transport.close()
        await asyncio.sleep(0)


def main() -> int:
    """Entry point of the worker process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--settings-fd", type=int, required=True)
    parser.add_argument("--listen-fd", type=int, required=True)
    parser.add_argument("--ready-fd", type=int, required=True)
    arguments = parser.parse_args()
    die_with_parent()
    with os.fdopen(arguments.settings_fd, "rb") as file:
        settings = Settings.model_validate_json(file.read())
    listener = socket.socket(fileno=arguments.listen_fd)
    uvloop.run(Worker(settings, Layout(arguments.home, settings), listener).run(arguments.ready_fd))
    return 0


if __name__ == "__main__":
    sys.exit(main())
