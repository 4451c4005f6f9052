"""The `farebox` command. The base install has only what an agent needs: a command imports the server's parts when it runs."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from gateway.commands import (
    ask,
    channel,
    configuration,
    contracts,
    doctor,
    explain,
    facilitator,
    keys,
    ledger,
    receipts,
    serving,
    settlements,
    wallet,
    withdrawals,
)
from gateway.commands.shared import show_failure

app = typer.Typer(
    name="farebox",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="An AI gateway that agents pay per request (x402) and enterprises pay with API keys.",
    epilog=(
        "[bold]Try it:[/bold]  [cyan]farebox dev[/cyan] starts a local chain, simulated providers and a gateway.\n\n"
        "[bold]Run it:[/bold]  [cyan]farebox config example > farebox.toml[/cyan], edit it, then "
        "[cyan]farebox config check[/cyan], [cyan]farebox doctor[/cyan] and [cyan]farebox serve[/cyan].\n\n"
        "[bold]Use it:[/bold]  [cyan]farebox ask 'Why is the sky blue?' --max-usd 0.05[/cyan] pays for the answer.\n\n"
        "Every command has --help, and --json for programs. Exit status: 0 fine, 1 a problem was found, 2 wrong usage."
    ),
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"farebox {version('farebox')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""


AGENTS, OPERATORS, INSIGHT = "For agents", "Run a gateway", "Look inside"
app.command(
    "ask",
    rich_help_panel=AGENTS,
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
)(ask.ask)
app.add_typer(wallet.app, name="wallet", rich_help_panel=AGENTS)
app.add_typer(channel.app, name="channel", rich_help_panel=AGENTS)
app.command("dev", rich_help_panel=OPERATORS)(serving.dev)
app.command("serve", rich_help_panel=OPERATORS)(serving.serve)
app.command("facilitator", rich_help_panel=OPERATORS, epilog=facilitator.EXAMPLES)(facilitator.facilitator)
app.add_typer(configuration.app, name="config", rich_help_panel=OPERATORS)
app.add_typer(contracts.app, name="contracts", rich_help_panel=OPERATORS)
app.command("doctor", rich_help_panel=OPERATORS)(doctor.doctor)
app.add_typer(keys.app, name="keys", rich_help_panel=OPERATORS)
app.add_typer(withdrawals.app, name="withdrawals", rich_help_panel=OPERATORS)
app.command("explain", rich_help_panel=INSIGHT)(explain.explain)
app.add_typer(ledger.app, name="ledger", rich_help_panel=INSIGHT)
app.add_typer(receipts.app, name="receipts", rich_help_panel=INSIGHT)
app.add_typer(settlements.app, name="settlements", rich_help_panel=INSIGHT)


def main() -> None:
    """Run the command and exit with its status."""
    try:
        app()
    except Exception as error:
        # The last line before the user, who is owed a sentence and not a traceback.
        if os.environ.get("FAREBOX_DEBUG"):
            raise
        fix = "This is a mistake in farebox itself. FAREBOX_DEBUG=1 shows where; please report it"
        show_failure(f"{type(error).__name__}: {error}", fix, as_json="--json" in sys.argv)
        sys.exit(1)


if __name__ == "__main__":
    main()
