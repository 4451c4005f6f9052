"""One request and all that paying for it takes: the agent's whole logic, without any I/O of its own.

Read `Exchange.run` top down. The rule that everything here serves: one request is paid once. A payment is written down before
it is sent; while its outcome is unknown the very same one is sent again, also by the next attempt of whoever retries above us;
a new one is signed only when the gateway says that the first was not used and why.
"""

from __future__ import annotations

import hashlib
import random
import secrets
import time
from dataclasses import dataclass

import httpx

from agents_sdk import credit, permit2
from agents_sdk.answers import (
    Answer,
    credited_in,
    document_in,
    error_code_in,
    error_in,
    final,
    outcome_unknown,
    pending,
    retry_after,
)
from agents_sdk.channels import deposits, terms
from agents_sdk.channels import payments as channel_payments
from agents_sdk.endings import Endings, scheme_of
from agents_sdk.errors import ApprovalNeeded, PolicyViolation, QuoteRejected
from agents_sdk.journal import StoredPayment
from agents_sdk.money import nano_to_atomic_up
from agents_sdk.policy import SpendingPolicy
from agents_sdk.quotes import Demand, Offer, check_quote, choose_offer, read_demand
from agents_sdk.receipts import Watch
from agents_sdk.shared import Shared
from agents_sdk.steps import Lost, Read, Reply, Send, Sleep, Steps, fetch
from agents_sdk.tokens import PERMIT2_ADDRESS
from agents_sdk.wallet import PAYMENT_HEADER

SIGNATURES_MAX = 2
"""Payments signed for one request: the second only after the first was refused for a reason that a new one cures."""
CORRECTIONS_MAX = 4
"""Vouchers signed anew for one request, besides: they are over what is owed anyway and no new right to money."""
TIMED_OUT = frozenset({"quote_expired", "expired"})
CURABLE = (
    TIMED_OUT
    | frozenset({"quote_mismatch", "quote_malformed", "route_gone", "insufficient_funds"})
    | frozenset({"exposure_exceeded", "unpaid_answers", "upto_needs_a_key"})
)
RETRY_AFTER_S_MAX = 60.0
PAUSE_S_MAX = 8.0
POLL_ROUND_S = 10.0
"""A pending payment is sent again after this long of polling, whatever the receipt says."""
_UNDER_WAY = frozenset({"payment_in_progress", terms.CHANNEL_BUSY})
_TRANSIENT = frozenset({408, 425, 429})
_CONFLICTS = {
    "payment_already_credited": "credited",
    "payment_already_used": "used",
    "authorization_reused": "used",
    "authorization_spent": "used",
}
"""What a 409 of the gateway says became of the payment."""


@dataclass(frozen=True, slots=True)
class _Turned:
    """The gateway will not serve this payment: it did not take it (402), or took it and credited it."""

    reply: Reply
    body: bytes
    credited: bool = False
    doubtful: bool = False
    """A 402 because of the time, to a payment that was sent before: the earlier sending may have been taken all the same."""

    def answer(self) -> Answer:
        """The same, for the caller."""
        return Answer(self.reply.status, final(self.reply.headers), self.body)


class Exchange:
    """Carries one request through.

    Args:
        shared: The agent's state.
        request: The caller's request, its body complete.
        policy: Rules for this request in place of the agent's.
        asset: The only one to pay in, see `choose_offer`.
        from_credit: Whether credit may pay for it.
        fill_channel: Fill the channel that pays for it up to what the policy lets lie in it.
    """

    def __init__(
        self,
        shared: Shared,
        request: Send,
        *,
        policy: SpendingPolicy | None = None,
        asset: str | None = None,
        from_credit: bool = True,
        fill_channel: bool = False,
    ) -> None:
        self._shared = shared
        self._journal = shared.journal
        self._settings = shared.settings
        self._request = request
        self._digest = digest_of(request)
        self._policy = policy or shared.settings.policy
        self._asset = asset
        self._from_credit = from_credit
        self._fill_channel = fill_channel
        self._headers = _own_headers(request.headers, self._policy)
        self._payer = shared.wallet.address
        self._endings = Endings(shared)
        self._identifier = f"farebox-{secrets.token_hex(16)}"
        """What the payment is for, in the extension `payment-identifier`: this one request."""

    def run(self) -> Steps[Answer]:
        """Get an answer, paying if one has to.

        Raises:
            FareboxError: If it may not or must not be paid; see `agents_sdk.errors`.
            httpx.TransportError: If the gateway cannot be reached, or its answer got lost again and again.
        """
        unfinished = self._journal.take_open(origin=self._shared.origin, payer=self._payer, request=self._digest)
        if unfinished is not None:
            outcome = yield from self._carry_through(unfinished, sent_before=True)
            if isinstance(outcome, Answer):
                return outcome
            if outcome.doubtful and self._is_retry():
                return outcome.answer()
            if not outcome.credited:
                return (yield from self._pay(outcome.reply, outcome.body))
        reply = yield from self._send({})
        if isinstance(reply, Lost):
            raise reply.error
        if reply.status != 402:
            return Answer(reply.status, reply.headers, reply=reply)
        body = yield from _read(reply)
        return (yield from self._pay(reply, body))

    # ------------------------------------------------------------------ paying

    def _pay(self, reply: Reply, body: bytes) -> Steps[Answer]:
        """Answer a 402: from credit if there is enough, else with a new payment."""
        policy, excluded = self._policy, set[tuple[str, str]]()
        against: PolicyViolation | None = None
        signatures = corrections = 0
        while signatures < SIGNATURES_MAX:
            demand = read_demand(reply.headers, body)
            if demand is None:
                return Answer(402, reply.headers, body)
            check_quote(demand, self._request.url, time.time())
            policy.check_amounts(demand.quote.maximum_nano_usd, demand.quote.network_fee_nano_usd)
            if self._from_credit and not (signatures or corrections or excluded):
                answer = yield from self._pay_from_credit(demand)
                if answer is not None:
                    return answer
            try:
                offer = choose_offer(demand, policy, self._settings.tokens, excluded, self._asset)
            except PolicyViolation:
                if against is not None:
                    raise against from None
                if excluded:
                    break
                raise
            try:
                payment = yield from self._sign(demand, offer)
            except PolicyViolation as violation:
                if offer.scheme != terms.SCHEME:
                    raise
                # What a channel's deposit is too much for, a single payment may not be.
                excluded.add((offer.scheme, offer.token.asset))
                against = violation
                continue
            outcome = yield from self._carry_through(payment, sent_before=False)
            if isinstance(outcome, Answer):
                return outcome
            reply, body = outcome.reply, outcome.body
            code = error_code_in(body)
            if outcome.credited or outcome.doubtful:
                break
            if offer.scheme == terms.SCHEME and terms.is_about_the_channel(code):
                corrections += 1
                required = read_demand(reply.headers, body)
                again = channel_payments.take_refusal(self._shared, payment, offer, required, code)
                if not again or corrections > CORRECTIONS_MAX:
                    excluded.add((offer.scheme, offer.token.asset))
                continue
            if code not in CURABLE:
                break
            signatures += 1
            if code == "insufficient_funds":
                excluded.add((offer.scheme, offer.token.asset))
        return Answer(reply.status, final(reply.headers), body)

    def _sign(self, demand: Demand, offer: Offer) -> Steps[StoredPayment]:
        """Take the amount out of the limits, then sign, then write the payment down."""
        if offer.scheme == terms.SCHEME:
            return (
                yield from channel_payments.sign(
                    self._shared,
                    demand,
                    offer,
                    self._digest,
                    self._identifier,
                    self._policy,
                    fill=self._fill_channel,
                )
            )
        quote, requirement = demand.quote, offer.requirement
        if offer.through_permit2:
            yield from permit2.ensure_allowance(self._shared, offer.token, int(requirement.amount), asked_to=False)
        payment = self._journal.reserve(
            origin=self._shared.origin,
            payer=self._payer,
            request=self._digest,
            amount_nano_usd=quote.maximum_nano_usd,
            asset=offer.token.asset,
            recipient=requirement.pay_to,
            expires_at=int(time.time()) + requirement.max_timeout_seconds,
            windows=self._policy.windows(),
        )
        try:
            signed = self._shared.wallet.sign_payment(demand, offer, self._identifier)
            return self._journal.signed(payment, signed.header, signed.expires_at)
        except BaseException:
            self._journal.let_go(payment)
            raise

    def _carry_through(self, payment: StoredPayment, *, sent_before: bool) -> Steps[Answer | _Turned]:
        """Send one payment, again and again if need be, until its outcome is known or patience ends.

        Raises:
            httpx.TransportError: If the last answer got lost; the payment stays open for the next attempt.
        """
        assert payment.header is not None
        deadline = time.monotonic() + self._settings.patience_s
        tries, approved, closed = 0, False, False
        answer: Answer | None = None
        try:
            while True:
                result = yield from self._send({PAYMENT_HEADER: payment.header})
                body: bytes | Lost = b""
                if isinstance(result, Reply):
                    if 200 <= result.status < 300 and result.status != 202:
                        closed = True  # from here on the watch decides
                        watch = Watch(result.headers, self._endings.served(payment, result.headers))
                        return Answer(result.status, final(result.headers), reply=result, watch=watch)
                    body = yield Read(result)
                if isinstance(result, Lost) or isinstance(body, Lost):
                    lost = result if isinstance(result, Lost) else body
                    assert isinstance(lost, Lost)
                    tries += 1
                    if tries >= self._settings.tries_max:
                        raise lost.error
                    yield Sleep(self._pause(tries))
                    continue
                code = error_code_in(body)
                verdict = self._verdict(result, body, code)
                if verdict is not None:
                    closed = True
                    again = result.status == 402 and (sent_before or tries > 0)
                    doubtful = again and code in TIMED_OUT
                    # A voucher that was sent before may have been taken, whatever is said of it now.
                    unheard = doubtful or (again and scheme_of(payment) == terms.SCHEME)
                    self._endings.known(payment, "expired" if unheard else verdict, result.headers, body)
                    if result.status == 402:
                        return _Turned(result, body, doubtful=doubtful)
                    if result.status == 409 and verdict == "credited":
                        return answer or _Turned(result, body, credited=True)
                    return Answer(result.status, final(result.headers), body)
                if result.status == 412:
                    if approved:
                        return Answer(412, final(result.headers), body)
                    try:
                        yield from self._approve_for(payment, body)
                    except ApprovalNeeded:
                        if not (sent_before or tries):
                            # It was not taken, and the next attempt may be paid otherwise.
                            closed = True
                            self._endings.known(payment, "refused", result.headers, body)
                        raise
                    approved = True
                    continue
                answer = Answer(result.status, final(result.headers), body)
                waiting = result.status == 202 or code in _UNDER_WAY
                tries += not waiting
                pause = self._pause(max(tries, 1), result.headers)
                if tries >= self._settings.tries_max or time.monotonic() + pause > deadline:
                    return pending(result, body) if result.status == 202 else answer
                if result.status == 202:
                    yield from self._poll(body, deadline)
                else:
                    yield Sleep(pause)
        finally:
            if not closed:
                self._journal.let_go(payment)

    def _verdict(self, reply: Reply, body: bytes, code: str) -> str | None:
        """What an answer says became of the payment, as a state of the journal; None if it does not say."""
        status = reply.status
        if credited_in(body) is not None:
            return "credited"
        if status == 409:
            # Any other 409 is not the gateway's: something on the way made it, and the payment may not have been used at all.
            return _CONFLICTS.get(code)
        if status in (202, 412) or status in _TRANSIENT or status >= 500 or code in _UNDER_WAY:
            return None
        # What names a receipt was accepted; a plain 4xx was turned away at the door.
        return "answered" if "x-farebox-receipt" in reply.headers else "refused"

    # ------------------------------------------------------------------ credit

    def _pay_from_credit(self, demand: Demand) -> Steps[Answer | None]:
        """Use the wallet's credit if it should suffice; None if a payment has to be signed after all."""
        if "authorization" in self._headers:  # the caller's own key; not ours to replace
            return None
        maximum = demand.quote.maximum_nano_usd
        for _ in range(2):
            session = yield from credit.enough_credit(self._shared, maximum, self._policy)
            if session is None:
                return None
            result = yield from self._send({"authorization": f"Bearer {session.token}"})
            if isinstance(result, Lost):
                if not result.sent:
                    raise result.error
                self._shared.look_for_credit = True
                return outcome_unknown(result)
            if result.status == 401:
                yield from _read(result)
                self._shared.session = None
                continue
            if result.status == 402:
                yield from _read(result)
                self._journal.set_credit(self._shared.origin, self._payer, {})
                self._shared.look_for_credit = True
                return None
            if result.status >= 400:
                headers = result.headers if "x-farebox-receipt" in result.headers else final(result.headers)
                return Answer(result.status, headers, reply=result)
            watch = Watch(result.headers, self._endings.served_on_credit(result.headers, maximum))
            return Answer(result.status, result.headers, reply=result, watch=watch)
        return None

    # ------------------------------------------------------------------ Permit2

    def _approve_for(self, payment: StoredPayment, body: bytes) -> Steps[None]:
        """The gateway says that Permit2 is not approved (412)."""
        token = self._settings.tokens.by_asset(payment.asset)
        error = error_in(body)
        if token is None or (token.transfer_method != "permit2" and scheme_of(payment) != "upto"):
            raise QuoteRejected("the gateway asks for a Permit2 approval of a token that does not need one")
        if str(error.get("spender", PERMIT2_ADDRESS)).lower() != PERMIT2_ADDRESS:
            raise QuoteRejected(f"the gateway asks to approve {error.get('spender')}, which is not Permit2")
        if scheme_of(payment) == terms.SCHEME:
            amount = deposits.deposit_of(self._journal, payment)
        else:
            amount = nano_to_atomic_up(payment.amount_nano_usd, token.decimals)
        yield from permit2.ensure_allowance(self._shared, token, amount, asked_to=True)

    # ------------------------------------------------------------------ sending and waiting

    def _is_retry(self) -> bool:
        """Whether the OpenAI SDK says that it asks the same again."""
        return str(self._headers.get("x-stainless-retry-count", "0")) != "0"

    def _send(self, extra: dict[str, str]) -> Steps[Reply | Lost]:
        headers = self._headers.copy()
        headers.update(extra)
        request = self._request
        result: Reply | Lost = yield Send(request.method, request.url, headers, request.body, request.extensions)
        return result

    def _poll(self, body: bytes, deadline: float) -> Steps[None]:
        """Look at a pending payment's receipt until it is no longer open, for one round."""
        path = document_in(body).get("poll")
        url = self._settings.base_url.join(path) if isinstance(path, str) else None
        until = min(deadline, time.monotonic() + POLL_ROUND_S)
        tries = 0
        while True:
            tries += 1
            yield Sleep(self._pause(tries))
            # The path is the gateway's, so it must not lead anywhere else.
            if url is None or url.netloc != self._settings.base_url.netloc or time.monotonic() > until:
                return
            try:
                reply, content = yield from fetch("GET", url)
            except httpx.TransportError:
                continue
            if reply.status != 200 or document_in(content).get("state") != "open":
                return

    def _pause(self, tries: int, headers: httpx.Headers | None = None) -> float:
        asked = None if headers is None else retry_after(headers)
        if asked is not None:
            return min(asked, RETRY_AFTER_S_MAX)
        longest = min(PAUSE_S_MAX, self._settings.backoff_s * 2.0 ** (tries - 1))
        return longest * random.uniform(0.75, 1.0)  # noqa: S311 - so that many agents do not knock at once


def digest_of(request: Send) -> str:
    """The name of a logical request: SHA-256 over method, URL and body. Headers change from attempt to attempt."""
    digest = hashlib.sha256()
    for part in (request.method.encode(), str(request.url).encode(), request.body):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _own_headers(headers: httpx.Headers, policy: SpendingPolicy) -> httpx.Headers:
    """The caller's headers as the gateway should see them."""
    own = headers.copy()
    # The OpenAI SDK cannot leave its API key out; only a real one of the gateway means anything.
    if not own.get("authorization", "").startswith(("Bearer fbk_", "Bearer fba_", "Bearer fbs_")):
        own.pop("authorization", None)
    own["accept-encoding"] = "identity"  # the receipt is read off the raw stream
    # Also the usual one: an operator may offer others by default.
    own["accept-payment"] = ", ".join([*policy.schemes, *sorted(policy.networks or ())])
    return own


def _read(reply: Reply) -> Steps[bytes]:
    body = yield Read(reply)
    if isinstance(body, Lost):
        raise body.error
    assert isinstance(body, bytes)
    return body
