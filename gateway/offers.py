"""The x402 side of a request: what a 402 offers, and what a payment header turns into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gateway.api.errors import ApiError
from gateway.api.http import Call
from gateway.extensions import Extensions
from gateway.planning import Plan, Planner
from payments.chain.networks import Network, Token
from payments.channels.requests import OutOfStep
from payments.errors import PaymentError, PaymentMalformed, PaymentRefused, SchemeRefused
from payments.money import atomic_to_nano_down, nano_to_usd
from payments.quotes import Quote, QuoteClaim, QuoteInvalid, QuoteItem, QuoteSealer
from payments.tenders.base import Tender
from payments.tenders.schemes import Scheme
from payments.x402 import wire
from payments.x402.answers import HEADER_BYTES_ASKED_MAX, HEADER_BYTES_MAX
from payments.x402.channels import SCHEME
from payments.x402.v1 import RESOURCE_DESCRIPTION

PAYMENT_HEADERS: dict[bytes, wire.HeaderName] = {b"payment-signature": "payment-signature", b"x-payment": "x-payment"}


@dataclass(frozen=True, slots=True)
class NetworkPayments:
    """A network and the schemes by which payments are taken on it, the operator's first choice first."""

    network: Network
    schemes: tuple[Scheme, ...]

    def scheme(self, name: str) -> Scheme | None:
        """The scheme of this name, if it is taken here."""
        return next((scheme for scheme in self.schemes if scheme.name == name), None)


@dataclass(frozen=True, slots=True)
class SentPayment:
    """A payment as it came with a request, nothing of it checked but its form."""

    payment: wire.PaymentHeader
    header: bytes
    scheme: Scheme
    token: Token


@dataclass(frozen=True, slots=True)
class PaidRequest:
    """A request that carries a payment which pays for it, as far as can be known without the chain."""

    plan: Plan
    tender: Tender
    sent: SentPayment


class PaymentNeeded(Exception):
    """The answer is a 402 with a quote. `code` and `message` say why, if a payment was there and did not do."""

    def __init__(
        self,
        plan: Plan,
        code: str = "payment_required",
        message: str = "this request has to be paid",
        refused: PaymentRefused | None = None,
    ) -> None:
        super().__init__(message)
        self.plan = plan
        self.code = code
        self.message = message
        self.refused = refused

    @property
    def error(self) -> str:
        """What the 402 says is wrong."""
        return f"{self.code}: {self.message}" if self.refused is None else error_text(self.code, self.message)


def error_text(code: str, message: str) -> str:
    """What a 402 says is wrong: a code of the standard's own stands alone, for clients compare it."""
    return code if code.startswith("invalid_") else f"{code}: {message}"


class Offers:
    """Makes 402 answers and reads payments.

    Args:
        networks: What payments are taken on, the operator's first choice first.
        sealer: Signs quotes.
        planner: Prices requests.
        public_url: How clients reach this gateway, or None to take it from each request.
        timeout_s: How long a payment must be good for, in seconds.
        default_schemes: Offered to whoever asks for none.
        extensions: What the answers are extended with, if anything.
    """

    def __init__(
        self,
        networks: list[NetworkPayments],
        sealer: QuoteSealer,
        planner: Planner,
        public_url: str | None,
        timeout_s: int,
        default_schemes: tuple[str, ...] = ("exact",),
        extensions: Extensions | None = None,
    ) -> None:
        self._extensions = extensions
        self._networks = networks
        self._sealer = sealer
        self._planner = planner
        self._public_url = public_url
        self._timeout_s = timeout_s
        self._default_schemes = default_schemes

    def required(self, call: Call, needed: PaymentNeeded) -> wire.PaymentRequiredAnswer:
        """The 402 for a request."""
        answer = self.required_for(call, needed.plan.quote, needed.error, needed.refused)
        answer.body["quote"] = needed.plan.quote_json()
        return answer

    def required_for(
        self,
        call: Call,
        quote: Quote,
        error: str,
        refused: PaymentRefused | None = None,
        only: Sequence[str] = (),
        description: str = RESOURCE_DESCRIPTION,
    ) -> wire.PaymentRequiredAnswer:
        """The 402 for anything that has a quote.

        Args:
            call: The request.
            quote: What it costs.
            error: Why it is not served.
            refused: What its payment was refused with; a payer that is out of step is told where it stands.
            only: The schemes that can be offered; the first of them is, if none was asked for or configured.
            description: What is paid for, in words.
        """
        accept_payment = call.header(b"accept-payment")
        networks, schemes = self._offered(accept_payment)
        if only:
            schemes = [name for name in schemes if name in only] or list(only[:1])
        if isinstance(refused, OutOfStep):
            networks = list(dict.fromkeys([*networks, *self._networks]))
            schemes = list(dict.fromkeys([SCHEME, *schemes]))
        if isinstance(refused, SchemeRefused):
            schemes = [name for name in schemes if name != refused.scheme] or ["exact"]
        requirements = [
            scheme.requirement(token, quote.maximum_nano_usd, self._timeout_s)
            for entry in networks
            for name in schemes
            if (scheme := entry.scheme(name)) is not None
            for token in scheme.tokens
        ]
        if isinstance(refused, OutOfStep):
            corrected = [offer for offer in map(refused.correct, requirements) if offer is not None]
            requirements = corrected + [offer for offer in requirements if offer.scheme != SCHEME]
        resource_url = self._resource(call)
        asked = [] if self._extensions is None else self._extensions.asked(accept_payment)
        return wire.payment_required(
            requirements,
            quote,
            self._sealer.seal(quote),
            resource_url,
            error,
            [entry.network for entry in networks],
            None if self._extensions is None else self._extensions.declared(call, asked, requirements, resource_url),
            HEADER_BYTES_ASKED_MAX if asked else HEADER_BYTES_MAX,
            description,
        )

    def payment_headers(self, call: Call, sent: SentPayment, response: dict[str, Any]) -> dict[str, str]:
        """The header that tells an x402 client how its payment went, with a signed receipt for those who asked for offers."""
        payment = sent.payment
        if self._extensions is not None and payment.wants_receipt and response["success"]:
            receipt = self._extensions.receipt(
                sent.scheme.network.caip2, self._resource(call), response["payer"], response["tx_hash"]
            )
            response = response | {"extensions": receipt}
        name = "X-PAYMENT-RESPONSE" if payment.version == 1 else "PAYMENT-RESPONSE"
        return {name: wire.payment_response(**response, v1=payment.version == 1)}

    def sent(self, call: Call) -> SentPayment | None:
        """The payment that a request carries; None if it carries none.

        Raises:
            PaymentMalformed: The header is no payment.
            PaymentRefused: It is on a network, by a scheme or in a token that is not taken here.
        """
        present = [name for name in PAYMENT_HEADERS if name in call.headers]
        if not present:
            return None
        if len(present) > 1:
            raise PaymentMalformed("two_payments", "send either PAYMENT-SIGNATURE or X-PAYMENT, not both")
        header = call.headers[present[0]]
        payment = wire.decode_payment(header.decode("latin-1"), PAYMENT_HEADERS[present[0]])
        scheme, token = self._paid_in(payment)
        return SentPayment(payment, header, scheme, token)

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
            raise PaymentNeeded(fresh, error.code, error.message, error) from None

    def tender(
        self,
        sent: SentPayment,
        quote: Quote,
        now: int,
        refusal: PaymentRefused | None = None,
        *,
        tops_up: bool = False,
    ) -> Tender:
        """What a payment is worth for what `quote` is of; errors, `refusal` and `tops_up` as for `Scheme.tender`."""
        requirement = sent.scheme.requirement(sent.token, quote.maximum_nano_usd, self._timeout_s)
        return sent.scheme.tender(
            sent.payment, sent.token, requirement, quote.request_digest, now, refusal, tops_up=tops_up
        )

    def claim(self, sent: SentPayment, digest: bytes, now: int) -> tuple[QuoteClaim | None, int, PaymentRefused | None]:
        """The quote that came back with a payment, what it was for in nano-USD, and the refusal that its age deserves if nobody
        used it in time. No claim for v1, which carries none, and for whoever left it out.

        Raises:
            QuoteInvalid: It is not ours, or was made for another request (`digest`) or amount.
        """
        payment = sent.payment
        if payment.quote_token is None or payment.accepted is None:
            return None, 0, None
        amount_nano_usd = atomic_to_nano_down(payment.accepted.amount, sent.token.decimals)
        try:
            claim = self._sealer.open(
                payment.quote_token, amount_nano_usd=amount_nano_usd, request_digest=digest, now=now
            )
        except QuoteInvalid as error:
            if error.code != "quote_expired":
                raise
            # Its age is all that is wrong with it: read it as of when it was good.
            claim = self._sealer.open(
                payment.quote_token, amount_nano_usd=amount_nano_usd, request_digest=digest, now=0
            )
            return claim, amount_nano_usd, error
        return claim, amount_nano_usd, None

    def _check(self, sent: SentPayment, fresh: Plan, now: int) -> PaidRequest:
        claim, amount_nano_usd, refusal = self.claim(sent, fresh.quote.request_digest, now)
        plan = fresh
        if claim is not None:
            plan, refusal = self._honoured(claim, amount_nano_usd, refusal, fresh)
        return PaidRequest(plan, self.tender(sent, plan.quote, now, refusal), sent)

    def _paid_in(self, payment: wire.PaymentHeader) -> tuple[Scheme, Token]:
        for entry in self._networks:
            if payment.network in (entry.network.caip2, entry.network.v1_name):
                break
        else:
            known = ", ".join(entry.network.caip2 for entry in self._networks)
            raise PaymentRefused(
                "wrong_network", f"payments on {payment.network!r} are not taken here, only on {known}"
            )
        scheme = entry.scheme(payment.scheme)
        if scheme is None:
            taken = ", ".join(scheme.name for scheme in entry.schemes)
            raise PaymentRefused("wrong_scheme", f"on {entry.network.caip2} these schemes are taken: {taken}")
        address = payment.token_address or entry.network.tokens[0].address
        token = next((token for token in scheme.tokens if token.address == address), None)
        if token is None:
            raise PaymentRefused("wrong_token", f"the token {address} is not taken on {entry.network.caip2}")
        return scheme, token

    def _honoured(
        self, claim: QuoteClaim, amount_nano_usd: int, refusal: PaymentRefused | None, fresh: Plan
    ) -> tuple[Plan, PaymentRefused | None]:
        """The plan that was quoted, and why it cannot be begun any more, if so."""
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

    def _offered(self, accept_payment: str | None) -> tuple[list[NetworkPayments], list[str]]:
        """The networks and the schemes to offer: those that the caller names, by CAIP-2 and by scheme; by default the first
        network, which works without any set-up. The default schemes follow those asked for: they work where those do not."""
        if not self._networks:
            raise ApiError(
                503,
                "payments_not_configured",
                "this gateway takes no payments on a chain; use an API key, or ask its operator",
            )
        asked = list(dict.fromkeys(item.strip() for item in (accept_payment or "").split(",")))
        networks = [entry for entry in self._networks if entry.network.caip2 in asked] or self._networks[:1]
        known = [name for name in asked if any(entry.scheme(name) is not None for entry in networks)]
        return networks, list(dict.fromkeys([*known, *self._default_schemes]))

    def _resource(self, call: Call) -> str:
        if self._public_url is not None:
            return self._public_url.rstrip("/") + call.path
        host = call.header(b"host") or "localhost"
        return f"{call.scope.get('scheme', 'http')}://{host}{call.path}"


def as_api_error(error: PaymentError) -> ApiError:
    """A payment's problem in the one form that errors have."""
    return ApiError(error.status, error.code, error.message)
