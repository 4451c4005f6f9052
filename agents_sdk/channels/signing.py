"""What a wallet signs for its payment channels: vouchers, deposits by EIP-3009 or Permit2, and the wish for a refund.

The bytes are the official package's; what is signed was decided by `agents_sdk.channels.book`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agents_sdk.channels.book import Reserved
from agents_sdk.channels.terms import Status, Terms
from agents_sdk.quotes import Demand, Offer
from agents_sdk.wallet import Wallet, encoded_payment

if TYPE_CHECKING:
    from x402.schemas import PaymentRequired, PaymentRequirements


@dataclass(frozen=True, slots=True)
class SignedVoucher:
    """A payment ready to be sent."""

    header: str
    authorization: dict[str, Any] | None
    """Of the deposit, if that was signed now: to be kept, since it is sent again rather than made again."""
    expires_at: int
    """Until when the authorization can be used, in Unix seconds; 0 if there is none."""


def sign_payment(
    wallet: Wallet, demand: Demand, offer: Offer, terms: Terms, reserved: Reserved, identifier: str | None
) -> SignedVoucher:
    """Sign a voucher, and its deposit if it has one that is not signed yet.

    Args:
        wallet: The payer.
        demand: The 402; its extensions (the sealed quote) are echoed.
        offer: The way to pay that was chosen.
        terms: The channel.
        reserved: The amount, and the deposit.
        identifier: Our own name for what is paid for.
    """
    payload: dict[str, Any]
    authorization, expires_at = None, 0
    if reserved.deposit is None:
        payload = {
            "type": "voucher",
            "channelConfig": terms.config,
            "voucher": _voucher(wallet, terms, reserved.amount),
        }
    elif reserved.deposit.authorization is not None:
        payload = {
            "type": "deposit",
            "channelConfig": terms.config,
            "voucher": _voucher(wallet, terms, reserved.amount),
            "deposit": {"amount": str(reserved.deposit.amount), "authorization": reserved.deposit.authorization},
        }
    else:
        payload = _deposit(wallet, offer, terms, reserved.deposit.amount, reserved.amount)
        authorization = payload["deposit"]["authorization"]
        expires_at = _expiry(authorization)
    header = encoded_payment(demand.required, offer.requirement, payload, identifier)
    return SignedVoucher(header, authorization, expires_at)


def sign_refund(
    wallet: Wallet,
    required: PaymentRequired,
    requirement: PaymentRequirements,
    terms: Terms,
    charged: int,
    amount: int | None,
) -> str:
    """The header that asks for a channel's refund.

    Args:
        wallet: The payer.
        required: The 402 that offers the channel.
        requirement: Its offer.
        terms: The channel.
        charged: What was charged, in atomic units: the voucher is over this.
        amount: How much is wanted back, in atomic units; None for all that is left.
    """
    payload = {"type": "refund", "channelConfig": terms.config, "voucher": _voucher(wallet, terms, charged)}
    if amount is not None:
        payload["amount"] = str(amount)
    return encoded_payment(required, requirement, payload, None)


def is_ours(wallet: Wallet, terms: Terms, status: Status) -> bool:
    """Whether the voucher that a gateway shows carries this wallet's signature, for this channel and amount."""
    from eth_account import Account
    from eth_account.messages import encode_typed_data
    from x402.mechanisms.evm.batch_settlement.constants import VOUCHER_TYPES
    from x402.mechanisms.evm.batch_settlement.utils import get_batch_settlement_eip712_domain

    if status.signature is None:
        return False
    chain_id = int(terms.network.removeprefix("eip155:"))
    message = {"channelId": bytes.fromhex(terms.channel_id[2:]), "maxClaimableAmount": status.voucher}
    signable = encode_typed_data(get_batch_settlement_eip712_domain(chain_id), VOUCHER_TYPES, message)
    try:
        signer = str(Account.recover_message(signable, signature=status.signature))
    except Exception:  # noqa: BLE001 - whatever the libraries raise, it is no signature of ours
        return False
    return signer == wallet.address


def _voucher(wallet: Wallet, terms: Terms, amount: int) -> dict[str, Any]:
    from x402.mechanisms.evm.batch_settlement.client.voucher import sign_voucher

    return sign_voucher(wallet.signer, terms.channel_id, amount, terms.network).to_dict()


def _deposit(wallet: Wallet, offer: Offer, terms: Terms, deposit: int, amount: int) -> dict[str, Any]:
    from x402.mechanisms.evm.batch_settlement.client.eip3009 import create_batch_settlement_eip3009_deposit_payload
    from x402.mechanisms.evm.batch_settlement.client.permit2 import create_batch_settlement_permit2_deposit_payload
    from x402.mechanisms.evm.batch_settlement.types import ChannelConfig

    make = (
        create_batch_settlement_permit2_deposit_payload
        if offer.through_permit2
        else create_batch_settlement_eip3009_deposit_payload
    )
    made = make(wallet.signer, offer.requirement, ChannelConfig.from_dict(terms.config), deposit, amount)
    payload: dict[str, Any] = made.to_dict()
    return payload


def _expiry(authorization: dict[str, Any]) -> int:
    if "permit2Authorization" in authorization:
        return int(authorization["permit2Authorization"]["deadline"])
    return int(authorization["erc3009Authorization"]["validBefore"])
