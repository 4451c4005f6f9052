"""Requests in each upstream's dialect, tools and all; what one cannot express is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import orjson
import pytest

from gateway.dialects import anthropic_messages, gemini, openai_upstream
from gateway.dialects.canonical import ChatRequest
from gateway.dialects.openai_chat import parse_request
from gateway.dialects.upstream import Untranslatable, UpstreamDialect
from tests.gateway.executing import candidate

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "time"}},
]
CALLS = [
    {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}},
    {"id": "c2", "type": "function", "function": {"name": "time", "arguments": ""}},
]
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Weather?"},
            {"type": "text", "text": ""},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            {"type": "image_url", "image_url": {"url": "https://example.com/x.webp?size=1"}},
        ],
    },
    {"role": "assistant", "content": "I look.", "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "c1", "content": '{"sky":"blue"}'},
    {"role": "tool", "tool_call_id": "c2", "content": "noon"},
    {"role": "user", "content": "Thanks"},
    {"role": "developer", "content": "In English."},
]
EMPTY_SCHEMA: dict[str, Any] = {"type": "object", "properties": {}}


def request(**more: Any) -> ChatRequest:
    return parse_request({"model": "m", "messages": CONVERSATION, **more})


def built(dialect: UpstreamDialect, asked: ChatRequest, base_url: str = "http://up") -> dict[str, Any]:
    value = orjson.loads(dialect.build(asked, candidate("up"), 99, base_url).body)
    assert isinstance(value, dict)
    return value


def test_conversation_in_anthropics_words() -> None:
    body = built(anthropic_messages, request(tools=TOOLS, temperature=1.5, top_p=0.9, stop=["END"], stream=True))
    assert body == {
        "model": "up-model",
        "max_tokens": 99,
        "system": "Be brief.\n\nIn English.",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Weather?"},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
                    {"type": "image", "source": {"type": "url", "url": "https://example.com/x.webp?size=1"}},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Oslo"}},
                    {"type": "tool_use", "id": "c2", "name": "time", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": '{"sky":"blue"}'},
                    {"type": "tool_result", "tool_use_id": "c2", "content": "noon"},
                    {"type": "text", "text": "Thanks"},
                ],
            },
        ],
        "tools": [
            {
                "name": "weather",
                "description": "Tells the weather",
                "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
            },
            {"name": "time", "input_schema": EMPTY_SCHEMA},
        ],
        "temperature": 1.0,
        "stop_sequences": ["END"],
        "stream": True,
    }


def test_conversation_in_geminis_words() -> None:
    schema = {"type": "object", "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    body = built(gemini, request(tools=TOOLS, temperature=1.5, top_p=0.9, stop=["END"], response_format=form))
    assert body == {
        "systemInstruction": {"parts": [{"text": "Be brief."}, {"text": "In English."}]},
        "contents": [
            {
                "role": "user",
                "parts": [
                    {"text": "Weather?"},
                    {"inlineData": {"mimeType": "image/png", "data": "AAAA"}},
                    {"fileData": {"mimeType": "image/webp", "fileUri": "https://example.com/x.webp?size=1"}},
                ],
            },
            {
                "role": "model",
                "parts": [
                    {"text": "I look."},
                    {"functionCall": {"name": "weather", "args": {"city": "Oslo"}}},
                    {"functionCall": {"name": "time", "args": {}}},
                ],
            },
            {
                "role": "user",
                "parts": [
                    {"functionResponse": {"name": "weather", "response": {"sky": "blue"}}},
                    {"functionResponse": {"name": "time", "response": {"result": "noon"}}},
                    {"text": "Thanks"},
                ],
            },
        ],
        "tools": [
            {
                "functionDeclarations": [
                    {
                        "name": "weather",
                        "description": "Tells the weather",
                        "parametersJsonSchema": {"type": "object", "properties": {"city": {"type": "string"}}},
                    },
                    {"name": "time", "parametersJsonSchema": EMPTY_SCHEMA},
                ]
            }
        ],
        "generationConfig": {
            "maxOutputTokens": 99,
            "temperature": 1.5,
            "topP": 0.9,
            "stopSequences": ["END"],
            "responseMimeType": "application/json",
            "responseJsonSchema": schema,
        },
    }


@pytest.mark.parametrize(
    ("choice", "in_anthropic", "in_gemini"),
    [
        ("auto", {"type": "auto"}, {"mode": "AUTO"}),
        ("none", {"type": "none"}, {"mode": "NONE"}),
        ("required", {"type": "any"}, {"mode": "ANY"}),
        (
            {"type": "function", "function": {"name": "time"}},
            {"type": "tool", "name": "time"},
            {"mode": "ANY", "allowedFunctionNames": ["time"]},
        ),
    ],
)
def test_tool_choice_in_each_dialect(choice: Any, in_anthropic: Any, in_gemini: Any) -> None:
    asked = request(tools=TOOLS, tool_choice=choice)
    assert built(anthropic_messages, asked)["tool_choice"] == in_anthropic
    assert built(gemini, asked)["toolConfig"] == {"functionCallingConfig": in_gemini}


def test_gemini_3_gets_the_documented_stand_in_for_a_signature_once_a_step() -> None:
    newer = dataclasses.replace(candidate("up"), upstream_model="gemini-3.1-pro")
    body = orjson.loads(gemini.build(request(), newer, 9, "http://up/v1beta").body)
    signed = ["thoughtSignature" in part for part in body["contents"][1]["parts"]]
    assert signed == [False, True, False]


@pytest.mark.parametrize(
    ("dialect", "more", "param"),
    [
        (anthropic_messages, {"n": 2}, "n"),
        (gemini, {"n": 2}, "n"),
        (anthropic_messages, {"response_format": {"type": "json_object"}}, "response_format"),
        (anthropic_messages, {"stop": ["\n"]}, "stop"),
        (
            anthropic_messages,
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "input_audio", "input_audio": {"data": "A", "format": "wav"}}],
                    }
                ]
            },
            "messages",
        ),
        (
            gemini,
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [CALLS[0] | {"function": {"name": "f", "arguments": "{"}}]}
                ]
            },
            "messages",
        ),
    ],
)
def test_what_a_dialect_cannot_say_is_refused_not_dropped(
    dialect: UpstreamDialect, more: dict[str, Any], param: str
) -> None:
    with pytest.raises(Untranslatable) as error:
        built(dialect, request(**more))
    assert error.value.param == param


@pytest.mark.parametrize(
    ("dialect", "base", "url"),
    [
        (openai_upstream, "https://api.groq.com/openai/v1/", "https://api.groq.com/openai/v1/chat/completions"),
        (openai_upstream, "http://localhost:8000", "http://localhost:8000/v1/chat/completions"),
        (openai_upstream, "https://x/v1/chat/completions", "https://x/v1/chat/completions"),
        (anthropic_messages, "https://api.anthropic.com", "https://api.anthropic.com/v1/messages"),
        (anthropic_messages, "https://api.anthropic.com/v1/", "https://api.anthropic.com/v1/messages"),
        (gemini, "https://x", "https://x/v1beta/models/up-model:generateContent"),
        (gemini, "https://x/v1beta", "https://x/v1beta/models/up-model:generateContent"),
    ],
)
def test_base_urls_as_providers_publish_them(dialect: UpstreamDialect, base: str, url: str) -> None:
    assert dialect.build(request(), candidate("up"), 9, base).url == url


def test_a_member_that_occurs_twice_reaches_the_upstream_as_it_was_priced() -> None:
    """Parsers differ in which one they take, so only one of them may be left, even where nothing else changes."""
    raw = b'{"model":"up-model","max_tokens":100000,"max_tokens":99,"messages":[{"role":"user","content":"x"}]}'
    asked = parse_request(orjson.loads(raw), raw)
    body = openai_upstream.build(asked, candidate("up"), 99, "http://up").body
    assert body.count(b"max_tokens") == 1
    assert orjson.loads(body)["max_tokens"] == 99


def test_openai_itself_always_gets_the_newer_token_limit() -> None:
    body = built(openai_upstream, request(max_tokens=50), "https://api.openai.com/v1")
    assert body["max_completion_tokens"] == 99
    assert "max_tokens" not in body
