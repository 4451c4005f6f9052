"""`farebox explain`: why the router would choose what it chooses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.commands.shared import (
    ConfigOption,
    Failed,
    JsonOption,
    WrongUsage,
    load_settings,
    out,
    print_json,
    reporting,
    table,
)

if TYPE_CHECKING:
    from gateway.routing.catalog import Catalog
    from gateway.routing.engine import Considered


@reporting
def explain(
    file: Annotated[
        str | None, typer.Argument(metavar="[REQUEST.json]", help="A chat completion's body; - reads standard input.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="A model, model@provider, or auto.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What is asked.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The limit on the answer.")] = None,
    strategy: Annotated[
        str | None, typer.Option(help="balanced, cost-first, latency-first or availability-first.")
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the candidates for a request, their scores, what each may cost, and what excluded the others.

    Asks no provider and pays nobody. Breakers are those of a gateway that has just started.
    """
    settings = load_settings(config)
    from gateway.api.errors import ApiError
    from gateway.dialects.openai_chat import parse_request
    from gateway.planning import Planner
    from gateway.routing.catalog import Catalog
    from gateway.routing.engine import Engine, NoRoute
    from gateway.routing.preferences import STRATEGY_HEADER, parse_preferences
    from gateway.routing.strategies import STRATEGIES
    from gateway.routing.tokens import count_input

    if strategy is not None and strategy.strip().lower() not in STRATEGIES:
        raise WrongUsage(f"there is no strategy {strategy!r}", f"Use one of: {', '.join(STRATEGIES)}")
    body = _body(file, model, prompt, max_tokens)
    catalog = Catalog.from_settings(settings)
    try:
        request = parse_request(body)
        preferences = parse_preferences(body, {STRATEGY_HEADER: strategy} if strategy else {})
        planner = Planner(settings, catalog, Engine(catalog, settings), count_input)
        route, _ = planner.route(request, preferences)
    except (ApiError, NoRoute) as error:
        raise Failed(
            error.message, "Correct the request; /v1/models and `farebox config check` show what there is"
        ) from None

    output_tokens = planner.max_output_tokens(request)
    rows = []
    for entry in route.explanation:
        candidate = _candidate(catalog, entry)
        counted = count_input(request, candidate.tokenizer)
        rows.append((entry, counted, planner.maximum_cost(request, candidate, output_tokens)))
    _show(route.strategy, count_input(request), output_tokens, rows, as_json)


def _show(
    strategy: str, input_tokens: int, output_tokens: int, rows: list[tuple[Considered, int, int]], as_json: bool
) -> None:
    from payments.money import nano_to_usd

    if as_json:
        print_json(
            {
                "ok": True,
                "strategy": strategy,
                "input_tokens": input_tokens,
                "max_output_tokens": output_tokens,
                "route": [entry.candidate_id for entry, _, _ in rows if entry.excluded_by is None],
                "considered": [
                    {
                        "candidate": entry.candidate_id,
                        "score": round(entry.score, 4),
                        "input_tokens": counted,
                        "expected_usd": nano_to_usd(entry.expected_nano_usd),
                        "maximum_usd": nano_to_usd(maximum),
                        "excluded_by": entry.excluded_by,
                    }
                    for entry, counted, maximum in rows
                ],
            }
        )
        return
    out.print(f"strategy {strategy}; {input_tokens} tokens in, at most {output_tokens} out\n", markup=False)
    shown = table(
        "", "candidate", "score", "likely USD", "at most USD", "", right=("score", "likely USD", "at most USD")
    )
    for place, (entry, _, maximum) in enumerate(rows, 1):
        shown.add_row(
            "-" if entry.excluded_by else str(place),
            entry.candidate_id,
            f"{entry.score:.3f}",
            nano_to_usd(entry.expected_nano_usd),
            nano_to_usd(maximum),
            entry.excluded_by and entry.excluded_by.replace("_", " "),
            style="dim" if entry.excluded_by else None,
        )
    out.print(shown)


def _candidate(catalog: Catalog, entry: Considered) -> Any:
    return next(candidate for candidate in catalog.all() if candidate.id == entry.candidate_id)


def _body(file: str | None, model: str | None, prompt: str | None, max_tokens: int | None) -> dict[str, Any]:
    """The request body that file and options make together; an option wins over the file."""
    body: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": prompt or "Hello"}]}
    if file is not None:
        try:
            body = json.loads(sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise Failed(
                f"{file} is not JSON: {error}", "Give the body of a chat completion, as sent to the gateway"
            ) from None
        if not isinstance(body, dict):
            raise Failed(f"{file} is not a JSON object", "Give the body of a chat completion, as sent to the gateway")
        if prompt is not None:
            body["messages"] = [{"role": "user", "content": prompt}]
    if model is not None:
        body["model"] = model
        body.pop("models", None)
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    return body
