"""What every upstream dialect offers, and how it says that something cannot be said or read in it.

A dialect is a module with these functions; `DIALECTS` in `gateway.providers.registry` lists them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

import orjson

from gateway.dialects.canonical import Answer, ChatRequest, Event, ToolCallBlock
from gateway.routing.catalog import Candidate
from payments.money import Usage


@dataclass(frozen=True, slots=True)
class UpstreamCall:
    """A request in an upstream's dialect: the whole URL, and the JSON body. Always a POST."""

    url: str
    body: bytes


class Untranslatable(Exception):
    """The request uses something that this dialect cannot express; another candidate may. `param` names it."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param
        self.message = message


class Undecodable(Exception):
    """The upstream's answer is not what its dialect says: the upstream is at fault."""


class ReportedError(Exception):
    """The upstream reported an error inside an answer that began as a success.

    `status` is the HTTP status that it stands for (502 where the upstream did not say).
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


class StreamDecoder(Protocol):
    """Reads one streamed answer. `ended` turns true at the dialect's own end marker."""

    ended: bool
    chunk: dict[str, Any]
    """The last chunk, decoded: what a pass-through rewrites instead of decoding it a second time."""

    def feed(self, data: bytes) -> list[Event]:
        """Read the data of one event.

        Raises:
            Undecodable: It is not what the dialect says.
            ReportedError: It is the upstream's own error.
        """


class UpstreamDialect(Protocol):
    """How to speak to an upstream."""

    NAME: str

    def auth_headers(self, api_key: str | None) -> dict[str, str]:
        """The headers that carry the key and the dialect's version."""

    def build(self, request: ChatRequest, candidate: Candidate, max_output_tokens: int, base_url: str) -> UpstreamCall:
        """Write the request.

        Raises:
            Untranslatable: The request cannot be expressed in this dialect.
        """

    def decode_answer(self, body: dict[str, Any]) -> Answer:
        """Read a complete answer.

        Raises:
            Undecodable: It is not what the dialect says.
            ReportedError: It is the upstream's own error.
        """

    def decoder(self, choices: int) -> StreamDecoder:
        """Begin to read a streamed answer of so many choices; `Untranslatable` was raised before where that is too many."""


def read_object(data: bytes) -> dict[str, Any]:
    """Decode a JSON object.

    Raises:
        Undecodable: It is not one.
    """
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise Undecodable("the upstream sent something that is not JSON") from None
    if not isinstance(value, dict):
        raise Undecodable("the upstream sent JSON that is not an object")
    return value


USAGE_TOKENS_MAX: Final = 1_000_000_000
"""Of one answer. More is nonsense, whose price would not fit the ledger."""


def count_in(record: dict[str, Any], name: str) -> int:
    """A token count of a usage record; 0 where it is missing, null or nonsense (a usage record must never break an answer)."""
    value = record.get(name)
    return value if type(value) is int and 0 < value <= USAGE_TOKENS_MAX else 0


def usage_of(
    *, input_tokens: int, cached_tokens: int, written_tokens: int, output_tokens: int, reasoning_tokens: int
) -> Usage:
    """A usage record whose parts are bounded by their whole, as `Usage` demands and as providers do not always keep."""
    cached = min(cached_tokens, input_tokens)
    return Usage(
        input_tokens=input_tokens,
        cached_input_tokens=cached,
        cache_write_tokens=min(written_tokens, input_tokens - cached),
        output_tokens=output_tokens,
        reasoning_tokens=min(reasoning_tokens, output_tokens),
    )


def tool_arguments(call: ToolCallBlock) -> dict[str, Any]:
    """The arguments of an earlier tool call, for dialects that carry them as an object and not as text.

    Raises:
        Untranslatable: They are not a JSON object (a model may have written anything).
    """
    if not call.arguments.strip():
        return {}
    try:
        value = orjson.loads(call.arguments)
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise Untranslatable("messages", f"the arguments of the tool call {call.id[:64]!r} are not a JSON object")
    return value
