"""`cloister config`: check, show and describe the settings."""

import typer

from gateway.commands.common import ConfigOption, JsonOption, load_settings, print_json

app = typer.Typer(help="Check, show and describe the settings.", no_args_is_help=True)


@app.command()
def check(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Check a configuration file; exit 0 when it can be used."""
    settings, _ = load_settings(config)
    _check_arguments(settings)
    if as_json:
        print_json({"ok": True, "digest": settings.digest()})
    else:
        typer.echo(f"ok: {len(settings.engine)} engine(s), configuration {settings.digest()}")


@app.command()
def show(config: ConfigOption = None) -> None:
    """Print the effective settings, defaults included, as JSON."""
    settings, _ = load_settings(config)
    print_json(settings.model_dump(mode="json"))


@app.command()
def schema() -> None:
    """Print the JSON Schema of the configuration file."""
    from gateway.config import Settings

    print_json(Settings.model_json_schema())


def _check_arguments(settings: object) -> None:
    from gateway.commands.common import BAD_INPUT, CommandError
    from gateway.config import Settings
    from gateway.engine.arguments import check as check_arguments
    from gateway.engine.errors import EngineError

    if isinstance(settings, Settings):
        for engine in settings.engine:
            try:
                check_arguments(engine.args)
            except EngineError as error:
                raise CommandError(f"engine {engine.name}: {error}", BAD_INPUT) from error
