"""What all command groups share: settings, layout, exit codes and how they speak to a person."""

import asyncio
import json
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from gateway.config import Layout, Settings

OK, NEGATIVE, BAD_INPUT, ENVIRONMENT = 0, 1, 2, 3
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="The TOML file with the settings.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
T = TypeVar("T")


class CommandError(Exception):
    """A command cannot do what was asked: one line for the person, and the exit code."""

    def __init__(self, message: str, code: int = ENVIRONMENT) -> None:
        super().__init__(message)
        self.code = code


def complain(message: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"cloister: {' '.join(message.split())}\n")


def load_settings(path: Path | None) -> "tuple[Settings, Layout]":
    """The settings and where everything lies; raises CommandError."""
    from gateway import config

    try:
        settings = config.load(path) if path is not None else config.default_settings()
    except config.ConfigError as error:
        raise CommandError(str(error), BAD_INPUT) from error
    return settings, config.Layout(config.home(), settings)


def print_json(value: object) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2 if sys.stdout.isatty() else None) + "\n")


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end; a store that cannot be used is a CommandError."""
    from gateway.store.store import StoreError

    try:
        return asyncio.run(work)
    except StoreError as error:
        raise CommandError(f"{error}. Check [store] url and the permissions of CLOISTER_HOME.") from error
