"""OpenAI's chat completions as the real API answers them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import orjson

from gateway.dev.simulator import wire
from gateway.dev.simulator.answers import MEDIA_TOKENS, Answer, Ask, Call, Finish, Tool, count_words
from gateway.dev.simulator.wire import BadRequest, ErrorAnswer, Fault, Headers, Step, member, objects, positive, string

NAME: Final = "openai_chat"
_FIELD_NAMES: Final = (
    "audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens "
    "messages metadata modalities model moderation n parallel_tool_calls prediction presence_penalty "
    "prompt_cache_key prompt_cache_options prompt_cache_retention reasoning_effort response_format "
    "safety_identifier seed service_tier stop store stream stream_options temperature tool_choice tools top_k "
    "top_logprobs top_p user verbosity web_search_options"
)
FIELDS: Final = frozenset(_FIELD_NAMES.split())
"""What the API takes; anything else it refuses (`top_k` is only other providers', whose models are simulated here as well)."""

_FINISHES: Final[dict[Finish, str]] = {
    "stop": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
}
_ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_CHOICES_MAX: Final = 8
_FINGERPRINT: Final = "fp_simulated"
_END: Final = Step(b"data: [DONE]\n\n", end=True)


def authenticated(headers: dict[bytes, bytes], query: dict[str, list[str]]) -> bool:
    """A bearer token that is not empty."""
    kind, _, key = headers.get(b"authorization", b"").partition(b" ")
    return kind.lower() == b"bearer" and bool(key.strip())


def headers(number: int) -> Headers:
    """The id by which OpenAI finds a request again."""
    return [(b"x-request-id", b"req_%032x" % number), (b"openai-version", b"2020-10-01")]


def read(body: dict[str, Any], headers: dict[bytes, bytes], model: str, *, streams: bool) -> Ask:
    """Understand a request."""
    unknown = wire.refuse_unknown(body, FIELDS)
    if unknown is not None:
        raise BadRequest(f"Unknown parameter: '{unknown}'.", unknown)
    model = string(body, "model")
    if not model:
        raise BadRequest("you must provide a model parameter")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("Missing required parameter: 'messages'.", "messages")
    turns = objects(messages)
    for place, turn in enumerate(turns):
        if turn.get("role") not in _ROLES:
            raise BadRequest(f"Invalid value: '{turn.get('role')}'.", f"messages[{place}].role")
    choices = positive(body, "n") or 1
    if choices > _CHOICES_MAX:
        raise BadRequest(f"Invalid 'n': the simulator gives at most {_CHOICES_MAX} choices.", "n")
    if body.get("stream_options") is not None and not body.get("stream"):
        raise BadRequest("The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options")
    tools = tuple(
        Tool(string(function, "name"), member(function, "parameters"))
        for tool in objects(body.get("tools"))
        if (function := member(tool, "function"))
    )
    described = sum(
        count_words(string(member(tool, "function"), "description")) + 1 for tool in objects(body.get("tools"))
    )
    max_tokens = positive(body, "max_completion_tokens")
    return Ask(
        model=model,
        stream=body.get("stream") is True,
        question=next((_said(turn)[0] for turn in reversed(turns) if turn["role"] == "user"), ""),
        input_tokens=sum(_said(turn)[1] for turn in turns) + described,
        max_tokens=positive(body, "max_tokens") if max_tokens is None else max_tokens,
        tools=() if body.get("tool_choice") == "none" else tools,
        must_call=_must_call(body.get("tool_choice")),
        after_tool_result=turns[-1]["role"] == "tool" if turns else False,
        json_schema=_json_schema(member(body, "response_format")),
        stop=wire.strings(body.get("stop")),
        choices=choices,
        usage_in_stream=member(body, "stream_options").get("include_usage") is True,
    )


def _said(turn: dict[str, Any]) -> tuple[str, int]:
    """The text of a turn, and its tokens."""
    content = turn.get("content")
    parts = objects(content)
    text = content if isinstance(content, str) else " ".join(string(part, "text") for part in parts)
    media = sum(part.get("type") not in ("text", "refusal") for part in parts)
    calls = sum(
        count_words(string(member(call, "function"), "arguments")) + 1 for call in objects(turn.get("tool_calls"))
    )
    return text, count_words(text) + media * MEDIA_TOKENS + calls


def _must_call(choice: object) -> str | None:
    if choice == "required":
        return ""
    return string(member(choice, "function"), "name") if isinstance(choice, dict) else None


def _json_schema(format_: dict[str, Any]) -> dict[str, Any] | None:
    match format_.get("type"):
        case "json_object":
            return {}
        case "json_schema":
            return member(member(format_, "json_schema"), "schema")
        case _:
            return None


def _usage(answer: Answer) -> dict[str, Any] | None:
    counts = answer.usage
    if counts is None:
        return None
    return {
        "prompt_tokens": counts.input,
        "completion_tokens": counts.output,
        "total_tokens": counts.input + counts.output,
        "prompt_tokens_details": {"cached_tokens": counts.cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": counts.reasoning,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _id(answer: Answer) -> str:
    return f"chatcmpl-sim{answer.number:024d}"


def _call_id(answer: Answer, place: int) -> str:
    return f"call_sim{answer.number:018d}{place:02d}"


def whole(answer: Answer) -> bytes:
    """A `chat.completion`."""
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if answer.calls else "".join(answer.text),
        "refusal": None,
        "annotations": [],
    }
    if answer.reasoning:
        message["reasoning_content"] = "".join(answer.reasoning)
    if answer.calls:
        message["tool_calls"] = [
            {
                "id": _call_id(answer, place),
                "type": "function",
                "function": {"name": call.name, "arguments": "".join(call.pieces)},
            }
            for place, call in enumerate(answer.calls)
        ]
    finish = _FINISHES[answer.finish]
    body: dict[str, Any] = {
        "id": _id(answer),
        "object": "chat.completion",
        "created": answer.created,
        "model": answer.model,
        "choices": [
            {"index": index, "message": message, "logprobs": None, "finish_reason": finish}
            for index in range(answer.choices)
        ],
        "usage": _usage(answer),
        "service_tier": "default",
        "system_fingerprint": _FINGERPRINT,
    }
    if answer.usage is None:
        del body["usage"]
    return orjson.dumps(body)


def stream(answer: Answer) -> Iterator[Step]:
    """`chat.completion.chunk`s; with usage on request only, in a last chunk without choices, and null in all others."""
    reports = answer.usage_in_stream and answer.usage is not None
    head = orjson.dumps(
        {
            "id": _id(answer),
            "object": "chat.completion.chunk",
            "created": answer.created,
            "model": answer.model,
            "service_tier": "default",
            "system_fingerprint": _FINGERPRINT,
        }
    )[:-1]
    tail = b',"usage":null}\n\n' if reports else b"}\n\n"

    def chunk(index: int, delta: bytes, finish: bytes = b"null") -> bytes:
        return b'data: %b,"choices":[{"index":%d,"delta":%b,"logprobs":null,"finish_reason":%b}]%b' % (
            head,
            index,
            delta,
            finish,
            tail,
        )

    every = range(answer.choices)
    content = b"null" if answer.calls else b'""'
    for index in every:
        yield Step(chunk(index, b'{"role":"assistant","content":%b,"refusal":null}' % content))
    for piece in answer.reasoning:
        for index in every:
            yield Step(chunk(index, orjson.dumps({"reasoning_content": piece})), 1)
    for piece in answer.text:
        for index in every:
            yield Step(chunk(index, orjson.dumps({"content": piece})), 1)
    for delta, tokens in _call_deltas(answer, answer.calls):
        for index in every:
            yield Step(chunk(index, delta), tokens)
    finish = orjson.dumps(_FINISHES[answer.finish])
    for index in every:
        yield Step(chunk(index, b"{}", finish))
    if reports:
        yield Step(b'data: %b,"choices":[],"usage":%b}\n\n' % (head, orjson.dumps(_usage(answer))))
    yield _END


def _call_deltas(answer: Answer, calls: Iterable[Call]) -> Iterator[tuple[bytes, int]]:
    for place, call in enumerate(calls):
        opening = {
            "index": place,
            "id": _call_id(answer, place),
            "type": "function",
            "function": {"name": call.name, "arguments": ""},
        }
        yield orjson.dumps({"tool_calls": [opening]}), 0
        for piece in call.pieces:
            yield orjson.dumps({"tool_calls": [{"index": place, "function": {"arguments": piece}}]}), 1


@dataclass(frozen=True, slots=True)
class _Error:
    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})


_FAILED: Final = _Error(500, "The server had an error while processing your request. Sorry about that!", "server_error")


def error(fault: Fault, number: int) -> ErrorAnswer:
    """OpenAI's errors, in its words."""
    if fault.kind == "status" and fault.status in (502, 504):
        return wire.proxy_error(fault.status)
    found = _status_error(fault) if fault.kind == "status" else _error(fault)
    more = wire.retry_after(fault)
    if found.code == "rate_limit_exceeded":
        more += [(b"x-ratelimit-limit-requests", b"500"), (b"x-ratelimit-remaining-requests", b"0")]
    return ErrorAnswer(found.status, [wire.JSON_HEADER, *headers(number), *more], found.body())


def _error(fault: Fault) -> _Error:
    match fault.kind:
        case "context_length":
            return _Error(
                400,
                f"This model's maximum context length is {fault.context_tokens} tokens. However, your messages resulted in "
                f"{fault.input_tokens} tokens. Please reduce the length of the messages.",
                code="context_length_exceeded",
                param="messages",
            )
        case "content_filter":
            return _Error(
                400,
                "Invalid prompt: your prompt was flagged as potentially violating our usage policy. Please try again with "
                "a different prompt: https://platform.openai.com/docs/guides/reasoning#advice-on-prompting",
                code="invalid_prompt",
            )
        case "quota":
            return _Error(
                429,
                "You exceeded your current quota, please check your plan and billing details. For more information on this "
                "error, read the docs: https://platform.openai.com/docs/guides/error-codes/api-errors.",
                "insufficient_quota",
                "insufficient_quota",
            )
        case "missing_key":
            return _Error(
                401,
                "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer "
                "auth (i.e. Authorization: Bearer YOUR_KEY).",
            )
        case "unknown_model":
            return _missing(fault)
        case "not_found":
            return _Error(404, fault.message)
        case _:
            return _Error(400, fault.message, param=fault.param)


def _missing(fault: Fault) -> _Error:
    message = fault.message or f"The model `{fault.model}` does not exist or you do not have access to it."
    return _Error(404, message, code="model_not_found")


def _status_error(fault: Fault) -> _Error:
    match fault.status:
        case 401:
            return _Error(
                401,
                "Incorrect API key provided: sk-sim**ated. You can find your API key at "
                "https://platform.openai.com/account/api-keys.",
                code="invalid_api_key",
            )
        case 403:
            message = "Country, region, or territory not supported"
            return _Error(403, message, "request_forbidden", "unsupported_country_region_territory")
        case 404:
            return _missing(fault)
        case 429:
            wait_s = 1 if fault.retry_after_s is None else fault.retry_after_s
            return _Error(
                429,
                f"Rate limit reached for {fault.model} in organization org-simulated on requests per min (RPM): Limit 500, "
                f"Used 500, Requested 1. Please try again in {wait_s}s. Visit "
                "https://platform.openai.com/account/rate-limits to learn more.",
                "requests",
                "rate_limit_exceeded",
            )
        case 503:
            return _Error(503, "The engine is currently overloaded, please try again later", "server_error")
        case status if status >= 500:
            return replace(_FAILED, status=status)
        case status:
            return _Error(status, "We could not process this request.")


def error_event(number: int) -> bytes:
    """OpenAI puts its error object where a chunk would be."""
    return b"data: %b\n\n" % _FAILED.body()


def malformed_event() -> bytes:
    """A torn chunk."""
    return b'data: {"id":"chatcmpl-sim","object":"chat.completion.chunk","choi\n\n'
