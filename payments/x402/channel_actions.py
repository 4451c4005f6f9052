"""What a resource server asks a facilitator to do with channels of the scheme `batch-settlement`: claim, settle, refund.

They travel in the place of a payment, in calls of `/settle` only; no payer sends them, and a gateway does not read them.
Payments through a channel (deposit, voucher, a payer's request for a refund) are read by `payments.x402.channels`.

Source: the scheme `batch-settlement` on EVM, as the official packages `x402` (Python 2.25) and `@x402/evm` speak it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from payments.x402.channels import (
    ChannelConfig,
    Voucher,
    decode_channel_payment,
    read_config,
    read_uint128,
    read_voucher,
)
from payments.x402.fields import malformed, read_address, read_members, read_signature, read_uint256
from payments.x402.headers import PaymentHeader

CLAIMS_MAX = 100
"""Rows in one action: about 5 million gas, and as many as official servers send at once."""

_CLAIM_MEMBERS = frozenset({"voucher", "signature", "totalClaimed"})
_CLAIM_VOUCHER_MEMBERS = frozenset({"channel", "maxClaimableAmount"})
_REFUND_MEMBERS = frozenset({"type", "channelConfig", "voucher", "amount", "refundNonce", "claims"})


@dataclass(frozen=True, slots=True)
class Claim:
    """One channel's row in a claim."""

    config: ChannelConfig
    voucher_amount: int
    signature: bytes
    total: int
    """What is claimed in all after this, at most `voucher_amount`."""


@dataclass(frozen=True, slots=True)
class ClaimAction(PaymentHeader):
    """Record what the payers of these channels have signed for."""

    claims: tuple[Claim, ...]
    authorization: bytes | None
    """Of the channels' receiverAuthorizer; None if the facilitator is that."""


@dataclass(frozen=True, slots=True)
class SettleAction(PaymentHeader):
    """Send a receiver what was claimed for it."""

    receiver: str
    token: str


@dataclass(frozen=True, slots=True)
class RefundAction(PaymentHeader):
    """Give a payer back what its channel holds beyond the claims."""

    config: ChannelConfig
    voucher: Voucher
    amount: int
    """Atomic units; more than there is means all that there is."""
    nonce: int
    claims: tuple[Claim, ...]
    """Made first, in the same transaction."""
    refund_authorization: bytes | None
    claim_authorization: bytes | None

    @property
    def payer(self) -> str:
        """Who gets the money, lower-case hex."""
        return self.config.payer


def decode_channel_call(header: PaymentHeader, payload: dict[str, Any]) -> PaymentHeader:
    """Read the payload of `batch-settlement` in a call of a facilitator: an action, or a payment.

    Raises:
        PaymentMalformed: Naming the field.
    """
    said = {field.name: getattr(header, field.name) for field in fields(PaymentHeader)}
    match payload.get("type"):
        case "claim":
            optional = {"claimAuthorizerSignature"} & payload.keys()
            payload = read_members(payload, "payload", frozenset({"type", "claims"} | optional))
            claims = _read_claims(payload["claims"], "payload.claims")
            if not claims:
                malformed("payload.claims", f"1 to {CLAIMS_MAX} claims")
            return ClaimAction(**said, claims=claims, authorization=_read_authorization(payload, "claim"))
        case "settle":
            payload = read_members(payload, "payload", frozenset({"type", "receiver", "token"}))
            receiver = read_address(payload["receiver"], "payload.receiver")
            return SettleAction(**said, receiver=receiver, token=read_address(payload["token"], "payload.token"))
        case "refund" if "refundNonce" in payload:
            optional = {"refundAuthorizerSignature", "claimAuthorizerSignature"} & payload.keys()
            payload = read_members(payload, "payload", frozenset(_REFUND_MEMBERS | optional))
            return RefundAction(
                **said,
                config=read_config(payload["channelConfig"], "payload.channelConfig"),
                voucher=read_voucher(payload["voucher"], "payload.voucher"),
                amount=read_uint128(payload["amount"], "payload.amount"),
                nonce=read_uint256(payload["refundNonce"], "payload.refundNonce"),
                claims=_read_claims(payload["claims"], "payload.claims"),
                refund_authorization=_read_authorization(payload, "refund"),
                claim_authorization=_read_authorization(payload, "claim"),
            )
        case _:
            return decode_channel_payment(header, payload)


def _read_claims(value: object, field: str) -> tuple[Claim, ...]:
    if not isinstance(value, list) or len(value) > CLAIMS_MAX:
        malformed(field, f"a list of at most {CLAIMS_MAX} claims")
    return tuple(_read_claim(row, f"{field}[{number}]") for number, row in enumerate(value))


def _read_claim(value: object, field: str) -> Claim:
    members = read_members(value, field, _CLAIM_MEMBERS)
    voucher = read_members(members["voucher"], f"{field}.voucher", _CLAIM_VOUCHER_MEMBERS)
    return Claim(
        config=read_config(voucher["channel"], f"{field}.voucher.channel"),
        voucher_amount=read_uint128(voucher["maxClaimableAmount"], f"{field}.voucher.maxClaimableAmount"),
        signature=read_signature(members["signature"], f"{field}.signature"),
        total=read_uint128(members["totalClaimed"], f"{field}.totalClaimed"),
    )


def _read_authorization(payload: dict[str, Any], of: str) -> bytes | None:
    name = f"{of}AuthorizerSignature"
    return None if payload.get(name) is None else read_signature(payload[name], f"payload.{name}")
