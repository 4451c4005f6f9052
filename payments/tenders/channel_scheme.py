"""The scheme `batch-settlement` on one network: what it offers, and the checks of a payment that need neither chain nor
database."""

from __future__ import annotations

from payments.chain.networks import NOBODY, Token
from payments.channels import requests
from payments.channels.services import ChannelServices
from payments.errors import PaymentRefused
from payments.tenders.authorizations import AlreadyUsed
from payments.tenders.channel import ChannelTender, use_digest
from payments.verification.channel_deposits import check_deposit
from payments.verification.checks import TOO_LATE, check_accepted
from payments.verification.vouchers import channel_id, verify_voucher
from payments.x402 import channels as wire
from payments.x402.channels import ChannelConfig, ChannelPayment, channel_requirement
from payments.x402.headers import PaymentHeader
from payments.x402.requirements import Requirement


class ChannelScheme:
    """`batch-settlement` in every token of a network."""

    name = wire.SCHEME

    def __init__(self, services: ChannelServices) -> None:
        self.network = services.network
        self.tokens = services.network.tokens
        self.services = services

    def requirement(self, token: Token, amount_nano_usd: int, max_timeout_s: int) -> Requirement:
        """See `payments.tenders.schemes.Scheme`."""
        services = self.services
        return channel_requirement(
            token,
            self.network,
            amount_nano_usd,
            services.receiver,
            max_timeout_s,
            services.authorizer.address,
            services.withdraw_delay_s,
        )

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
    ) -> ChannelTender:
        """See `payments.tenders.schemes.Scheme`."""
        assert isinstance(payment, ChannelPayment)
        if payment.type == "refund":
            raise PaymentRefused(wire.PAYLOAD_TYPE, "a refund pays for nothing: send it with GET to this address")
        self.check(payment, token, requirement)
        if payment.deposit is not None:
            try:
                check_deposit(payment, payment.deposit, token, self.network, now)
            except PaymentRefused as error:
                if error.code not in (wire.DEPOSIT_EXPIRED, *TOO_LATE):
                    raise
                # Whoever sent it in time finds the first outcome.
                refusal = error
        return ChannelTender(self.services, payment, token, request_digest, refusal, tops_up=tops_up)

    def check(self, payment: ChannelPayment, token: Token, requirement: Requirement) -> None:
        """Check that a payment's channel is one that we offer, and its voucher signed.

        Raises:
            PaymentRefused: With the official code.
        """
        assert payment.accepted is not None
        check_accepted(payment.accepted, requirement)
        _check_config(payment.config, self.services)
        self.check_channel(payment, token)

    def check_channel(self, payment: ChannelPayment, token: Token) -> None:
        """Check that a channel is one that we can sign for, and its voucher signed; errors as for `check`. That it was offered
        once, the book knows: to another treasury, perhaps, or with another delay."""
        authorizer = payment.config.receiver_authorizer
        if authorizer not in self.services.authorizers:
            ours = self.services.authorizer.address
            raise PaymentRefused(wire.RECEIVER_AUTHORIZER_MISMATCH, f"channelConfig.receiverAuthorizer must be {ours}")
        if payment.config.token != token.address:
            raise PaymentRefused(wire.TOKEN_MISMATCH, f"channelConfig.token must be {token.address}")
        if payment.voucher.channel_id != channel_id(payment.config, token.chain_id):
            raise PaymentRefused(wire.CHANNEL_ID_MISMATCH, "the voucher's channelId is not that of the channelConfig")
        verify_voucher(payment.voucher, payment.config.payer_authorizer, token.chain_id)

    async def first_outcome(self, payment: PaymentHeader, token: Token, request_digest: bytes) -> AlreadyUsed | None:
        """See `payments.tenders.schemes.Scheme`."""
        assert isinstance(payment, ChannelPayment)
        digest = use_digest(payment, request_digest)
        return await self.services.store.read(lambda tx: requests.outcome_of(tx, digest))

    async def use_ended(self, receipt_id: str, timeout_s: float) -> bool:
        """See `payments.tenders.schemes.Scheme`."""
        return await self.services.payers.use_ended(receipt_id, timeout_s)


def _check_config(config: ChannelConfig, services: ChannelServices) -> None:
    for code, field, theirs, ours in (
        (wire.RECEIVER_MISMATCH, "receiver", config.receiver, services.receiver),
        (wire.WITHDRAW_DELAY_MISMATCH, "withdrawDelay", config.withdraw_delay, services.withdraw_delay_s),
    ):
        if theirs != ours:
            raise PaymentRefused(code, f"channelConfig.{field} must be {ours}")
    if config.payer == NOBODY:
        raise PaymentRefused(wire.DEPOSIT_PAYLOAD, "channelConfig.payer must be an account")
