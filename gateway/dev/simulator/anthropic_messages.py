"""Anthropic's Messages API (version 2023-06-01) as the real one answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import orjson

from gateway.dev.simulator import wire
from gateway.dev.simulator.answers import MEDIA_TOKENS, Answer, Ask, Finish, Tool, count_words
from gateway.dev.simulator.wire import BadRequest, ErrorAnswer, Fault, Headers, Step, member, objects, positive, string

NAME: Final = "anthropic_messages"
_FIELD_NAMES: Final = (
    "cache_control container context_management inference_geo max_tokens mcp_servers messages metadata model "
    "output_config output_format service_tier speed stop_sequences stream system temperature thinking "
    "tool_choice tools top_k top_p"
)
FIELDS: Final = frozenset(_FIELD_NAMES.split())
"""What the API takes; anything else it refuses."""

_FINISHES: Final[dict[Finish, str]] = {
    "stop": "end_turn",
    "stop_sequence": "stop_sequence",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}
_ERROR_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_MESSAGES: Final = {
    401: "invalid x-api-key",
    402: "There is an issue with your billing or payment information.",
    403: "Your API key does not have permission to use the specified resource.",
    413: "Request exceeds the maximum size",
    500: "Internal server error",
    529: "Overloaded",
}
_SIGNATURE: Final = "c2ltdWxhdGVk"


def authenticated(headers: dict[bytes, bytes], query: dict[str, list[str]]) -> bool:
    """An API key that is not empty."""
    return bool(headers.get(b"x-api-key", b"").strip())


def headers(number: int) -> Headers:
    """The id by which Anthropic finds a request again."""
    return [(b"request-id", _request_id(number).encode())]


def _request_id(number: int) -> str:
    return f"req_sim{number:020d}"


def read(body: dict[str, Any], headers: dict[bytes, bytes], model: str, *, streams: bool) -> Ask:
    """Understand a request."""
    if not headers.get(b"anthropic-version"):
        raise BadRequest("anthropic-version: header is required")
    unknown = wire.refuse_unknown(body, FIELDS)
    if unknown is not None:
        raise BadRequest(f"{unknown}: Extra inputs are not permitted")
    for name in ("model", "max_tokens", "messages"):
        if body.get(name) is None:
            raise BadRequest(f"{name}: Field required")
    turns = objects(body["messages"])
    if not turns:
        raise BadRequest("messages: at least one message is required")
    for place, turn in enumerate(turns):
        if turn.get("role") not in ("user", "assistant"):
            raise BadRequest(f"messages.{place}.role: Input should be 'user' or 'assistant'")
        if turn.get("content") in ("", []) and place < len(turns) - 1:
            raise BadRequest(f"messages.{place}: all messages must have non-empty content")
    offered = [tool for tool in objects(body.get("tools")) if "input_schema" in tool]
    choice = member(body, "tool_choice")
    system = body.get("system")
    return Ask(
        model=string(body, "model"),
        stream=body.get("stream") is True,
        question=next((said for turn in reversed(turns) if turn["role"] == "user" and (said := _text(turn))), ""),
        input_tokens=sum(_tokens(turn.get("content")) for turn in turns)
        + _tokens(system)
        + sum(count_words(string(tool, "description")) + 1 for tool in offered),
        max_tokens=positive(body, "max_tokens"),
        tools=()
        if choice.get("type") == "none"
        else tuple(Tool(string(tool, "name"), member(tool, "input_schema")) for tool in offered),
        must_call={"any": "", "tool": string(choice, "name")}.get(string(choice, "type")),
        after_tool_result=any(part.get("type") == "tool_result" for part in objects(turns[-1].get("content"))),
        json_schema=_json_schema(body),
        stop=wire.strings(body.get("stop_sequences")),
    )


def _text(turn: dict[str, Any]) -> str:
    content = turn.get("content")
    return content if isinstance(content, str) else " ".join(string(part, "text") for part in objects(content)).strip()


def _tokens(content: object) -> int:
    if isinstance(content, str):
        return count_words(content)
    total = 0
    for part in objects(content):
        match part.get("type"):
            case "text":
                total += count_words(string(part, "text"))
            case "thinking":
                total += count_words(string(part, "thinking"))
            case "tool_use":
                total += count_words(orjson.dumps(part.get("input")).decode()) + 1
            case "tool_result":
                total += _tokens(part.get("content"))
            case _:
                total += MEDIA_TOKENS
    return total


def _json_schema(body: dict[str, Any]) -> dict[str, Any] | None:
    format_ = member(member(body, "output_config"), "format") or member(body, "output_format")
    return member(format_, "schema") if format_.get("type") == "json_schema" else None


def _usage(answer: Answer, output_tokens: int) -> dict[str, Any] | None:
    counts = answer.usage
    if counts is None:
        return None
    return {
        "input_tokens": counts.input - counts.cached - counts.written,
        "cache_creation_input_tokens": counts.written,
        "cache_read_input_tokens": counts.cached,
        "cache_creation": {"ephemeral_5m_input_tokens": counts.written, "ephemeral_1h_input_tokens": 0},
        "output_tokens": output_tokens,
        "service_tier": "standard",
    }


def _message(answer: Answer, content: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    message = {
        "model": answer.model,
        "id": f"msg_sim{answer.number:020d}",
        "type": "message",
        "role": "assistant",
        "content": content,
        **more,
    }
    return {name: value for name, value in message.items() if name != "usage" or value is not None}


def _tool_id(answer: Answer, place: int) -> str:
    return f"toolu_sim{answer.number:018d}{place:02d}"


def whole(answer: Answer) -> bytes:
    """A `message`."""
    content: list[dict[str, Any]] = []
    if answer.reasoning:
        content.append({"type": "thinking", "thinking": "".join(answer.reasoning), "signature": _SIGNATURE})
    if answer.text:
        content.append({"type": "text", "text": "".join(answer.text)})
    content += [
        {"type": "tool_use", "id": _tool_id(answer, place), "name": call.name, "input": call.arguments}
        for place, call in enumerate(answer.calls)
    ]
    return orjson.dumps(
        _message(
            answer,
            content,
            stop_reason=_FINISHES[answer.finish],
            stop_sequence=answer.stop_sequence,
            usage=_usage(answer, answer.usage.output) if answer.usage else None,
        )
    )


def _event(name: str, **members: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps({"type": name, **members}))


def stream(answer: Answer) -> Iterator[Step]:
    """`message_start` to `message_stop`, with a ping after the first block's start as the API sends it."""
    start = _message(answer, [], stop_reason=None, stop_sequence=None, usage=_usage(answer, 1))
    yield Step(_event("message_start", message=start))
    first = True
    for index, (block, steps) in enumerate(_blocks(answer)):
        yield Step(_event("content_block_start", index=index, content_block=block))
        if first:
            yield Step(_event("ping"))
            first = False
        for delta, tokens in steps:
            yield Step(_event("content_block_delta", index=index, delta=delta), tokens)
        yield Step(_event("content_block_stop", index=index))
    closing: dict[str, Any] = {
        "delta": {"stop_reason": _FINISHES[answer.finish], "stop_sequence": answer.stop_sequence}
    }
    if answer.usage is not None:
        closing["usage"] = {
            "input_tokens": answer.usage.input - answer.usage.cached - answer.usage.written,
            "cache_creation_input_tokens": answer.usage.written,
            "cache_read_input_tokens": answer.usage.cached,
            "output_tokens": answer.usage.output,
        }
    yield Step(_event("message_delta", **closing))
    yield Step(_event("message_stop"), end=True)


def _blocks(answer: Answer) -> Iterator[tuple[dict[str, Any], list[tuple[dict[str, Any], int]]]]:
    """Each content block as it starts, and its deltas with their tokens."""
    if answer.reasoning:
        thoughts: list[tuple[dict[str, Any], int]] = [
            ({"type": "thinking_delta", "thinking": piece}, 1) for piece in answer.reasoning
        ]
        signed = ({"type": "signature_delta", "signature": _SIGNATURE}, 0)
        yield {"type": "thinking", "thinking": "", "signature": ""}, [*thoughts, signed]
    if answer.text:
        yield {"type": "text", "text": ""}, [({"type": "text_delta", "text": piece}, 1) for piece in answer.text]
    for place, call in enumerate(answer.calls):
        block = {"type": "tool_use", "id": _tool_id(answer, place), "name": call.name, "input": {}}
        yield (
            block,
            [
                ({"type": "input_json_delta", "partial_json": ""}, 0),
                *(({"type": "input_json_delta", "partial_json": piece}, 1) for piece in call.pieces),
            ],
        )


def _error(kind: str, message: str, number: int) -> bytes:
    return orjson.dumps(
        {"type": "error", "error": {"type": kind, "message": message}, "request_id": _request_id(number)}
    )


def error(fault: Fault, number: int) -> ErrorAnswer:
    """Anthropic's errors, in its words."""
    more: Headers = []
    match fault.kind:
        case "context_length":
            message = f"prompt is too long: {fault.input_tokens} tokens > {fault.context_tokens} maximum"
            status, kind = 400, "invalid_request_error"
        case "content_filter":
            status, kind, message = 400, "invalid_request_error", "Output blocked by content filtering policy"
        case "quota":
            status, kind = 400, "invalid_request_error"
            message = (
                "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing to upgrade or "
                "purchase credits."
            )
        case "bad_request":
            status, kind, message = 400, "invalid_request_error", fault.message
        case "missing_key":
            status, kind, message = 401, "authentication_error", "x-api-key header is required"
        case "unknown_model" | "not_found":
            status, kind, message = 404, "not_found_error", fault.message or f"model: {fault.model}"
        case "status":
            if fault.status in (502, 504):
                return wire.proxy_error(fault.status)
            status = fault.status
            kind = _ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
            message = _status_message(fault)
            more = wire.retry_after(fault)
            if status == 429:
                more += [
                    (b"anthropic-ratelimit-requests-limit", b"50"),
                    (b"anthropic-ratelimit-requests-remaining", b"0"),
                ]
    return ErrorAnswer(status, [wire.JSON_HEADER, *headers(number), *more], _error(kind, message, number))


def _status_message(fault: Fault) -> str:
    if fault.status == 404:
        return f"model: {fault.model}"
    if fault.status == 429:
        return (
            "This request would exceed your organization's rate limit of 50 requests per minute. Please reduce the prompt "
            "length or the maximum tokens requested, or try again later."
        )
    fallback = "Internal server error" if fault.status >= 500 else "The request could not be processed."
    return _MESSAGES.get(fault.status, fallback)


def error_event(number: int) -> bytes:
    """Under high load Anthropic ends streams with what would be a 529."""
    return _event("error", error={"type": "overloaded_error", "message": "Overloaded"}, request_id=_request_id(number))


def malformed_event() -> bytes:
    """A torn delta."""
    return b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"del\n\n'
