"""Whatever a request carries upstream is priced or refused: nothing that costs money travels for free."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.api.errors import ApiError
from gateway.dialects.openai_chat import parse_request
from gateway.dialects.openai_upstream import read_usage
from gateway.routing.tokens import measure_input

WORDS = "seven words that nobody here ever reads " * 500
PLAIN: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL: dict[str, Any] = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def said(**members: Any) -> dict[str, Any]:
    return PLAIN | {"messages": [{"role": "assistant", "content": "hi"} | members, *PLAIN["messages"]]}


@pytest.mark.parametrize(
    "hidden",
    [
        said(reasoning_content=WORDS),
        said(name=WORDS),
        said(refusal=WORDS),
        said(reasoning_details=[{"text": WORDS}]),
        said(content=[{"type": "text", "text": "hi", "context": WORDS}]),
        said(tool_calls=[CALL | {"thought_signature": WORDS}]),
        PLAIN | {"documents": [{"title": "t", "text": WORDS}]},
        PLAIN | {"chat_template": WORDS},
        PLAIN | {"tools": [TOOL | {"examples": [WORDS]}]},
        PLAIN | {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}, "examples": WORDS}}]},
    ],
)
def test_text_in_members_that_only_an_upstream_knows_is_counted(hidden: dict[str, Any]) -> None:
    spoken = PLAIN | {"messages": [{"role": "user", "content": WORDS}]}
    assert measure_input(parse_request(hidden)).base_tokens >= measure_input(parse_request(spoken)).base_tokens


def test_ordinary_members_cost_nothing_more() -> None:
    ordinary = PLAIN | {"user": WORDS, "metadata": {"about": WORDS}, "temperature": 1, "seed": 7, "logprobs": True}
    assert measure_input(parse_request(ordinary)) == measure_input(parse_request(PLAIN))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("service_tier", "priority"),
        ("web_search_options", {}),
        ("plugins", [{"id": "web"}]),
        ("best_of", 16),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "v"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("Max_Tokens", 100_000),
        ("max_to\N{KELVIN SIGN}ens", 100_000),
        ("Messages", PLAIN["messages"]),
        ("N", 16),
    ],
)
def test_what_has_a_price_of_its_own_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ApiError) as refused:
        parse_request(PLAIN | {name: value})
    assert (refused.value.status, refused.value.code, refused.value.param) == (400, "unsupported_parameter", name)


@pytest.mark.parametrize("value", ["auto", "default", "flex", None])
def test_service_tiers_that_cost_no_more_pass(value: str | None) -> None:
    parse_request(PLAIN | {"service_tier": value})


def test_a_usage_record_whose_price_would_not_fit_the_ledger_is_nonsense() -> None:
    assert read_usage({"prompt_tokens": 10, "completion_tokens": 10**19}) is not None
    usage = read_usage({"prompt_tokens": 10, "completion_tokens": 10**19})
    assert usage is not None
    assert usage.output_tokens == 0  # so that the output is counted here instead
