"""Checking chat completion requests: what is accepted, and what is refused with which field."""

from __future__ import annotations

import contextlib
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.api.errors import ApiError
from gateway.dialects.canonical import ChatRequest, MediaBlock, Message, TextBlock, Tool, ToolCallBlock, ToolResultBlock
from gateway.dialects.openai_chat import MESSAGES_MAX, TOOLS_MAX, parse_request
from gateway.dialects.upstream import Untranslatable
from gateway.providers.registry import DIALECTS
from tests.gateway.executing import candidate

USER = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def body(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [USER], **more}


def test_everything_that_is_known_reaches_the_canonical_form() -> None:
    request = parse_request(
        body(
            messages=[
                {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "look"},
                        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                        {"type": "image_url", "image_url": {"url": "https://example.com/x.jpg", "detail": "low"}},
                        {"type": "input_audio", "input_audio": {"data": "BBBB", "format": "mp3"}},
                        {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,CC"}},
                    ],
                },
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "42"}]},
            ],
            models=["m", "n"],
            tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "f"}},
            max_tokens=5,
            max_completion_tokens=7,
            temperature=1,
            top_p=0.5,
            stop="END",
            response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
            stream=True,
            stream_options={"include_usage": True},
            n=2,
            unknown_field=[1],
        )
    )
    assert request.messages == (
        Message("system", (TextBlock("be brief"),)),
        Message(
            "user",
            (
                TextBlock("look"),
                MediaBlock("image", data="AAAA", media_type="image/png"),
                MediaBlock("image", url="https://example.com/x.jpg"),
                MediaBlock("audio", data="BBBB", media_type="audio/mpeg"),
                MediaBlock("file", data="CC", media_type="application/pdf"),
            ),
        ),
        Message("assistant", (ToolCallBlock("c1", "f", '{"a":1}'),)),
        Message("tool", (ToolResultBlock("c1", "42"),)),
    )
    assert (request.model, request.models, request.tool_choice) == ("m", ("m", "n"), "tool:f")
    assert request.tools == (Tool("f", "d", {"type": "object"}),)
    assert (request.max_output_tokens, request.temperature, request.top_p, request.stop) == (7, 1.0, 0.5, ("END",))
    assert (request.response_format, request.response_schema) == (
        "json_schema",
        {"name": "s", "schema": {"type": "object"}},
    )
    assert (request.stream, request.include_usage, request.choices) == (True, True, 2)


def test_null_is_the_same_as_missing() -> None:
    optional = (
        "models tools tool_choice max_tokens max_completion_tokens temperature top_p stop response_format stream "
        "stream_options n functions"
    )
    nulls = dict.fromkeys(optional.split())
    with_nulls, without = parse_request(body(**nulls)), parse_request(body())
    names = set(ChatRequest.__dataclass_fields__) - {"raw_body"}
    assert all(getattr(with_nulls, name) == getattr(without, name) for name in names)
    assert (without.max_output_tokens, without.stream, without.choices) == (None, False, 1)


def test_models_alone_name_the_model() -> None:
    assert parse_request({"models": ["a", "b"], "messages": [USER]}).model == "a"


@pytest.mark.parametrize(
    ("wrong", "param", "code"),
    [
        ([], None, "invalid_type"),
        ("text", None, "invalid_type"),
        (None, None, "invalid_type"),
        ({}, "model", "missing_required_parameter"),
        ({"model": "m"}, "messages", "missing_required_parameter"),
        (body(model=3), "model", "invalid_type"),
        (body(model=" "), "model", "invalid_value"),
        (body(model="m\n"), "model", "invalid_value"),
        (body(model="m" * 300), "model", "invalid_value"),
        (body(models="m"), "models", "invalid_type"),
        (body(models=[]), "models", "empty_array"),
        (body(models=["a", 1]), "models[1]", "invalid_type"),
        (body(messages=[]), "messages", "empty_array"),
        (body(messages={}), "messages", "invalid_type"),
        (body(messages=[USER] * (MESSAGES_MAX + 1)), "messages", "array_above_max_length"),
        (body(messages=["hi"]), "messages[0]", "invalid_type"),
        (body(messages=[USER, {"content": "hi"}]), "messages[1].role", "missing_required_parameter"),
        (body(messages=[{"role": "robot", "content": "hi"}]), "messages[0].role", "invalid_value"),
        (body(messages=[{"role": ["user"], "content": "hi"}]), "messages[0].role", "invalid_value"),
        (body(messages=[{"role": "user"}]), "messages[0].content", "missing_required_parameter"),
        (body(messages=[{"role": "user", "content": 5}]), "messages[0].content", "invalid_type"),
        (body(messages=[{"role": "user", "content": []}]), "messages[0].content", "empty_array"),
        (
            body(messages=[{"role": "user", "content": [{}]}]),
            "messages[0].content[0].type",
            "missing_required_parameter",
        ),
        (body(messages=[{"role": "user", "content": [{"type": "x"}]}]), "messages[0].content[0].type", "invalid_value"),
        (
            body(messages=[{"role": "user", "content": [{"type": "text", "text": 1}]}]),
            "messages[0].content[0].text",
            "invalid_type",
        ),
        (
            body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "https://x"}]}]),
            "messages[0].content[0].image_url",
            "invalid_type",
        ),
        (
            body(
                messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/x"}}]}]
            ),
            "messages[0].content[0].image_url.url",
            "invalid_value",
        ),
        (
            body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}]),
            "messages[0].content[0].image_url.url",
            "invalid_value",
        ),
        (
            body(
                messages=[
                    {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "A", "format": "x"}}]}
                ]
            ),
            "messages[0].content[0].input_audio.format",
            "invalid_value",
        ),
        (
            body(messages=[{"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}]),
            "messages[0].content[0].file.file_id",
            "unsupported_parameter",
        ),
        (
            body(messages=[{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "https://x"}}]}]),
            "messages[0].content[0].type",
            "invalid_value",
        ),
        (body(messages=[{"role": "assistant"}]), "messages[0].content", "missing_required_parameter"),
        (
            body(messages=[{"role": "assistant", "tool_calls": [{"id": "c"}]}]),
            "messages[0].tool_calls[0].function",
            "missing_required_parameter",
        ),
        (
            body(
                messages=[
                    {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {}}}]}
                ]
            ),
            "messages[0].tool_calls[0].function.arguments",
            "invalid_type",
        ),
        (
            body(messages=[USER, {"role": "tool", "tool_call_id": "c1", "content": "x"}]),
            "messages[1].tool_call_id",
            "invalid_value",
        ),
        (body(tools={}), "tools", "invalid_type"),
        (body(tools=[TOOL] * (TOOLS_MAX + 1)), "tools", "array_above_max_length"),
        (body(tools=[{"type": "custom"}]), "tools[0].type", "invalid_value"),
        (body(tools=[{"type": "function"}]), "tools[0].function", "missing_required_parameter"),
        (body(tools=[{"type": "function", "function": {"name": ""}}]), "tools[0].function.name", "invalid_value"),
        (
            body(tools=[{"type": "function", "function": {"name": "f", "parameters": []}}]),
            "tools[0].function.parameters",
            "invalid_type",
        ),
        (body(tool_choice="sometimes"), "tool_choice", "invalid_value"),
        (body(tool_choice="required"), "tool_choice", "invalid_value"),
        (body(tool_choice=1), "tool_choice", "invalid_type"),
        (
            body(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}),
            "tool_choice.function.name",
            "invalid_value",
        ),
        (body(max_tokens=0), "max_tokens", "invalid_value"),
        (body(max_tokens=True), "max_tokens", "invalid_type"),
        (body(max_tokens=1.5), "max_tokens", "invalid_type"),
        (body(max_tokens="5"), "max_tokens", "invalid_type"),
        (body(max_completion_tokens=10**30), "max_completion_tokens", "invalid_value"),
        (body(temperature=2.1), "temperature", "invalid_value"),
        (body(temperature="hot"), "temperature", "invalid_type"),
        (body(temperature=float("nan")), "temperature", "invalid_value"),
        (body(top_p=-0.1), "top_p", "invalid_value"),
        (body(stop=["a"] * 17), "stop", "array_above_max_length"),
        (body(stop=["a", 1]), "stop[1]", "invalid_type"),
        (body(response_format="json"), "response_format", "invalid_type"),
        (body(response_format={"type": "xml"}), "response_format.type", "invalid_value"),
        (body(response_format={"type": "json_schema"}), "response_format.json_schema", "missing_required_parameter"),
        (body(stream="yes"), "stream", "invalid_type"),
        (body(stream_options=[]), "stream_options", "invalid_type"),
        (body(stream_options={"include_usage": 1}), "stream_options.include_usage", "invalid_type"),
        (body(n=0), "n", "invalid_value"),
        (body(n=10**9), "n", "invalid_value"),
        (body(functions=[]), "functions", "unsupported_parameter"),
    ],
)
def test_mistake_is_named_with_its_place(wrong: Any, param: str | None, code: str) -> None:
    with pytest.raises(ApiError) as error:
        parse_request(wrong)
    assert (error.value.status, error.value.param, error.value.code) == (400, param, code)
    assert error.value.message.endswith(".")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "model",
    "models",
    "messages",
    "tools",
    "tool_choice",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "stop",
    "response_format",
    "stream",
    "stream_options",
    "n",
    "functions",
]
PLAUSIBLE = st.sampled_from(
    [
        "user",
        "assistant",
        "tool",
        "function",
        "text",
        "image_url",
        "json_schema",
        "auto",
        "required",
        "data:a/b;base64,%",
        "c1",
        [USER],
        [CALL],
        [TOOL],
        {"type": "function", "function": {"name": "f"}},
    ]
)
KEYS = st.sampled_from(
    [
        "role",
        "content",
        "type",
        "text",
        "image_url",
        "url",
        "input_audio",
        "data",
        "format",
        "file",
        "file_data",
        "tool_calls",
        "tool_call_id",
        "id",
        "function",
        "name",
        "arguments",
        "parameters",
        "json_schema",
        "schema",
        "include_usage",
    ]
)
SHAPED = st.recursive(
    JSON | PLAUSIBLE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(JSON | st.dictionaries(st.sampled_from(FIELDS), SHAPED).map(lambda more: body(**more)))
def test_any_json_is_a_request_or_a_400(value: Any) -> None:
    request = None
    with contextlib.suppress(ApiError):
        request = parse_request(value, b"")
    if request is None:
        with pytest.raises(ApiError) as error:
            parse_request(value, b"")
        assert error.value.status == 400
        assert orjson.dumps(error.value.body())
        return
    assert request.messages
    for dialect in DIALECTS.values():
        with contextlib.suppress(Untranslatable):
            assert orjson.loads(dialect.build(request, candidate("up"), 10, "http://up").body)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_tokens": 1.5}, "must be a whole number, written as one, not 1.5"),
        ({"n": 1.0}, "must be a whole number, written as one, not 1.0"),
        ({"n": "1"}, "must be a whole number, not a string"),
        ({"stop": 5}, "must be a string or an array of strings, not a number"),
    ],
)
def test_a_wrong_type_is_told_with_what_is_taken(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse_request(body(**fields))
    assert (refused.value.code, says in refused.value.message) == ("invalid_type", True), refused.value.message
