"""The three upstream dialects as their providers write them: what the scripted upstreams of the tests send."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson


def event(value: object, name: str = "") -> bytes:
    """One SSE event."""
    head = f"event: {name}\r\n".encode() if name else b""
    return head + b"data: " + orjson.dumps(value) + (b"\r\n\r\n" if name else b"\n\n")


def _chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "upstream-name"}
    return event({**head, "choices": [choice], **more})


def _candidate(parts: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"content": {"role": "model", "parts": parts}, **more}


@dataclass(frozen=True)
class WireOf:
    """A dialect's pieces: an answer of 11 input tokens (3 of them cached) and 5 output tokens."""

    dialect: str
    base: str
    start: bytes
    hello: bytes
    """The text "Hello "."""
    world: bytes
    """The text "world"."""
    finish: bytes
    """The finish reason, in OpenAI's words `stop`."""
    usage: bytes
    end: bytes
    """The end marker, where there is one."""
    error: bytes
    """An error in the middle of a stream."""
    whole: dict[str, Any]
    context_error: dict[str, Any]
    filter_error: dict[str, Any]


_ANTHROPIC_USAGE = {"input_tokens": 8, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 0}
_GEMINI_USAGE = {
    "promptTokenCount": 11,
    "cachedContentTokenCount": 3,
    "candidatesTokenCount": 3,
    "thoughtsTokenCount": 2,
    "totalTokenCount": 16,
}
_OPENAI_USAGE = {
    "prompt_tokens": 11,
    "completion_tokens": 5,
    "total_tokens": 16,
    "prompt_tokens_details": {"cached_tokens": 3},
}

OPENAI = WireOf(
    dialect="openai_chat",
    base="/v1",
    start=_chunk({"role": "assistant", "content": ""}),
    hello=_chunk({"content": "Hello "}),
    world=_chunk({"content": "world"}),
    finish=_chunk({}, "stop"),
    usage=event({"id": "c1", "object": "chat.completion.chunk", "created": 1, "choices": [], "usage": _OPENAI_USAGE}),
    end=b"data: [DONE]\n\n",
    error=event({"error": {"message": "overloaded", "type": "server_error", "code": 503}}),
    whole={
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "upstream-name",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "Hello world"}, "finish_reason": "stop"},
        ],
        "usage": _OPENAI_USAGE,
        "system_fingerprint": "fp_1",
    },
    context_error={
        "error": {
            "message": "This model's maximum context length is 8 tokens.",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "context_length_exceeded",
        }
    },
    filter_error={
        "error": {"message": "The response was filtered", "type": "invalid_request_error", "code": "content_filter"}
    },
)

ANTHROPIC = WireOf(
    dialect="anthropic_messages",
    base="",
    start=event(
        {
            "type": "message_start",
            "message": {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "content": [],
                "model": "upstream-name",
                "stop_reason": None,
                "usage": {**_ANTHROPIC_USAGE, "output_tokens": 1},
            },
        },
        "message_start",
    )
    + event(
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        "content_block_start",
    )
    + event({"type": "ping"}, "ping"),
    hello=event(
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello "}},
        "content_block_delta",
    ),
    world=event(
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "world"}},
        "content_block_delta",
    ),
    finish=event({"type": "content_block_stop", "index": 0}, "content_block_stop")
    + event({"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}}, "message_delta"),
    usage=event({"type": "message_delta", "delta": {}, "usage": {"output_tokens": 5}}, "message_delta"),
    end=event({"type": "message_stop"}, "message_stop"),
    error=event({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, "error"),
    whole={
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "upstream-name",
        "content": [{"type": "text", "text": "Hello world"}],
        "stop_reason": "end_turn",
        "usage": {**_ANTHROPIC_USAGE, "output_tokens": 5},
    },
    context_error={
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "prompt is too long: 200010 tokens > 200000 maximum"},
    },
    filter_error={
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "Output blocked by content filtering policy"},
    },
)

GEMINI = WireOf(
    dialect="gemini",
    base="/v1beta",
    start=event({"candidates": [_candidate([{"text": ""}])], "responseId": "r1", "modelVersion": "upstream-name"}),
    hello=event({"candidates": [_candidate([{"text": "Hello "}])], "responseId": "r1"}),
    world=event({"candidates": [_candidate([{"text": "world"}])], "responseId": "r1"}),
    finish=event({"candidates": [_candidate([], finishReason="STOP")], "responseId": "r1"}),
    usage=event({"usageMetadata": _GEMINI_USAGE}),
    end=b"",
    error=event({"error": {"code": 503, "message": "overloaded", "status": "UNAVAILABLE"}}),
    whole={
        "candidates": [_candidate([{"text": "Hello world"}], finishReason="STOP")],
        "usageMetadata": _GEMINI_USAGE,
        "responseId": "r1",
        "modelVersion": "upstream-name",
    },
    context_error={
        "error": {
            "code": 400,
            "message": "The input token count (200010) exceeds the maximum number of tokens allowed (200000).",
            "status": "INVALID_ARGUMENT",
        }
    },
    filter_error={"promptFeedback": {"blockReason": "SAFETY"}},
)

ALL = (OPENAI, ANTHROPIC, GEMINI)
