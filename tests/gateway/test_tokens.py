"""Token counts: exact for the base tokenizer, never fewer than what other public tokenizers need, bounded in memory."""

from __future__ import annotations

import json
import random
from typing import Any, cast

import pytest
import splintr
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.canonical import (
    ChatRequest,
    MediaBlock,
    Message,
    TextBlock,
    Tool,
    ToolCallBlock,
    ToolResultBlock,
)
from gateway.routing import tokens
from gateway.routing.tokens import FAMILIES, count_input, count_text, measure_input
from gateway.settings import TokenizerFamily

PUBLIC = {"cl100k_base": "cl100k_base", "llama3": "llama3", "deepseek": "deepseek_v3", "mistral": "mistral_v3"}

TEXTS = {
    "english": "The gateway picks a model for each request, keeps working when a provider fails, and charges what was used. ",
    "code": "def capture(self, amount: int) -> None:\n    if amount > self._held:\n        raise TooMuch(amount)\n",
    "json": json.dumps([{"id": i, "name": f"item {i}", "price": i * 1.37, "tags": ["a", "b"]} for i in range(20)]),
    "chinese": "人工智能网关为每个请求选择模型，并且只按实际使用量收费。",
    "hindi": "एआई गेटवे हर अनुरोध के लिए मॉडल चुनता है और केवल वास्तविक उपयोग के लिए शुल्क लेता है।",
    "arabic": "تختار البوابة نموذجًا لكل طلب وتفرض رسومًا فقط على ما تم استخدامه فعليًا.",
    "russian": "Шлюз выбирает модель для каждого запроса и берёт плату только за то, что было использовано.",
    "thai": "เกตเวย์เลือกโมเดลสำหรับแต่ละคำขอและคิดค่าบริการเฉพาะที่ใช้จริง",
    "digits": " ".join(str(random.Random(i).randrange(10**9)) for i in range(60)),
}


def request_of(*texts: str, **fields: Any) -> ChatRequest:
    messages = tuple(Message("user", (TextBlock(text),)) for text in texts)
    return ChatRequest("openai_chat", "m", (), fields.pop("messages", messages), **fields)


def test_base_count_is_that_of_the_public_tokenizer() -> None:
    encoding = splintr.Tokenizer.from_pretrained("o200k_base")
    for text in TEXTS.values():
        assert count_text(text, "o200k_base") == len(encoding.encode_ordinary(text))


def test_special_tokens_spelled_out_count_as_the_text_they_are() -> None:
    assert count_text("<|endoftext|>") > 3


@pytest.mark.parametrize("family", PUBLIC)
@pytest.mark.parametrize("name", TEXTS)
def test_margin_covers_what_the_public_tokenizer_of_the_family_needs(family: TokenizerFamily, name: str) -> None:
    text = TEXTS[name] * 10
    needed = len(splintr.Tokenizer.from_pretrained(PUBLIC[family]).encode_ordinary(text))
    assert count_input(request_of(text), family) >= needed


def test_margin_of_other_families_is_never_negative() -> None:
    request = request_of(*TEXTS.values())
    assert all(count_input(request, family) >= count_input(request) for family in FAMILIES)


def test_long_text_is_counted_in_pieces_with_next_to_no_difference() -> None:
    text = TEXTS["english"] * 1000
    whole = len(splintr.Tokenizer.from_pretrained("o200k_base").encode_ordinary(text))
    assert whole <= count_text(text) <= whole + 2 * (len(text) // tokens.CHUNK_CHARACTERS)


def test_half_a_surrogate_pair_counts_as_something() -> None:
    assert count_text("a\ud800b") >= 2
    assert count_input(request_of("a\ud800b")) >= 2


@given(st.lists(st.text(max_size=200), min_size=1, max_size=5))
def test_a_request_is_at_least_its_texts(texts: list[str]) -> None:
    # Blocks are counted joined, so a token may span two of them; their framing is worth more than that.
    assert count_input(request_of(*texts)) >= sum(count_text(text) for text in texts)


def test_everything_that_is_sent_is_counted() -> None:
    plain = measure_input(request_of("hello"))
    schema = {"type": "object", "properties": {"city": {"type": "string", "description": "where to look"}}}
    tool = Tool("weather", "looks outside of the window", schema)
    call = Message("assistant", (ToolCallBlock("call_1", "weather", '{"city": "Ulm"}'),))
    result = Message("tool", (ToolResultBlock("call_1", "sunny, and warm for the season"),))
    said = Message("user", (TextBlock("hello"),))
    for other in (
        request_of("hello", tools=(tool,)),
        request_of("hello", response_format="json_schema", response_schema={"name": "x", "schema": schema}),
        request_of(messages=(said, call)),
        request_of(messages=(said, result)),
    ):
        assert measure_input(other).base_tokens > plain.base_tokens + tokens.TOKENS_PER_MESSAGE
    image = MediaBlock("image", url="https://example.com/a.png")
    sound = MediaBlock("audio", data="A" * 40_000, media_type="audio/mp3")
    media = measure_input(request_of(messages=(Message("user", (TextBlock("hello"), image, sound)),)))
    assert media.media_tokens == tokens.IMAGE_TOKENS + 30_000 // tokens.AUDIO_BYTES_PER_TOKEN


def test_tools_add_the_hidden_prompt_of_their_provider() -> None:
    tool = Tool("t", None, {})
    with_tools = count_input(request_of("hello", tools=(tool,)), "claude")
    assert with_tools >= count_input(request_of("hello"), "claude") + FAMILIES["claude"].tools_tokens


def test_the_measure_of_one_request_is_not_used_for_the_next() -> None:
    short, long = request_of("hi"), request_of("hi " * 500)
    assert count_input(short) < count_input(long)
    assert count_input(short) == measure_input(short).tokens("o200k_base")


def test_what_the_tokenizer_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "CACHE_ENTRIES_MAX", 100)
    monkeypatch.setattr(tokens, "CACHE_CHECK_CHARACTERS", 1_000)
    letters = random.Random(1)
    for _ in range(50):
        count_text(" ".join("".join(letters.choices("abcdefghij", k=8)) for _ in range(50)))
    assert cast("Any", tokens)._encoding().cache_len < 500
