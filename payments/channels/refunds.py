"""Giving a payer back what its channel holds beyond what was charged, at the payer's own request and our gas.

The payer proves itself by a voucher over what was charged. The refund is signed by the receiver's authorizer for this channel's
refund nonce, so it can happen once, whoever submits it; until the chain was asked what is left, nothing else can spend it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from payments.chain.channel_contract import encode_refund
from payments.chain.networks import BATCH_SETTLEMENT_ADDRESS, Token
from payments.channels import book
from payments.channels.requests import OutOfStep
from payments.channels.services import ChannelServices
from payments.errors import PaymentRefused, SettlementPending, SettlementUnavailable
from payments.money import nano_to_atomic_up
from payments.settlement import outbox
from payments.settlement.engine import Settlements
from payments.settlement.orders import SettlementOrder
from payments.store import Transaction
from payments.verification.vouchers import refund_digest, sign_digest
from payments.x402.channels import (
    CHANNEL_NOT_FOUND,
    REFUND_AMOUNT,
    REFUND_FAILED,
    REFUND_NO_BALANCE,
    ChannelPayment,
    hex32,
)

LOOKS_MAX = 10
"""Looks at the chain before one refund; more only while the channel goes on changing."""


@dataclass(frozen=True, slots=True)
class Refunded:
    """A refund that is on chain. `amount` is in atomic units."""

    channel: book.Channel
    amount: int
    transaction_hash: str | None

    def payment_response(self, network: str) -> dict[str, Any]:
        """What `payments.x402.wire.payment_response` takes."""
        return {
            "success": True,
            "tx_hash": self.transaction_hash,
            "network": network,
            "payer": self.channel.config.payer,
            "amount": self.amount,
            "channelState": self.channel.status().as_json(),
        }


class Refunder:
    """Refunds the channels of one network.

    Args:
        services: Of the network.
        settlements: The engine, which knows the kind ``channel_refund``.
        check: Says whether a payment's channel is one of ours and its voucher signed.
    """

    def __init__(
        self, services: ChannelServices, settlements: Settlements, check: Callable[[ChannelPayment, Token], None]
    ) -> None:
        self._services = services
        self._settlements = settlements
        self._check = check

    async def refund(self, payment: ChannelPayment, token: Token) -> Refunded:
        """Refund a channel as its payer asks; errors as for `refund`."""
        self._check(payment, token)
        return await refund(self._services, self._settlements, payment, token, self._services.payers.settlement_wait_s)


async def refund(
    services: ChannelServices, settlements: Settlements, payment: ChannelPayment, token: Token, wait_s: float
) -> Refunded:
    """Refund a channel as its payer asks.

    Args:
        services: Of the channel's network.
        settlements: The engine, which knows the kind ``channel_refund``.
        payment: Of the type ``refund``; channel and signature are checked.
        token: What the channel is in.
        wait_s: How long to wait for the transaction.

    Raises:
        PaymentRefused: There is nothing to give back, or the transaction failed.
        OutOfStep: The voucher is not over what was charged.
        SettlementPending: The transaction is on its way; the same request again waits for it.
        SettlementUnavailable: The chain cannot be asked.
    """
    channel_id = hex32(payment.voucher.channel_id)
    for _ in range(LOOKS_MAX):
        if not await services.sync([channel_id]):
            raise PaymentRefused(CHANNEL_NOT_FOUND, "nothing was ever paid through this channel")
        begun = await services.store.write(lambda tx: _begin(tx, services, payment, channel_id, token))
        if begun is not None:
            break
    else:
        raise SettlementUnavailable("channel_changes", "too much happens to this channel now; ask again shortly")
    if isinstance(begun, PaymentRefused):
        raise begun
    settlement_id, amount = begun
    settlements.take_queued(settlement_id)
    outcome = await settlements.outcome(settlement_id, wait_s)
    if outcome.open:
        raise SettlementPending(
            "settlement_pending", "the refund is on its way and not mined yet; ask again later", settlement_id
        )
    if not outcome.paid:
        raise PaymentRefused(REFUND_FAILED, f"the refund failed: {outcome.reason or 'no reason is known'}")
    (channel,) = await services.sync([channel_id])
    return Refunded(channel, amount, outcome.transaction_hash)


def _begin(
    tx: Transaction, services: ChannelServices, payment: ChannelPayment, channel_id: str, token: Token
) -> tuple[str, int] | PaymentRefused | None:
    """The settlement of the refund and its amount, or why there is none; None if the chain has to be asked first."""
    channel = book.find(tx, channel_id)
    assert channel is not None
    if channel.refund_id is not None:
        under_way = outbox.find(tx, channel.refund_id)
        assert under_way is not None
        return channel.refund_id, under_way.order.value
    if channel.unsynced:
        # Something happened since it was asked, such as the refund that somebody asked for at the same time.
        return None
    held = book.held_nano_usd(tx, channel)
    owed = nano_to_atomic_up(channel.charged_nano_usd + held, token.decimals)
    if payment.voucher.amount not in (channel.announced, owed):
        told = book.announce(tx, channel, held, token.decimals)
        return OutOfStep(told, told.status(), "a refund comes with a voucher over what was charged")
    # A withdrawal that the payer announced is no reason to keep the money: a refund reduces it.
    left = channel.on_chain.balance - owed
    amount = left if payment.refund_amount is None else payment.refund_amount
    if amount == 0 and payment.refund_amount is not None:
        return PaymentRefused(REFUND_AMOUNT, "the amount of a refund must be more than 0")
    if not 0 < amount <= left:
        return PaymentRefused(REFUND_NO_BALANCE, f"the channel has {max(left, 0)} atomic units that are not charged")
    nonce = channel.on_chain.refund_nonce
    authorizer = services.authorizers[channel.config.receiver_authorizer]
    digest = refund_digest(channel.number, nonce, amount, channel.chain_id)
    settlement_id = f"refund:{channel.id}:{nonce}:{channel.marks}"
    order = SettlementOrder(
        id=settlement_id,
        kind="channel_refund",
        reference=channel.id,
        chain_id=channel.chain_id,
        token=token.address,
        payer=BATCH_SETTLEMENT_ADDRESS,
        pay_to=channel.config.payer,
        value=amount,
        authorization_nonce=nonce,
        call_to=BATCH_SETTLEMENT_ADDRESS,
        call_data=encode_refund(channel.config, amount, nonce, sign_digest(authorizer.key, digest)),
        valid_before=0,
    )
    book.count_transaction(tx, channel)
    outbox.enqueue(tx, order)
    book.put(tx, channel.id, refunding=book.signed_refunds(tx, channel.id, nonce), refund_id=settlement_id)
    return settlement_id, amount
