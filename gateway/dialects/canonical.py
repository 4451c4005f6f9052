"""The one form between dialects: a request of ordered content blocks, and an answer as start / delta / stop events.

Each dialect translates to and from this form. What only one dialect knows travels in `extra`, an opaque bag that the
dialect named by `dialect` put there and that no other dialect reads. When caller and upstream speak the same dialect the
original body passes through instead (`ChatRequest.raw_body`) and only model, token limit and usage options are rewritten.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from payments.money import Usage

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
BlockKind = Literal["text", "reasoning", "tool_call"]


@dataclass(frozen=True, slots=True)
class TextBlock:
    """Plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class MediaBlock:
    """An image, audio or file: either a URL or base64 data with its media type."""

    kind: Literal["image", "audio", "file"]
    url: str | None = None
    data: str | None = None
    media_type: str | None = None


@dataclass(frozen=True, slots=True)
class ToolCallBlock:
    """The assistant asked for a tool; `arguments` is JSON text, exactly as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolResultBlock:
    """What the tool answered to the call with this id."""

    call_id: str
    content: str


Block = TextBlock | MediaBlock | ToolCallBlock | ToolResultBlock


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None
    parameters: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request in the canonical form.

    `max_output_tokens` is None where the caller gave none; the quote then fixes the configured default, which is also sent
    upstream. `tool_choice` is ``auto``, ``none``, ``required`` or a tool's name prefixed by ``tool:``. `response_format` is
    ``text``, ``json_object`` or ``json_schema`` (then `response_schema` holds the OpenAI-style `json_schema` object).
    """

    dialect: str
    model: str
    models: tuple[str, ...]
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    response_format: Literal["text", "json_object", "json_schema"] = "text"
    response_schema: dict[str, Any] | None = None
    stream: bool = False
    include_usage: bool = False
    choices: int = 1
    extra: dict[str, Any] = field(default_factory=dict)
    raw_body: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Start:
    """The answer begins; sent once, before any block."""

    id: str
    model: str


@dataclass(frozen=True, slots=True)
class BlockStart:
    """Block number `index` begins. `tool_id` and `tool_name` are set for tool calls."""

    index: int
    kind: BlockKind
    tool_id: str | None = None
    tool_name: str | None = None


@dataclass(frozen=True, slots=True)
class BlockDelta:
    """More text, reasoning, or JSON argument text of block `index`."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class BlockStop:
    """Block `index` is complete."""

    index: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The model stopped, and why. Usage may still follow."""

    reason: FinishReason


@dataclass(frozen=True, slots=True)
class UsageReport:
    """The provider's own usage record; the last one counts."""

    usage: Usage


Event = Start | BlockStart | BlockDelta | BlockStop | Finish | UsageReport


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer that was not streamed."""

    id: str
    model: str
    text: str
    reasoning: str
    tool_calls: tuple[ToolCallBlock, ...]
    finish: FinishReason
    usage: Usage | None
    """None when the provider sent no usage: the gateway then counts."""
