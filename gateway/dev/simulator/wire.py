"""What the three wire formats have in common: their interface, and reading JSON that may be anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from gateway.dev.simulator.answers import Answer, Ask

JSON_HEADER = (b"content-type", b"application/json")
EVENT_STREAM_HEADER = (b"content-type", b"text/event-stream; charset=utf-8")

Headers = list[tuple[bytes, bytes]]
FaultKind = Literal[
    "status",
    "context_length",
    "content_filter",
    "quota",
    "bad_request",
    "missing_key",
    "unknown_model",
    "not_found",
]


class BadRequest(Exception):
    """The request is not what the provider takes. `param` is the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


@dataclass(frozen=True, slots=True)
class Fault:
    """An error to be told in a provider's words. `status` counts for the kind `status` only; other kinds have their own."""

    kind: FaultKind
    model: str = ""
    status: int = 400
    message: str = ""
    param: str | None = None
    input_tokens: int = 0
    context_tokens: int = 0
    retry_after_s: int | None = None


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """The whole of an error's HTTP answer. Gemini's content filter is a 200."""

    status: int
    headers: Headers
    body: bytes


class Step(NamedTuple):
    """A piece of a stream, sent at once. `end` marks the dialect's end."""

    data: bytes
    tokens: int = 0
    end: bool = False


class Dialect(Protocol):
    """A provider's wire format; each is a module."""

    NAME: str

    def authenticated(self, headers: dict[bytes, bytes], query: dict[str, list[str]]) -> bool:
        """Whether a key is there. Which one does not matter."""

    def read(self, body: dict[str, Any], headers: dict[bytes, bytes], model: str, *, streams: bool) -> Ask:
        """Understand a request; `model` and `streams` are what the URL says, in the dialect that says it there.

        Raises:
            BadRequest: The provider would refuse it.
        """

    def headers(self, number: int) -> Headers:
        """What the provider sends with every answer."""

    def whole(self, answer: Answer) -> bytes:
        """The answer in one piece."""

    def stream(self, answer: Answer) -> Iterator[Step]:
        """The answer in events."""

    def error(self, fault: Fault, number: int) -> ErrorAnswer:
        """The provider's error."""

    def error_event(self, number: int) -> bytes:
        """The error that the provider puts into a stream when it fails in the middle."""

    def malformed_event(self) -> bytes:
        """An event as the provider sends them, with the JSON torn in two."""


def proxy_error(status: int) -> ErrorAnswer:
    """What stands between a client and a provider speaks HTML, whatever the provider speaks."""
    title = {502: "502 Bad Gateway", 504: "504 Gateway Time-out"}[status]
    body = f"<html>\r\n<head><title>{title}</title></head>\r\n<body><center><h1>{title}</h1></center></body>\r\n</html>\r\n"
    return ErrorAnswer(status, [(b"content-type", b"text/html")], body.encode())


def retry_after(fault: Fault) -> Headers:
    """The header, where the fault has one."""
    return [] if fault.retry_after_s is None else [(b"retry-after", str(fault.retry_after_s).encode())]


def refuse_unknown(body: dict[str, Any], known: frozenset[str]) -> str | None:
    """The first field that the provider does not know; None where it knows all."""
    return next((name for name in body if name not in known), None)


def objects(value: object) -> list[dict[str, Any]]:
    """The objects of an array; empty where it is none."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def member(owner: dict[str, Any], name: str) -> dict[str, Any]:
    """An object's member that is an object; empty where it is not."""
    value = owner.get(name)
    return value if isinstance(value, dict) else {}


def string(owner: dict[str, Any], name: str) -> str:
    """An object's member that is a string; empty where it is not."""
    value = owner.get(name)
    return value if isinstance(value, str) else ""


def positive(owner: dict[str, Any], name: str) -> int | None:
    """A limit of at least one; None where there is none.

    Raises:
        BadRequest: It is something else.
    """
    value = owner.get(name)
    if value is None:
        return None
    if type(value) is not int or value < 1:
        raise BadRequest(f"Invalid value for '{name}': expected an integer of at least 1.", name)
    return value


def strings(value: object) -> tuple[str, ...]:
    """One string or several."""
    if isinstance(value, str):
        return (value,)
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()
