"""`farebox ask`: an agent that pays for an answer. Lives in `agents_sdk`, which is imported only when it is used."""

from __future__ import annotations

import typer

from gateway.commands.shared import reporting


@reporting
def ask(context: typer.Context) -> None:
    """Ask a question and pay for the answer from a wallet, within --max-usd. `farebox ask --help` shows everything."""
    from agents_sdk.ask import ask_command

    agent = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="rich", add_completion=False)
    agent.command(context_settings={"help_option_names": ["-h", "--help"]})(ask_command)
    status = agent(context.args, prog_name="farebox ask", standalone_mode=False)
    raise typer.Exit(status if isinstance(status, int) else 0)
