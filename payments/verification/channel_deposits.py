"""Whether a deposit into a payment channel is the payer's own, as far as that can be told without the chain."""

from __future__ import annotations

from payments.chain.networks import PERMIT2_DEPOSIT_COLLECTOR_ADDRESS, Network, Token
from payments.errors import PaymentError, PaymentRefused
from payments.verification.approvals import check_approval
from payments.verification.checks import SETTLEMENT_MARGIN_S
from payments.verification.permits import check_permit
from payments.verification.signatures import recover
from payments.verification.vouchers import erc3009_deposit_digest, permit2_deposit_digest
from payments.x402 import channels as wire
from payments.x402.channels import ChannelPayment, Deposit, Permit2Deposit


def check_deposit(payment: ChannelPayment, deposit: Deposit, token: Token, network: Network, now: int) -> None:
    """Return if the payer's key signed a deposit for the payment's channel, and it holds now.

    Args:
        payment: Its voucher's channel is that of its config.
        deposit: Its own.
        token: What the channel is in, and how it is moved.
        network: Where.
        now: Unix seconds.

    Raises:
        PaymentRefused: With the official code; `DEPOSIT_EXPIRED` only if all the rest is right. Or what `check_permit` and
            `check_approval` raise.
    """
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
