"""`farebox config`: check a configuration, or print an example of one."""

from __future__ import annotations

import os

import typer

from gateway.commands.shared import (
    ConfigOption,
    JsonOption,
    config_file,
    err,
    out,
    print_json,
    problem_json,
    reporting,
)

app = typer.Typer(no_args_is_help=True, help="Check a configuration, or print an example.")


@app.command(epilog="Example: [cyan]FAREBOX_PORT=80 farebox config check --config farebox.toml[/cyan]")
@reporting
def check(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Report every mistake in the file and the FAREBOX_* variables, with its place and its fix. Contacts nobody."""
    from gateway.config import inspect

    path = config_file(config)
    report = inspect(path, os.environ)
    settings = report.settings
    if as_json:
        summary = None
        if settings is not None:
            summary = {
                "networks": [network.caip2 for network in settings.resolved_networks()],
                "providers": list(settings.providers),
                "models": list(dict.fromkeys(model.id for model in settings.models)),
            }
        print_json(
            {
                "ok": settings is not None,
                "config": None if path is None else str(path),
                "problems": [problem_json(problem) for problem in report.problems],
                "settings": summary,
            }
        )
    else:
        for problem in report.problems:
            err.print("[yellow]warning[/yellow]" if problem.warning else "[bold red]mistake[/bold red]", end=" ")
            err.print(f"{problem.place}: {problem.what}\n  → {problem.fix}", markup=False)
        source = "the environment (there is no farebox.toml here)" if path is None else str(path)
        if settings is None:
            count = sum(not problem.warning for problem in report.problems)
            err.print(f"{source}: {count} mistake{'s' if count > 1 else ''}", style="bold", markup=False)
        else:
            networks = ", ".join(
                f"{network.caip2} ({', '.join(token.symbol for token in network.tokens)})"
                for network in settings.resolved_networks()
            )
            models = len({model.id for model in settings.models})
            out.print("[green]ok[/green]", end=" ")
            out.print(
                f"{source}: {models} models at {len(settings.providers)} providers; payments on {networks or 'no network'}",
                markup=False,
            )
    if settings is None:
        raise typer.Exit(1)


@app.command(epilog="Example: [cyan]farebox config example > farebox.toml[/cyan]")
@reporting
def example(as_json: JsonOption = False) -> None:
    """Print a complete, commented configuration to start from."""
    from gateway import config

    if as_json:
        print_json({"ok": True, "file": "farebox.toml", "text": config.example()})
    else:
        typer.echo(config.example(), nl=False)


@app.command()
@reporting
def reference(as_json: JsonOption = False) -> None:
    """Print every setting with its type, default and meaning, as a Markdown table."""
    from gateway.config_reference import markdown, settings

    if as_json:
        print_json({"ok": True, "settings": settings()})
    else:
        typer.echo(markdown(), nl=False)
