"""`cloister doctor`: what is wrong on this host, why it matters, and the command that repairs it."""

import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.commands.common import NEGATIVE, ConfigOption, JsonOption, load_settings, print_json

if TYPE_CHECKING:
    from gateway.config import Layout, Settings


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    id: str
    level: str
    what: str
    why: str
    repair: str = ""


def doctor(
    config: ConfigOption = None,
    egress: Annotated[bool, typer.Option("--egress", help="Try to get out of a sandbox like the engines'.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check this host; exit 1 when something must be repaired."""
    settings, layout = load_settings(config)
    findings = [_host(), _engine(), _bubblewrap(), *_seals(settings, layout), *_rules(settings), *_modes(layout)]
    if egress:
        findings.append(_egress())
    ok = all(finding.level != "error" for finding in findings)
    if as_json:
        print_json({"ok": ok, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            typer.echo(f"{finding.level:8}{finding.id:18}{finding.what}")
            if finding.level in {"warning", "error"}:
                typer.echo(
                    f"{'':26}why: {finding.why}" + (f"\n{'':26}repair: {finding.repair}" if finding.repair else "")
                )
    raise typer.Exit(0 if ok else NEGATIVE)


def _host() -> Finding:
    what = f"Linux {platform.release()}, Python {platform.python_version()}, {os.cpu_count()} processors"
    return Finding("host", "ok", what, "the ground everything stands on")


def _engine() -> Finding:
    from gateway.engine.errors import EngineError
    from gateway.engine.launch import flavour

    why = "without an engine nothing can be served"
    try:
        which = flavour()
    except EngineError as error:
        return Finding("engine", "error", str(error), why, "make setup")
    level = "warning" if "make setup" in which.reason else "ok"
    return Finding("engine", level, f"vLLM {which.version} for {which.device}: {which.reason}", why, "make setup")


def _bubblewrap() -> Finding:
    from gateway.engine import seal

    program = shutil.which("bwrap")
    why = "the kernel sandbox is what makes egress impossible"
    if program is None:
        return Finding("bubblewrap", "error", "bubblewrap is missing", why, seal.INSTALL)
    return Finding("bubblewrap", "ok", program, why)


def _egress() -> Finding:
    import tempfile

    from gateway.engine import seal
    from gateway.engine.errors import EngineError

    why = "an engine that can reach something can leak what it is told"
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = seal.probe(seal.sandbox(Path(folder), [], {"PATH": "/usr/bin:/bin"}, gpu=False))
    except EngineError as error:
        return Finding("egress", "error", str(error), why, seal.INSTALL)
    if report.sealed:
        return Finding(
            "egress", "ok", f"nothing reached: {', '.join(f'{k} {v}' for k, v in report.attempts.items())}", why
        )
    return Finding("egress", "error", report.reason, why, "sysctl kernel.unprivileged_userns_clone=1")


def _seals(settings: "Settings", layout: "Layout") -> list[Finding]:
    from gateway.engine.state import read_state

    findings = []
    for engine in settings.engine:
        why = "only a sealed engine is proof that nothing leaves"
        if engine.external:
            what = f"{engine.name}: external, sealed by whoever runs it"
            findings.append(Finding("seal", "note", what, why))
            continue
        if engine.seal == "none":
            findings.append(Finding("seal", "warning", f"{engine.name}: seal = none", why, 'set seal = "required"'))
            continue
        for number in range(engine.replicas):
            state = read_state(layout.engine_state(engine.name, number))
            what = (
                f"{engine.name}/{number}: {state.state}, {state.seal}"
                if state
                else f"{engine.name}/{number}: not running"
            )
            broken = state is not None and state.state == "failed"
            findings.append(
                Finding(
                    "seal", "error" if broken else "ok", what + (f" ({state.detail})" if state and broken else ""), why
                )
            )
    return findings


def _rules(settings: "Settings") -> list[Finding]:
    findings = []
    if settings.policy.models == "any":
        findings.append(
            Finding(
                "models", "note", 'models = "any": any model directory is served', "unverified weights may be anything"
            )
        )
    if settings.audit.durability != "fsync":
        why = "a power cut may lose records that were acknowledged"
        findings.append(
            Finding("durability", "warning", "audit durability is 'os'", why, 'set [audit] durability = "fsync"')
        )
    return findings


def _modes(layout: "Layout") -> list[Finding]:
    findings = []
    for path in (layout.secrets, layout.pepper, layout.audit_key, layout.audit):
        if path.exists() and path.stat().st_mode & 0o077:
            why = "others on this host can read what only Cloister may"
            findings.append(Finding("modes", "error", f"{path.name} is open to others", why, f"chmod go= {path}"))
    return findings or [
        Finding("modes", "ok", "secrets and audit log are the owner's only", "others must not read them")
    ]
