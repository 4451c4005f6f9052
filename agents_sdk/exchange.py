"""One request and all that paying for it takes: the agent's whole logic, without any I/O of its own.

Read `Exchange.run` top down. The rule that everything here serves: one request is paid once. A payment is written down before
it is sent; while its outcome is unknown the very same one is sent again, also by the next attempt of whoever retries above us;
a new one is signed only when the gateway says that the first was not used and why.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import secrets
import time
from dataclasses import dataclass
from typing import Any

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
from agents_sdk.errors import PolicyViolation, QuoteRejected
from agents_sdk.journal import StoredPayment
from agents_sdk.money import nano_to_atomic_up, nano_to_usd
from agents_sdk.policy import SpendingPolicy
from agents_sdk.quotes import Demand, Offer, check_quote, choose_offer, read_demand
from agents_sdk.receipts import Ending, Watch, amount_of, document_of
from agents_sdk.shared import Shared
from agents_sdk.steps import Lost, Read, Reply, Send, Sleep, Steps, fetch
from agents_sdk.tokens import PERMIT2_ADDRESS
from agents_sdk.wallet import PAYMENT_HEADER

SIGNATURES_MAX = 2
"""Payments signed for one request: the second only after the first was refused for a reason that a new one cures."""
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
_TRANSIENT = frozenset({408, 425, 429})
_CONFLICTS = {
    "payment_already_credited": "credited",
    "payment_already_used": "used",
    "authorization_reused": "used",
    "authorization_spent": "used",
}
"""What a 409 of the gateway says became of the payment; of ``payment_in_progress`` nothing is known yet."""


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
    """

    def __init__(self, shared: Shared, request: Send) -> None:
        self._shared = shared
        self._journal = shared.journal
        self._settings = shared.settings
        self._request = request
        self._digest = digest_of(request)
        self._headers = _own_headers(request.headers, self._settings.policy)
        self._payer = shared.wallet.address
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
        policy, excluded = self._settings.policy, set[str]()
        for signature in range(SIGNATURES_MAX):
            demand = read_demand(reply.headers, body)
            if demand is None:
                return Answer(402, reply.headers, body)
            check_quote(demand, self._request.url, time.time())
            policy.check_amounts(demand.quote.maximum_nano_usd, demand.quote.network_fee_nano_usd)
            if signature == 0:
                answer = yield from self._pay_from_credit(demand)
                if answer is not None:
                    return answer
            try:
                offer = choose_offer(demand, policy, self._settings.tokens, excluded)
            except PolicyViolation:
                if excluded:
                    break
                raise
            payment = yield from self._sign(demand, offer)
            outcome = yield from self._carry_through(payment, sent_before=False)
            if isinstance(outcome, Answer):
                return outcome
            reply, body = outcome.reply, outcome.body
            code = error_code_in(body)
            if outcome.credited or outcome.doubtful or code not in CURABLE:
                break
            if code == "insufficient_funds":
                excluded.add(offer.token.asset)
        return Answer(reply.status, final(reply.headers), body)

    def _sign(self, demand: Demand, offer: Offer) -> Steps[StoredPayment]:
        """Take the amount out of the limits, then sign, then write the payment down."""
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
            windows=self._settings.policy.windows(),
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
                        watch = Watch(result.headers, self._on_end(payment, result.headers))
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
                    doubtful = result.status == 402 and code in TIMED_OUT and (sent_before or tries > 0)
                    self._journal.close_payment(payment, "expired" if doubtful else verdict)
                    self._note_credit(payment, body, "expired" if doubtful else verdict)
                    if result.status == 402:
                        return _Turned(result, body, doubtful=doubtful)
                    if result.status == 409 and verdict == "credited":
                        return answer or _Turned(result, body, credited=True)
                    return Answer(result.status, final(result.headers), body)
                if result.status == 412:
                    if approved:
                        return Answer(412, final(result.headers), body)
                    yield from self._approve_for(payment, body)
                    approved = True
                    continue
                answer = Answer(result.status, final(result.headers), body)
                waiting = result.status == 202 or code == "payment_in_progress"
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
        if status in (202, 412) or status in _TRANSIENT or status >= 500:
            return None
        # What names a receipt was accepted; a plain 4xx was turned away at the door.
        return "answered" if "x-farebox-receipt" in reply.headers else "refused"

    def _note_credit(self, payment: StoredPayment, body: bytes, verdict: str) -> None:
        if verdict == "refused" or scheme_of(payment) == "upto":
            return
        credited = credited_in(body)
        if credited is None and verdict == "credited":
            credited = payment.amount_nano_usd
        if credited is None:
            self._shared.look_for_credit = True
        else:
            amount = min(credited, payment.amount_nano_usd)
            self._journal.add_credit(self._shared.origin, self._payer, payment.asset, amount)

    def _on_end(self, payment: StoredPayment, headers: httpx.Headers) -> Any:
        """What happens when the answer to a payment is over."""

        def on_end(ending: Ending, comment: dict[str, Any]) -> None:
            if ending == "broken":
                self._journal.let_go(payment)
                return
            document = document_of(headers, comment)
            charged = amount_of(document["charged_usd"])
            scheme = scheme_of(payment)
            if scheme == "upto":
                document["credited_usd"] = nano_to_usd(0)  # nothing else was taken
            elif charged is None:
                self._shared.look_for_credit = True
            else:
                # A token that takes a fee on its way leaves less credit than the difference: the gateway knows.
                told = amount_of(document.get("credited_usd"))
                unused = max(0, payment.amount_nano_usd - charged)
                unused = unused if told is None else min(told, unused)
                document["credited_usd"] = nano_to_usd(unused)
                self._journal.add_credit(self._shared.origin, self._payer, payment.asset, unused)
            self._journal.close_payment(payment, "answered")
            self._keep_receipt(document, payment.id, scheme, payment.amount_nano_usd, payment.asset)

        return on_end

    def _keep_receipt(self, document: dict[str, Any], reserve_id: str, paid_with: str, quoted: int, asset: str) -> None:
        document["id"] = document.get("id") or reserve_id
        document["quoted_usd"] = document.get("quoted_usd") or nano_to_usd(quoted)
        document |= {"gateway": self._shared.origin, "paid_with": paid_with, "asset": asset}
        self._journal.add_receipt(document["id"], self._payer, document)

    # ------------------------------------------------------------------ credit

    def _pay_from_credit(self, demand: Demand) -> Steps[Answer | None]:
        """Use the wallet's credit if it should suffice; None if a payment has to be signed after all."""
        if "authorization" in self._headers:  # the caller's own key; not ours to replace
            return None
        maximum = demand.quote.maximum_nano_usd
        for _ in range(2):
            session = yield from credit.enough_credit(self._shared, maximum)
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
            watch = Watch(result.headers, self._on_credit_end(result.headers, maximum))
            return Answer(result.status, result.headers, reply=result, watch=watch)
        return None

    def _on_credit_end(self, headers: httpx.Headers, maximum: int) -> Any:
        def on_end(ending: Ending, comment: dict[str, Any]) -> None:
            origin, journal = self._shared.origin, self._journal
            document = document_of(headers, comment)
            charged = amount_of(document["charged_usd"])
            amounts = journal.credit(origin, self._payer)
            asset = max(amounts, key=lambda name: amounts[name], default="")
            if charged is None or not asset:
                self._shared.look_for_credit = True
            else:
                journal.add_credit(origin, self._payer, asset, -charged)
            if ending != "broken" or charged is not None:
                receipt_id = f"credit_{hashlib.sha256(str(time.time_ns()).encode()).hexdigest()[:20]}"
                self._keep_receipt(document, receipt_id, "credit", maximum, asset)

        return on_end

    # ------------------------------------------------------------------ Permit2

    def _approve_for(self, payment: StoredPayment, body: bytes) -> Steps[None]:
        """The gateway says that Permit2 is not approved (412)."""
        token = self._settings.tokens.by_asset(payment.asset)
        error = error_in(body)
        if token is None or (token.transfer_method != "permit2" and scheme_of(payment) != "upto"):
            raise QuoteRejected("the gateway asks for a Permit2 approval of a token that does not need one")
        if str(error.get("spender", PERMIT2_ADDRESS)).lower() != PERMIT2_ADDRESS:
            raise QuoteRejected(f"the gateway asks to approve {error.get('spender')}, which is not Permit2")
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


def scheme_of(payment: StoredPayment) -> str:
    """By which scheme a signed payment pays."""
    assert payment.header is not None
    return str(json.loads(base64.b64decode(payment.header))["accepted"]["scheme"])


def _own_headers(headers: httpx.Headers, policy: SpendingPolicy) -> httpx.Headers:
    """The caller's headers as the gateway should see them."""
    own = headers.copy()
    # The OpenAI SDK cannot leave its API key out; only a real one of the gateway means anything.
    if not own.get("authorization", "").startswith(("Bearer fbk_", "Bearer fba_", "Bearer fbs_")):
        own.pop("authorization", None)
    own["accept-encoding"] = "identity"  # the receipt is read off the raw stream
    asked = [*(() if tuple(policy.schemes) == ("exact",) else policy.schemes), *sorted(policy.networks or ())]
    if asked:
        own["accept-payment"] = ", ".join(asked)
    return own


def _read(reply: Reply) -> Steps[bytes]:
    body = yield Read(reply)
    if isinstance(body, Lost):
        raise body.error
    assert isinstance(body, bytes)
    return body
