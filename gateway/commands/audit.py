"""`cloister audit`: verify and read the audit log. Verifying needs no settings and no running gateway."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from gateway.commands.common import (
    BAD_INPUT,
    NEGATIVE,
    CommandError,
    ConfigOption,
    JsonOption,
    load_settings,
    print_json,
)

app = typer.Typer(help="The audit log: verify it, read it.", no_args_is_help=True)
DirArgument = Annotated[
    Path | None, typer.Argument(metavar="[DIR]", help="The log's directory; this host's by default.")
]


@app.command()
def verify(
    directory: DirArgument = None,
    log_key: Annotated[
        Path | None, typer.Option("--log-key", help="The log's verifier key, from a source you trust.")
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check that no record was changed, removed, reordered or forged; exit 1 when something is wrong."""
    from gateway.audit import verify as verifier
    from gateway.audit.checkpoint import PINNED_FILE
    from gateway.config import home
    from gateway.trust.notes import TrustError, Verifier

    chosen = _directory(directory, config)
    pinned = home() / "secrets" / PINNED_FILE
    anchor, trust = None, "self_asserted"
    source = log_key or (pinned if pinned.exists() else None)
    if source is not None:
        try:
            anchor, trust = Verifier.parse(source.read_text()), "log_key" if log_key else "pinned"
        except (TrustError, UnicodeDecodeError) as error:
            raise CommandError(f"{source.name}: {error}", BAD_INPUT) from error
    started = time.monotonic()
    report = verifier.verify(chosen, anchor, trust)
    if as_json:
        problems = [{"where": problem.where, "what": problem.what} for problem in report.problems]
        checkpoint = {"size": report.signed, "root": report.root}
        print_json(
            {
                "ok": report.ok,
                "records": report.records,
                "checkpoint": checkpoint,
                "witnessed": report.witnessed,
                "trust": trust,
                "problems": problems,
            }
        )
    else:
        for problem in report.problems:
            typer.echo(f"PROBLEM  {problem.where}: {problem.what}")
        verdict = "ok" if report.ok else "NOT ok"
        typer.echo(
            f"{verdict}: {report.records} records, {report.signed} signed, "
            f"{time.monotonic() - started:.1f} s, trust: {trust}"
        )
        if trust == "self_asserted":
            typer.echo(
                "The key is the log's own. Bring it from a source you trust with --log-key to rule out a replaced log."
            )
    raise typer.Exit(0 if report.ok else NEGATIVE)


@app.command()
def show(
    directory: DirArgument = None,
    config: ConfigOption = None,
    request: Annotated[str, typer.Option("--request", help="Only records of this request id.")] = "",
    kind: Annotated[str, typer.Option("--kind", help="Only records of this kind, e.g. req.end.")] = "",
    tenant: Annotated[str, typer.Option("--tenant", help="Only records of this tenant.")] = "",
    last: Annotated[int, typer.Option("--last", min=1, max=100_000, help="How many of the newest.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Print the newest records, as a table or as JSON lines."""
    from collections import deque

    from gateway.audit import segment

    wanted = {"request": request, "kind": kind, "tenant": tenant}
    found: deque[dict[str, Any]] = deque(maxlen=last)
    for _, path in segment.paths(_directory(directory, config)):
        for _, line in segment.lines(path):
            record = _parsed(line)
            if record is not None and all(not value or record.get(name) == value for name, value in wanted.items()):
                found.append(record)
    if as_json:
        print_json({"records": list(found)})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("seq", "time (UTC)", "kind", "tenant", "operation", "model", "status", "outcome", "request")
    for record in found:
        model = record.get("model")
        table.add_row(
            str(record["seq"]),
            time.strftime("%H:%M:%S", time.gmtime(record["time_us"] / 1e6)),
            record["kind"],
            str(record.get("tenant", "")),
            str(record.get("operation", "")),
            str(model.get("requested", "") if isinstance(model, dict) else record.get("engine", "")),
            str(record.get("status", "")),
            str(record.get("outcome", "") or record.get("reason", "")),
            str(record.get("request", "")),
        )
    Console().print(table)


def _directory(directory: Path | None, config: Path | None) -> Path:
    chosen = directory or load_settings(config)[1].audit
    if not chosen.is_dir():
        raise CommandError(f"there is no audit log at {chosen}; name its directory", BAD_INPUT)
    return chosen


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "seq" in record else None
