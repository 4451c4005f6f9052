"""The payloads of the x402 scheme `batch-settlement`, and what is said of a channel's state to those who pay through it.

A payer locks a deposit in a channel and pays each request with a voucher, a signature over the sum of everything so far.
Nothing here verifies: signatures are `payments.verification.vouchers`' matter, sums are `payments.channels.book`'s.

Source: the scheme `batch-settlement` on EVM, as the official packages `x402` (Python 2.25) and `@x402/evm` speak it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from payments.chain.networks import Network, Token
from payments.money import nano_to_atomic_up
from payments.verification.signatures import checksum_address
from payments.x402.fields import (
    malformed,
    read_address,
    read_bytes32,
    read_members,
    read_object,
    read_seconds,
    read_signature,
    read_uint256,
)
from payments.x402.headers import PaymentHeader
from payments.x402.requirements import Requirement, signing_domain

SCHEME = "batch-settlement"
UINT128_MAX = 2**128 - 1
WITHDRAW_DELAY_S_MIN, WITHDRAW_DELAY_S_MAX = 900, 2_592_000
"""What the contract allows."""
MIN_DEPOSIT_FACTOR = 10
"""What a first deposit should cover, in requests like this one: fewer would not be worth the transactions."""

CODE = "invalid_batch_settlement_evm_"
"""What every word of the scheme for an error begins with."""
CUMULATIVE_MISMATCH = f"{CODE}cumulative_amount_mismatch"
"""The one word for which official clients take the channel's state from a 402 and sign again."""
EXCEEDS_BALANCE = f"{CODE}cumulative_exceeds_balance"
CHANNEL_NOT_FOUND = f"{CODE}channel_not_found"
CHANNEL_ID_MISMATCH = f"{CODE}channel_id_mismatch"
RECEIVER_MISMATCH = f"{CODE}receiver_mismatch"
RECEIVER_AUTHORIZER_MISMATCH = f"{CODE}receiver_authorizer_mismatch"
TOKEN_MISMATCH = f"{CODE}token_mismatch"
WITHDRAW_DELAY_MISMATCH = f"{CODE}withdraw_delay_mismatch"
VOUCHER_SIGNATURE = f"{CODE}voucher_signature"
PAYLOAD_TYPE = f"{CODE}payload_type"
DEPOSIT_PAYLOAD = f"{CODE}deposit_payload"
DEPOSIT_SIGNATURE = f"{CODE}receive_authorization_signature"
PERMIT2_SIGNATURE = f"{CODE}permit2_invalid_signature"
PERMIT2_SPENDER = f"{CODE}permit2_invalid_spender"
PERMIT2_AMOUNT = f"{CODE}permit2_amount_mismatch"
DEPOSIT_NOT_YET_VALID = f"{CODE}payload_authorization_valid_after"
DEPOSIT_EXPIRED = f"{CODE}payload_authorization_valid_before"
DEPOSIT_SIMULATION = f"{CODE}deposit_simulation_failed"
DEPOSIT_FAILED = f"{CODE}deposit_transaction_failed"
CLAIM_PAYLOAD = f"{CODE}claim_payload"
CLAIM_SIMULATION = f"{CODE}claim_simulation_failed"
CLAIM_FAILED = f"{CODE}claim_transaction_failed"
SETTLE_PAYLOAD = f"{CODE}settle_payload"
SETTLE_SIMULATION = f"{CODE}settle_simulation_failed"
SETTLE_FAILED = f"{CODE}settle_transaction_failed"
NOTHING_TO_SETTLE = f"{CODE}nothing_to_settle"
BELOW_CLAIMED = f"{CODE}cumulative_below_claimed"
INSUFFICIENT_BALANCE = f"{CODE}insufficient_balance"
ALLOWANCE = f"{CODE}permit2_allowance_required"
WITHDRAW_DELAY_RANGE = f"{CODE}withdraw_delay_out_of_range"
AUTHORIZER_MISMATCH = f"{CODE}authorizer_address_mismatch"
AUTHORIZER_NOT_CONFIGURED = f"{CODE}authorizer_not_configured"
REFUND_PAYLOAD = f"{CODE}refund_payload"
REFUND_SIMULATION = f"{CODE}refund_simulation_failed"
REFUND_FAILED = f"{CODE}refund_transaction_failed"
REFUND_NO_BALANCE = f"{CODE}refund_no_balance"
REFUND_AMOUNT = f"{CODE}refund_amount_invalid"
CHANNEL_BUSY = f"{CODE}channel_busy"

_CONFIG_MEMBERS = frozenset(
    {"payer", "payerAuthorizer", "receiver", "receiverAuthorizer", "token", "withdrawDelay", "salt"}
)
_VOUCHER_MEMBERS = frozenset({"channelId", "maxClaimableAmount", "signature"})
_DEPOSIT_MEMBERS = frozenset({"amount", "authorization"})
_ERC3009_MEMBERS = frozenset({"validAfter", "validBefore", "salt", "signature"})
_PERMIT2_MEMBERS = frozenset({"from", "permitted", "spender", "nonce", "deadline", "witness", "signature"})
_PERMITTED_MEMBERS = frozenset({"token", "amount"})
_WITNESS_MEMBERS = frozenset({"channelId"})
_PAYLOADS = {
    "voucher": frozenset({"type", "channelConfig", "voucher"}),
    "deposit": frozenset({"type", "channelConfig", "voucher", "deposit"}),
}

PayloadType = Literal["deposit", "voucher", "refund"]


@dataclass(frozen=True, slots=True)
class ChannelConfig:
    """What a channel is: its id is the EIP-712 hash of this. Addresses are lower-case hex."""

    payer: str
    payer_authorizer: str
    """Who signs vouchers; the zero address for a contract wallet that judges them itself."""
    receiver: str
    receiver_authorizer: str
    token: str
    withdraw_delay: int
    """Seconds between the payer's announcement of a withdrawal and the withdrawal."""
    salt: int
    """The bytes32 as a big-endian integer."""


@dataclass(frozen=True, slots=True)
class Voucher:
    """The payer's word that up to `amount` atomic units in all may be claimed from a channel."""

    channel_id: int
    """The bytes32 as a big-endian integer."""
    amount: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class Erc3009Deposit:
    """A `ReceiveWithAuthorization` to the deposit collector, whose nonce is the hash of the channel's id and `salt`."""

    amount: int
    valid_after: int
    valid_before: int
    salt: int
    signature: bytes

    @property
    def expires_at(self) -> int:
        """Unix seconds, cut to what fits a database column."""
        return min(self.valid_before, 2**63 - 1)


@dataclass(frozen=True, slots=True)
class Permit2Deposit:
    """A `PermitWitnessTransferFrom` for the deposit collector, with the channel's id as its witness."""

    amount: int
    payer: str
    token: str
    permitted: int
    spender: str
    nonce: int
    deadline: int
    channel_id: int
    signature: bytes

    @property
    def expires_at(self) -> int:
        """Unix seconds, cut to what fits a database column."""
        return min(self.deadline, 2**63 - 1)


Deposit = Erc3009Deposit | Permit2Deposit


@dataclass(frozen=True, slots=True)
class ChannelPayment(PaymentHeader):
    """A payment through a channel: a voucher, with a deposit where the channel is opened or topped up; or a request for a
    refund."""

    type: PayloadType
    config: ChannelConfig
    voucher: Voucher
    deposit: Deposit | None
    refund_amount: int | None
    """Of a refund: atomic units, or None for everything that is left."""

    @property
    def payer(self) -> str:
        """Who claims to pay, lower-case hex."""
        return self.config.payer


def decode_channel_payment(header: PaymentHeader, payload: dict[str, Any]) -> ChannelPayment:
    """Read the payload of `batch-settlement`.

    Raises:
        PaymentMalformed: Naming the field.
    """
    kind: Any = payload.get("type")
    deposit: Deposit | None = None
    refund_amount: int | None = None
    if kind == "refund":
        members = {"type", "channelConfig", "voucher"} | ({"amount"} & payload.keys())
        payload = read_members(payload, "payload", frozenset(members))
        if "amount" in payload:
            refund_amount = read_uint128(payload["amount"], "payload.amount")
    elif kind in tuple(_PAYLOADS):  # a tuple asks for no hash: it may be anything
        payload = read_members(payload, "payload", _PAYLOADS[kind])
        if kind == "deposit":
            deposit = _read_deposit(payload["deposit"], "payload.deposit")
    else:
        malformed("payload.type", "deposit, voucher or refund")
    return ChannelPayment(
        version=header.version,
        scheme=header.scheme,
        network=header.network,
        accepted=header.accepted,
        quote_token=header.quote_token,
        digest=header.digest,
        type=kind,
        config=read_config(payload["channelConfig"], "payload.channelConfig"),
        voucher=read_voucher(payload["voucher"], "payload.voucher"),
        deposit=deposit,
        refund_amount=refund_amount,
    )


def channel_requirement(
    token: Token,
    network: Network,
    amount_nano_usd: int,
    pay_to: str,
    max_timeout_s: int,
    receiver_authorizer: str,
    withdraw_delay_s: int,
) -> Requirement:
    """The offer to pay up to `amount_nano_usd` in `token` through a channel.

    Args:
        token: One of `network`'s tokens.
        network: The chain.
        amount_nano_usd: The most that this request costs; rounds up to a whole atomic unit.
        pay_to: The treasury, in any letter case.
        max_timeout_s: How long a deposit's authorization shall be valid.
        receiver_authorizer: Who signs our claims and refunds, lower-case hex.
        withdraw_delay_s: What a channel must leave us to claim after its payer announced a withdrawal.
    """
    amount = nano_to_atomic_up(amount_nano_usd, token.decimals)
    return Requirement(
        scheme=SCHEME,
        network=network.caip2,
        asset=token.address,
        amount=amount,
        pay_to=pay_to.lower(),
        max_timeout_s=max_timeout_s,
        extra={
            **signing_domain(token, token.transfer_method),
            "assetTransferMethod": token.transfer_method,
            "receiverAuthorizer": checksum_address(receiver_authorizer),
            "withdrawDelay": withdraw_delay_s,
            "minDeposit": str(amount * MIN_DEPOSIT_FACTOR),
        },
    )


@dataclass(frozen=True, slots=True)
class ChannelStatus:
    """What a payer is told of its channel. Amounts are atomic units."""

    channel_id: str
    balance: int
    total_claimed: int
    withdraw_requested_at: int
    refund_nonce: int
    charged: int
    """What was charged in all, as the payer is to count it: its next voucher adds the next price to this."""

    def as_json(self) -> dict[str, Any]:
        """The member `channelState`."""
        return {
            "channelId": self.channel_id,
            "balance": str(self.balance),
            "totalClaimed": str(self.total_claimed),
            "withdrawRequestedAt": self.withdraw_requested_at,
            "refundNonce": str(self.refund_nonce),
            "chargedCumulativeAmount": str(self.charged),
        }


def corrected(requirement: Requirement, status: ChannelStatus, voucher: Voucher | None) -> Requirement:
    """An offer that tells the payer where its channel stands: what a corrective 402 carries.

    Args:
        requirement: The offer.
        status: The channel's state.
        voucher: The highest voucher that we have; the payer knows it by its own signature.
    """
    extra = requirement.extra | {"channelState": status.as_json()}
    if voucher is not None:
        extra["voucherState"] = {
            "signedMaxClaimable": str(voucher.amount),
            "signature": "0x" + voucher.signature.hex(),
        }
    return replace(requirement, extra=extra)


def hex32(value: int) -> str:
    """A bytes32 as 0x and 64 hex digits, lower case."""
    return f"0x{value:064x}"


def read_config(value: object, field: str) -> ChannelConfig:
    """What a channel is; errors as for `decode_channel_payment`."""
    members = read_members(value, field, _CONFIG_MEMBERS)
    return ChannelConfig(
        payer=read_address(members["payer"], f"{field}.payer"),
        payer_authorizer=read_address(members["payerAuthorizer"], f"{field}.payerAuthorizer"),
        receiver=read_address(members["receiver"], f"{field}.receiver"),
        receiver_authorizer=read_address(members["receiverAuthorizer"], f"{field}.receiverAuthorizer"),
        token=read_address(members["token"], f"{field}.token"),
        withdraw_delay=read_seconds(members["withdrawDelay"], f"{field}.withdrawDelay"),
        salt=read_bytes32(members["salt"], f"{field}.salt"),
    )


def read_voucher(value: object, field: str) -> Voucher:
    """A voucher; errors as for `decode_channel_payment`."""
    members = read_members(value, field, _VOUCHER_MEMBERS)
    return Voucher(
        channel_id=read_bytes32(members["channelId"], f"{field}.channelId"),
        amount=read_uint128(members["maxClaimableAmount"], f"{field}.maxClaimableAmount"),
        signature=read_signature(members["signature"], f"{field}.signature"),
    )


def _read_deposit(value: object, field: str) -> Deposit:
    members = read_members(value, field, _DEPOSIT_MEMBERS)
    amount = read_uint128(members["amount"], f"{field}.amount")
    if amount == 0:
        malformed(f"{field}.amount", "more than 0")
    field = f"{field}.authorization"
    authorization = read_object(members["authorization"], field)
    if authorization.keys() == {"permit2Authorization"}:
        return _read_permit2(amount, authorization["permit2Authorization"], f"{field}.permit2Authorization")
    if authorization.keys() != {"erc3009Authorization"}:
        malformed(field, "an object with either erc3009Authorization or permit2Authorization")
    return _read_erc3009(amount, authorization["erc3009Authorization"], f"{field}.erc3009Authorization")


def _read_erc3009(amount: int, value: object, field: str) -> Erc3009Deposit:
    members = read_members(value, field, _ERC3009_MEMBERS)
    return Erc3009Deposit(
        amount=amount,
        valid_after=read_uint256(members["validAfter"], f"{field}.validAfter"),
        valid_before=read_uint256(members["validBefore"], f"{field}.validBefore"),
        salt=read_bytes32(members["salt"], f"{field}.salt"),
        signature=read_signature(members["signature"], f"{field}.signature"),
    )


def _read_permit2(amount: int, value: object, field: str) -> Permit2Deposit:
    members = read_members(value, field, _PERMIT2_MEMBERS)
    permitted = read_members(members["permitted"], f"{field}.permitted", _PERMITTED_MEMBERS)
    witness = read_members(members["witness"], f"{field}.witness", _WITNESS_MEMBERS)
    return Permit2Deposit(
        amount=amount,
        payer=read_address(members["from"], f"{field}.from"),
        token=read_address(permitted["token"], f"{field}.permitted.token"),
        permitted=read_uint256(permitted["amount"], f"{field}.permitted.amount"),
        spender=read_address(members["spender"], f"{field}.spender"),
        nonce=read_uint256(members["nonce"], f"{field}.nonce"),
        deadline=read_uint256(members["deadline"], f"{field}.deadline"),
        channel_id=read_bytes32(witness["channelId"], f"{field}.witness.channelId"),
        signature=read_signature(members["signature"], f"{field}.signature"),
    )


def read_uint128(value: object, field: str) -> int:
    """A uint128 as a decimal string; errors as for `decode_channel_payment`."""
    number = read_uint256(value, field)
    if number > UINT128_MAX:
        malformed(field, "at most 2^128 - 1")
    return number
