"""OpenAI chat completions as callers read them: answers and streams, written from the canonical form or passed through.

`model` is always the public id of the model that served the request. Streams are written without the terminal
`data: [DONE]`: the gateway puts the receipt before it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol

import orjson

from gateway.dialects.canonical import Answer, BlockDelta, BlockStart, Event, Finish, Start
from gateway.dialects.sse import frame
from gateway.dialects.upstream import StreamDecoder
from payments.money import Usage


class StreamWriter(Protocol):
    """Writes the caller's stream."""

    def write(self, decoder: StreamDecoder, events: Sequence[Event]) -> bytes:
        """The frames for what the decoder has just read; may be empty."""

    def close(self, usage: Usage) -> bytes:
        """The last frame: usage, where the caller asked for it and has not got it."""


def encode_answer(answer: Answer, model: str, usage: Usage) -> bytes:
    """A complete answer as a `chat.completion` object."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or None, "refusal": None}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.tool_calls
        ]
    elif message["content"] is None:
        message["content"] = ""
    return orjson.dumps(
        {
            "id": answer.id or _new_id(),
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish}],
            "usage": usage_object(usage),
        }
    )


def pass_answer(body: dict[str, Any], data: bytes, model: str, usage: Usage) -> bytes:
    """An answer of the same dialect: the upstream's own bytes, unless the model's name or the usage has to change."""
    if body.get("model") == model and body.get("usage"):
        return data
    return orjson.dumps(body | {"model": model, "usage": body.get("usage") or usage_object(usage)})


def usage_object(usage: Usage) -> dict[str, Any]:
    """Usage in OpenAI's words."""
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_input_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _new_id() -> str:
    return f"chatcmpl-{secrets.token_hex(12)}"


class PassThrough:
    """Forwards chunks of the same dialect. Only `model` is rewritten, and `usage` withheld from callers who did not ask."""

    def __init__(self, model: str, *, include_usage: bool) -> None:
        self._model = model
        self._include_usage = include_usage
        self._usage_sent = False
        self._last: dict[str, Any] = {}

    def write(self, decoder: StreamDecoder, events: Sequence[Event]) -> bytes:
        """Forward the chunk that was just decoded. It is parsed already, so writing it again costs about a microsecond."""
        chunk = decoder.chunk
        if decoder.ended or chunk is self._last:
            return b""
        self._last = chunk
        if self._include_usage:
            self._usage_sent = self._usage_sent or bool(chunk.get("usage"))
        elif "usage" in chunk:
            usage = chunk.pop("usage")
            if usage is not None and not chunk.get("choices"):
                return b""
        chunk["model"] = self._model
        return frame(orjson.dumps(chunk))

    def close(self, usage: Usage) -> bytes:
        """The usage chunk that the upstream owed."""
        if not self._include_usage or self._usage_sent:
            return b""
        self._usage_sent = True
        base = {name: self._last.get(name) for name in ("id", "object", "created")}
        return frame(orjson.dumps({**base, "model": self._model, "choices": [], "usage": usage_object(usage)}))


class ChunkWriter:
    """Writes `chat.completion.chunk` frames from canonical events of any dialect."""

    def __init__(self, model: str, *, include_usage: bool) -> None:
        self._model = orjson.dumps(model)
        self._include_usage = include_usage
        self._head = b""
        self._tail = b',"usage":null}' if include_usage else b"}"
        self._kinds: dict[int, str] = {}
        self._calls: dict[int, int] = {}

    def write(self, decoder: StreamDecoder, events: Sequence[Event]) -> bytes:
        """The frames for these events, joined."""
        return b"".join([self._event(event) for event in events])

    def _event(self, event: Event) -> bytes:
        if isinstance(event, BlockDelta):
            text = orjson.dumps(event.text)
            kind = self._kinds[event.index]
            if kind == "text":
                return self._chunk(b'{"content":' + text + b"}")
            if kind == "reasoning":
                return self._chunk(b'{"reasoning_content":' + text + b"}")
            number = self._calls[event.index]
            return self._chunk(b'{"tool_calls":[{"index":%d,"function":{"arguments":%b}}]}' % (number, text))
        if isinstance(event, Start):
            created = int(time.time())
            self._head = b'{"id":%b,"object":"chat.completion.chunk","created":%d,"model":%b,"choices":' % (
                orjson.dumps(event.id or _new_id()),
                created,
                self._model,
            )
            return self._chunk(b'{"role":"assistant","content":""}')
        if isinstance(event, BlockStart):
            self._kinds[event.index] = event.kind
            if event.kind == "tool_call":
                return self._call(event)
        elif isinstance(event, Finish):
            return self._chunk(b"{}", orjson.dumps(event.reason))
        return b""

    def _call(self, event: BlockStart) -> bytes:
        number = self._calls[event.index] = len(self._calls)
        call = {
            "index": number,
            "id": event.tool_id,
            "type": "function",
            "function": {"name": event.tool_name, "arguments": ""},
        }
        return self._chunk(b'{"tool_calls":[%b]}' % orjson.dumps(call))

    def _chunk(self, delta: bytes, finish: bytes = b"null") -> bytes:
        choice = b'[{"index":0,"delta":%b,"logprobs":null,"finish_reason":%b}]' % (delta, finish)
        return b"data: " + self._head + choice + self._tail + b"\n\n"

    def close(self, usage: Usage) -> bytes:
        """The usage chunk, where it was asked for."""
        if not self._include_usage or not self._head:
            return b""
        return b'data: %b[],"usage":%b}\n\n' % (self._head, orjson.dumps(usage_object(usage)))
