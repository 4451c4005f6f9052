"""The OpenAI dialect of the simulator, as the official SDK sees it."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.chat import completion_create_params

from gateway.dev.simulator import openai_chat
from gateway.dev.simulator.process import Simulator

ASK: Any = {"model": "gpt-5.4", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 2}},
            },
        },
    }
]


def streamed(sdk: openai.OpenAI, **more: Any) -> list[Any]:
    return list(sdk.chat.completions.create(**(ASK | {"stream": True} | more)))


def text_of(chunks: list[Any], index: int = 0) -> str:
    choices = (choice for chunk in chunks for choice in chunk.choices if choice.index == index)
    return "".join(choice.delta.content or "" for choice in choices)


def test_an_answer_repeats_the_question_and_counts_words(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(**ASK)
    message = answer.choices[0].message
    assert message.content is not None
    assert "Why is the sky blue?" in message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "gpt-5.4"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == len(message.content.split()) == 40
    assert answer.usage.total_tokens == 45


def test_the_same_question_has_the_same_answer_streamed_or_not(sdk: openai.OpenAI) -> None:
    whole = sdk.chat.completions.create(**ASK).choices[0].message.content
    assert text_of(streamed(sdk)) == whole
    other = sdk.chat.completions.create(**(ASK | {"messages": [{"role": "user", "content": "And the sea?"}]}))
    assert other.choices[0].message.content != whole


def test_a_stream_reports_usage_only_on_request(sdk: openai.OpenAI) -> None:
    assert all(chunk.usage is None and chunk.choices for chunk in streamed(sdk))
    chunks = streamed(sdk, stream_options={"include_usage": True})
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 40
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_max_tokens_ends_the_answer_with_length(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(**ASK, max_tokens=3)
    assert answer.choices[0].message.content == "You asked: Why"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_max_completion_tokens_wins_and_includes_the_reasoning(sdk: openai.OpenAI, simulator: Simulator) -> None:
    simulator.configure("gpt-5.4", reasoning_tokens=4)
    answer = sdk.chat.completions.create(**ASK, max_tokens=100, max_completion_tokens=6)
    assert answer.choices[0].message.content == "You asked:"
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert (answer.usage.completion_tokens, answer.usage.completion_tokens_details.reasoning_tokens) == (6, 4)


def test_a_stop_sequence_ends_the_answer_before_it(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(**ASK, stop=["sky", "never said"])
    assert answer.choices[0].message.content == "You asked: Why is the "
    assert answer.choices[0].finish_reason == "stop"


def test_several_choices_are_counted_together(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(**ASK, n=2, max_tokens=5)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 10
    chunks = streamed(sdk, n=2, max_tokens=5)
    assert text_of(chunks, 0) == text_of(chunks, 1) == answer.choices[0].message.content


def test_cached_input_and_visible_reasoning_are_reported(sdk: openai.OpenAI, simulator: Simulator) -> None:
    simulator.configure("gpt-5.4", cached_input_tokens=1000, reasoning_tokens=3, show_reasoning=True)
    answer = sdk.chat.completions.create(**ASK)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 43
    assert answer.choices[0].message.model_dump()["reasoning_content"] == "This answer comes"


def test_a_demanded_tool_is_called(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(**ASK, tools=TOOLS, tool_choice="required")
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    (call,) = calls
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Why is the sky blue?", "days": 2}
    assert answer.usage is not None
    assert answer.usage.completion_tokens == -(-len(call.function.arguments) // 6)


def test_tool_calls_are_streamed_in_fragments(sdk: openai.OpenAI, simulator: Simulator) -> None:
    simulator.configure("gpt-5.4", tool_calls=2, tool_arguments={"city": "Bern"})
    chunks = streamed(sdk, tools=TOOLS)
    deltas = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    for index in (0, 1):
        pieces = [delta.function.arguments for delta in deltas if delta.index == index]
        assert len(pieces) > 2
        assert json.loads("".join(pieces)) == {"city": "Bern"}
    assert len({delta.id for delta in deltas if delta.id}) == 2
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_tool_result_is_answered_in_words(sdk: openai.OpenAI, simulator: Simulator) -> None:
    simulator.configure("gpt-5.4", tool_calls=1)
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    turns: Any = [
        *ASK["messages"],
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    answer = sdk.chat.completions.create(model="gpt-5.4", messages=turns, tools=TOOLS)
    assert answer.choices[0].finish_reason == "stop"


def test_json_mode_answers_with_json(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(**ASK, response_format={"type": "json_object"})
    assert set(json.loads(answer.choices[0].message.content or "")) == {"answer"}


def test_a_json_schema_is_followed(sdk: openai.OpenAI) -> None:
    schema: Any = {
        "type": "object",
        "properties": {
            "colour": {"enum": ["blue", "red"]},
            "why": {"$ref": "#/$defs/reasons"},
            "sure": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        },
        "$defs": {"reasons": {"type": "array", "items": {"type": "number"}}},
    }
    format_: Any = {"type": "json_schema", "json_schema": {"name": "sky", "schema": schema}}
    answer = sdk.chat.completions.create(**ASK, response_format=format_)
    assert json.loads(answer.choices[0].message.content or "") == {"colour": "blue", "why": [1], "sure": True}


def test_every_parameter_of_the_sdk_is_known() -> None:
    parameters = completion_create_params.CompletionCreateParamsBase.__annotations__.keys()
    assert parameters <= openai_chat.FIELDS


def test_a_field_that_is_not_in_the_api_is_refused(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"Unknown parameter: 'models'") as refused:
        sdk.chat.completions.create(**ASK, extra_body={"models": ["a", "b"]})
    assert refused.value.param == "models"


def test_a_key_has_to_be_there_and_is_not_logged(sdk: openai.OpenAI, simulator: Simulator) -> None:
    with pytest.raises(openai.AuthenticationError):
        sdk.with_options(default_headers={"Authorization": ""}).chat.completions.create(**ASK)
    sdk.chat.completions.create(**ASK)
    assert [attempt["authentication"] for attempt in simulator.attempts()] == ["absent", "present"]
    assert "secret-key" not in json.dumps(simulator.attempts())


@pytest.mark.parametrize(
    ("behaviour", "kind", "code", "param"),
    [
        ({"error": "context_length"}, openai.BadRequestError, "context_length_exceeded", "messages"),
        ({"context_tokens": 4}, openai.BadRequestError, "context_length_exceeded", "messages"),
        ({"error": "content_filter"}, openai.BadRequestError, "invalid_prompt", None),
        ({"error": "quota"}, openai.RateLimitError, "insufficient_quota", None),
        ({"status": 400}, openai.BadRequestError, None, None),
        ({"status": 401}, openai.AuthenticationError, "invalid_api_key", None),
        ({"status": 403}, openai.PermissionDeniedError, "unsupported_country_region_territory", None),
        ({"status": 404}, openai.NotFoundError, "model_not_found", None),
        ({"status": 429}, openai.RateLimitError, "rate_limit_exceeded", None),
        ({"status": 500}, openai.InternalServerError, None, None),
        ({"status": 503}, openai.InternalServerError, None, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_openais(
    sdk: openai.OpenAI,
    simulator: Simulator,
    behaviour: dict[str, Any],
    kind: type[openai.APIStatusError],
    code: str | None,
    param: str | None,
    stream: bool,
) -> None:
    simulator.configure("gpt-5.4", **behaviour)
    with pytest.raises(kind) as failed:
        sdk.chat.completions.create(**ASK, stream=stream)
    assert (failed.value.code, failed.value.param) == (code, param)
    assert isinstance(failed.value.body, dict)
    assert set(failed.value.body) == {"message", "type", "param", "code"}
    assert "retry-after" not in failed.value.response.headers
    (attempt,) = simulator.attempts()
    assert (attempt["outcome"], attempt["status"]) == ("error", failed.value.status_code)


def test_a_content_filter_can_end_an_answer(sdk: openai.OpenAI, simulator: Simulator) -> None:
    simulator.configure("gpt-5.4", finish="content_filter", output_tokens=2)
    assert sdk.chat.completions.create(**ASK).choices[0].finish_reason == "content_filter"
    assert streamed(sdk)[-1].choices[0].finish_reason == "content_filter"


def test_an_error_in_the_stream_is_the_sdks_api_error(sdk: openai.OpenAI, simulator: Simulator) -> None:
    simulator.configure("gpt-5.4", error_after_tokens=2)
    with pytest.raises(openai.APIError, match="had an error while processing"):
        streamed(sdk)
    assert simulator.attempts()[0]["outcome"] == "error_event"


def test_usage_can_be_missing(sdk: openai.OpenAI, simulator: Simulator) -> None:
    simulator.configure("gpt-5.4", missing_usage=True)
    assert sdk.chat.completions.create(**ASK).usage is None
    chunks = streamed(sdk, stream_options={"include_usage": True})
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
