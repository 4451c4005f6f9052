"""Reading server-sent events from bytes cut anywhere."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.sse import SseEvent, SseParser, SseTooLong

STREAM = (
    b"\xef\xbb\xbf: comment\n\nevent: first\r\ndata: one\r\n\r\ndata:two\ndata: lines\nid: 3\nretry: 5\n\n\n\n"
    b"data: \xe2\x82\xac\n\nevent: empty\n\ndata: [DONE]\n\n"
)
EVENTS = [
    SseEvent(b"first", b"one"),
    SseEvent(b"", b"two\nlines"),
    SseEvent(b"", "€".encode()),
    SseEvent(b"", b"[DONE]"),
]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_cuts_make_no_difference(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    parser = SseParser()
    events = [event for start, end in itertools.pairwise(places) for event in parser.feed(STREAM[start:end])]
    assert events == EVENTS
    assert parser.flush() == []


def test_last_event_may_lack_its_blank_line() -> None:
    parser = SseParser()
    assert parser.feed(b"data: a\n\ndata: b") == [SseEvent(b"", b"a")]
    assert parser.flush() == [SseEvent(b"", b"b")]


@pytest.mark.parametrize("chunk", [b"x" * 60, b"data: " + b"x" * 50 + b"\n"])
def test_lines_and_events_are_bounded(chunk: bytes) -> None:
    parser = SseParser(event_bytes_max=100)
    parser.feed(chunk)
    with pytest.raises(SseTooLong):
        parser.feed(chunk)
