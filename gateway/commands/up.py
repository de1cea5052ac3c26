"""`cloister up`: the starter model behind the gateway in one command, with embedded defaults."""

import asyncio
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.commands.common import CommandError, load_settings

if TYPE_CHECKING:
    from gateway.config import Layout, Settings
    from gateway.supervisor import Supervisor

TENANT, KEY_NAME = "default", "up"
QUESTION = "What is Cloister?"
SHOW_AFTER_S = 2.0


def up(
    port: Annotated[int | None, typer.Option("--port", min=0, max=65535, help="Data port.")] = None,
    ops_port: Annotated[int | None, typer.Option("--ops-port", min=0, max=65535, help="Ops port.")] = None,
) -> None:
    """Serve the starter model: prints URL, a key and lines to paste. Ctrl-C stops it."""
    from gateway.commands.serve import make_engines, run_supervisor, start_ops
    from gateway.engine.errors import EngineError
    from gateway.engine.launch import flavour
    from gateway.supervisor import Hooks

    settings, layout = load_settings(None)
    settings = _with_ports(settings, port, ops_port)
    try:
        which = flavour()
    except EngineError as error:
        raise CommandError(str(error)) from error
    progress = Progress()
    progress(f"engine: vLLM {which.version} for {which.device} ({which.reason})")
    layout.logs.mkdir(parents=True, exist_ok=True, mode=0o700)
    output = os.open(layout.logs / "gateway.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    async def on_ready(supervisor: "Supervisor") -> None:
        await _wait_for_engine(supervisor, progress)
        key = await _fresh_key(settings, layout)
        _write_up_file(settings, layout, key)
        progress.done()
        _welcome(settings, layout, key)

    hooks = Hooks(
        start_ops=start_ops, make_engines=make_engines, on_ready=on_ready, on_progress=progress, child_output=output
    )
    run_supervisor(settings, layout, hooks)
    typer.echo("stopped: everything that was started is gone")


class Progress:
    """Says what is being done and for how long; plain lines where there is no terminal."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, text: str) -> None:
        """A next step begins."""
        sys.stderr.write(f"[{time.monotonic() - self._started:5.1f} s] {text}\n")
        sys.stderr.flush()

    def done(self) -> None:
        """All steps are through."""
        self("ready")


async def _wait_for_engine(supervisor: "Supervisor", progress: Progress) -> None:
    from gateway.engine.state import FAILED, READY

    shown = told = ""
    last = time.monotonic()
    while True:
        states = supervisor.engines.snapshot()
        if states and all(state.state == READY for state in states):
            return
        for state in states:
            if state.state == FAILED and state.detail != shown:
                shown = state.detail
                progress(f"the engine failed, trying again: {state.detail}")
            phase = _phase(supervisor.layout.engine_log(state.name, state.replica))
            if time.monotonic() - last > SHOW_AFTER_S and (phase != told or time.monotonic() - last > 3 * SHOW_AFTER_S):
                told, last = phase, time.monotonic()
                progress(f"the engine is loading: {phase}")
        await asyncio.sleep(0.1)


def _phase(log: Any) -> str:
    """What the engine is doing, from its log."""
    try:
        text = log.read_text(errors="replace")[-20000:]
    except OSError:
        return "sealing the sandbox"
    for mark, phase in (
        ("Starting vLLM server", "opening its socket"),
        ("KV cache size", "warming up"),
        ("Loading weights took", "preparing the cache"),
        ("Starting to load model", "reading the weights"),
        ("Initializing a V1 LLM engine", "starting the engine core"),
    ):
        if mark in text:
            return phase
    return "importing vLLM"


async def _fresh_key(settings: "Settings", layout: "Layout") -> str:
    """A new key for this run; keys of earlier runs end."""
    from gateway.identity.credentials import load_pepper
    from gateway.identity.service import KeyService, KeySpec
    from gateway.store.store import Store

    store = await Store.open(settings.store.url, layout.home)
    try:
        service = KeyService(store, load_pepper(layout.pepper), settings.identity.environment)
        for item in await service.list():
            if item["name"] == KEY_NAME and item["tenant"] == TENANT and item["state"] == "active":
                await service.revoke(item["id"])
        return (await service.create(KeySpec(TENANT, KEY_NAME)))[1]
    finally:
        await store.close()


def _write_up_file(settings: "Settings", layout: "Layout", key: str) -> None:
    from gateway.trust.files import write_durably

    content = {
        "url": f"http://{settings.server.address}",
        "ops_url": f"http://{settings.ops.address}",
        "key": key,
        "model": settings.engine[0].name,
        "audit_dir": str(layout.audit),
        "pid": os.getpid(),
    }
    write_durably(layout.up_file, json.dumps(content, indent=2).encode() + b"\n")


def _with_ports(settings: "Settings", port: int | None, ops_port: int | None) -> "Settings":
    server, ops = settings.server, settings.ops
    if port is not None:
        server = server.model_copy(update={"listen": f"127.0.0.1:{port or _free_port()}"})
    if ops_port is not None:
        ops = ops.model_copy(update={"listen": f"127.0.0.1:{ops_port or _free_port()}"})
    return settings.model_copy(update={"server": server, "ops": ops})


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _welcome(settings: "Settings", layout: "Layout", key: str) -> None:
    url, model = f"http://{settings.server.address}", settings.engine[0].name
    ask = json.dumps({"model": model, "messages": [{"role": "user", "content": QUESTION}]})
    typer.echo(f"""
Cloister serves {model!r}: no network for the engine, every request on record.

  URL      {url}/v1
  key      {key}
  metrics  http://{settings.ops.address}/metrics
  audit    {layout.audit}

  curl {url}/v1/chat/completions -H 'Authorization: Bearer {key}' \\
    -H 'Content-Type: application/json' -d '{ask}'

  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="{key}")
  question = {{"role": "user", "content": "{QUESTION}"}}
  print(client.chat.completions.create(model="{model}", messages=[question]).choices[0].message.content)

  cloister audit verify    proves that no record was changed
  Ctrl-C                   stops it; running streams finish first
""")
    sys.stdout.flush()
