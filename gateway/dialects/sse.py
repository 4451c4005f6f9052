"""Server-sent events, read incrementally from bytes, and written.

The parser follows the WHATWG rules for `event` and `data` lines; comments, `id` and `retry` mean nothing between a gateway
and an upstream. Lines may end in LF or CRLF; a lone CR, which no provider sends, is not a line end here. Memory is bounded:
an upstream cannot make the gateway hold an endless line.
"""

from __future__ import annotations

from typing import NamedTuple

EVENT_BYTES_MAX = 4 * 1024 * 1024
"""The longest line and the longest event that are accepted; an image in one chunk fits."""
_BOM = b"\xef\xbb\xbf"


class SseEvent(NamedTuple):
    """One event; `name` is empty where the server gave none."""

    name: bytes
    data: bytes


class SseTooLong(ValueError):
    """A line or an event is longer than the limit."""


class SseParser:
    """Turns a byte stream, cut anywhere, into events."""

    __slots__ = ("_begun", "_data", "_data_bytes", "_limit", "_line", "_line_bytes", "_name")

    def __init__(self, event_bytes_max: int = EVENT_BYTES_MAX) -> None:
        self._limit = event_bytes_max
        self._line: list[bytes] = []
        self._line_bytes = 0
        self._name = b""
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._begun = False

    def feed(self, chunk: bytes) -> list[SseEvent]:
        """Take the next bytes; return the events that they complete, in order.

        Raises:
            SseTooLong: A line or an event exceeds the limit. The parser is of no further use.
        """
        if not self._begun and chunk:
            self._begun = True
            chunk = chunk.removeprefix(_BOM)
        if b"\n" not in chunk:
            # Pieces of one long line are joined once, at its end: joining at every piece would cost quadratic time.
            self._hold(chunk)
            return []
        lines = chunk.split(b"\n")
        if self._line:
            self._hold(lines[0])
            lines[0] = b"".join(self._line)
            self._line.clear()
            self._line_bytes = 0
        rest = lines.pop()
        events: list[SseEvent] = []
        for line in lines:
            self._take(line, events)
        if rest:
            self._hold(rest)
        return events

    def flush(self) -> list[SseEvent]:
        """The stream has ended: return the event that only lacks its blank line, as some servers leave it."""
        events: list[SseEvent] = []
        if self._line:
            self._take(b"".join(self._line), events)
            self._line.clear()
            self._line_bytes = 0
        self._take(b"", events)
        return events

    def _hold(self, piece: bytes) -> None:
        self._line_bytes += len(piece)
        if self._line_bytes > self._limit:
            raise SseTooLong(f"a line of the event stream is longer than {self._limit} bytes")
        self._line.append(piece)

    def _take(self, line: bytes, events: list[SseEvent]) -> None:
        if line.endswith(b"\r"):
            line = line[:-1]
        if not line:
            if self._data:
                data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
                events.append(SseEvent(self._name, data))
                self._data.clear()
                self._data_bytes = 0
            self._name = b""
        elif line.startswith(b"data:"):
            value = line[6:] if line.startswith(b"data: ") else line[5:]
            self._data_bytes += len(value) + 1
            if self._data_bytes > self._limit:
                raise SseTooLong(f"an event is longer than {self._limit} bytes")
            self._data.append(value)
        elif line.startswith(b"event:"):
            self._name = line[6:].strip()


def frame(data: bytes) -> bytes:
    """One event without a name. `data` has no line breaks (JSON written compactly has none)."""
    return b"data: " + data + b"\n\n"
