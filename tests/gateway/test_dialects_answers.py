"""Answers of every dialect in OpenAI's words, complete and streamed, and nonsense in none."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from gateway.dialects import anthropic_messages, gemini, openai_upstream
from gateway.dialects.openai_answers import ChunkWriter, encode_answer
from gateway.dialects.upstream import ReportedError, StreamDecoder, Undecodable, UpstreamDialect
from payments.money import Usage

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}

TOOL_ANSWERS: list[tuple[UpstreamDialect, dict[str, Any]]] = [
    (
        anthropic_messages,
        {
            "id": "m1",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Oslo"}},
            ],
            "stop_reason": "tool_use",
            "usage": {
                "input_tokens": 5,
                "cache_read_input_tokens": 3,
                "cache_creation_input_tokens": 2,
                "output_tokens": 7,
            },
        },
    ),
    (
        gemini,
        {
            "responseId": "m1",
            "candidates": [
                {
                    "content": {
                        "parts": [
                            {"text": "hm", "thought": True},
                            {"text": "I look."},
                            {"functionCall": {"id": "c1", "name": "weather", "args": {"city": "Oslo"}}},
                        ]
                    },
                    "finishReason": "STOP",
                }
            ],
            "usageMetadata": {
                "promptTokenCount": 10,
                "cachedContentTokenCount": 3,
                "candidatesTokenCount": 4,
                "thoughtsTokenCount": 3,
            },
        },
    ),
]


@pytest.mark.parametrize(("dialect", "body"), TOOL_ANSWERS)
def test_tool_call_answer_in_openais_words(dialect: UpstreamDialect, body: dict[str, Any]) -> None:
    answer = dialect.decode_answer(body)
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.cached_input_tokens, answer.usage.output_tokens) == (10, 3, 7)
    encoded = orjson.loads(encode_answer(answer, "public", answer.usage))
    assert encoded["choices"][0]["finish_reason"] == "tool_calls"
    message = encoded["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("I look.", "hm")
    assert message["tool_calls"] == [CALL]


STREAMED_TOOLS: list[tuple[UpstreamDialect, list[dict[str, Any]]]] = [
    (
        anthropic_messages,
        [
            {"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 1}}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "x"}},
            {"type": "content_block_stop", "index": 0},
            {
                "type": "content_block_start",
                "index": 1,
                "content_block": {"type": "server_tool_use", "id": "s", "name": "x"},
            },
            {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": "{}"}},
            {"type": "content_block_stop", "index": 1},
            {
                "type": "content_block_start",
                "index": 2,
                "content_block": {"type": "tool_use", "id": "c1", "name": "weather", "input": {}},
            },
            {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": ""}},
            {
                "type": "content_block_delta",
                "index": 2,
                "delta": {"type": "input_json_delta", "partial_json": '{"city":'},
            },
            {
                "type": "content_block_delta",
                "index": 2,
                "delta": {"type": "input_json_delta", "partial_json": '"Oslo"}'},
            },
            {"type": "content_block_stop", "index": 2},
            {
                "type": "content_block_start",
                "index": 3,
                "content_block": {"type": "tool_use", "id": "c2", "name": "time", "input": {}},
            },
            {"type": "content_block_stop", "index": 3},
            {"type": "some_new_event"},
            {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 9}},
            {"type": "message_stop"},
        ],
    ),
    (
        gemini,
        [
            {"candidates": [{"content": {"parts": [{"text": "hm", "thought": True}]}}], "responseId": "m"},
            {
                "candidates": [
                    {
                        "content": {
                            "parts": [{"functionCall": {"id": "c1", "name": "weather", "args": {"city": "Oslo"}}}]
                        }
                    }
                ]
            },
            {
                "candidates": [
                    {"content": {"parts": [{"functionCall": {"id": "c2", "name": "time"}}]}, "finishReason": "STOP"}
                ]
            },
        ],
    ),
    (
        openai_upstream,
        [
            {
                "id": "m",
                "choices": [{"index": 0, "delta": {"role": "assistant", "content": None, "reasoning_content": "hm"}}],
            },
            {
                "choices": [
                    {
                        "index": 0,
                        "delta": {
                            "tool_calls": [
                                {
                                    "index": 0,
                                    "id": "c1",
                                    "type": "function",
                                    "function": {"name": "weather", "arguments": ""},
                                }
                            ]
                        },
                    }
                ]
            },
            {
                "choices": [
                    {"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":"Oslo"}'}}]}}
                ]
            },
            {
                "choices": [
                    {
                        "index": 0,
                        "delta": {
                            "tool_calls": [{"index": 1, "id": "c2", "function": {"name": "time", "arguments": ""}}]
                        },
                    }
                ]
            },
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
        ],
    ),
]


@pytest.mark.parametrize(("dialect", "events"), STREAMED_TOOLS)
def test_streamed_tool_calls_in_openais_words(dialect: UpstreamDialect, events: list[dict[str, Any]]) -> None:
    decoder: StreamDecoder = dialect.decoder(1)
    writer = ChunkWriter("public", include_usage=True)
    data = b"".join(writer.write(decoder, decoder.feed(orjson.dumps(event))) for event in events)
    data += writer.close(Usage(input_tokens=1, output_tokens=9))
    chunks = [orjson.loads(line.removeprefix(b"data: ")) for line in data.split(b"\n\n") if line]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    calls: dict[int, dict[str, Any]] = {}
    for part in (part for delta in deltas for part in delta.get("tool_calls", ())):
        call = calls.setdefault(part["index"], {"arguments": ""})
        call["arguments"] += part["function"].get("arguments", "")
        call |= {key: part[key] for key in ("id", "type") if key in part}
        call |= {"name": part["function"]["name"]} if "name" in part["function"] else {}
    assert calls[0] == {"id": "c1", "type": "function", "name": "weather", "arguments": '{"city":"Oslo"}'}
    assert (calls[1]["id"], calls[1]["name"], calls[1]["arguments"] or "{}") == ("c2", "time", "{}")
    assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]][-1] == "tool_calls"
    assert chunks[-1]["usage"]["completion_tokens"] == 9
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


@pytest.mark.parametrize(
    ("dialect", "body", "finish"),
    [
        (anthropic_messages, {"content": [], "stop_reason": "max_tokens"}, "length"),
        (anthropic_messages, {"content": [], "stop_reason": "stop_sequence"}, "stop"),
        (anthropic_messages, {"content": [], "stop_reason": "refusal"}, "content_filter"),
        (gemini, {"candidates": [{"finishReason": "MAX_TOKENS"}]}, "length"),
        (gemini, {"candidates": [{"finishReason": "SAFETY"}]}, "content_filter"),
        (gemini, {"candidates": [{"finishReason": "SOMETHING_NEW"}]}, "stop"),
        (openai_upstream, {"choices": [{"message": {}, "finish_reason": "function_call"}]}, "tool_calls"),
        (openai_upstream, {"choices": [{"message": {}, "finish_reason": "something_new"}]}, "stop"),
    ],
)
def test_finish_reasons(dialect: UpstreamDialect, body: dict[str, Any], finish: str) -> None:
    assert dialect.decode_answer(body).finish == finish


NONSENSE: list[dict[str, Any]] = [
    {},
    {"choices": 3, "content": 3, "candidates": 3, "type": 3},
    {"choices": [3], "content": [3], "candidates": [3]},
    {"choices": [{}], "content": [{}], "candidates": [{}]},
    {"choices": [{"message": {"tool_calls": [1]}}], "candidates": [{"content": {"parts": [{"functionCall": 1}]}}]},
    {"choices": [{"message": {"content": "cut"}}], "candidates": [{"content": {"parts": [{"text": "cut"}]}}]},
    {"candidates": [{"content": {"parts": 3}, "finishReason": "STOP"}]},
    {"candidates": [{"finishReason": "MALFORMED_FUNCTION_CALL"}]},
    {"error": "broken", "type": "error"},
    {"error": {"code": {}, "message": []}, "type": "error"},
]


@pytest.mark.parametrize("dialect", [openai_upstream, anthropic_messages, gemini])
@pytest.mark.parametrize("body", NONSENSE)
def test_nonsense_is_never_an_answer(dialect: UpstreamDialect, body: dict[str, Any]) -> None:
    with pytest.raises((Undecodable, ReportedError)):
        dialect.decode_answer(body)


@pytest.mark.parametrize(
    ("dialect", "chunk"),
    [
        (openai_upstream, {"choices": [{"index": "0", "delta": {"content": "x"}}]}),
        (openai_upstream, {"choices": [{"index": [], "delta": {"content": "x"}}]}),
        (openai_upstream, {"choices": [{"delta": 3}]}),
        (openai_upstream, {"choices": [{"delta": {"tool_calls": [{"index": {}, "function": {}}]}}]}),
        (openai_upstream, {"choices": {}}),
        (openai_upstream, {}),
        (anthropic_messages, {"type": "content_block_delta", "delta": {"text": "x"}}),
        (anthropic_messages, {"type": "content_block_delta", "index": 0}),
        (anthropic_messages, {"type": "content_block_start", "index": 0, "content_block": "text"}),
        (anthropic_messages, {"type": "message_start"}),
        (gemini, {}),
        (gemini, {"candidates": "x"}),
        (gemini, {"candidates": [{"content": {"parts": ["x"]}}]}),
    ],
)
def test_nonsense_chunk_is_undecodable(dialect: UpstreamDialect, chunk: dict[str, Any]) -> None:
    with pytest.raises(Undecodable):
        dialect.decoder(1).feed(orjson.dumps(chunk))


@pytest.mark.parametrize(
    ("record", "usage"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": None}, Usage(5, output_tokens=2)),
        (
            {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 9}},
            Usage(5, 5, 0, 2),
        ),
        ({"prompt_tokens": 5, "completion_tokens": 2, "prompt_cache_hit_tokens": 4}, Usage(5, 4, 0, 2)),
        (
            {
                "prompt_tokens": 5,
                "completion_tokens": 2,
                "total_tokens": 10,
                "completion_tokens_details": {"reasoning_tokens": 3},
            },
            Usage(5, 0, 0, 5, 3),
        ),
        (
            {
                "prompt_tokens": 5,
                "completion_tokens": 4,
                "total_tokens": 9,
                "completion_tokens_details": {"reasoning_tokens": 3},
            },
            Usage(5, 0, 0, 4, 3),
        ),
        ({"prompt_tokens": -5, "completion_tokens": "2"}, None),
        ({}, None),
        (None, None),
        ("5", None),
    ],
)
def test_usage_records_of_compatible_providers(record: Any, usage: Usage | None) -> None:
    assert openai_upstream.read_usage(record) == usage
