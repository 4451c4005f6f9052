"""`farebox ask`: a command-line agent that asks one question, pays for the answer, and says what it cost.

The wallet's key comes from the environment only: arguments are seen by every process of the machine.

Example:
    $ FAREBOX_WALLET_KEY=0x… farebox ask "Why is the sky blue?" --max-usd 0.05
    $ FAREBOX_WALLET_KEY=0x… farebox ask "And the sea?" --scheme batch-settlement
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any, cast

import httpx
import typer
from rich.console import Console

from agents_sdk.agent import Agent
from agents_sdk.errors import FareboxError
from agents_sdk.policy import Scheme, SpendingPolicy
from agents_sdk.receipts import Receipt

KEY_VARIABLE = "FAREBOX_WALLET_KEY"
GATEWAY_VARIABLE = "FAREBOX_GATEWAY"
RPC_VARIABLE = "FAREBOX_RPC_URL"


def ask_command(
    question: Annotated[str, typer.Argument(help="What to ask; `-` reads it from standard input.")],
    max_usd: Annotated[str, typer.Option(help="The most that the answer may cost, in dollars.")] = "0.05",
    model: Annotated[str, typer.Option(help="A model's name, or `auto`.")] = "auto",
    strategy: Annotated[
        str | None, typer.Option(help="balanced, cost-first, latency-first or availability-first.")
    ] = None,
    scheme: Annotated[
        str,
        typer.Option(
            help="How to pay what credit does not cover: exact, upto, batch-settlement (a channel); exact where that cannot be."
        ),
    ] = "exact",
    deposit_usd: Annotated[str, typer.Option(help="The most that lies unspent in a channel.")] = "1.00",
    token: Annotated[
        str | None, typer.Option(help="Pay in this token only, from credit too: a symbol or an address.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    gateway: Annotated[str, typer.Option(envvar=GATEWAY_VARIABLE, help="The gateway's URL.")] = "http://127.0.0.1:8402",
    rpc_url: Annotated[
        str | None, typer.Option(envvar=RPC_VARIABLE, help="A JSON-RPC server, to approve Permit2 with (USDT).")
    ] = None,
) -> None:
    """Ask a question and pay for the answer from your wallet (its key in FAREBOX_WALLET_KEY)."""
    console = Console(stderr=True)
    key = os.environ.get(KEY_VARIABLE)
    if not key:
        fix = f"Set {KEY_VARIABLE} to the private key of the wallet that pays."
        raise _failed(console, "there is no wallet", fix, 2, as_json=json_output)
    try:
        text = _question(question)
        _require_text(model, "--model")
        _require_text(token or "", "--token")
        if strategy is not None and not strategy.isascii():
            raise ValueError("--strategy is the name of none")
        policy = SpendingPolicy(
            max_per_request=max_usd,
            max_per_day=None,
            tokens=None if token is None else [token],
            schemes=cast("tuple[Scheme, ...]", tuple(dict.fromkeys((scheme, "exact")))),
            channel_deposit=deposit_usd,
        )
        agent = Agent(key, gateway, policy=policy, rpc_url=rpc_url)
    except ValueError as error:
        raise _failed(console, str(error), "`farebox ask --help` shows examples", 2, as_json=json_output) from None
    with agent:
        try:
            answer = _ask(agent, text, model, strategy, echo=not json_output)
        except httpx.TransportError as error:
            what = f"{gateway} does not answer ({type(error).__name__})"
            fix = f"Check --gateway (or {GATEWAY_VARIABLE}), and ask the same again: nothing is paid twice"
            raise _failed(console, what, fix, 1, as_json=json_output) from None
        except (FareboxError, httpx.HTTPError, _Failed) as error:
            what = f"{type(error).__name__.lstrip('_')}: {error}"
            raise _failed(console, what, "Change what it says, and ask again", 1, as_json=json_output) from None
        receipt = next(iter(agent.receipts(limit=1)), None)
    if json_output:
        sys.stdout.write(json.dumps({"ok": True, "answer": answer, "receipt": _as_json(receipt)}) + "\n")
    else:
        sys.stdout.write("\n")
        if receipt is not None:
            console.print(_line(receipt), style="dim", markup=False, highlight=False)


def _question(given: str) -> str:
    try:
        text = sys.stdin.read() if given == "-" else given
    except UnicodeError:
        raise ValueError("the question is not text (UTF-8)") from None
    _require_text(text, "the question")
    return text


def _require_text(value: str, what: str) -> None:
    # Of bytes that are no UTF-8 Python makes characters that cannot be sent.
    try:
        value.encode()
    except UnicodeError:
        raise ValueError(f"{what} is not text (UTF-8)") from None


def _failed(console: Console, what: str, fix: str, status: int, *, as_json: bool) -> typer.Exit:
    """Tell what went wrong: JSON on standard output for programs, two lines on standard error for people."""
    if as_json:
        sys.stdout.write(json.dumps({"ok": False, "error": {"message": what, "fix": fix}}) + "\n")
    else:
        console.print(what, style="red", markup=False, soft_wrap=True)
        console.print(f"  → {fix}", markup=False, soft_wrap=True)
    return typer.Exit(status)


class _Failed(Exception):
    """The gateway's answer is an error."""


def _ask(agent: Agent, question: str, model: str, strategy: str | None, *, echo: bool) -> str:
    headers = {} if strategy is None else {"x-farebox-strategy": strategy}
    body = {"model": model, "messages": [{"role": "user", "content": question}], "stream": True}
    pieces: list[str] = []
    with (
        agent.http_client() as http,
        http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response,
    ):
        if response.status_code != 200:
            response.read()
            raise _Failed(_reason(response))
        for piece in _deltas(response):
            pieces.append(piece)
            if echo:
                sys.stdout.write(piece)
                sys.stdout.flush()
    return "".join(pieces)


def _deltas(response: httpx.Response) -> Iterator[str]:
    """The text of a streamed completion, piece by piece."""
    for line in response.iter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event: dict[str, Any] = json.loads(line[len("data: ") :])
        if "error" in event:
            raise _Failed(str(event["error"].get("message", event["error"])))
        for choice in event.get("choices", ()):
            content = choice.get("delta", {}).get("content")
            if content:
                yield content


def _reason(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"


def _line(receipt: Receipt) -> str:
    def usd(amount: str | None) -> str:
        return "unknown" if amount is None else f"${amount}"

    parts = [receipt.model or "unknown model", f"cost {usd(receipt.charged_usd)}"]
    if receipt.paid_with == "credit":
        parts.append("paid from credit")
    elif receipt.paid_with == "batch-settlement":
        parts.append("paid through a channel")
        parts += [f"deposit {receipt.transaction}"] if receipt.transaction else []
    else:
        parts.append(f"credited {usd(receipt.credited_usd)}")
        parts.append(f"transaction {receipt.transaction or 'unknown'}")
    return " · ".join(parts)


def _as_json(receipt: Receipt | None) -> dict[str, Any] | None:
    if receipt is None:
        return None
    fields = {name: getattr(receipt, name) for name in receipt.__slots__}
    return fields | {"at": receipt.at.isoformat()}
