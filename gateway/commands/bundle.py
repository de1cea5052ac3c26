"""`cloister bundle`: deliveries across the air gap."""

import typer

app = typer.Typer(help="Offline bundles: weights, wheels and policy across the air gap.", no_args_is_help=True)


@app.callback()
def bundle() -> None:
    """Offline bundles: weights, wheels and policy across the air gap."""
