"""The `cloister` command. Exit codes: 0 ok, 1 a negative answer, 2 bad usage or input, 3 environment fault."""

import sys

import click
import typer

from gateway import __version__
from gateway.commands import audit, bundle, config, doctor, key, serve, up
from gateway.commands.common import BAD_INPUT, ENVIRONMENT, CommandError, complain

app = typer.Typer(
    name="cloister",
    help="Cloister: the LLM serving gateway for places where nothing may leave.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("up")(up.up)
app.command("serve")(serve.serve)
app.command("doctor")(doctor.doctor)
app.add_typer(config.app, name="config")
app.add_typer(key.app, name="key")
app.add_typer(audit.app, name="audit")
app.add_typer(bundle.app, name="bundle")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cloister {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Cloister: the LLM serving gateway for places where nothing may leave."""


def main() -> None:
    """Run the command line; every failure is one line on standard error and an exit code."""
    try:
        code = app(standalone_mode=False)
    except CommandError as error:
        complain(str(error))
        sys.exit(error.code)
    except click.ClickException as error:
        complain(error.format_message())
        sys.exit(BAD_INPUT)
    except click.Abort:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        complain(f"{error.strerror or type(error).__name__}" + (f": {error.filename}" if error.filename else ""))
        sys.exit(ENVIRONMENT)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
