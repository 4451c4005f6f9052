"""What a gateway's 402 says of payment channels, read with suspicion: the terms of a channel, and where one stands.

Nothing is taken on trust. A channel's id is computed here from its terms, and of what the gateway says was charged only as much
can ever be believed as this wallet has signed, see `agents_sdk.channels.book`.

Source: the x402 scheme `batch-settlement` on EVM, as the official package `x402` speaks it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from agents_sdk.errors import QuoteRejected
from agents_sdk.tokens import Token

if TYPE_CHECKING:
    from x402.schemas import PaymentRequirements

SCHEME = "batch-settlement"
WITHDRAW_DELAY_S_MIN, WITHDRAW_DELAY_S_MAX = 900, 604_800
"""The contract's least, and the longest that a wallet should have to wait for its own money if the gateway does not answer."""

CUMULATIVE_MISMATCH = "invalid_batch_settlement_evm_cumulative_amount_mismatch"
EXCEEDS_BALANCE = "invalid_batch_settlement_evm_cumulative_exceeds_balance"
CHANNEL_BUSY = "invalid_batch_settlement_evm_channel_busy"
DEPOSIT_EXPIRED = "invalid_batch_settlement_evm_payload_authorization_valid_before"
REFUND_NO_BALANCE = "invalid_batch_settlement_evm_refund_no_balance"
DEPOSIT_REFUSED = frozenset({
    "insufficient_funds",
    "invalid_batch_settlement_evm_deposit_simulation_failed",
    "invalid_batch_settlement_evm_deposit_transaction_failed",
})  # fmt: skip

_CODES = "invalid_batch_settlement_"
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}", re.ASCII)
_DIGITS = re.compile(r"[0-9]{1,39}", re.ASCII)
_SIGNATURE = re.compile(r"0x[0-9a-fA-F]{130}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Terms:
    """A channel: its id is the hash of the rest."""

    channel_id: str
    network: str
    asset: str
    decimals: int
    config: dict[str, Any]
    """The member `channelConfig` of payloads."""

    @property
    def receiver(self) -> str:
        """Who is paid through it."""
        return str(self.config["receiver"])

    def are_served_by(self, requirement: PaymentRequirements) -> bool:
        """Whether whoever makes an offer is the channel's receiver, and can sign for it: with any URL, name or delay."""
        asked = (
            requirement.network,
            requirement.asset,
            requirement.pay_to,
            requirement.extra.get("receiverAuthorizer"),
        )
        own = (self.network, self.config["token"], self.receiver, self.config["receiverAuthorizer"])
        return requirement.scheme == SCHEME and [str(each).lower() for each in asked] == [each.lower() for each in own]

    def to_json(self) -> str:
        """For the journal."""
        return json.dumps([self.channel_id, self.network, self.asset, self.decimals, self.config])

    @classmethod
    def from_json(cls, text: str) -> Terms:
        """From the journal."""
        return cls(*json.loads(text))


@dataclass(frozen=True, slots=True)
class Status:
    """Where the gateway says that a channel stands. Amounts are atomic units."""

    balance: int
    charged: int
    voucher: int
    """The highest voucher that it has, 0 if it shows none."""
    signature: str | None


def read_terms(requirement: PaymentRequirements, token: Token, payer: str, name: str) -> Terms:
    """The channel through which an offer wants to be paid.

    Args:
        requirement: The offer.
        token: What it is in.
        payer: The wallet.
        name: What the agent calls its channels.

    Raises:
        QuoteRejected: If it is none that this wallet should put money into.
    """
    authorizer, delay = requirement.extra.get("receiverAuthorizer"), requirement.extra.get("withdrawDelay")
    if not isinstance(authorizer, str) or not _ADDRESS.fullmatch(authorizer) or int(authorizer, 16) == 0:
        raise QuoteRejected("the 402 offers a channel without a receiverAuthorizer: what is left could not be refunded")
    if type(delay) is not int or not WITHDRAW_DELAY_S_MIN <= delay <= WITHDRAW_DELAY_S_MAX:
        raise QuoteRejected(
            f"the 402 offers a channel whose payer waits {delay!r} seconds for its own money; "
            f"{WITHDRAW_DELAY_S_MIN} to {WITHDRAW_DELAY_S_MAX} are taken"
        )
    return _terms(requirement.network, token, payer, requirement.pay_to, authorizer, delay, name)


@lru_cache(maxsize=1024)
def _terms(network: str, token: Token, payer: str, receiver: str, authorizer: str, delay: int, name: str) -> Terms:
    from eth_utils.address import to_checksum_address
    from x402.mechanisms.evm.batch_settlement.types import ChannelConfig
    from x402.mechanisms.evm.batch_settlement.utils import compute_channel_id

    config = ChannelConfig(
        payer=to_checksum_address(payer),
        payer_authorizer=to_checksum_address(payer),
        receiver=to_checksum_address(receiver),
        receiver_authorizer=to_checksum_address(authorizer),
        token=to_checksum_address(token.address),
        withdraw_delay=delay,
        # By name and not by chance: an agent that lost its log finds its channel, and what is left in it, again.
        salt="0x" + hashlib.sha256(b"farebox agent channel 1\n" + name.encode()).hexdigest(),
    )
    channel_id = compute_channel_id(config, network).lower()
    return Terms(channel_id, network, token.asset, token.decimals, config.to_dict())


def read_status(extra: dict[str, Any], channel_id: str) -> Status:
    """What a corrective 402 says of a channel.

    Raises:
        QuoteRejected: If it says nothing of this channel that can be read.
    """
    state, voucher = extra.get("channelState"), extra.get("voucherState")
    if not isinstance(state, dict) or str(state.get("channelId")).lower() != channel_id:
        raise QuoteRejected("the 402 says that the voucher is out of step, but not where this wallet's channel stands")
    balance, charged = _number(state.get("balance")), _number(state.get("chargedCumulativeAmount"))
    if not isinstance(voucher, dict):
        return Status(balance, charged, 0, None)
    signature = voucher.get("signature")
    if not isinstance(signature, str) or not _SIGNATURE.fullmatch(signature):
        raise QuoteRejected("the voucher that the 402 shows has no signature")
    return Status(balance, charged, _number(voucher.get("signedMaxClaimable")), signature)


def is_about_the_channel(code: str) -> bool:
    """Whether a 402 refused a payment for what its channel or its deposit is, and not for the quote."""
    return code.startswith(_CODES) or code in DEPOSIT_REFUSED


def _number(value: object) -> int:
    if not isinstance(value, str) or not _DIGITS.fullmatch(value):
        raise QuoteRejected(f"the 402's channel state has {value!r} for an amount")
    return int(value)
