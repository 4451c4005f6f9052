"""Gemini's generateContent (v1beta) as the real one answers; streams with `alt=sse` only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import orjson

from gateway.dev.simulator import wire
from gateway.dev.simulator.answers import MEDIA_TOKENS, Answer, Ask, Finish, Tool, count_words
from gateway.dev.simulator.wire import BadRequest, ErrorAnswer, Fault, Headers, Step, member, objects, positive, string

NAME: Final = "gemini"
_FIELD_NAMES: Final = (
    "cachedContent contents generationConfig model safetySettings serviceTier store systemInstruction "
    "system_instruction toolConfig tools"
)
FIELDS: Final = frozenset(_FIELD_NAMES.split())
"""What the API takes; anything else it refuses."""

_FINISHES: Final[dict[Finish, str]] = {
    "stop": "STOP",
    "stop_sequence": "STOP",
    "length": "MAX_TOKENS",
    "tool_calls": "STOP",
    "content_filter": "SAFETY",
}
_STATUSES: Final = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ABORTED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_MESSAGES: Final = {
    401: "Request had invalid authentication credentials. Expected OAuth 2 access token, login cookie or other valid "
    "authentication credential.",
    403: "Permission denied on the requested resource.",
    500: "An internal error has occurred. Please retry or report in "
    "https://developers.generativeai.google/guide/troubleshooting",
    503: "The model is overloaded. Please try again later.",
}
_RATINGS: Final = [
    {"category": "HARM_CATEGORY_DANGEROUS_CONTENT", "probability": "HIGH", "blocked": True},
    {"category": "HARM_CATEGORY_HARASSMENT", "probability": "NEGLIGIBLE"},
]


def authenticated(headers: dict[bytes, bytes], query: dict[str, list[str]]) -> bool:
    """An API key in the header, or in the URL as older clients send it."""
    return bool(headers.get(b"x-goog-api-key", b"").strip() or query.get("key"))


def headers(number: int) -> Headers:
    """Google's answers carry no request id."""
    return [(b"vary", b"Origin"), (b"vary", b"X-Origin")]


def read(body: dict[str, Any], headers: dict[bytes, bytes], model: str, *, streams: bool) -> Ask:
    """Understand a request."""
    unknown = wire.refuse_unknown(body, FIELDS)
    if unknown is not None:
        raise BadRequest(f'Invalid JSON payload received. Unknown name "{unknown}": Cannot find field.')
    contents = objects(body.get("contents"))
    if not contents:
        raise BadRequest("* GenerateContentRequest.contents: contents is not specified\n")
    for place, content in enumerate(contents):
        if content.get("role", "user") not in ("user", "model"):
            raise BadRequest("Please use a valid role: user, model.")
        if not objects(content.get("parts")):
            raise BadRequest(f"* GenerateContentRequest.contents[{place}].parts: contents.parts must not be empty.\n")
    declared = [
        function for tool in objects(body.get("tools")) for function in objects(tool.get("functionDeclarations"))
    ]
    calling = member(member(body, "toolConfig"), "functionCallingConfig")
    config = member(body, "generationConfig")
    system = member(body, "systemInstruction") or member(body, "system_instruction")
    allowed = wire.strings(calling.get("allowedFunctionNames"))
    return Ask(
        model=model,
        stream=streams,
        question=next((said for content in reversed(contents) if (said := _question(content))), ""),
        input_tokens=sum(_tokens(content) for content in contents)
        + _tokens(system)
        + sum(count_words(string(function, "description")) + 1 for function in declared),
        max_tokens=positive(config, "maxOutputTokens"),
        tools=()
        if calling.get("mode") == "NONE"
        else tuple(
            Tool(string(function, "name"), member(function, "parametersJsonSchema") or member(function, "parameters"))
            for function in declared
        ),
        must_call=(allowed[0] if allowed else "") if calling.get("mode") == "ANY" else None,
        after_tool_result=any("functionResponse" in part for part in objects(contents[-1].get("parts"))),
        json_schema=(member(config, "responseJsonSchema") or member(config, "responseSchema"))
        if config.get("responseMimeType") == "application/json"
        else None,
        stop=wire.strings(config.get("stopSequences")),
    )


def _question(content: dict[str, Any]) -> str:
    if content.get("role", "user") != "user":
        return ""
    return " ".join(string(part, "text") for part in objects(content.get("parts"))).strip()


def _tokens(content: dict[str, Any]) -> int:
    total = 0
    for part in objects(content.get("parts")):
        if "text" in part:
            total += count_words(string(part, "text"))
        elif "functionCall" in part or "functionResponse" in part:
            called = member(part, "functionCall") or member(part, "functionResponse")
            total += count_words(orjson.dumps(called).decode())
        else:
            total += MEDIA_TOKENS
    return total


def _usage(answer: Answer, output_tokens: int) -> dict[str, Any]:
    """The counts so far; `output_tokens` are those that are not thoughts."""
    counts = answer.usage
    if counts is None:
        return {}
    usage: dict[str, Any] = {"promptTokenCount": counts.input}
    if output_tokens:
        usage["candidatesTokenCount"] = output_tokens
    usage["totalTokenCount"] = counts.input + output_tokens + counts.reasoning
    if counts.cached:
        usage["cachedContentTokenCount"] = counts.cached
    usage["promptTokensDetails"] = [{"modality": "TEXT", "tokenCount": counts.input}]
    if counts.reasoning:
        usage["thoughtsTokenCount"] = counts.reasoning
    return {"usageMetadata": usage}


def _body(
    answer: Answer, parts: list[dict[str, Any]], output_tokens: int, finish: Finish | None = None
) -> dict[str, Any]:
    candidate: dict[str, Any] = {"content": {"parts": parts, "role": "model"}}
    if finish is not None:
        candidate["finishReason"] = _FINISHES[finish]
    candidate["index"] = 0
    if finish == "content_filter":
        candidate["safetyRatings"] = _RATINGS
        if not any(part.get("text") for part in parts):
            del candidate["content"]
    return {
        "candidates": [candidate],
        **_usage(answer, output_tokens),
        "modelVersion": answer.model,
        "responseId": f"sim{answer.number:019d}",
    }


def _call_parts(answer: Answer) -> list[tuple[dict[str, Any], int]]:
    return [({"functionCall": {"name": call.name, "args": call.arguments}}, len(call.pieces)) for call in answer.calls]


def whole(answer: Answer) -> bytes:
    """A `GenerateContentResponse`."""
    parts: list[dict[str, Any]] = []
    if answer.reasoning:
        parts.append({"text": "".join(answer.reasoning), "thought": True})
    if answer.text:
        parts.append({"text": "".join(answer.text)})
    calls = _call_parts(answer)
    parts += [part for part, _ in calls]
    output_tokens = len(answer.text) + sum(tokens for _, tokens in calls)
    return orjson.dumps(_body(answer, parts, output_tokens, answer.finish))


def _event(body: dict[str, Any]) -> bytes:
    return b"data: %b\r\n\r\n" % orjson.dumps(body)


def stream(answer: Answer) -> Iterator[Step]:
    """Small answers, each with the usage so far; the one with the finish reason is the end."""
    for piece in answer.reasoning:
        yield Step(_event(_body(answer, [{"text": piece, "thought": True}], 0)), 1)
    output_tokens = 0
    for piece in answer.text:
        output_tokens += 1
        yield Step(_event(_body(answer, [{"text": piece}], output_tokens)), 1)
    for part, tokens in _call_parts(answer):
        output_tokens += tokens
        yield Step(_event(_body(answer, [part], output_tokens)), tokens)
    yield Step(_event(_body(answer, [{"text": ""}], output_tokens, answer.finish)), end=True)


def _error(code: int, message: str, details: list[dict[str, Any]] | None = None) -> bytes:
    status = _STATUSES.get(code, "INTERNAL" if code >= 500 else "INVALID_ARGUMENT")
    error = {"code": code, "message": message, "status": status}
    return orjson.dumps({"error": error | ({"details": details} if details else {})}, option=orjson.OPT_INDENT_2)


def error(fault: Fault, number: int) -> ErrorAnswer:
    """Google's errors, in its words. A filtered prompt is a 200 without candidates."""
    details: list[dict[str, Any]] = []
    more: Headers = []
    match fault.kind:
        case "context_length":
            code = 400
            message = (
                f"The input token count ({fault.input_tokens}) exceeds the maximum number of tokens allowed "
                f"({fault.context_tokens})."
            )
        case "content_filter":
            return ErrorAnswer(200, [wire.JSON_HEADER, *headers(number)], orjson.dumps(_blocked(fault)))
        case "quota":
            code, message, details = 429, _QUOTA_MESSAGE, _quota_details(fault)
        case "bad_request":
            code, message = 400, fault.message
        case "missing_key":
            code = 403
            message = (
                "Method doesn't allow unregistered callers (callers without established identity). Please use API Key or "
                "other form of API consumer identity to call this API."
            )
        case "unknown_model" | "not_found":
            code, message = 404, fault.message or _missing(fault.model)
        case "status":
            if fault.status == 502:
                return wire.proxy_error(fault.status)
            code = fault.status
            message = _missing(fault.model) if code == 404 else _MESSAGES.get(code, "Request failed.")
            # Google says when to come back in the body. The header is for what stands in front of it.
            more = wire.retry_after(fault)
            if code == 429:
                message, details = _QUOTA_MESSAGE, _quota_details(fault)
    return ErrorAnswer(code, [wire.JSON_HEADER, *headers(number), *more], _error(code, message, details))


_QUOTA_MESSAGE: Final = (
    "You exceeded your current quota, please check your plan and billing details. For more information on this error, head to: "
    "https://ai.google.dev/gemini-api/docs/rate-limits."
)


def _quota_details(fault: Fault) -> list[dict[str, Any]]:
    violation = {
        "quotaMetric": "generativelanguage.googleapis.com/generate_content_paid_tier_requests",
        "quotaId": "GenerateRequestsPerMinutePerProjectPerModel",
        "quotaDimensions": {"location": "global", "model": fault.model},
        "quotaValue": "10",
    }
    details: list[dict[str, Any]] = [
        {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [violation]}
    ]
    if fault.retry_after_s is not None:
        details.append({"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{fault.retry_after_s}s"})
    return details


def _missing(model: str) -> str:
    return (
        f"models/{model} is not found for API version v1beta, or is not supported for generateContent. Call ListModels to see "
        "the list of available models and their supported methods."
    )


def _blocked(fault: Fault) -> dict[str, Any]:
    return {
        "promptFeedback": {"blockReason": "PROHIBITED_CONTENT"},
        "usageMetadata": {"promptTokenCount": fault.input_tokens, "totalTokenCount": fault.input_tokens},
        "modelVersion": fault.model,
    }


def error_event(number: int) -> bytes:
    """Google puts its error object where a chunk would be."""
    return b"data: %b\r\n\r\n" % orjson.dumps(orjson.loads(_error(503, _MESSAGES[503])))


def malformed_event() -> bytes:
    """A torn chunk."""
    return b'data: {"candidates": [{"content": {"parts": [{"te\r\n\r\n'
