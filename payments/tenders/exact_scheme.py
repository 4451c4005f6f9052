"""The scheme `exact` on one network: a signed transfer of the whole quoted maximum, settled before the answer is shown."""

from __future__ import annotations

from collections.abc import Sequence

from payments.chain.networks import Network, Token
from payments.errors import PaymentRefused
from payments.tenders import authorizations
from payments.tenders.authorizations import AlreadyUsed
from payments.tenders.exact import ExactTender, use_digest
from payments.tenders.exact_services import ExactServices
from payments.verification import checks
from payments.verification.wallet_signatures import check_factory
from payments.x402.requirements import Requirement, requirement_for
from payments.x402.wire import Payment, PaymentHeader


class ExactScheme:
    """`exact` over EIP-3009 and Permit2, in every token of a network.

    Args:
        network: Where it is.
        pay_to: The treasury, in any letter case.
        services: What the payments share.
        wallet_factories: Deploy contract wallets that pay before they exist (ERC-6492), in any letter case.
    """

    name = "exact"

    def __init__(
        self, network: Network, pay_to: str, services: ExactServices, wallet_factories: Sequence[str] = ()
    ) -> None:
        self.network = network
        self.tokens = network.tokens
        self._pay_to = pay_to
        self._services = services
        self._wallet_factories = frozenset(address.lower() for address in wallet_factories)

    def requirement(self, token: Token, amount_nano_usd: int, max_timeout_s: int) -> Requirement:
        """See `payments.tenders.schemes.Scheme`."""
        return requirement_for(token, self.network, amount_nano_usd, self._pay_to, max_timeout_s)

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
    ) -> ExactTender:
        """See `payments.tenders.schemes.Scheme`."""
        assert isinstance(payment, Payment)
        unproven = None
        try:
            checks.check_offline(payment, requirement, self.network, token, now=now)
        except checks.SignatureUnproven as error:
            check_factory(payment.signature, self._wallet_factories)
            unproven = error
        except PaymentRefused as error:
            # Times pass, and prices move under a v1 payment, which carries no quote. Whoever paid in time is not told so.
            if error.code not in checks.TOO_LATE and not (error.code == "wrong_amount" and payment.version == 1):
                raise
            refusal = error
        return ExactTender(
            self._services,
            payment,
            token,
            self.network,
            requirement,
            request_digest,
            refusal,
            unproven,
            tops_up=tops_up,
        )

    async def first_outcome(self, payment: PaymentHeader, token: Token, request_digest: bytes) -> AlreadyUsed | None:
        """See `payments.tenders.schemes.Scheme`."""
        assert isinstance(payment, Payment)
        identity = payment.identity(token.chain_id, token)
        digest = use_digest(payment, request_digest)
        return await self._services.store.read(lambda tx: authorizations.outcome_of(tx, identity, digest))

    async def use_ended(self, receipt_id: str, timeout_s: float) -> bool:
        """See `payments.tenders.schemes.Scheme`."""
        return await self._services.use_ended(receipt_id, timeout_s)
