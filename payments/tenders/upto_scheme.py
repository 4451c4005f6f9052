"""The scheme `upto` on one network: the payer authorises the quoted maximum, and pays what the answer cost once it is there."""

from __future__ import annotations

from dataclasses import replace

from payments.chain.networks import Network, Token
from payments.errors import PaymentRefused
from payments.tenders import pledges
from payments.tenders.authorizations import AlreadyUsed
from payments.tenders.exact import use_digest
from payments.tenders.exact_services import ExactServices
from payments.tenders.upto import UptoTender
from payments.tenders.upto_topup import UptoTopUp
from payments.verification import checks
from payments.x402.requirements import Requirement, requirement_for, signing_domain
from payments.x402.wire import Payment, PaymentHeader


class UptoScheme:
    """`upto` over Permit2, in every token of a network.

    Args:
        network: Where it is.
        pay_to: The treasury, in any letter case.
        facilitator: The operator's batch contract, in any letter case: only it can settle, for our signers only.
        services: What the payments share.
        answer_s: How long an answer and its settlement may take; an authorization must hold that much longer.
        exposure_max_nano_usd: What one payer may owe for answers that are not settled.
    """

    name = "upto"

    def __init__(
        self,
        network: Network,
        pay_to: str,
        facilitator: str,
        services: ExactServices,
        *,
        answer_s: int,
        exposure_max_nano_usd: int,
    ) -> None:
        self.network = network
        self.tokens = network.tokens
        self._pay_to, self._facilitator = pay_to, facilitator.lower()
        self._services = services
        self._answer_s = answer_s
        self._exposure_max_nano_usd = exposure_max_nano_usd

    def requirement(self, token: Token, amount_nano_usd: int, max_timeout_s: int) -> Requirement:
        """See `payments.tenders.schemes.Scheme`."""
        exact = requirement_for(token, self.network, amount_nano_usd, self._pay_to, max_timeout_s)
        extra = {
            **signing_domain(token, "permit2"),
            "assetTransferMethod": "permit2",
            "facilitatorAddress": self._facilitator,
        }
        return replace(exact, scheme=self.name, max_timeout_s=max_timeout_s + self._answer_s, extra=extra)

    def tender(
        self,
        payment: PaymentHeader,
        token: Token,
        requirement: Requirement,
        request_digest: bytes,
        now: int,
        refusal: PaymentRefused | None = None,
        *,
        tops_up: bool = False,
    ) -> UptoTender | UptoTopUp:
        """See `payments.tenders.schemes.Scheme`."""
        assert isinstance(payment, Payment)
        refusal = self._check(payment, token, requirement, now) or refusal
        if tops_up:
            return UptoTopUp(
                self._services, payment, token, self.network, requirement, request_digest, refusal, tops_up=True
            )
        return UptoTender(self._services, payment, token, request_digest, self._exposure_max_nano_usd, refusal)

    async def first_outcome(self, payment: PaymentHeader, token: Token, request_digest: bytes) -> AlreadyUsed | None:
        """See `payments.tenders.schemes.Scheme`."""
        assert isinstance(payment, Payment)
        identity, digest = payment.identity(token.chain_id, token), use_digest(payment, request_digest)
        return await self._services.store.read(lambda tx: pledges.outcome_of(tx, identity, digest))

    async def use_ended(self, receipt_id: str, timeout_s: float) -> bool:
        """See `payments.tenders.schemes.Scheme`."""
        return await self._services.use_ended(receipt_id, timeout_s)

    def _check(self, payment: Payment, token: Token, requirement: Requirement, now: int) -> PaymentRefused | None:
        try:
            checks.check_offline(payment, requirement, self.network, token, now=now, valid_s=self._answer_s)
        except PaymentRefused as error:
            # Times pass. Whoever used it in time is told what it came to.
            if error.code not in checks.TOO_LATE:
                raise
            return error
        return None
