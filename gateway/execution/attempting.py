"""One attempt: one request to one upstream, up to the first token of a stream or to the whole answer."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from gateway.dialects.canonical import Answer, ChatRequest
from gateway.dialects.openai_answers import ChunkWriter, PassThrough, StreamWriter, encode_answer, pass_answer
from gateway.dialects.upstream import ReportedError, Undecodable, read_object
from gateway.execution.attempts import AttemptLog
from gateway.execution.breakers import Breaker
from gateway.execution.errors import (
    CUT,
    SILENT,
    TIMED_OUT,
    AttemptFailed,
    Failure,
    from_exception,
    from_response,
    next_candidate,
)
from gateway.execution.streams import AnswerStream, Running
from gateway.providers.registry import Provider
from gateway.providers.upstream import (
    BodyTooLarge,
    Disconnected,
    Upstream,
    UpstreamFailure,
    UpstreamRequest,
    UpstreamResponse,
)
from gateway.routing.catalog import Candidate
from gateway.settings import TimeoutSettings, TokenizerFamily

ANSWER_BYTES_MAX: Final = 32 * 1024 * 1024
ERROR_BYTES_MAX: Final = 64 * 1024
SLOWNESS_FACTOR: Final = 3
"""How much slower than its usual pace a candidate may be at a complete answer, see `Attempting.patience_s`."""


@dataclass(frozen=True, slots=True)
class Target:
    """A candidate, ready to be asked."""

    candidate: Candidate
    provider: Provider
    upstream_request: UpstreamRequest
    breaker: Breaker
    max_output_tokens: int


class Attempting:
    """Asks targets.

    Args:
        timeouts: The limits of an attempt.
        upstream: The seam.
        count_text: Tokens of a text under a tokenizer.
        count_input: Tokens of a request's input under a tokenizer.
    """

    def __init__(
        self,
        timeouts: TimeoutSettings,
        upstream: Upstream,
        count_text: Callable[[str, TokenizerFamily], int],
        count_input: Callable[[ChatRequest, TokenizerFamily], int],
    ) -> None:
        self._timeouts = timeouts
        self._upstream = upstream
        self._count_text = count_text
        self._count_input = count_input

    async def ask(self, request: ChatRequest, target: Target, log: AttemptLog, deadline: float) -> Running:
        """Send the request; return with the first token, or with the whole answer where it is not streamed.

        Args:
            request: What is asked.
            target: Who is asked.
            log: Gets the attempt, whatever becomes of it.
            deadline: Of the whole execution, in the loop's time.

        Raises:
            AttemptFailed: It did not come to that. The connection is closed.
        """
        began = asyncio.get_running_loop().time()
        try:
            return await self._ask(request, target, log, began, deadline)
        except AttemptFailed as error:
            log.asked = None
            log.failed(target.candidate.id, error.failure.code, error.failure.http_status, began)
            raise

    async def _ask(
        self, request: ChatRequest, target: Target, log: AttemptLog, began: float, deadline: float
    ) -> Running:
        patient_until = began + self.patience_s(request, target)
        response: UpstreamResponse | None = None
        keep_open = False
        try:
            async with asyncio.timeout_at(min(patient_until, deadline)):
                response = await self._upstream.send(target.upstream_request, lambda: _note_asked(log, target))
                if response.status != 200:
                    raise AttemptFailed(await _read_error(response))
                if not request.stream:
                    return await self._whole(request, target, response, log, began)
                stream = await self._stream(request, target, response, deadline)
                keep_open = True
            log.answered(target.candidate.id, began)
            return self._running(request, target, log, began, stream)
        except TimeoutError:
            raise AttemptFailed(SILENT if patient_until < deadline else TIMED_OUT) from None
        except (UpstreamFailure, Undecodable, ReportedError) as error:
            raise AttemptFailed(from_exception(error)) from error
        finally:
            if response is not None and not keep_open:
                response.close()

    def patience_s(self, request: ChatRequest, target: Target) -> float:
        """How long to wait for the first token of a stream, or for a complete answer.

        The upstream of a complete answer sends nothing before it is done, so that silence alone says nothing: it gets the time
        of its longest output at the candidate's usual pace, several times over, on top.
        """
        patience_s = self._timeouts.first_token_ms / 1000
        if request.stream:
            return patience_s
        return patience_s + (
            SLOWNESS_FACTOR * target.max_output_tokens * request.choices / target.candidate.tokens_per_second
        )

    async def _stream(
        self, request: ChatRequest, target: Target, response: UpstreamResponse, deadline: float
    ) -> AnswerStream:
        if response.headers.get("content-type", "").startswith("application/json"):
            raise AttemptFailed(await _read_unstreamed(response, target.provider))
        same_dialect = request.dialect == target.provider.dialect.NAME
        writer: StreamWriter = (PassThrough if same_dialect else ChunkWriter)(
            target.candidate.model, include_usage=request.include_usage
        )
        stream = AnswerStream(
            response,
            target.provider.dialect.decoder(request.choices),
            writer,
            between_s=self._timeouts.between_tokens_ms / 1000,
            deadline=deadline,
        )
        await stream.first_token()
        return stream

    async def _whole(
        self, request: ChatRequest, target: Target, response: UpstreamResponse, log: AttemptLog, began: float
    ) -> Running:
        try:
            data = await response.read(ANSWER_BYTES_MAX)
        except Disconnected:
            raise AttemptFailed(CUT) from None
        decoded = read_object(data)
        answer = target.provider.dialect.decode_answer(decoded)
        log.answered(target.candidate.id, began)
        running = self._running(request, target, log, began, None)
        running.complete(_pieces(answer), answer.finish, answer.usage)
        model = target.candidate.model
        if request.dialect == target.provider.dialect.NAME:
            running.body = pass_answer(decoded, data, model, running.usage)
        else:
            running.body = encode_answer(answer, model, running.usage)
        return running

    def _running(
        self, request: ChatRequest, target: Target, log: AttemptLog, began: float, stream: AnswerStream | None
    ) -> Running:
        tokenizer = target.candidate.tokenizer
        return Running(
            target.candidate,
            log,
            count_output=functools.partial(self._count_pieces, tokenizer),
            count_input=functools.partial(self._count_input, request, tokenizer),
            began=began,
            breaker=target.breaker,
            stream=stream,
        )

    def _count_pieces(self, tokenizer: TokenizerFamily, pieces: list[str]) -> int:
        return self._count_text("".join(pieces), tokenizer)


def _note_asked(log: AttemptLog, target: Target) -> None:
    log.asked = target.candidate


def _pieces(answer: Answer) -> list[str]:
    """All that the model wrote, for counting."""
    return [
        answer.reasoning,
        answer.text,
        *(text for call in answer.tool_calls for text in (call.name, call.arguments)),
    ]


async def _read_unstreamed(response: UpstreamResponse, provider: Provider) -> Failure:
    """Where a stream was due, a success in one piece is a report of something else: Gemini's filtered prompts, say."""
    try:
        provider.dialect.decode_answer(read_object(await response.read(ERROR_BYTES_MAX)))
    except (UpstreamFailure, Undecodable, ReportedError) as error:
        return from_exception(error)
    return next_candidate("upstream_malformed", "the provider did not stream its answer")


async def _read_error(response: UpstreamResponse) -> Failure:
    try:
        body = await response.read(ERROR_BYTES_MAX)
    except (Disconnected, BodyTooLarge):
        body = b""  # the status says enough
    return from_response(response.status, response.headers, body, time.time())
