"""Upstreams that speak Gemini's generateContent (v1beta).

Schemas go as plain JSON Schema (`parametersJsonSchema`, `responseJsonSchema`), which Gemini takes beside its own OpenAPI
subset, so nothing has to be converted or dropped. Thinking is billed as output and reported beside it; our usage adds the two.
"""

from __future__ import annotations

import mimetypes
import secrets
from collections.abc import Iterator
from itertools import groupby
from typing import Any, Final
from urllib.parse import quote

import orjson

from gateway.dialects.canonical import (
    Answer,
    Block,
    BlockDelta,
    BlockKind,
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
    Tool,
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

NAME: Final = "gemini"
_FILTERS: Final = frozenset(
    {"SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY", "LANGUAGE"}
)
_BROKEN: Final = frozenset({"MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "OTHER"})
"""The model's output was not usable; another attempt may be."""
_UNSIGNED: Final = "skip_thought_signature_validator"
"""Gemini 3 refuses its own tool calls without their thought signature, which OpenAI's dialect has no place for. This is the
value that Google documents for calls whose signature is not there."""


def auth_headers(api_key: str | None) -> dict[str, str]:
    """The key."""
    return {} if api_key is None else {"x-goog-api-key": api_key}


def build(request: ChatRequest, candidate: Candidate, max_output_tokens: int, base_url: str) -> UpstreamCall:
    """Translate the request."""
    if request.choices > 1:
        raise Untranslatable("n", "this provider gives one answer at a time")
    body: dict[str, Any] = {"contents": list(_contents(request.messages, candidate.upstream_model))}
    system = [
        {"text": block.text}
        for message in request.messages
        if message.role == "system"
        for block in message.blocks
        if isinstance(block, TextBlock) and block.text
    ]
    if system:
        body["systemInstruction"] = {"parts": system}
    if request.tools:
        body["tools"] = [{"functionDeclarations": [_declaration(tool) for tool in request.tools]}]
        if request.tool_choice is not None:
            body["toolConfig"] = {"functionCallingConfig": _calling(request.tool_choice)}
    body["generationConfig"] = _generation(request, max_output_tokens)
    base = base_url.rstrip("/")
    if not base.endswith(("/v1beta", "/v1")):
        base += "/v1beta"
    method = "streamGenerateContent?alt=sse" if request.stream else "generateContent"
    model = candidate.upstream_model.removeprefix("models/")
    return UpstreamCall(f"{base}/models/{quote(model, safe='')}:{method}", orjson.dumps(body))


def _generation(request: ChatRequest, max_output_tokens: int) -> dict[str, Any]:
    config: dict[str, Any] = {"maxOutputTokens": max_output_tokens}
    if request.temperature is not None:
        config["temperature"] = request.temperature
    if request.top_p is not None:
        config["topP"] = request.top_p
    if request.stop:
        config["stopSequences"] = list(request.stop)
    if request.response_format != "text":
        config["responseMimeType"] = "application/json"
        schema = (request.response_schema or {}).get("schema")
        if schema:
            config["responseJsonSchema"] = schema
    return config


def _declaration(tool: Tool) -> dict[str, Any]:
    declaration = {"name": tool.name, "parametersJsonSchema": tool.parameters}
    return declaration if tool.description is None else declaration | {"description": tool.description}


def _calling(choice: str) -> dict[str, Any]:
    if choice.startswith("tool:"):
        return {"mode": "ANY", "allowedFunctionNames": [choice.removeprefix("tool:")]}
    return {"mode": {"auto": "AUTO", "none": "NONE", "required": "ANY"}[choice]}


def _contents(messages: tuple[Message, ...], model: str) -> Iterator[dict[str, Any]]:
    """Turns alternate, and all results of one round of tool calls have to be in one turn."""
    spoken = [message for message in messages if message.role != "system"]
    names: dict[str, str] = {}
    for role, group in groupby(spoken, lambda message: "model" if message.role == "assistant" else "user"):
        parts = [part for message in group for part in _parts(message, names, model)]
        if parts:
            yield {"role": role, "parts": parts}


def _parts(message: Message, names: dict[str, str], model: str) -> Iterator[dict[str, Any]]:
    unsigned = "gemini-3" in model
    for block in message.blocks:
        if isinstance(block, ToolCallBlock):
            names[block.id] = block.name
            part = {"functionCall": {"name": block.name, "args": tool_arguments(block)}}
            yield part | {"thoughtSignature": _UNSIGNED} if unsigned else part
            unsigned = False  # only the first call of a step carries one
        elif not (isinstance(block, TextBlock) and not block.text):
            yield _part(block, names)


def _part(block: Block, names: dict[str, str]) -> dict[str, Any]:
    if isinstance(block, TextBlock):
        return {"text": block.text}
    if isinstance(block, ToolResultBlock):
        return {"functionResponse": {"name": names[block.call_id], "response": _result(block.content)}}
    assert isinstance(block, MediaBlock)
    if block.url is None:
        return {"inlineData": {"mimeType": block.media_type, "data": block.data}}
    guessed = mimetypes.guess_type(block.url.partition("?")[0])[0]
    return {"fileData": {"fileUri": block.url, "mimeType": block.media_type or guessed or "image/jpeg"}}


def _result(content: str) -> dict[str, Any]:
    """A tool's result must be an object here; anything else is put into one."""
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError:
        return {"result": content}
    return value if isinstance(value, dict) else {"result": value}


def _read_usage(record: object) -> Usage | None:
    if not isinstance(record, dict):
        return None
    input_tokens = count_in(record, "promptTokenCount") + count_in(record, "toolUsePromptTokenCount")
    thoughts = count_in(record, "thoughtsTokenCount")
    output_tokens = count_in(record, "candidatesTokenCount") + thoughts
    if input_tokens == 0 and output_tokens == 0:
        return None
    return usage_of(
        input_tokens=input_tokens,
        cached_tokens=count_in(record, "cachedContentTokenCount"),
        written_tokens=0,
        output_tokens=output_tokens,
        reasoning_tokens=thoughts,
    )


def _candidate(body: dict[str, Any]) -> dict[str, Any] | None:
    """The one candidate of an answer or chunk; None for a chunk without (usage only).

    Raises:
        ReportedError: The prompt was blocked, or the answer is an error.
    """
    if isinstance(body.get("error"), dict):
        error = body["error"]
        status = error.get("code")
        status = status if type(status) is int and 400 <= status <= 599 else 502
        raise ReportedError(status, str(error.get("status") or "error"), str(error.get("message") or "no message"))
    feedback = body.get("promptFeedback")
    if isinstance(feedback, dict) and feedback.get("blockReason"):
        raise ReportedError(400, "content_filter", f"the prompt was blocked: {feedback['blockReason']}")
    candidates = body.get("candidates")
    if candidates is None:
        return None
    if not isinstance(candidates, list) or not all(isinstance(candidate, dict) for candidate in candidates):
        raise Undecodable("`candidates` is not an array of objects")
    return candidates[0] if candidates else None


def _content_parts(candidate: dict[str, Any]) -> list[dict[str, Any]]:
    content = candidate.get("content")
    parts = content.get("parts") if isinstance(content, dict) else None
    if parts is None:
        return []
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise Undecodable("`parts` is not an array of objects")
    return parts


def _finish(reason: str, *, called: bool) -> FinishReason:
    if reason in _BROKEN:
        raise ReportedError(502, reason.lower(), f"the model ended with {reason}")
    if reason in _FILTERS:
        return "content_filter"
    if reason == "MAX_TOKENS":
        return "length"
    return "tool_calls" if called else "stop"


def _call(part: dict[str, Any]) -> ToolCallBlock:
    call = part["functionCall"]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise Undecodable("a `functionCall` has no `name`")
    call_id = call.get("id")
    arguments = orjson.dumps(call.get("args") or {}).decode()
    # Gemini's ids are optional; OpenAI's callers answer by id.
    return ToolCallBlock(
        call_id if isinstance(call_id, str) and call_id else f"call_{secrets.token_hex(12)}", call["name"], arguments
    )


def _text(owner: dict[str, Any], name: str) -> str:
    value = owner.get(name)
    return value if isinstance(value, str) else ""


def decode_answer(body: dict[str, Any]) -> Answer:
    """Read a complete answer."""
    candidate = _candidate(body)
    if candidate is None:
        raise Undecodable("the answer has no `candidates`")
    reason = candidate.get("finishReason")
    if not isinstance(reason, str):
        raise Undecodable("the answer has no `finishReason`")
    parts = _content_parts(candidate)
    calls = tuple(_call(part) for part in parts if "functionCall" in part)
    return Answer(
        id=_text(body, "responseId"),
        model=_text(body, "modelVersion"),
        text="".join(_text(part, "text") for part in parts if not part.get("thought")),
        reasoning="".join(_text(part, "text") for part in parts if part.get("thought")),
        tool_calls=calls,
        finish=_finish(reason, called=bool(calls)),
        usage=_read_usage(body.get("usageMetadata")),
    )


def decoder(choices: int) -> GeminiDecoder:
    """Begin to read a streamed answer."""
    assert choices == 1
    return GeminiDecoder()


class GeminiDecoder:
    """Reads chunks, each a small answer of its own. There is no end marker beside the finish reason and the end of the body."""

    def __init__(self) -> None:
        self.ended = False
        self.chunk: dict[str, Any] = {}
        self._started = False
        self._open: BlockKind | None = None
        self._index = -1
        self._called = False

    def feed(self, data: bytes) -> list[Event]:
        """Read one chunk."""
        chunk = self.chunk = read_object(data)
        candidate = _candidate(chunk)
        if candidate is None and "usageMetadata" not in chunk:
            raise Undecodable("a chunk has neither `candidates` nor `usageMetadata`")
        events: list[Event] = []
        if not self._started:
            self._started = True
            events.append(Start(_text(chunk, "responseId"), _text(chunk, "modelVersion")))
        if candidate is not None:
            self._read(candidate, events)
        usage = _read_usage(chunk.get("usageMetadata"))
        if usage is not None:
            events.append(UsageReport(usage))
        return events

    def _read(self, candidate: dict[str, Any], events: list[Event]) -> None:
        for part in _content_parts(candidate):
            if "functionCall" in part:
                call = _call(part)
                self._called = True
                self._begin("tool_call", events, call)
                events.append(BlockDelta(self._index, call.arguments))
                continue
            text = _text(part, "text")
            if text:
                kind: BlockKind = "reasoning" if part.get("thought") else "text"
                if self._open != kind:
                    self._begin(kind, events)
                events.append(BlockDelta(self._index, text))
        reason = candidate.get("finishReason")
        if isinstance(reason, str):
            finish = _finish(reason, called=self._called)
            self._end(events)
            events.append(Finish(finish))

    def _begin(self, kind: BlockKind, events: list[Event], call: ToolCallBlock | None = None) -> None:
        self._end(events)
        self._index += 1
        self._open = kind
        events.append(BlockStart(self._index, kind, call.id if call else None, call.name if call else None))

    def _end(self, events: list[Event]) -> None:
        if self._open is not None:
            events.append(BlockStop(self._index))
            self._open = None
