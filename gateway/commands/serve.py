"""`cloister serve`: all processes of a configured host, or one of them for service managers."""

import asyncio
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.commands.common import BAD_INPUT, CommandError, ConfigOption, load_settings

if TYPE_CHECKING:
    from gateway.config import Layout, Settings
    from gateway.engine.manager import EngineManager
    from gateway.supervisor import Hooks, Supervisor

ROLES = {"auditor": frozenset({"auditor"}), "gateway": frozenset({"gateway"})}


def serve(
    config: ConfigOption = None,
    role: Annotated[str, typer.Option("--role", help="gateway, auditor or engine:NAME; all by default.")] = "",
) -> None:
    """Run all processes of this host, or one of them, until SIGTERM."""
    from gateway.supervisor import Hooks

    if config is None:
        raise CommandError("cloister serve needs --config FILE ('cloister up' runs with embedded defaults)", BAD_INPUT)
    settings, layout = load_settings(config)
    if not settings.engine:
        raise CommandError("the configuration has no [[engine]]", BAD_INPUT)
    only = role.removeprefix("engine:") if role.startswith("engine:") else None
    if only is not None and only not in {engine.name for engine in settings.engine}:
        raise CommandError(f"--role names an engine that is not configured: {only}", BAD_INPUT)
    if role and only is None and role not in ROLES:
        raise CommandError("--role is gateway, auditor or engine:NAME", BAD_INPUT)
    hooks = Hooks(
        start_ops=start_ops, make_engines=lambda supervisor: make_engines(supervisor, only), on_ready=_announce
    )
    if role:
        hooks.parts = frozenset({"engines"}) if only else ROLES[role]
    run_supervisor(settings, layout, hooks)


def run_supervisor(settings: "Settings", layout: "Layout", hooks: "Hooks") -> None:
    """Run a supervisor to its end; what cannot be brought up is a CommandError."""
    import uvloop

    from gateway.supervisor import Supervisor, SupervisorError

    async def main() -> None:
        await Supervisor(settings, layout, hooks).run()

    try:
        uvloop.run(main())
    except SupervisorError as error:
        raise CommandError(str(error)) from error


def make_engines(supervisor: "Supervisor", only: str | None = None) -> "EngineManager":
    """The engine manager with the models that this installation knows."""
    from gateway.engine.manager import EngineManager
    from gateway.starter import model_digest

    return EngineManager(
        supervisor.settings,
        supervisor.layout,
        model_dir=model_directory,
        digest=model_digest,
        on_event=lambda kind, fields: _on_event(supervisor, kind, fields),
        only=only,
    )


def model_directory(model: str) -> Path:
    """Where a model lies; raises EngineError for one that is not there."""
    from gateway.config import STARTER
    from gateway.engine.errors import EngineError
    from gateway.starter import MODEL_DIR

    if model == STARTER:
        return MODEL_DIR
    path = Path(model)
    if not (path / "config.json").is_file():
        raise EngineError(
            f"the model {model!r} is not a directory with a config.json; give its path in [[engine]] model"
        )
    return path


async def start_ops(supervisor: "Supervisor", listener: socket.socket) -> None:
    """Serve the ops port on the supervisor's loop, without uvicorn's server and its tick."""
    from uvicorn.config import Config
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    from uvicorn.server import ServerState

    from gateway.admin.ops import OpsSources, build_ops

    settings = supervisor.settings
    sources = OpsSources(
        metrics_dir=supervisor.layout.metrics,
        audit=supervisor.audit,
        engines=lambda: _engine_states(supervisor),
        external=supervisor.external_health,
        workers=supervisor.worker_counts,
        models_rule=settings.policy.models,
        durability=settings.audit.durability,
        loopback=settings.ops.address.host in {"127.0.0.1", "::1", "localhost"},
    )
    config = Config(
        build_ops(sources), loop="none", http="httptools", ws="none", lifespan="off", log_config=None,
        access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=5, limit_concurrency=64,
    )  # fmt: skip
    config.load()
    state, loop = ServerState(), asyncio.get_running_loop()
    await loop.create_server(lambda: HttpToolsProtocol(config, state, {}, loop), sock=listener)


def _engine_states(supervisor: "Supervisor") -> list[Any]:
    """What this supervisor runs, and what other services run on this host as their state files say."""
    from gateway.engine.state import read_state

    states = {(state.name, state.replica): state for state in supervisor.engines.snapshot()}
    for engine in supervisor.settings.engine:
        for number in range(0 if engine.external else engine.replicas):
            state = read_state(supervisor.layout.engine_state(engine.name, number))
            if state is not None:
                states.setdefault((engine.name, number), state)
    return list(states.values())


def _on_event(supervisor: "Supervisor", kind: str, fields: dict[str, Any]) -> None:
    supervisor.record(kind, fields)
    words = {name: value for name, value in fields.items() if isinstance(value, str | int)}
    supervisor.log.line("error" if kind in {"engine.failed", "engine.hung"} else "info", kind, **words)


def _announce(supervisor: "Supervisor") -> None:
    supervisor.log.line(
        "info",
        "serving",
        url=str(supervisor.settings.server.address),
        ops=str(supervisor.settings.ops.address),
        since=int(time.time()),
    )
    sys.stderr.flush()
