"""Synchronous JSON-RPC for development and tests. The serving process has its own client in `payments.chain.rpc`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import httpx

Call = tuple[str, Sequence[Any]]


class RpcRefused(RuntimeError):
    """The node answered with an error. `data` is a revert's return data in hex, where there is one."""

    def __init__(self, method: str, code: int, message: str, data: Any) -> None:
        super().__init__(f"{method}: {message} (code {code})" + (f" {data}" if data else ""))
        self.method = method
        self.code = code
        self.message = message
        self.data = data


class NodeUnreachable(RuntimeError):
    """There was no answer, or not one in JSON-RPC."""


def rpc(rpc_url: str, method: str, *params: Any) -> Any:
    """Call one method and return its result.

    Raises:
        RpcRefused: the node answered with an error.
        NodeUnreachable: no answer.
    """
    return batch(rpc_url, [(method, params)])[0]


def batch(rpc_url: str, calls: Sequence[Call], *, timeout_s: float = 30.0) -> list[Any]:
    """Call several methods in one round trip and return their results in order. The node may run them in any order.

    Raises:
        RpcRefused: for the first call that the node answered with an error.
        NodeUnreachable: no answer.
    """
    body = [
        {"jsonrpc": "2.0", "id": index, "method": method, "params": list(params)}
        for index, (method, params) in enumerate(calls)
    ]
    try:
        answers = _client().post(rpc_url, json=body, timeout=timeout_s).raise_for_status().json()
    except (httpx.HTTPError, ValueError) as error:
        raise NodeUnreachable(f"no JSON-RPC answer from {rpc_url}: {error!r}") from error
    if not isinstance(answers, list) or len(answers) != len(calls):
        raise NodeUnreachable(f"not a batch answer from {rpc_url}: {str(answers)[:200]}")
    results: list[Any] = []
    for (method, _), answer in zip(calls, sorted(answers, key=lambda each: int(each["id"])), strict=True):
        if (refusal := answer.get("error")) is not None:
            raise RpcRefused(method, refusal["code"], refusal["message"], refusal.get("data"))
        results.append(answer["result"])
    return results


_clients = threading.local()


def _client() -> httpx.Client:
    """A client for each thread: its connections stay open, and no other thread closes one that is in use. Without proxies."""
    found: httpx.Client | None = getattr(_clients, "found", None)
    if found is None:
        found = _clients.found = httpx.Client(trust_env=False)
    return found
