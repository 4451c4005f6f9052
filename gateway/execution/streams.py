"""An answer under way: reading the upstream's stream, writing the caller's, and knowing at every moment what was delivered.

Up to the first token everything read is held back, so that another candidate can still take over unseen. From then on a
failure ends the stream with an error frame and without a finish: a truncated answer never looks complete.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from typing import Final, Literal

import orjson

from gateway.api.errors import error_object
from gateway.dialects.canonical import BlockDelta, BlockStart, Event, Finish, FinishReason, UsageReport
from gateway.dialects.openai_answers import StreamWriter
from gateway.dialects.sse import SseParser, SseTooLong, frame
from gateway.dialects.upstream import ReportedError, StreamDecoder, Undecodable
from gateway.execution.attempts import AttemptLog
from gateway.execution.breakers import Breaker
from gateway.execution.errors import (
    CUT,
    STALLED,
    TIMED_OUT,
    AttemptFailed,
    Failure,
    Verdict,
    from_exception,
    next_candidate,
)
from gateway.providers.upstream import Disconnected, UpstreamResponse
from gateway.routing.catalog import Candidate
from payments.money import Usage

STREAM_BYTES_MAX: Final = 32 * 1024 * 1024
"""Of one answer, as the upstream sends it; also bounds what is kept for counting."""
AFTER_FINISH_S: Final = 5.0
"""How long the usage record may take after the finish reason."""
AFTER_END_S: Final = 0.25
"""How long the end of the body may take after the end marker; reaching it keeps the connection for the next request."""

UsageSource = Literal["provider", "counted"]


class _Watchdog:
    """Closes the upstream when it is waited for in vain: one timer a stream, moved lazily, instead of one a read."""

    __slots__ = ("_close", "_deadline", "_handle", "_loop", "_when", "expired")

    def __init__(self, close: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._close = close
        self._deadline = math.inf
        self._when = math.inf
        self._handle: asyncio.TimerHandle | None = None
        self.expired = False

    def arm(self, deadline: float) -> None:
        self._deadline = deadline
        if self._handle is None or deadline < self._when:
            self.cancel()
            self._deadline = self._when = deadline
            self._handle = self._loop.call_at(deadline, self._fire)

    def disarm(self) -> None:
        """Nobody waits: a slow caller is not a stalled upstream."""
        self._deadline = math.inf

    def cancel(self) -> None:
        self._deadline = math.inf
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _fire(self) -> None:
        self._handle = None
        if self._loop.time() >= self._deadline:
            self.expired = True
            self._close()
        elif self._deadline < math.inf:
            self.arm(self._deadline)


class AnswerStream:
    """One upstream stream, turned into the caller's frames.

    Args:
        response: With status 200.
        decoder: Of the upstream's dialect.
        writer: Of the caller's.
        between_s: How long the upstream may be silent between two tokens.
        deadline: When all of it must be over, in the loop's time.
    """

    def __init__(
        self,
        response: UpstreamResponse,
        decoder: StreamDecoder,
        writer: StreamWriter,
        *,
        between_s: float,
        deadline: float,
    ) -> None:
        self._response = response
        self._decoder = decoder
        self._writer = writer
        self._between_s = between_s
        self._deadline = deadline
        self._parser = SseParser()
        self._loop = asyncio.get_running_loop()
        self._watchdog = _Watchdog(response.close)
        self._held: list[bytes] = []
        self._bytes = 0
        self._over = False
        self._failure: Failure | None = None
        self._tokens = 0
        """Events that carried something; only they prove that the upstream is alive, pings do not."""
        self.pieces: list[str] = []
        self.finish: FinishReason | None = None
        self.reported: Usage | None = None

    async def first_token(self) -> None:
        """Read up to the first token (or the finish of an answer without any). The caller sets the time limit.

        Raises:
            AttemptFailed: There will be none.
        """
        while not self._tokens:
            frames = await self._pull()
            if frames:
                self._held.append(frames)

    async def frames(self) -> bytes:
        """The next frames, never none of them until the end, then empty.

        Raises:
            AttemptFailed: The upstream failed before the answer was finished.
        """
        if self._held:
            held = b"".join(self._held)
            self._held.clear()
            return held
        progress, since = self._progress(), self._loop.time()
        while not self._over:
            self._watchdog.arm(self._limit(since))
            try:
                frames = await self._pull()
            finally:
                self._watchdog.disarm()
            if frames:
                return frames
            if self._progress() != progress:
                progress, since = self._progress(), self._loop.time()
        return b""

    def _progress(self) -> tuple[int, bool]:
        return self._tokens, self._decoder.ended

    def last_frames(self, usage: Usage) -> bytes:
        """What the writer still owes the caller after a complete answer."""
        return self._writer.close(usage)

    def close(self) -> None:
        """Let go of the upstream, at once where it is not done."""
        self._watchdog.cancel()
        self._response.close()

    def _limit(self, since: float) -> float:
        if self._decoder.ended:
            return since + AFTER_END_S
        if self.finish is not None:
            return since + min(self._between_s, AFTER_FINISH_S)
        return min(since + self._between_s, self._deadline)

    async def _pull(self) -> bytes:
        """Read once and write what it completes; a failure is told after what came before it is written."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise AttemptFailed(failure)
        try:
            chunk = await self._response.chunk()
        except Disconnected:
            frames, failure = b"", self._why_broken_off()
        else:
            frames, failure = self._absorb(chunk)
        if failure is None:
            self._over = not chunk
        elif self.finish is not None:
            self._over = True  # the answer is complete; what became of the rest does not matter
        elif frames:
            self._failure = failure
        else:
            raise AttemptFailed(failure)
        return frames

    def _why_broken_off(self) -> Failure:
        if not self._watchdog.expired:
            return CUT
        return TIMED_OUT if self._loop.time() >= self._deadline else STALLED

    def _absorb(self, chunk: bytes) -> tuple[bytes, Failure | None]:
        """Decode the events that `chunk` completes (at the end of the body it is empty), and write them.

        Stops at the first event that is no good, keeping what came before it.
        """
        self._bytes += len(chunk)
        if self._bytes > STREAM_BYTES_MAX:
            return b"", next_candidate("upstream_too_large", f"the answer is longer than {STREAM_BYTES_MAX} bytes")
        out: list[bytes] = []
        failure: Failure | None = None
        try:
            events = self._parser.feed(chunk) if chunk else self._parser.flush()
            for event in events:
                if self._decoder.ended:
                    break
                decoded = self._decoder.feed(event.data)
                self._observe(decoded)
                out.append(self._writer.write(self._decoder, decoded))
        except SseTooLong as error:
            failure = next_candidate("upstream_too_large", str(error))
        except Undecodable as error:
            # A last line without its end was cut off; anything else is nonsense that the upstream wrote in full.
            failure = from_exception(error) if chunk else CUT
        except ReportedError as error:
            failure = from_exception(error)
        if failure is None and self.finish is None and (self._decoder.ended or not chunk):
            failure = CUT
        return b"".join(out), failure

    def _observe(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, BlockDelta):
                self.pieces.append(event.text)
                self._tokens += 1
            elif isinstance(event, UsageReport):
                self.reported = event.usage
            elif isinstance(event, Finish):
                self.finish = event.reason
                self._tokens += 1
            elif isinstance(event, BlockStart) and event.tool_name:
                self.pieces.append(event.tool_name)
                self._tokens += 1


class Running:
    """A started answer: complete (`body`), or a stream with its first token here (`frames()`).

    `usage`, `usage_source`, `finish` and `failure` are final once the frames are exhausted or `aclose` was called; for a
    complete answer at once.

    Args:
        candidate: Who answers.
        log: All attempts so far; the last is this one, and is updated when it ends.
        count_output: Counts pieces of output under the candidate's tokenizer.
        count_input: Counts the request's input under the candidate's tokenizer.
        began: When the attempt began, in the loop's time.
        breaker: Learns how it ended.
        stream: None for a complete answer.
    """

    def __init__(
        self,
        candidate: Candidate,
        log: AttemptLog,
        *,
        count_output: Callable[[list[str]], int],
        count_input: Callable[[], int],
        began: float,
        breaker: Breaker,
        stream: AnswerStream | None = None,
    ) -> None:
        self.candidate = candidate
        self.attempts = log.attempts
        self.body = b""
        self.usage = Usage()
        self.usage_source: UsageSource = "counted"
        self.finish: FinishReason | None = None
        self.failure: str | None = None
        self._log = log
        self._count_output = count_output
        self._count_input = count_input
        self._began = began
        self._breaker = breaker
        self._stream = stream
        self._pieces: list[str] = stream.pieces if stream is not None else []
        self._delivered = False
        self._ended = False

    def complete(self, pieces: list[str], finish: FinishReason, reported: Usage | None) -> None:
        """The whole answer is here; the executor sets `body` next."""
        self._pieces = pieces
        self._delivered = True
        self.finish = finish
        self._settle_usage(reported, whole=True)
        self._ended = True
        self._breaker.succeeded()

    def frames(self) -> AsyncIterator[bytes]:
        """The caller's SSE frames, several of them at a time where they arrived together, without the final `[DONE]`.

        A failure is the last frame, `data: {"error": …}`, and is named by `failure`.
        """
        return self

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._ended or self._stream is None:
            raise StopAsyncIteration
        try:
            frames = await self._stream.frames()
        except AttemptFailed as error:
            failure = error.failure
            self._end(failure)
            status = failure.caller_status if failure.verdict is Verdict.TELL_CALLER else 502
            message = f"{failure.message}; the answer above is incomplete."
            return frame(orjson.dumps({"error": error_object(status, failure.code, message, failure.param)}))
        if frames:
            self._delivered = True
            return frames
        self._end(None)
        last = self._stream.last_frames(self.usage)
        if not last:
            raise StopAsyncIteration
        return last

    async def aclose(self) -> None:
        """Stop the upstream at once if it is still under way. May be called at any time, and again."""
        if not self._ended and self._stream is not None:
            self._end(None, hung_up=self._stream.finish is None)

    def _end(self, failure: Failure | None, *, hung_up: bool = False) -> None:
        """The one way for a stream to end: complete, failed, or given up by the caller."""
        assert self._stream is not None
        assert not self._ended
        self._ended = True
        self._stream.close()
        self.finish = self._stream.finish
        self.failure = None if failure is None else failure.code
        self._settle_usage(self._stream.reported, whole=self.finish is not None, hung_up=hung_up)
        error_code = "caller_hung_up" if hung_up else self.failure
        self._log.ended("ok" if failure is None else "failed", error_code, self._began)
        if failure is not None and failure.trips:
            self._breaker.failed(failure.retry_after_s)
        elif failure is not None or hung_up:
            self._breaker.abandoned()
        else:
            self._breaker.succeeded()

    def _settle_usage(self, reported: Usage | None, *, whole: bool, hung_up: bool = False) -> None:
        """The provider's record of a whole answer; else our count of what was delivered, which is nothing if nothing was; if it
        was the caller that did not wait, at least the input."""
        if not self._delivered and not hung_up:
            return
        if whole and reported is not None and reported.output_tokens > 0:
            self.usage, self.usage_source = reported, "provider"
            return
        # Some dialects report the input at the start: that is better than our count of it.
        known = reported is not None and reported.input_tokens > 0
        self.usage = Usage(
            input_tokens=reported.input_tokens if reported is not None and known else self._count_input(),
            cached_input_tokens=reported.cached_input_tokens if reported is not None else 0,
            cache_write_tokens=reported.cache_write_tokens if reported is not None else 0,
            output_tokens=self._count_output(self._pieces),
        )
