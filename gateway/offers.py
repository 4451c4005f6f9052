"""The x402 side of a request: what a 402 offers, and what a payment header turns into."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gateway.api.errors import ApiError
from gateway.api.http import Call
from gateway.planning import Plan, Planner
from payments.chain.networks import Network, Token
from payments.errors import PaymentError, PaymentMalformed, PaymentRefused
from payments.money import atomic_to_nano_down, nano_to_usd
from payments.quotes import Quote, QuoteInvalid, QuoteItem, QuoteSealer
from payments.tenders.exact import ExactServices, ExactTender
from payments.verification import checks
from payments.x402 import wire

PAYMENT_HEADERS: dict[bytes, wire.HeaderName] = {b"payment-signature": "payment-signature", b"x-payment": "x-payment"}


@dataclass(frozen=True, slots=True)
class NetworkPayments:
    """A network with what is needed to be paid on it."""

    network: Network
    pay_to: str
    services: ExactServices


@dataclass(frozen=True, slots=True)
class SentPayment:
    """A payment as it came with a request, nothing of it checked but its form."""

    payment: wire.Payment
    header: bytes
    entry: NetworkPayments
    token: Token

    @property
    def identity(self) -> str:
        """The name under which its authorization can be used once."""
        return self.payment.identity(self.token.chain_id, self.token)


@dataclass(frozen=True, slots=True)
class PaidRequest:
    """A request that carries a payment which pays for it, as far as can be known without the chain."""

    plan: Plan
    tender: ExactTender
    sent: SentPayment


class PaymentNeeded(Exception):
    """The answer is a 402 with a quote. `code` and `message` say why, if a payment was there and did not do."""

    def __init__(
        self, plan: Plan, code: str = "payment_required", message: str = "this request has to be paid"
    ) -> None:
        super().__init__(message)
        self.plan = plan
        self.code = code
        self.message = message


class Offers:
    """Makes 402 answers and reads payments.

    Args:
        networks: What payments are taken on, the operator's first choice first.
        sealer: Signs quotes.
        planner: Prices requests.
        public_url: How clients reach this gateway, or None to take it from each request.
        timeout_s: How long a payment must be good for, in seconds.
    """

    def __init__(
        self,
        networks: list[NetworkPayments],
        sealer: QuoteSealer,
        planner: Planner,
        public_url: str | None,
        timeout_s: int,
    ) -> None:
        self._networks = networks
        self._sealer = sealer
        self._planner = planner
        self._public_url = public_url
        self._timeout_s = timeout_s

    def required(self, call: Call, needed: PaymentNeeded) -> wire.PaymentRequiredAnswer:
        """The 402 for a request."""
        quote = needed.plan.quote
        networks = self._offered(call.header(b"accept-payment"))
        requirements = [
            wire.requirement_for(token, entry.network, quote.maximum_nano_usd, entry.pay_to, self._timeout_s)
            for entry in networks
            for token in entry.network.tokens
        ]
        answer = wire.payment_required(
            requirements,
            quote,
            self._sealer.seal(quote),
            self._resource(call),
            f"{needed.code}: {needed.message}",
            [entry.network for entry in networks],
        )
        answer.body["quote"] = needed.plan.quote_json()
        return answer

    def sent(self, call: Call) -> SentPayment | None:
        """The payment that a request carries; None if it carries none.

        Raises:
            PaymentMalformed: The header is no payment.
            PaymentRefused: It is on a network or in a token that is not taken here.
        """
        present = [name for name in PAYMENT_HEADERS if name in call.headers]
        if not present:
            return None
        if len(present) > 1:
            raise PaymentMalformed("two_payments", "send either PAYMENT-SIGNATURE or X-PAYMENT, not both")
        header = call.headers[present[0]]
        payment = wire.decode_payment(header.decode("latin-1"), PAYMENT_HEADERS[present[0]])
        entry, token = self._paid_in(payment)
        return SentPayment(payment, header, entry, token)

    def read(self, call: Call, fresh: Plan, now: int) -> PaidRequest | None:
        """The payment that a request carries, checked as far as that needs no chain; None if it carries none.

        Args:
            call: The request.
            fresh: The plan that it would get without a payment.
            now: Unix seconds.

        Raises:
            PaymentMalformed: The header is no payment.
            PaymentNeeded: The payment does not pay for this request; says why, with a fresh quote.
        """
        try:
            sent = self.sent(call)
            return None if sent is None else self._check(sent, fresh, now)
        except PaymentRefused as error:
            raise PaymentNeeded(fresh, error.code, error.message) from None

    def _check(self, sent: SentPayment, fresh: Plan, now: int) -> PaidRequest:
        payment, entry, token = sent.payment, sent.entry, sent.token
        plan, refusal = fresh, None
        if payment.quote_token is not None and payment.accepted is not None:
            plan, refusal = self._honoured(payment.quote_token, payment.accepted.amount, token, fresh, now)
        requirement = wire.requirement_for(
            token, entry.network, plan.quote.maximum_nano_usd, entry.pay_to, self._timeout_s
        )
        try:
            checks.check_offline(payment, requirement, entry.network, token, now=now)
        except PaymentRefused as error:
            # Times pass, and prices move under a v1 payment, which carries no quote. Whoever paid in time is not told so.
            if error.code != "expired" and not (error.code == "wrong_amount" and payment.version == 1):
                raise
            refusal = error
        tender = ExactTender(
            entry.services, payment, token, entry.network, requirement, plan.quote.request_digest, refusal
        )
        return PaidRequest(plan, tender, sent)

    def _paid_in(self, payment: wire.Payment) -> tuple[NetworkPayments, Token]:
        for entry in self._networks:
            if payment.network in (entry.network.caip2, entry.network.v1_name):
                break
        else:
            known = ", ".join(entry.network.caip2 for entry in self._networks)
            raise PaymentRefused(
                "wrong_network", f"payments on {payment.network!r} are not taken here, only on {known}"
            )
        address = payment.token_address or entry.network.tokens[0].address
        token = entry.network.token_at(address)
        if token is None:
            raise PaymentRefused("wrong_token", f"the token {address} is not taken on {entry.network.caip2}")
        return entry, token

    def _honoured(
        self, quote_token: str, amount: int, token: Token, fresh: Plan, now: int
    ) -> tuple[Plan, PaymentRefused | None]:
        """The plan that was quoted, and the refusal that its age deserves if nobody used it in time."""
        amount_nano_usd = atomic_to_nano_down(amount, token.decimals)
        digest = fresh.quote.request_digest
        refusal: PaymentRefused | None = None
        try:
            claim = self._sealer.open(quote_token, amount_nano_usd=amount_nano_usd, request_digest=digest, now=now)
        except QuoteInvalid as error:
            if error.code != "quote_expired":
                raise
            refusal = error
            # Its age is all that is wrong with it: read it as of when it was good.
            claim = self._sealer.open(quote_token, amount_nano_usd=amount_nano_usd, request_digest=digest, now=0)
        fee = min(fresh.quote.network_fee_nano_usd, amount_nano_usd)
        items = [QuoteItem("inference", amount_nano_usd - fee)]
        if fee:
            items.append(QuoteItem("network_fee", fee))
        quote = Quote(claim.id, tuple(items), amount_nano_usd, (), fresh.quote.request_digest, claim.expires_at)
        plan = self._planner.honour(fresh, quote, claim.route_marks)
        if plan is None:
            plan = replace(fresh, quote=quote)
            refusal = refusal or PaymentRefused(
                "route_gone",
                f"the models that were quoted at {nano_to_usd(amount_nano_usd)} USD are gone and none costs as little; "
                "nothing was taken",
            )
        return replace(plan, quote=replace(quote, route=tuple(candidate.id for candidate in plan.candidates))), refusal

    def _offered(self, accept_payment: str | None) -> list[NetworkPayments]:
        """The first network, which works without any set-up, and those that the caller asks for by their CAIP-2 name."""
        if not self._networks:
            raise ApiError(
                503,
                "payments_not_configured",
                "this gateway takes no payments on a chain; use an API key, or ask its operator",
            )
        asked = {item.strip() for item in (accept_payment or "").split(",")}
        named = [entry for entry in self._networks if entry.network.caip2 in asked]
        return named or self._networks[:1]

    def _resource(self, call: Call) -> str:
        if self._public_url is not None:
            return self._public_url.rstrip("/") + call.path
        host = call.header(b"host") or "localhost"
        return f"{call.scope.get('scheme', 'http')}://{host}{call.path}"


def payment_headers(payment: wire.Payment, response: dict[str, Any]) -> dict[str, str]:
    """The header that tells an x402 client how its payment went."""
    name = "X-PAYMENT-RESPONSE" if payment.version == 1 else "PAYMENT-RESPONSE"
    return {name: wire.payment_response(**response, v1=payment.version == 1)}


def as_api_error(error: PaymentError) -> ApiError:
    """A payment's problem in the one form that errors have."""
    return ApiError(error.status, error.code, error.message)
