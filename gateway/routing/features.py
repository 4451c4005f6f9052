"""What the engine looks at in a request: its size and what it needs from a model. Never the words of a system prompt."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.dialects.canonical import ChatRequest, MediaBlock, ToolCallBlock

_CAPABILITY_OF_MEDIA = {"image": "vision", "audio": "audio", "file": "vision"}
"""A file (a PDF, in practice) is read as pages, which takes a model that sees."""


@dataclass(frozen=True, slots=True)
class Features:
    """The facts about one request that filters and estimates use."""

    input_tokens: int
    """Counted by o200k_base; a candidate's own tokenizer adds its margin."""
    max_output_tokens: int
    output_is_asked: bool
    """The caller gave the limit itself, so a candidate that cannot write as much will not do."""
    needs: frozenset[str]
    """Capabilities that a candidate must have."""


def features_of(request: ChatRequest, input_tokens: int, max_output_tokens: int) -> Features:
    """Read the features of a request.

    Args:
        request: The canonical request.
        input_tokens: Its counted input.
        max_output_tokens: The caller's limit, or the default that stands in for it.
    """
    needs: set[str] = set()
    if request.tools and request.tool_choice != "none":
        needs.add("tools")
    if request.response_format != "text":
        needs.add(request.response_format)
    if request.choices > 1:
        needs.add("choices")
    for message in request.messages:
        for block in message.blocks:
            if isinstance(block, MediaBlock):
                needs.add(_CAPABILITY_OF_MEDIA[block.kind])
            elif isinstance(block, ToolCallBlock):
                needs.add("tools")
    return Features(input_tokens, max_output_tokens, request.max_output_tokens is not None, frozenset(needs))
