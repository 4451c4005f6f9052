"""The pipeline of a request, whoever pays: plan → tender → authorize → execute → capture or release.

Read it top down. How a route is chosen, what a payment is, how an upstream is reached and what a receipt holds are other
modules' business; the order in which things happen to money is this one's.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Any

import orjson

from gateway import replays as replaying
from gateway.access.hangup import until_gone
from gateway.access.keys import Access, Caller, KeyCaller, WalletKeyCaller
from gateway.access.limits import QuoteLimiter
from gateway.api.errors import ApiError, error_object
from gateway.api.http import Call, CallerGone, EventStream, read_json, send_body, send_json
from gateway.dialects import openai_chat, sse
from gateway.execution.attempts import tried
from gateway.execution.errors import CallerFault, ExecutionFailed
from gateway.execution.failover import Executor
from gateway.execution.inference import Inference
from gateway.execution.streams import Running
from gateway.extensions import Extensions
from gateway.metrics import Metrics
from gateway.offers import PAYMENT_HEADERS, Offers, PaidRequest, PaymentNeeded, SentPayment
from gateway.planning import Plan, Planner
from gateway.replays import KeptAnswer, Replays
from gateway.routing.preferences import STRATEGY_HEADER, parse_preferences
from payments.errors import PaymentMalformed, PaymentRefused
from payments.money import nano_to_usd
from payments.quotes import request_digest
from payments.sign_in import SignInRefused
from payments.store import Store, StoreBusy
from payments.tenders.account import AccountTender
from payments.tenders.authorizations import AlreadyUsed
from payments.tenders.base import Charge, Hold, HoldEnded, Outcome, Tender
from payments.tenders.closing import because
from payments.tenders.prepaid import PrepaidTender

ANOTHER_USE_WAIT_S = 30.0
"""How long the same payment sent again waits for its first use before it is told to come back."""
RESUMES_MAX = 3
DONE = b"data: [DONE]\n\n"
CUT_SHORT = (
    b'data: {"error":{"message":"The connection was closed during this answer: it is incomplete and was charged as far as it '
    b'came.","type":"api_error","code":"caller_hung_up","param":null}}\n\n'
)
"""How the kept answer of a caller that hung up ends: sent again, it must not look complete."""
LARGE_BODY_BYTES = 65_536
"""From here on a request is measured in a thread: four megabytes take the tokenizer up to a third of a second."""


@dataclass(slots=True)
class Job:
    """A planned and paid request under way."""

    call: Call
    plan: Plan
    hold: Hold
    paid: PaidRequest | None
    offers: Offers

    def headers(self, running: Running | None = None, charge_nano_usd: int | None = None) -> dict[str, str]:
        """What the response says about the route, the payment, and the charge if that is known already."""
        headers = {
            "x-farebox-receipt": self.hold.receipt_id,
            "x-farebox-strategy": self.plan.strategy,
            "x-farebox-quoted-usd": nano_to_usd(self.plan.quote.maximum_nano_usd),
        }
        if running is not None:
            headers["x-farebox-model"] = running.candidate.model
            headers["x-farebox-provider"] = running.candidate.provider
            headers["x-farebox-attempts"] = str(tried(running.attempts))
        if self.paid is not None:
            response = self.hold.payment_response(charge_nano_usd)
            if response is not None:
                headers |= self.offers.payment_headers(self.call, self.paid.sent, response)
        return headers

    def seal(self, replays: Replays, answer: KeptAnswer) -> replaying.Sealed | None:
        """The answer, kept for the same payment sent again; other tenders have nothing to send again."""
        if self.paid is None:
            return None
        return replays.sealed(
            self.hold.receipt_id, replaying.replay_secret(self.paid.sent.header, self.call.body), answer
        )


class Flow:
    """Serves paid requests."""

    def __init__(
        self,
        *,
        planner: Planner,
        offers: Offers,
        executor: Executor,
        access: Access,
        extensions: Extensions,
        store: Store,
        replays: Replays,
        limiter: QuoteLimiter,
        metrics: Metrics,
        credit_assets: tuple[str, ...],
        json_depth_max: int,
    ) -> None:
        self._planner = planner
        self._offers = offers
        self._executor = executor
        self._access = access
        self._extensions = extensions
        self._store = store
        self._replays = replays
        self._limiter = limiter
        self._metrics = metrics
        self._credit_assets = credit_assets
        self._json_depth_max = json_depth_max

    # ------------------------------------------------------------------ the pipeline

    async def serve(self, call: Call) -> None:
        """Answer `POST /v1/chat/completions`."""
        paying = not PAYMENT_HEADERS.keys().isdisjoint(call.headers)
        caller = None if paying else await self._access.caller(call.header(b"authorization"))
        refused: SignInRefused | None = None
        if caller is None:
            self._limiter.check(call.client)
            if not paying:
                caller, refused = await self._signed_in(call)
        try:
            fresh = await self.plan(call)
            if refused is not None:
                raise PaymentNeeded(fresh, refused.code, refused.message)
            plan, tender, paid = self._tender(call, fresh, caller)
        except PaymentNeeded as needed:
            await self.ask_for_payment(call, needed)
            return
        except (ApiError, PaymentMalformed):
            # What paid when it could still be served has its answer, whatever the catalog and the breakers say by now.
            if paying and await self._answered_before(call):
                return
            # What is asked wrongly costs work too.
            if caller is None:
                self._limiter.count(call.client)
            raise
        try:
            await self._pay_and_perform(call, plan, tender, paid)
        except PaymentRefused as error:
            # A pool cannot be paid for with a quote; everybody else gets a fresh one that says why.
            if isinstance(tender, AccountTender):
                raise
            await self.ask_for_payment(call, PaymentNeeded(fresh, error.code, error.message, error))

    async def _signed_in(self, call: Call) -> tuple[Caller | None, SignInRefused | None]:
        """The wallet that signed in with this very request, or why it is not let in: then it may still pay."""
        try:
            return await self._extensions.signed_in(call), None
        except SignInRefused as refused:
            return None, refused

    async def _pay_and_perform(self, call: Call, plan: Plan, tender: Tender, paid: PaidRequest | None) -> None:
        for _ in range(RESUMES_MAX):
            try:
                hold = await tender.authorize(plan.quote, plan.details())
            except AlreadyUsed as used:
                assert paid is not None
                if await self._answer_again(call, paid.sent, used):
                    return
                continue
            await self._perform(Job(call, plan, hold, paid, self._offers))
            return
        raise ApiError(409, "payment_in_progress", "this payment's first use is still under way; send it again later")

    async def plan(self, call: Call) -> Plan:
        """Route and price a request: no database, no chain."""
        if len(call.body) > LARGE_BODY_BYTES:
            return await asyncio.to_thread(self._plan, call)
        return self._plan(call)

    def _plan(self, call: Call) -> Plan:
        body = read_json(call.body, self._json_depth_max)
        request = openai_chat.parse_request(body, call.body)
        strategy = call.header(STRATEGY_HEADER.encode())
        preferences = parse_preferences(body, {} if strategy is None else {STRATEGY_HEADER: strategy})
        digest = request_digest(call.method, call.path, call.body)
        return self._planner.plan(request, preferences, digest, int(time.time()))

    def _tender(self, call: Call, plan: Plan, caller: Caller | None) -> tuple[Plan, Tender, PaidRequest | None]:
        """Who pays, and how. A payment with the request comes before a key or session that is also there."""
        paid = self._offers.read(call, plan, int(time.time()))
        if paid is not None:
            return paid.plan, paid.tender, paid
        if caller is None:
            raise PaymentNeeded(plan)
        if isinstance(caller, KeyCaller):
            return plan, AccountTender(self._store, caller.key_id, caller.pool), None
        key_id = caller.key_id if isinstance(caller, WalletKeyCaller) else None
        return plan, PrepaidTender(self._store, caller.address, self._credit_assets, key_id), None

    async def ask_for_payment(self, call: Call, needed: PaymentNeeded) -> None:
        """Answer 402 with a quote, in the header for x402 v2 and in the body for v1 and for people."""
        self._limiter.count(call.client)
        self._metrics.payments_required.labels(needed.code).inc()
        answer = self._offers.required(call, needed)
        await send_json(call.send, 402, answer.body, {"PAYMENT-REQUIRED": answer.header, "cache-control": "no-store"})

    async def _perform(self, job: Job) -> None:
        """Execute, then capture or release: whatever happens, the hold ends here."""
        plan = job.plan
        inference = Inference(self._executor, plan.request, plan.candidates, plan.max_output_tokens)
        try:
            async with until_gone(job.call):
                running = await self._begin(job, inference)
        except (ExecutionFailed, CallerFault) as failure:
            await self._release(job, failure)
        except CallerGone:
            # Or whoever hangs up again and again would have us pay the providers for it.
            spent = self._planner.spent(plan, await inference.abandon())
            await job.hold.interrupt(because("the caller hung up before the answer"), spent)
        except BaseException:
            await inference.abandon()
            await job.hold.interrupt(because("the request was stopped before the answer"))
            raise
        else:
            try:
                async with contextlib.aclosing(running):
                    await (self._stream(job, running) if job.plan.request.stream else self._whole(job, running))
            except StoreBusy:
                raise  # the capture goes on being tried by itself; to interrupt would race it
            except BaseException:
                # Does nothing after a capture; before one, whatever went wrong, nobody may find the hold open for ever.
                await job.hold.interrupt(because("the answer could not be finished"))
                raise

    async def _begin(self, job: Job, inference: Inference) -> Running:
        """Start the inference; return once there is something to show and the money for it is certain."""
        if job.hold.may_start_early:
            inference.begin()
        await job.hold.ready()
        return await inference.answer()

    async def _whole(self, job: Job, running: Running) -> None:
        amount = self._charge(job, running)
        cost = nano_to_usd(min(amount, job.hold.maximum_nano_usd))
        headers = job.headers(running, amount) | {"x-farebox-cost-usd": cost}
        kept = KeptAnswer(200, headers, "application/json", running.body)
        await self._capture(job, running, amount, kept)
        await send_body(job.call.send, 200, running.body, headers, kept.content_type)

    async def _stream(self, job: Job, running: Running) -> None:
        headers = job.headers(running)
        stream = EventStream(job.call.send)
        delivered = bytearray()
        gone = False
        stopped: asyncio.CancelledError | None = None
        try:
            async with until_gone(job.call):
                await stream.start(headers)
                async for frame in running.frames():
                    if job.paid is not None:
                        delivered += frame
                    await stream.write(frame)
        except CallerGone:
            gone = True
        except asyncio.CancelledError as error:
            # The server stops: what was delivered is charged all the same.
            gone, stopped = True, error
        finally:
            await running.aclose()
        ending = CUT_SHORT if gone else b"" if running.failure else DONE
        kept = KeptAnswer(200, headers, "text/event-stream; charset=utf-8", bytes(delivered) + ending)
        try:
            charge = await self._capture(job, running, self._charge(job, running), kept)
        except HoldEnded as error:
            # The status is out: the stream itself has to say that this is not the answer that was paid for.
            if gone:
                raise
            body = {"error": error_object(error.status, error.code, error.message) | {"receipt": error.receipt_id}}
            await stream.finish(sse.frame(orjson.dumps(body)))
            return
        if stopped is not None:
            raise stopped
        if not gone:
            await stream.finish(_receipt_comment(job, running, charge) + ending)

    async def _capture(self, job: Job, running: Running, amount_nano_usd: int, kept: KeptAnswer) -> Charge:
        charge = await job.hold.capture(amount_nano_usd, _outcome(running), also=job.seal(self._replays, kept))
        self._metrics.captured(running, charge)
        return charge

    async def _release(self, job: Job, failure: ExecutionFailed | CallerFault) -> None:
        """Nothing was delivered, so nothing is charged; say so."""
        error = _as_api_error(failure)
        charge = await job.hold.release(
            Outcome({"reason": error.code, "attempts": [attempt.as_json() for attempt in failure.attempts]})
        )
        self._metrics.released(failure)
        receipt: dict[str, Any] = {
            "id": charge.receipt_id,
            "charged_usd": "0.00",
            "credited_usd": nano_to_usd(charge.credited_nano_usd),
        }
        error.extra["farebox"] = {"receipt": receipt, "attempts": [attempt.as_json() for attempt in failure.attempts]}
        error.headers |= job.headers()
        if job.paid is not None and job.paid.sent.scheme.name != "exact":
            error.message += " You were not charged, and nothing is taken for this request."
        elif job.paid is not None:
            error.message += (
                f" You were not charged: {receipt['credited_usd']} USD are credited to your wallet's balance; sign in to "
                "spend them."
            )
        raise error

    # ------------------------------------------------------------------ the same payment again

    async def _answered_before(self, call: Call) -> bool:
        """Answer a payment that was used before for this very request, if it was; for requests that cannot be planned."""
        try:
            sent = self._offers.sent(call)
        except (PaymentMalformed, PaymentRefused):
            return False
        assert sent is not None
        digest = request_digest(call.method, call.path, call.body)
        used = await sent.scheme.first_outcome(sent.payment, sent.token, digest)
        return used is not None and await self._answer_again(call, sent, used)

    async def _answer_again(self, call: Call, sent: SentPayment, used: AlreadyUsed) -> bool:
        """Answer a payment that was sent before with its first outcome; False if it may be tried again."""
        if used.state == "in_progress" and await sent.scheme.use_ended(used.receipt_id, ANOTHER_USE_WAIT_S):
            return False
        kept = await self._replays.find(used.receipt_id, replaying.replay_secret(sent.header, call.body))
        if kept is None:
            raise ApiError(
                409,
                used.code,
                used.message,
                headers={"x-farebox-receipt": used.receipt_id},
                extra={"receipt": used.receipt_id, "poll": f"/v1/receipts/{used.receipt_id}"},
            )
        self._metrics.replayed.inc()
        headers = kept.headers | {"x-farebox-replayed": "true"}
        await send_body(call.send, kept.status, kept.body, headers, kept.content_type)
        return True

    def _charge(self, job: Job, running: Running) -> int:
        return self._planner.charge(job.plan, running.candidate.price.cost(running.usage))


def _outcome(running: Running) -> Outcome:
    return Outcome(
        {
            "model": running.candidate.model,
            "provider": running.candidate.provider,
            "attempts": [attempt.as_json() for attempt in running.attempts],
            "usage": {
                "input_tokens": running.usage.input_tokens,
                "cached_input_tokens": running.usage.cached_input_tokens,
                "output_tokens": running.usage.output_tokens,
                "reasoning_tokens": running.usage.reasoning_tokens,
                "source": running.usage_source,
            },
            "finish": running.finish,
            "reason": running.failure,
        }
    )


def _receipt_comment(job: Job, running: Running, charge: Charge) -> bytes:
    """The receipt as an SSE comment: clients of event streams ignore comments, our SDK reads it."""
    receipt = {
        "id": charge.receipt_id,
        "model": running.candidate.model,
        "provider": running.candidate.provider,
        "attempts": tried(running.attempts),
        "quoted_usd": nano_to_usd(job.plan.quote.maximum_nano_usd),
        "charged_usd": nano_to_usd(charge.charged_nano_usd),
        "credited_usd": nano_to_usd(charge.credited_nano_usd),
        "transaction": charge.transaction_hash,
    }
    return b": farebox-receipt " + orjson.dumps(receipt) + b"\n\n"


def _as_api_error(failure: ExecutionFailed | CallerFault) -> ApiError:
    if isinstance(failure, CallerFault):
        return ApiError(failure.status, failure.code, failure.message, param=failure.param)
    return ApiError(
        502,
        "all_candidates_failed",
        f"none of the {tried(failure.attempts)} attempts at a provider succeeded; the last one failed with {failure.last}.",
    )
