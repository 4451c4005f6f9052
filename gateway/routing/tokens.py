"""How many tokens a text or a request is, cheaply enough for every quote, and never knowingly too few for a quote.

One public tokenizer, o200k_base, is loaded (about 40 MB, at the first count) and counts everything. Models with another
tokenizer get that count and a margin by family, because loading each family's tables would cost tens of megabytes, and for
the largest families (Claude, Gemini) there are no public tables at all. A margin is not a price: what is not used is not
charged.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import orjson

from gateway.dialects.canonical import ChatRequest, MediaBlock, TextBlock, ToolCallBlock, ToolResultBlock
from gateway.settings import TokenizerFamily
from payments.money import divide_up

BASE_TOKENIZER: Literal["o200k_base"] = "o200k_base"

TOKENS_PER_MESSAGE = 4
TOKENS_PER_REQUEST = 3
TOKENS_PER_TOOL = 12
"""OpenAI's own framing: 3 a message and 1 for a name, 3 to prime the answer; a tool's declaration around its schema."""

IMAGE_TOKENS = 1_600
"""An image at full detail: 1,445 (OpenAI's tiles), 1,568 (Anthropic's 1.15 megapixels), 258 a tile (Gemini)."""
AUDIO_BYTES_PER_TOKEN = 125
"""32 tokens a second (Gemini, the dearest) of speech compressed to 4 kB a second."""
FILE_BYTES_PER_TOKEN = 20
UNSEEN_MEDIA_TOKENS = 16_000
"""Audio or a file behind a URL: the gateway does not fetch it, so it takes a document of about ten pages."""

CHUNK_CHARACTERS = 16_384
"""Counted piece by piece: a megabyte without spaces costs a sixth of the time and no memory; a cut adds a token or two."""
CACHE_ENTRIES_MAX = 50_000
CACHE_CHECK_CHARACTERS = 1_000_000
"""The tokenizer remembers every word it has seen, without a bound of its own; asking it how many costs 50 µs, so seldom."""


@dataclass(frozen=True, slots=True)
class Family:
    """How much more than o200k_base a family of tokenizers may need.

    Measured on prose in ten languages, code, JSON, numbers and hex against the public tables of cl100k, Llama 3, DeepSeek V3
    and Mistral; Claude's and Gemini's are judged from their makers' documentation.
    """

    margin_percent: int = 0
    per_100_wide_bytes: int = 0
    """Tokens added per 100 bytes that UTF-8 needs beyond one a character: scripts that the family knows less well."""
    per_100_digits: int = 0
    """Tokens added per 100 digits where each digit is a token; o200k_base takes three at once."""
    tools_tokens: int = 0
    """The hidden prompt that the provider adds when tools are given."""


FAMILIES: dict[TokenizerFamily, Family] = {
    BASE_TOKENIZER: Family(),
    "cl100k_base": Family(margin_percent=5, per_100_wide_bytes=60),
    "llama3": Family(margin_percent=20, per_100_wide_bytes=20),
    "deepseek": Family(margin_percent=20, per_100_wide_bytes=20),
    "qwen": Family(margin_percent=20, per_100_wide_bytes=20, per_100_digits=67),
    "mistral": Family(margin_percent=20, per_100_wide_bytes=60, per_100_digits=67),
    "gemini": Family(margin_percent=20, per_100_wide_bytes=20, per_100_digits=67),
    "claude": Family(margin_percent=50, per_100_wide_bytes=60, per_100_digits=67, tools_tokens=530),
    "other": Family(margin_percent=20, per_100_wide_bytes=60, per_100_digits=67),
}
"""What a model's `tokenizer` may be."""


class _Encoding(Protocol):
    """The part of splintr's tokenizer that is used."""

    cache_len: int

    def encode_ordinary(self, text: str) -> list[int]:
        """Token ids; special tokens spelled out in the text are ordinary text, as upstream."""

    def clear_cache(self) -> None:
        """Forget remembered words."""


@functools.cache
def _encoding() -> _Encoding:
    import splintr

    return cast("_Encoding", splintr.Tokenizer.from_pretrained(BASE_TOKENIZER))


def count_text(text: str, tokenizer: TokenizerFamily = BASE_TOKENIZER) -> int:
    """Tokens of `text`: exact for o200k_base, the best estimate without a margin for other families.

    This is what bills an answer whose provider reported no usage, so it must not lean to the gateway's side.

    Args:
        text: Any text; halves of surrogate pairs, which JSON can carry, count as replacement characters.
        tokenizer: One of `FAMILIES`.
    """
    assert tokenizer in FAMILIES
    return _count(text)


_counted_characters = 0
_last: tuple[ChatRequest, InputCount] | None = None


def _count(text: str) -> int:
    global _counted_characters
    encoding = _encoding()
    _counted_characters += len(text)
    if _counted_characters > CACHE_CHECK_CHARACTERS:
        _counted_characters = 0
        if encoding.cache_len > CACHE_ENTRIES_MAX:
            encoding.clear_cache()
    try:
        if len(text) <= CHUNK_CHARACTERS:
            return len(encoding.encode_ordinary(text))
        return sum(
            len(encoding.encode_ordinary(text[start : start + CHUNK_CHARACTERS]))
            for start in range(0, len(text), CHUNK_CHARACTERS)
        )
    except UnicodeEncodeError:
        return _count(text.encode("utf-8", "replace").decode())


@dataclass(frozen=True, slots=True)
class InputCount:
    """A request's input, measured once; `tokens` then costs nothing per tokenizer."""

    base_tokens: int
    """Text, tools and framing by o200k_base."""
    media_tokens: int
    wide_bytes: int
    digits: int
    has_tools: bool

    def tokens(self, tokenizer: TokenizerFamily) -> int:
        """Tokens under `tokenizer`, with its family's margin, in whole tokens rounded up."""
        family = FAMILIES[tokenizer]
        text = (
            self.base_tokens * (100 + family.margin_percent)
            + self.wide_bytes * family.per_100_wide_bytes
            + self.digits * family.per_100_digits
        )
        return divide_up(text, 100) + self.media_tokens + (family.tools_tokens if self.has_tools else 0)


def measure_input(request: ChatRequest) -> InputCount:
    """Measure all that a request sends: messages, tool calls and results, tool schemas, a response schema, media.

    About 15 µs for 1 KB, 10–60 ms a megabyte; it holds the interpreter, so measure megabytes in a thread.
    """
    media_tokens = 0
    texts: list[str] = []
    for message in request.messages:
        for block in message.blocks:
            match block:
                case TextBlock(text):
                    texts.append(text)
                case ToolCallBlock(identifier, name, arguments):
                    texts += (identifier, name, arguments)
                case ToolResultBlock(call_id, content):
                    texts += (call_id, content)
                case MediaBlock():
                    media_tokens += _media_tokens(block)
    texts.extend(_schema_texts(request))
    texts.extend(_unread_texts(request.raw_body))
    # One call instead of one a block: the newlines stand for the framing between blocks.
    joined = "\n".join(texts)
    encoded = joined.encode("utf-8", "replace")
    return InputCount(
        base_tokens=_count(joined)
        + len(request.messages) * TOKENS_PER_MESSAGE
        + len(request.tools) * TOKENS_PER_TOOL
        + TOKENS_PER_REQUEST,
        media_tokens=media_tokens,
        wide_bytes=len(encoded) - len(joined),
        digits=len(encoded) - len(encoded.translate(None, b"0123456789")),
        has_tools=bool(request.tools),
    )


def count_input(request: ChatRequest, tokenizer: TokenizerFamily = BASE_TOKENIZER) -> int:
    """Tokens that `request` sends to a model with this tokenizer, with its family's margin.

    A request is priced for each of its candidates, so the last request's measure is remembered.

    Args:
        request: The canonical request. Must not be changed between calls.
        tokenizer: One of `FAMILIES`.
    """
    global _last
    remembered = _last
    if remembered is None or remembered[0] is not request:
        remembered = _last = (request, measure_input(request))
    return remembered[1].tokens(tokenizer)


def with_margin(base_tokens: int, tokenizer: TokenizerFamily) -> int:
    """A plain o200k_base count widened by the margin of `tokenizer`'s family, where the text itself is not at hand."""
    margin_percent = FAMILIES[tokenizer].margin_percent
    return divide_up(base_tokens * (100 + margin_percent), 100) if margin_percent else base_tokens


def _schema_texts(request: ChatRequest) -> Iterator[str]:
    for tool in request.tools:
        yield tool.name
        yield tool.description or ""
        yield _json(tool.parameters)
    if request.response_schema is not None:
        yield _json(request.response_schema)


def _unread_texts(body: dict[str, Any]) -> Iterator[str]:
    """What passes through to an upstream of the caller's dialect and was read by nobody here.

    It may well become input there (earlier reasoning, documents, a prediction), and what is not counted would not be paid.
    """
    yield from _others(body, _READ_IN_BODY)
    for message in _objects(body.get("messages")):
        yield from _others(message, _READ_IN_MESSAGE)
        for part in _objects(message.get("content")):
            yield from _others(part, _READ_IN_PART)
        for call in _objects(message.get("tool_calls")):
            yield from _others(call, _READ_IN_CALL)
    for tool in _objects(body.get("tools")):
        yield from _others(tool, _READ_IN_CALL)
        function = tool.get("function")
        if isinstance(function, dict):
            yield from _others(function, _READ_IN_FUNCTION)


_READ_IN_BODY = frozenset({
    "model", "models", "provider", "strategy", "route", "farebox", "messages", "tools", "tool_choice", "response_format",
    "stop", "stream_options", "user", "metadata", "safety_identifier", "prompt_cache_key",
})  # fmt: skip
_READ_IN_MESSAGE = frozenset({"role", "content", "tool_calls", "tool_call_id"})
_READ_IN_PART = frozenset({"type", "text", "refusal", "image_url", "input_audio", "file"})
_READ_IN_CALL = frozenset({"id", "type", "function", "index"})
_READ_IN_FUNCTION = frozenset({"name", "description", "parameters", "strict"})


def _others(owner: dict[str, Any], read: frozenset[str]) -> Iterator[str]:
    for name in owner.keys() - read:
        value = owner[name]
        if isinstance(value, str | list | dict):
            yield value if isinstance(value, str) else _json(value)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        yield from (item for item in value if isinstance(item, dict))


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()


def _media_tokens(block: MediaBlock) -> int:
    if block.kind == "image":
        return IMAGE_TOKENS
    if block.data is None:
        return UNSEEN_MEDIA_TOKENS
    size = len(block.data) * 3 // 4
    return divide_up(size, AUDIO_BYTES_PER_TOKEN if block.kind == "audio" else FILE_BYTES_PER_TOKEN)
