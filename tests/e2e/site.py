"""A whole Cloister in front of the fake engine: `cloister serve` as a subprocess with a home of its own."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2

from tests.fakes.engine import FakeEngine

CLOISTER = Path(sys.executable).with_name("cloister")
GIVE_UP_S = 30.0


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], Any], what: str, patience_s: float = GIVE_UP_S) -> Any:
    """Poll until `condition` is true and return its value; fail after the deadline."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {patience_s} s: {what}")


class Site:
    """One running host; `start` and `stop` may be called again."""

    def __init__(self, *, workers: int = 1, server: str = "", extra: str = "", over: str = "unix") -> None:
        self.base = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))
        self.home, self.config, self.stderr = self.base / "home", self.base / "c.toml", self.base / "stderr"
        self.port, self.ops_port = free_port(), free_port()
        self.engine = FakeEngine(self.base / "engine.sock")
        self._server, self._extra, self._workers, self._over = server, extra, workers, over
        self.process: subprocess.Popen[bytes] | None = None
        self._key = ""

    def __enter__(self) -> Self:
        self.engine.__enter__()
        self.write_config()
        self.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.engine.__exit__(None, None, None)
        shutil.rmtree(self.base, ignore_errors=True)

    def write_config(self) -> None:
        """Write the configuration file."""
        url = f"unix:{self.engine.socket}" if self._over == "unix" else f"http://127.0.0.1:{self.engine.port}"
        self.config.write_text(
            f'[server]\nlisten = "127.0.0.1:{self.port}"\nworkers = {self._workers}\n{self._server}\n'
            f'[ops]\nlisten = "127.0.0.1:{self.ops_port}"\n'
            f'[[engine]]\nname = "fake"\nurls = ["{url}"]\n{self._extra}\n'
            f'[[engine]]\nname = "other"\nurls = ["{url}"]\n'
        )

    @property
    def environment(self) -> dict[str, str]:
        """What every `cloister` command of this site runs with."""
        return {**os.environ, "CLOISTER_HOME": str(self.home)}

    def launch(self) -> "subprocess.Popen[bytes]":
        """Start `cloister serve` without waiting for it."""
        command = [str(CLOISTER), "serve", "--config", str(self.config)]
        with self.stderr.open("ab") as output:
            return subprocess.Popen(command, env=self.environment, stderr=output, stdout=output)

    def start(self) -> None:
        """Start and wait until requests are served."""
        self.process = self.launch()
        wait_until(self._ready, "readyz")

    def _ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        try:
            return httpx2.get(f"{self.ops_url}/readyz", timeout=5).status_code == 200
        except httpx2.TransportError:
            return False

    def stop(self, patience_s: float = 20.0) -> int:
        """SIGTERM and wait; returns the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(patience_s)

    def kill(self) -> None:
        """kill -9 of the supervisor."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    @property
    def url(self) -> str:
        """The data port."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def ops_url(self) -> str:
        """The ops port."""
        return f"http://127.0.0.1:{self.ops_port}"

    @property
    def key(self) -> str:
        """A key that may do everything."""
        if not self._key:
            self._key = self.create_key("all")
        return self._key

    def create_key(self, name: str, *options: str) -> str:
        """`cloister key create --quiet`."""
        result = self.cloister("key", "create", "--tenant", "t", "--name", name, "--quiet", *options)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def cloister(self, *arguments: str, config: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run a `cloister` command on this site."""
        command = [str(CLOISTER), *arguments, *(("--config", str(self.config)) if config else ())]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)

    def client(self, key: str | None = None, **options: Any) -> httpx2.Client:
        """An HTTP client of the data port with a key."""
        headers = {"authorization": f"Bearer {self.key if key is None else key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=20, **options)

    @contextmanager
    def streaming(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> Iterator[httpx2.Response]:
        """A streamed request under way."""
        with self.client() as client, client.stream("POST", path, json=body) as response:
            yield response

    def log(self) -> str:
        """All that the processes have written to standard error."""
        return self.stderr.read_text(errors="replace") if self.stderr.exists() else ""

    def records(self, kind: str = "") -> list[dict[str, Any]]:
        """The audit log's records, of one kind or all."""
        found = []
        for path in sorted((self.home / "audit").glob("records-*.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                if line.strip(b"\x00"):
                    found.append(json.loads(line))
        return [record for record in found if not kind or record["kind"] == kind]

    def metric(self, name: str) -> float:
        """The sum of a metric's samples whose line starts with `name`."""
        text = httpx2.get(f"{self.ops_url}/metrics", timeout=5).text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))

    def processes(self) -> list[int]:
        """Every process of this site, found by its home in the environment."""
        mark = f"CLOISTER_HOME={self.home}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if mark in (entry / "environ").read_bytes().split(b"\x00"):
                        found.append(int(entry.name))
                except OSError:
                    continue
        return found

    def child(self, module: str) -> int:
        """The process id of the child that runs this module."""
        for pid in self.processes():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\x00")
            except OSError:
                continue
            if module.encode() in words:
                return pid
        raise AssertionError(f"{module} is not running")


def chat(text: str = "words:5", **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"model": "fake", "messages": [{"role": "user", "content": text}], **fields}


def raw(port: int, data: bytes, *, patience_s: float = 10.0) -> bytes:
    """Send bytes as they are and read until the other side closes or is quiet for a while."""
    with socket.create_connection(("127.0.0.1", port), timeout=patience_s) as connection:
        connection.sendall(data)
        answer = b""
        while True:
            try:
                block = connection.recv(65536)
            except (TimeoutError, ConnectionResetError):
                return answer
            if not block:
                return answer
            answer += block
            connection.settimeout(0.3)
