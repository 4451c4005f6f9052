"""Upstreams that speak Anthropic's Messages API (version 2023-06-01).

What it cannot express is refused as `Untranslatable` rather than left out: JSON modes (there is no equivalent that every model
has), audio, several choices. Its usage counts cached input beside `input_tokens`; ours includes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, Final

import orjson

from gateway.dialects.canonical import (
    Answer,
    Block,
    BlockDelta,
    BlockStart,
    BlockStop,
    ChatRequest,
    Event,
    Finish,
    FinishReason,
    MediaBlock,
    Message,
    Start,
    TextBlock,
    ToolCallBlock,
    ToolResultBlock,
    UsageReport,
)
from gateway.dialects.upstream import (
    ReportedError,
    Undecodable,
    Untranslatable,
    UpstreamCall,
    count_in,
    read_object,
    tool_arguments,
    usage_of,
)
from gateway.routing.catalog import Candidate
from payments.money import Usage

NAME: Final = "anthropic_messages"
VERSION: Final = "2023-06-01"
_FINISHES: Final[dict[str, FinishReason]] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
_ERROR_STATUSES: Final = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "overloaded_error": 529,
}


def auth_headers(api_key: str | None) -> dict[str, str]:
    """The key and the version of the API."""
    return {"anthropic-version": VERSION} | ({} if api_key is None else {"x-api-key": api_key})


def build(request: ChatRequest, candidate: Candidate, max_output_tokens: int, base_url: str) -> UpstreamCall:
    """Translate the request."""
    if request.choices > 1:
        raise Untranslatable("n", "this provider gives one answer at a time")
    if request.response_format != "text":
        raise Untranslatable("response_format", "this provider has no JSON mode")
    body: dict[str, Any] = {"model": candidate.upstream_model, "max_tokens": max_output_tokens}
    system = [block.text for message in request.messages if message.role == "system" for block in _texts(message)]
    if system:
        body["system"] = "\n\n".join(system)
    body["messages"] = list(_turns(request.messages))
    if request.tools:
        body["tools"] = [
            {"name": tool.name, "input_schema": tool.parameters}
            | ({} if tool.description is None else {"description": tool.description})
            for tool in request.tools
        ]
        if request.tool_choice is not None:
            body["tool_choice"] = _tool_choice(request.tool_choice)
    # Its current models refuse both at once, and temperatures above 1.
    if request.temperature is not None:
        body["temperature"] = min(request.temperature, 1.0)
    elif request.top_p is not None:
        body["top_p"] = request.top_p
    if request.stop:
        if not all(stop.strip() for stop in request.stop):
            raise Untranslatable("stop", "this provider takes no stop sequence of white space only")
        body["stop_sequences"] = list(request.stop)
    if request.stream:
        body["stream"] = True
    base = base_url.rstrip("/")
    url = f"{base}/messages" if base.endswith("/v1") else f"{base}/v1/messages"
    return UpstreamCall(url, orjson.dumps(body))


def _texts(message: Message) -> Iterator[TextBlock]:
    # Empty text blocks are an error to this API.
    return (block for block in message.blocks if isinstance(block, TextBlock) and block.text)


def _turns(messages: tuple[Message, ...]) -> Iterator[dict[str, Any]]:
    """Turns alternate in this API, and a tool's results are part of the user's turn."""
    spoken = [message for message in messages if message.role != "system"]
    for role, group in groupby(spoken, lambda message: "assistant" if message.role == "assistant" else "user"):
        content = [
            _block(block)
            for message in group
            for block in message.blocks
            if not (isinstance(block, TextBlock) and not block.text)
        ]
        if content:
            yield {"role": role, "content": content}


def _block(block: Block) -> dict[str, Any]:
    if isinstance(block, TextBlock):
        return {"type": "text", "text": block.text}
    if isinstance(block, ToolCallBlock):
        return {"type": "tool_use", "id": block.id, "name": block.name, "input": tool_arguments(block)}
    if isinstance(block, ToolResultBlock):
        return {"type": "tool_result", "tool_use_id": block.call_id, "content": block.content}
    return _media(block)


def _media(block: MediaBlock) -> dict[str, Any]:
    if block.kind == "audio":
        raise Untranslatable("messages", "this provider takes no audio")
    kind = "image" if block.kind == "image" else "document"
    if block.url is not None:
        return {"type": kind, "source": {"type": "url", "url": block.url}}
    return {"type": kind, "source": {"type": "base64", "media_type": block.media_type, "data": block.data}}


def _tool_choice(choice: str) -> dict[str, str]:
    if choice.startswith("tool:"):
        return {"type": "tool", "name": choice.removeprefix("tool:")}
    return {"type": {"auto": "auto", "none": "none", "required": "any"}[choice]}


def _read_usage(record: object) -> Usage | None:
    if not isinstance(record, dict):
        return None
    cached = count_in(record, "cache_read_input_tokens")
    written = count_in(record, "cache_creation_input_tokens")
    input_tokens = count_in(record, "input_tokens") + cached + written
    output_tokens = count_in(record, "output_tokens")
    if input_tokens == 0 and output_tokens == 0:
        return None
    return usage_of(
        input_tokens=input_tokens,
        cached_tokens=cached,
        written_tokens=written,
        output_tokens=output_tokens,
        reasoning_tokens=0,
    )


def _raise_reported(error: object) -> None:
    kind = error.get("type") if isinstance(error, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    raise ReportedError(_ERROR_STATUSES.get(str(kind), 502), str(kind or "error"), str(message or "no message"))


def _text(owner: dict[str, Any], name: str) -> str:
    value = owner.get(name)
    return value if isinstance(value, str) else ""


def decode_answer(body: dict[str, Any]) -> Answer:
    """Read a complete answer."""
    if body.get("type") == "error":
        _raise_reported(body.get("error"))
    content = body.get("content")
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise Undecodable("the answer has no `content`")
    reason = body.get("stop_reason")
    if not isinstance(reason, str):
        raise Undecodable("the answer has no `stop_reason`")
    return Answer(
        id=_text(body, "id"),
        model=_text(body, "model"),
        text="".join(_text(block, "text") for block in content if block.get("type") == "text"),
        reasoning="".join(_text(block, "thinking") for block in content if block.get("type") == "thinking"),
        tool_calls=tuple(
            ToolCallBlock(_text(block, "id"), _text(block, "name"), orjson.dumps(block.get("input") or {}).decode())
            for block in content
            if block.get("type") == "tool_use"
        ),
        finish=_FINISHES.get(reason, "stop"),
        usage=_read_usage(body.get("usage")),
    )


def decoder(choices: int) -> AnthropicDecoder:
    """Begin to read a streamed answer."""
    assert choices == 1
    return AnthropicDecoder()


class AnthropicDecoder:
    """Reads the events of a streamed message. Their `type` repeats the event's name, so the name is not needed."""

    def __init__(self) -> None:
        self.ended = False
        self.chunk: dict[str, Any] = {}
        self._usage: dict[str, Any] = {}
        self._open: set[int] = set()
        """Blocks of the kinds that callers see; server-side tools' blocks pass by."""

    def feed(self, data: bytes) -> list[Event]:
        """Read one event."""
        event = self.chunk = read_object(data)
        kind = event.get("type")
        if kind == "content_block_delta":
            return self._delta(event)
        if kind == "message_start":
            message = _member(event, "message")
            return [Start(_text(message, "id"), _text(message, "model")), *self._report(message)]
        if kind == "content_block_start":
            return self._block_start(event)
        if kind == "content_block_stop":
            index = _index(event)
            if index in self._open:
                self._open.discard(index)
                return [BlockStop(index)]
        elif kind == "message_delta":
            reason = _member(event, "delta").get("stop_reason")
            finish: list[Event] = [Finish(_FINISHES.get(reason, "stop"))] if isinstance(reason, str) else []
            return finish + self._report(event)
        elif kind == "message_stop":
            self.ended = True
        elif kind == "error":
            _raise_reported(event.get("error"))
        return []  # ping, and whatever kinds come to be: the API's versioning rules ask clients to pass them over

    def _report(self, owner: dict[str, Any]) -> list[Event]:
        """Usage is cumulative; the closing record may leave out what the opening one said of the input."""
        record = owner.get("usage")
        if isinstance(record, dict):
            self._usage |= {name: value for name, value in record.items() if value is not None}
        usage = _read_usage(self._usage)
        return [] if usage is None else [UsageReport(usage)]

    def _block_start(self, event: dict[str, Any]) -> list[Event]:
        index, block = _index(event), _member(event, "content_block")
        kind = block.get("type")
        events: list[Event]
        if kind == "text":
            events = [BlockStart(index, "text")]
            said = _text(block, "text")
        elif kind == "thinking":
            events = [BlockStart(index, "reasoning")]
            said = _text(block, "thinking")
        elif kind == "tool_use":
            events = [BlockStart(index, "tool_call", _text(block, "id"), _text(block, "name"))]
            said = orjson.dumps(block["input"]).decode() if block.get("input") else ""
        else:
            return []
        self._open.add(index)
        return [*events, BlockDelta(index, said)] if said else events

    def _delta(self, event: dict[str, Any]) -> list[Event]:
        index, delta = _index(event), _member(event, "delta")
        if index not in self._open:
            return []
        text = _text(delta, "text") or _text(delta, "partial_json") or _text(delta, "thinking")
        return [BlockDelta(index, text)] if text else []


def _member(event: dict[str, Any], name: str) -> dict[str, Any]:
    value = event.get(name)
    if not isinstance(value, dict):
        raise Undecodable(f"an event has no `{name}`")
    return value


def _index(event: dict[str, Any]) -> int:
    value = event.get("index")
    if type(value) is not int:
        raise Undecodable("an event has no `index`")
    return value
