"""`cloister key`: create, list, show, rotate and revoke API keys. A key is shown once and never stored."""

import re
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.commands.common import (
    BAD_INPUT,
    NEGATIVE,
    CommandError,
    ConfigOption,
    JsonOption,
    load_settings,
    print_json,
    run,
)

if TYPE_CHECKING:
    from pathlib import Path

    from gateway.identity.service import KeyService, KeySpec

app = typer.Typer(help="API keys: create, list, show, rotate, revoke.", no_args_is_help=True)
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print only the key.")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The key's id.")]
_DURATION = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:-]{0,127}")


@app.command()
def create(
    tenant: Annotated[str, typer.Option("--tenant", help="Unit of isolation and quota.")],
    name: Annotated[str, typer.Option("--name", help="What you call this key.")],
    config: ConfigOption = None,
    models: Annotated[str | None, typer.Option("--models", help="Models it may use, a,b; all by default.")] = None,
    operations: Annotated[str | None, typer.Option("--operations", help="Operations it may ask for, a,b.")] = None,
    expires: Annotated[str | None, typer.Option("--expires", help="Lifetime, e.g. 30d, 12h.")] = None,
    rpm: Annotated[int | None, typer.Option("--rpm", min=1, help="Requests per minute.")] = None,
    tpm: Annotated[int | None, typer.Option("--tpm", min=1, help="Tokens per minute.")] = None,
    concurrency: Annotated[int | None, typer.Option("--concurrency", min=1, help="Requests at once.")] = None,
    label: Annotated[str, typer.Option("--label", help="Its label; the lowest by default.")] = "",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Create a key; it is usable at once on every gateway worker."""
    from gateway.guard.routes import OPERATIONS
    from gateway.identity.service import KeySpec

    for option, value in (("--tenant", tenant), ("--name", name), *([("--label", label)] if label else [])):
        if not _NAME.fullmatch(value):
            raise CommandError(f"{option} takes letters, digits and . _ @ : - (128 at most)", BAD_INPUT)
    asked = _split(operations)
    unknown = sorted(set(asked or ()) - OPERATIONS)
    if unknown:
        raise CommandError(f"unknown operation {unknown[0]!r}; known are: {', '.join(sorted(OPERATIONS))}", BAD_INPUT)
    limits = {
        limit: value for limit, value in (("rpm", rpm), ("tpm", tpm), ("concurrency", concurrency)) if value is not None
    }
    spec = KeySpec(tenant, name, _split(models), asked, _expiry(expires), label, limits)
    if limits and not (quiet or as_json):
        sys.stderr.write("note: limits are stored with the key; this release does not enforce them yet\n")
    key_id, text = run(_with_service(config, _create(spec)))
    _print_key(key_id, text, spec.tenant, quiet=quiet, as_json=as_json)


@app.command("list")
def list_keys(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List all keys, never their secrets."""
    keys = run(_with_service(config, lambda service: service.list()))
    if as_json:
        print_json({"keys": keys})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("id", "name", "tenant", "state", "models", "expires")
    for item in keys:
        expiry = time.strftime("%Y-%m-%d", time.gmtime(item["expires"])) if item["expires"] else "never"
        table.add_row(
            item["id"], item["name"], item["tenant"], item["state"], ", ".join(item["models"] or ["all"]), expiry
        )
    Console().print(table)


@app.command()
def show(key_id: IdArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show one key's scopes and state."""
    item = run(_with_service(config, _by_id(key_id, "show")))
    if as_json:
        print_json(item)
        return
    for field, value in item.items():
        typer.echo(f"{field:12}{'-' if value is None else value}")


@app.command()
def rotate(
    key_id: IdArgument, config: ConfigOption = None, quiet: QuietOption = False, as_json: JsonOption = False
) -> None:
    """Replace a key by a new one with the same scopes; the old one stops working within a second."""
    new_id, text = run(_with_service(config, _by_id(key_id, "rotate")))
    _print_key(new_id, text, "", quiet=quiet, as_json=as_json)


@app.command()
def revoke(key_id: IdArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """End a key for good, on every worker within a second."""
    run(_with_service(config, _by_id(key_id, "revoke")))
    if as_json:
        print_json({"id": key_id, "state": "revoked"})
    else:
        typer.echo(f"revoked {key_id}")


def _print_key(key_id: str, text: str, tenant: str, *, quiet: bool, as_json: bool) -> None:
    if quiet:
        typer.echo(text)
    elif as_json:
        print_json({"id": key_id, "key": text, "tenant": tenant} if tenant else {"id": key_id, "key": text})
    else:
        typer.echo(f"{text}\n\nid {key_id}. Keep the key now: it is not stored and cannot be shown again.")


def _create(spec: "KeySpec") -> Any:
    return lambda service: service.create(spec)


def _by_id(key_id: str, verb: str) -> Any:
    async def work(service: "KeyService") -> Any:
        from gateway.identity.service import NoSuchKey

        try:
            return await getattr(service, verb)(key_id)
        except NoSuchKey:
            raise CommandError("there is no key with this id; see 'cloister key list'", NEGATIVE) from None

    return work


async def _with_service(config: "Path | None", work: Any) -> Any:
    from gateway.identity.credentials import load_pepper
    from gateway.identity.service import KeyService
    from gateway.store.store import Store

    settings, layout = load_settings(config)
    pepper = load_pepper(layout.pepper)
    store = await Store.open(settings.store.url, layout.home)
    try:
        return await work(KeyService(store, pepper, settings.identity.environment))
    finally:
        await store.close()


def _split(text: str | None) -> list[str] | None:
    if text is None:
        return None
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise CommandError("a list of names is written a,b and not empty", BAD_INPUT)
    return items


def _expiry(text: str | None) -> int | None:
    if text is None:
        return None
    match = _DURATION.fullmatch(text)
    if match is None:
        raise CommandError("--expires takes a number and s, m, h or d, e.g. 30d", BAD_INPUT)
    return int(time.time()) + int(match[1]) * _UNIT_S[match[2]]
