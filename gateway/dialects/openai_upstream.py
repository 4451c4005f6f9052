"""Upstreams that speak OpenAI chat completions: OpenAI itself and everything compatible with it.

A caller of the same dialect passes through: of its body only the model, the token limit and the usage option are rewritten and
the gateway's own fields removed. Every chunk is decoded all the same, because a malformed one must not reach the caller as if
it were an answer, and because first token, finish and usage are read from it.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import urlsplit

import orjson

from gateway.dialects.canonical import (
    Answer,
    BlockDelta,
    BlockKind,
    BlockStart,
    BlockStop,
    ChatRequest,
    Event,
    Finish,
    FinishReason,
    Start,
    ToolCallBlock,
    UsageReport,
)
from gateway.dialects.openai_chat import GATEWAY_FIELDS
from gateway.dialects.upstream import ReportedError, Undecodable, UpstreamCall, count_in, read_object, usage_of
from gateway.routing.catalog import Candidate
from payments.money import Usage

NAME: Final = "openai_chat"
_FINISHES: Final[dict[str, FinishReason]] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}
_NEWER_LIMIT_HOSTS: Final = (".openai.com", ".openai.azure.com")
"""These refuse `max_tokens` for reasoning models and take `max_completion_tokens` for all; others may know only the former."""


def auth_headers(api_key: str | None) -> dict[str, str]:
    """A bearer key."""
    return {} if api_key is None else {"authorization": f"Bearer {api_key}"}


def build(request: ChatRequest, candidate: Candidate, max_output_tokens: int, base_url: str) -> UpstreamCall:
    """Rewrite the caller's body for this upstream."""
    assert request.dialect == NAME, "the only caller dialect there is"
    url = _completions_url(base_url)
    body = request.raw_body
    limit_field = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    if f".{urlsplit(url).hostname}".endswith(_NEWER_LIMIT_HOSTS):
        limit_field = "max_completion_tokens"
    changed: dict[str, Any] = {"model": candidate.upstream_model, limit_field: max_output_tokens}
    if request.stream:
        changed["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    removed = GATEWAY_FIELDS & body.keys()
    other_limit = "max_tokens" if limit_field == "max_completion_tokens" else "max_completion_tokens"
    if other_limit in body:
        removed |= {other_limit}
    if not request.stream and "stream_options" in body:
        removed |= {"stream_options"}
    # Written anew even where nothing changes: of a member that occurs twice, another parser may take the first one, and what
    # was priced is what we read.
    rewritten = {name: value for name, value in body.items() if name not in removed} if removed else dict(body)
    rewritten.update(changed)
    return UpstreamCall(url, orjson.dumps(rewritten))


def _completions_url(base_url: str) -> str:
    """Providers publish bases with and without the version; a bare host gets the version that all of them accept."""
    base = base_url.rstrip("/")
    if base.endswith("/chat/completions"):
        return base
    return f"{base}/chat/completions" if urlsplit(base).path else f"{base}/v1/chat/completions"


def read_usage(record: object) -> Usage | None:
    """A provider's usage record; None where there is none worth the name."""
    if not isinstance(record, dict):
        return None
    input_tokens = count_in(record, "prompt_tokens")
    output_tokens = count_in(record, "completion_tokens")
    if input_tokens == 0 and output_tokens == 0:
        return None
    of_input, of_output = record.get("prompt_tokens_details"), record.get("completion_tokens_details")
    of_input = of_input if isinstance(of_input, dict) else {}
    reasoning = count_in(of_output, "reasoning_tokens") if isinstance(of_output, dict) else 0
    if reasoning and count_in(record, "total_tokens") == input_tokens + output_tokens + reasoning:
        output_tokens += reasoning  # xAI counts reasoning beside the completion, all others inside it
    return usage_of(
        input_tokens=input_tokens,
        # DeepSeek has its own name for it
        cached_tokens=count_in(of_input, "cached_tokens") or count_in(record, "prompt_cache_hit_tokens"),
        written_tokens=count_in(of_input, "cache_write_tokens"),
        output_tokens=output_tokens,
        reasoning_tokens=reasoning,
    )


def raise_reported(error: object) -> None:
    """Raise the error that an upstream reported where an answer was due."""
    if isinstance(error, dict):
        status, code = error.get("status_code", error.get("code")), error.get("code") or error.get("type")
        status = status if type(status) is int and 400 <= status <= 599 else 502
        raise ReportedError(status, str(code or "error"), str(error.get("message") or "no message"))
    raise ReportedError(502, "error", str(error))


def decode_answer(body: dict[str, Any]) -> Answer:
    """Read a complete answer: its first choice in full, the text of all (so that it can be counted)."""
    if body.get("error"):
        raise_reported(body["error"])
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        raise Undecodable("the answer has no `choices`")
    texts: list[str] = []
    reasonings: list[str] = []
    calls: list[ToolCallBlock] = []
    for choice in choices:
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(message, dict):
            raise Undecodable("a choice of the answer has no `message`")
        texts.append(_text(message, "content") or _text(message, "refusal"))
        reasonings.append(_text(message, "reasoning_content") or _text(message, "reasoning"))
        calls.extend(_call(call) for call in _list(message, "tool_calls"))
    if not choices[0].get("finish_reason"):
        raise Undecodable("the answer has no `finish_reason`")
    return Answer(
        id=_text(body, "id"),
        model=_text(body, "model"),
        text="".join(texts),
        reasoning="".join(reasonings),
        tool_calls=tuple(calls),
        finish=_finish(choices[0]["finish_reason"]),
        usage=read_usage(body.get("usage")),
    )


def _text(owner: dict[str, Any], name: str) -> str:
    value = owner.get(name)
    return value if isinstance(value, str) else ""


def _list(owner: dict[str, Any], name: str) -> list[Any]:
    value = owner.get(name)
    return value if isinstance(value, list) else []


def _call(call: object) -> ToolCallBlock:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise Undecodable("a tool call of the answer has no `function`")
    return ToolCallBlock(_text(call, "id"), _text(function, "name"), _text(function, "arguments"))


def _finish(reason: object) -> FinishReason:
    return _FINISHES.get(reason, "stop") if isinstance(reason, str) else "stop"


def decoder(choices: int) -> OpenAiDecoder:
    """Begin to read a streamed answer of so many choices."""
    return OpenAiDecoder(choices)


class OpenAiDecoder:
    """Reads chunks. With several choices, each has blocks of its own; the answer finishes with the last of them."""

    def __init__(self, choices: int) -> None:
        self.ended = False
        self.chunk: dict[str, Any] = {}
        self._started = False
        self._blocks: dict[tuple[int, BlockKind | int], int] = {}
        """By choice and kind, or by choice and position among its tool calls."""
        self._open: dict[int, int] = {}
        self._choices = choices
        self._finished: set[int] = set()

    def feed(self, data: bytes) -> list[Event]:
        """Read one chunk."""
        if data == b"[DONE]":
            self.ended = True
            return []
        chunk = self.chunk = read_object(data)
        if chunk.get("error"):
            raise_reported(chunk["error"])
        events: list[Event] = []
        if not self._started:
            self._started = True
            events.append(Start(_text(chunk, "id"), _text(chunk, "model")))
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            if choices is not None or "usage" not in chunk:
                raise Undecodable("a chunk has no `choices`")
            choices = []
        for choice in choices:
            self._read_choice(choice, events)
        usage = read_usage(chunk.get("usage"))
        if usage is not None:
            events.append(UsageReport(usage))
        return events

    def _read_choice(self, choice: object, events: list[Event]) -> None:
        if not isinstance(choice, dict):
            raise Undecodable("a choice of a chunk is not an object")
        number = choice.get("index", 0)
        if type(number) is not int:
            raise Undecodable("the `index` of a choice is not a number")
        delta = choice.get("delta")
        if isinstance(delta, dict):
            reasoning = _text(delta, "reasoning_content") or _text(delta, "reasoning")
            if reasoning:
                self._say(number, "reasoning", reasoning, events)
            content = _text(delta, "content") or _text(delta, "refusal")
            if content:
                self._say(number, "text", content, events)
            for call in _list(delta, "tool_calls"):
                self._read_call(number, call, events)
        elif delta is not None:
            raise Undecodable("the `delta` of a chunk is not an object")
        reason = choice.get("finish_reason")
        if reason:
            self._finished.add(number)
            if number in self._open:
                events.append(BlockStop(self._open.pop(number)))
            if len(self._finished) >= self._choices:
                events.append(Finish(_finish(reason)))

    def _say(self, number: int, kind: BlockKind, text: str, events: list[Event]) -> None:
        events.append(BlockDelta(self._block((number, kind), kind, events), text))

    def _read_call(self, number: int, call: object, events: list[Event]) -> None:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict):
            raise Undecodable("a tool call of a chunk has no `function`")
        position = call.get("index")
        position = 0 if position is None else position
        if type(position) is not int:
            raise Undecodable("the `index` of a tool call is not a number")
        index = self._block((number, position), "tool_call", events, _text(call, "id"), _text(function, "name"))
        arguments = _text(function, "arguments")
        if arguments:
            events.append(BlockDelta(index, arguments))

    def _block(
        self,
        key: tuple[int, BlockKind | int],
        kind: BlockKind,
        events: list[Event],
        tool_id: str | None = None,
        tool_name: str | None = None,
    ) -> int:
        """The number of this block; a block that begins ends the one before it of the same choice."""
        index = self._blocks.get(key)
        if index is None:
            if key[0] in self._open:
                events.append(BlockStop(self._open[key[0]]))
            index = self._blocks[key] = len(self._blocks)
            self._open[key[0]] = index
            events.append(BlockStart(index, kind, tool_id, tool_name))
        return index
