"""Running a request along its candidates until one of them answers.

Before the first token (of a stream) or the whole answer (otherwise) a failure is invisible to the caller: the next candidate
is tried. What a failure means is decided in `errors`, who is left alone in `breakers`; here is only the order of things.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from gateway.dialects.canonical import ChatRequest
from gateway.dialects.upstream import Untranslatable
from gateway.execution.attempting import Attempting, Target
from gateway.execution.attempts import AttemptLog
from gateway.execution.breakers import Breakers
from gateway.execution.errors import (
    TIMED_OUT,
    AttemptFailed,
    CallerFault,
    ExecutionFailed,
    Failure,
    Verdict,
    from_exception,
)
from gateway.execution.streams import Running
from gateway.providers.registry import Registry
from gateway.providers.upstream import Upstream
from gateway.routing.catalog import Candidate
from gateway.settings import Settings, TokenizerFamily
from payments.money import Usage


class Executor:
    """Reaches upstreams on behalf of callers. Belongs to one event loop.

    Args:
        settings: Its timeouts and the most attempts a request.
        registry: The providers.
        count_text: Tokens of a text under a tokenizer, for output whose provider reports no usage.
        count_input: Tokens of a request's input under a tokenizer, likewise.
        breakers: A new set by default.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        *,
        count_text: Callable[[str, TokenizerFamily], int],
        count_input: Callable[[ChatRequest, TokenizerFamily], int],
        breakers: Breakers | None = None,
    ) -> None:
        self.breakers = Breakers() if breakers is None else breakers
        self._registry = registry
        self._attempts_max = settings.routing.attempts_max
        self._total_s = settings.timeouts.total_ms / 1000
        self._upstream = Upstream(connect_timeout_s=settings.timeouts.connect_ms / 1000)
        self._count_input = count_input
        self._attempting = Attempting(settings.timeouts, self._upstream, count_text, count_input)

    async def aclose(self) -> None:
        """Close the connections to all upstreams."""
        await self._upstream.aclose()

    async def start(
        self,
        request: ChatRequest,
        candidates: Sequence[Candidate],
        max_output_tokens: int,
        log: AttemptLog | None = None,
    ) -> Running:
        """Get an answer under way, or the whole of it where it is not streamed.

        Args:
            request: What is asked.
            candidates: Whom to ask, in order.
            max_output_tokens: The limit that is sent upstream, per choice; a candidate's own limit bounds it further.
            log: Gets the attempts.

        Returns:
            The answer, which must be closed with `aclose`. Cancelling the call closes the upstream at once.

        Raises:
            ExecutionFailed: Nobody answered.
            CallerFault: The request is at fault.
        """
        log = AttemptLog() if log is None else log
        pursuit = _Pursuit(log, log.began + self._total_s)
        for candidate in candidates:
            target = self._target(request, candidate, max_output_tokens, pursuit)
            if target is None:
                continue
            if not target.breaker.admits():
                log.skipped(candidate.id, "breaker_open")
                pursuit.set_aside.append(target)
                continue
            running = await self._try(request, target, pursuit)
            if running is not None:
                return running
            if self._is_over(pursuit):
                break
        if log.tried == 0:  # with every breaker open, a try is worth more than a refusal
            for target in pursuit.set_aside:
                running = await self._try(request, target, pursuit)
                if running is not None:
                    return running
                if self._is_over(pursuit):
                    break
        raise pursuit.verdict()

    def cost_so_far(self, request: ChatRequest, log: AttemptLog) -> int:
        """Nano-USD that an execution which was cancelled before its answer is billed for: its input, if a provider has it."""
        if log.asked is None:
            return 0
        return log.asked.price.cost(Usage(input_tokens=self._count_input(request, log.asked.tokenizer)))

    def _is_over(self, pursuit: _Pursuit) -> bool:
        return pursuit.is_hopeless or pursuit.log.tried >= self._attempts_max

    def _target(
        self, request: ChatRequest, candidate: Candidate, max_output_tokens: int, pursuit: _Pursuit
    ) -> Target | None:
        """The candidate made ready to be asked; None, and a note of why, if it can be of no use."""
        provider = self._registry.get(candidate.provider)
        if provider is None or provider.unavailable is not None:
            pursuit.log.skipped(candidate.id, "provider_unavailable")
            return None
        if candidate.context_tokens <= pursuit.context_too_small:
            pursuit.log.skipped(candidate.id, "context_too_small")
            return None
        limit = min(max_output_tokens, candidate.max_output_tokens)
        try:
            upstream_request = provider.request(request, candidate, limit)
        except Untranslatable as error:
            failure = from_exception(error)
            pursuit.untranslatable = failure
            pursuit.log.skipped(candidate.id, failure.code)
            return None
        return Target(candidate, provider, upstream_request, self.breakers.of(candidate.id), limit)

    async def _try(self, request: ChatRequest, target: Target, pursuit: _Pursuit) -> Running | None:
        """Ask one target, a second time where the first did not even get through; tell its breaker what happened."""
        failure = TIMED_OUT
        try:
            for _ in range(2):
                try:
                    return await self._attempting.ask(request, target, pursuit.log, pursuit.deadline)
                except AttemptFailed as error:
                    failure = error.failure
                if failure.verdict is not Verdict.RETRY_HERE or pursuit.log.tried >= self._attempts_max:
                    break
        except BaseException:
            target.breaker.abandoned()  # the caller hung up, which says nothing of the candidate
            raise
        if failure.trips:
            target.breaker.failed(failure.retry_after_s)
        else:
            target.breaker.abandoned()
        pursuit.failed(target.candidate, failure)
        return None


class _Pursuit:
    """What one execution has learnt so far."""

    def __init__(self, log: AttemptLog, deadline: float) -> None:
        self.log = log
        self.deadline = deadline
        self.set_aside: list[Target] = []
        self.context_too_small = 0
        """The largest context, in tokens, that has proved too small."""
        self.last: Failure | None = None
        self.untranslatable: Failure | None = None

    def failed(self, candidate: Candidate, failure: Failure) -> None:
        """A candidate was tried in vain."""
        self.last = failure
        if failure.verdict is Verdict.LARGER_CONTEXT:
            self.context_too_small = max(self.context_too_small, candidate.context_tokens)

    @property
    def is_hopeless(self) -> bool:
        """Whether no other candidate would do better, or there is no time for one."""
        if self.last is not None and self.last.verdict is Verdict.TELL_CALLER:
            return True
        return asyncio.get_running_loop().time() >= self.deadline

    def verdict(self) -> ExecutionFailed | CallerFault:
        """What to tell the caller now that nobody has answered."""
        fault = self.untranslatable if self.last is None else self.last
        if fault is not None and (
            fault is self.untranslatable or fault.verdict in (Verdict.TELL_CALLER, Verdict.LARGER_CONTEXT)
        ):
            return CallerFault(self.log.attempts, fault.caller_status, fault.message, fault.code, fault.param)
        return ExecutionFailed(self.log.attempts, self.last)
