"""The scheme `batch-settlement` on one network: what it offers, and the checks of a payment that need neither chain nor
database."""

from __future__ import annotations

from payments.chain.networks import NOBODY, PERMIT2_DEPOSIT_COLLECTOR_ADDRESS, Network, Token
from payments.channels import requests
from payments.channels.services import ChannelServices
from payments.errors import PaymentError, PaymentRefused
from payments.tenders.authorizations import AlreadyUsed
from payments.tenders.channel import ChannelTender, use_digest
from payments.verification.approvals import check_approval
from payments.verification.checks import SETTLEMENT_MARGIN_S, TOO_LATE, check_accepted
from payments.verification.permits import check_permit
from payments.verification.signatures import recover
from payments.verification.vouchers import channel_id, erc3009_deposit_digest, permit2_deposit_digest, verify_voucher
from payments.x402 import channels as wire
from payments.x402.channels import ChannelConfig, ChannelPayment, Deposit, Permit2Deposit, channel_requirement
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
    ) -> ChannelTender:
        """See `payments.tenders.schemes.Scheme`."""
        assert isinstance(payment, ChannelPayment)
        if payment.type == "refund":
            raise PaymentRefused(wire.PAYLOAD_TYPE, "a refund pays for nothing: send it with GET to this address")
        self.check(payment, token, requirement)
        if payment.deposit is not None:
            try:
                _check_deposit(payment, payment.deposit, token, self.network, now)
            except PaymentRefused as error:
                if error.code not in (wire.DEPOSIT_EXPIRED, *TOO_LATE):
                    raise
                # Whoever sent it in time finds the first outcome.
                refusal = error
        return ChannelTender(self.services, payment, token, request_digest, refusal)

    def check(self, payment: ChannelPayment, token: Token, requirement: Requirement) -> None:
        """Check that a payment's channel is one of ours, and its voucher signed.

        Raises:
            PaymentRefused: With the official code.
        """
        assert payment.accepted is not None
        check_accepted(payment.accepted, requirement)
        self.check_channel(payment, token)

    def check_channel(self, payment: ChannelPayment, token: Token) -> None:
        """As `check`, whatever the payment is for."""
        _check_config(payment.config, token, self.services)
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


def _check_config(config: ChannelConfig, token: Token, services: ChannelServices) -> None:
    for code, field, theirs, ours in (
        (wire.RECEIVER_MISMATCH, "receiver", config.receiver, services.receiver),
        (
            wire.RECEIVER_AUTHORIZER_MISMATCH,
            "receiverAuthorizer",
            config.receiver_authorizer,
            services.authorizer.address,
        ),
        (wire.TOKEN_MISMATCH, "token", config.token, token.address),
        (wire.WITHDRAW_DELAY_MISMATCH, "withdrawDelay", config.withdraw_delay, services.withdraw_delay_s),
    ):
        if theirs != ours:
            raise PaymentRefused(code, f"channelConfig.{field} must be {ours}")
    if config.payer == NOBODY:
        raise PaymentRefused(wire.DEPOSIT_PAYLOAD, "channelConfig.payer must be an account")


def _check_deposit(payment: ChannelPayment, deposit: Deposit, token: Token, network: Network, now: int) -> None:
    config, channel = payment.config, payment.voucher.channel_id
    if isinstance(deposit, Permit2Deposit) != (token.transfer_method == "permit2"):
        raise PaymentRefused(wire.DEPOSIT_PAYLOAD, f"deposits of {token.symbol} are made by {token.transfer_method}")
    if isinstance(deposit, Permit2Deposit):
        if deposit.payer != config.payer or deposit.channel_id != channel:
            raise PaymentRefused(wire.DEPOSIT_PAYLOAD, "the deposit must be the payer's, for the voucher's channel")
        if deposit.token != token.address:
            raise PaymentRefused(wire.TOKEN_MISMATCH, f"permitted.token must be {token.address}")
        if deposit.permitted != deposit.amount:
            raise PaymentRefused(wire.PERMIT2_AMOUNT, "permitted.amount must be the deposit's amount")
        if deposit.spender != PERMIT2_DEPOSIT_COLLECTOR_ADDRESS:
            raise PaymentRefused(wire.PERMIT2_SPENDER, f"spender must be {PERMIT2_DEPOSIT_COLLECTOR_ADDRESS}")
        if payment.permit is not None:
            check_permit(payment.permit, config.payer, deposit.amount, token, now=now, valid_s=SETTLEMENT_MARGIN_S)
        if payment.approval is not None:
            check_approval(payment.approval, config.payer, deposit.amount, token, network)
        code, digest = wire.PERMIT2_SIGNATURE, permit2_deposit_digest(deposit, token.chain_id)
    else:
        if deposit.valid_after > now:
            raise PaymentRefused(wire.DEPOSIT_NOT_YET_VALID, f"the deposit must be valid now ({now}) already")
        code, digest = wire.DEPOSIT_SIGNATURE, erc3009_deposit_digest(deposit, config, channel, token)
    try:
        signer = recover(digest, deposit.signature)
    except PaymentError as error:
        raise PaymentRefused(code, error.message) from None
    if signer != config.payer:
        raise PaymentRefused(code, "the deposit is not signed by the channel's payer")
    if deposit.expires_at < now + SETTLEMENT_MARGIN_S:
        raise PaymentRefused(
            wire.DEPOSIT_EXPIRED, f"the deposit must hold for {SETTLEMENT_MARGIN_S} s from now ({now}) on"
        )
