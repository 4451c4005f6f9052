"""What resource servers and a facilitator say to each other: `/verify` and `/settle`, x402 v1 and v2.

Both versions are read into the v2 form. Whatever is wrong with a payment is an answer of the protocol (``isValid: false``),
not an HTTP error: official clients raise on anything but 200, and a payer's nonsense must not break somebody's server.

Source: x402 specification v2, section 7; error words of section 9 and of the official packages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from payments.chain.networks import Network
from payments.errors import PaymentMalformed
from payments.x402 import channels
from payments.x402.channel_actions import ClaimAction, RefundAction, SettleAction, decode_channel_call
from payments.x402.channels import ChannelPayment
from payments.x402.fields import (
    is_deeper_than,
    malformed,
    read_address,
    read_object,
    read_seconds,
    read_text,
    read_uint256,
)
from payments.x402.requirements import Requirement
from payments.x402.wire import JSON_DEPTH_MAX, SCHEMES, Payment, PaymentHeader, read_payment, read_requirement

PENDING = "settlement_pending"
"""Broadcast or about to be, and not known to be mined: official servers ask once more when a transaction comes with it."""
DUPLICATE = "duplicate_settlement"
"""Another settle was told of this payment's success already."""

_EIP3009 = "invalid_exact_evm_payload"
_ANY_METHOD = {
    "unsupported_version": "invalid_x402_version",
    "unsupported_scheme": "unsupported_scheme",
    "wrong_scheme": "unsupported_scheme",
    "wrong_network": "invalid_network",
    "wrong_token": "invalid_payment_requirements",
    "invalid_requirements": "invalid_payment_requirements",
    "not_accepted_here": "invalid_payment_requirements",
    "wrong_timeout": "invalid_payment_requirements",
    "wrong_extra": "invalid_payment_requirements",
    "permit2_allowance_required": "permit2_allowance_required",
    "permit_in_use": "permit2_allowance_required",
    "transfer_would_fail": "invalid_exact_evm_transaction_simulation_failed",
    "settlement_failed": "transaction_failed",
    "payments_reverted": "payer_suspended",
    "client_suspended": "client_suspended",
    PENDING: PENDING,
    DUPLICATE: DUPLICATE,
}
_BY_METHOD = {
    "eip3009": {
        "wrong_amount": f"{_EIP3009}_authorization_value_mismatch",
        "wrong_recipient": f"{_EIP3009}_recipient_mismatch",
        "not_yet_valid": f"{_EIP3009}_authorization_valid_after",
        "expired": f"{_EIP3009}_authorization_valid_before",
        "bad_signature": f"{_EIP3009}_signature",
        "unsupported_signature": f"{_EIP3009}_signature",
        "malformed_signature": f"{_EIP3009}_signature",
        "authorization_used": "invalid_exact_evm_nonce_already_used",
        "insufficient_funds": "invalid_exact_evm_insufficient_balance",
    },
    "permit2": {
        "wrong_token": "permit2_token_mismatch",
        "wrong_amount": "permit2_amount_mismatch",
        "wrong_recipient": "invalid_permit2_recipient_mismatch",
        "wrong_spender": "invalid_permit2_spender",
        "not_yet_valid": "permit2_not_yet_valid",
        "expired": "permit2_deadline_expired",
        "bad_signature": "invalid_permit2_signature",
        "unsupported_signature": "invalid_permit2_signature",
        "malformed_signature": "invalid_permit2_signature",
        "authorization_used": "permit2_invalid_nonce",
        "insufficient_funds": "permit2_insufficient_balance",
        "wrong_facilitator": "upto_facilitator_mismatch",
        "exceeds_maximum": "invalid_upto_evm_payload_settlement_exceeds_amount",
    },
}
_OF_CHANNELS = {
    "insufficient_funds": channels.INSUFFICIENT_BALANCE,
    "permit2_allowance_required": channels.ALLOWANCE,
    "authorization_used": channels.DEPOSIT_SIMULATION,
    "malformed_signature": channels.VOUCHER_SIGNATURE,
}
_FAILED: dict[type[PaymentHeader], str] = {
    ClaimAction: channels.CLAIM_FAILED,
    SettleAction: channels.SETTLE_FAILED,
    RefundAction: channels.REFUND_FAILED,
}
_DECODERS = {**SCHEMES, channels.SCHEME: decode_channel_call}


@dataclass(frozen=True, slots=True)
class FacilitatorCall:
    """A payment and what a resource server wants for it; nothing of it verified but its form."""

    payment: PaymentHeader
    requirement: Requirement
    """In the v2 form, whichever version it came in."""
    network_name: str
    """As the resource server wrote it: what answers must repeat."""
    resource: str | None
    """What is paid for, as the payer or the server says."""
    document: dict[str, Any]
    """The payment as it came, for extensions."""

    @property
    def payer(self) -> str | None:
        """Who claims to pay, lower-case hex."""
        return self.payment.payer if isinstance(self.payment, Payment | ChannelPayment | RefundAction) else None


def read_call(body: dict[str, Any], networks: Sequence[Network]) -> FacilitatorCall:
    """Read the body of `/verify` or `/settle`.

    Raises:
        PaymentMalformed: Naming the field; the code is ``invalid_requirements`` where the resource server is at fault.
    """
    document = read_object(body.get("paymentPayload"), "paymentPayload")
    requirements = read_object(body.get("paymentRequirements"), "paymentRequirements")
    if is_deeper_than(document, JSON_DEPTH_MAX) or is_deeper_than(requirements, JSON_DEPTH_MAX):
        malformed("paymentPayload", f"nested at most {JSON_DEPTH_MAX} levels deep")
    version = document.get("x402Version", body.get("x402Version"))
    if type(version) is not int or version not in (1, 2) or body.get("x402Version", version) != version:
        raise PaymentMalformed("unsupported_version", "x402Version must be 1 or 2, and the same everywhere")
    try:
        requirement = _read_v1(requirements, networks) if version == 1 else read_requirement(requirements, "")
    except PaymentMalformed as error:
        field = error.message.removeprefix(".")
        raise PaymentMalformed("invalid_requirements", f"paymentRequirements.{field}") from error
    described = document.get("resource") if version == 2 else {"url": requirements.get("resource")}
    url = described.get("url") if isinstance(described, dict) else None
    return FacilitatorCall(
        payment=read_payment(document, version, _DECODERS),
        requirement=requirement,
        network_name=str(requirements["network"]),
        resource=url if isinstance(url, str) else None,
        document=document,
    )


def reason_for(code: str, payment: PaymentHeader | None) -> str:
    """The protocol's word for an error of ours; ``invalid_payload`` where it has none."""
    if code.startswith(("eip2612_", "erc20_approval_", channels.CODE)):
        return code
    own: dict[str, str] = {}
    if isinstance(payment, Payment):
        own = _BY_METHOD[payment.transfer_method]
    elif payment is not None and payment.scheme == channels.SCHEME:
        own = _OF_CHANNELS | {"settlement_failed": _FAILED.get(type(payment), channels.DEPOSIT_FAILED)}
    return own.get(code) or _ANY_METHOD.get(code, "invalid_payload")


def verified(payer: str | None, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """The answer of `/verify` for a payment that is good now."""
    return {"isValid": True} | _payer(payer) | ({} if extra is None else {"extra": extra})


def not_verified(reason: str, message: str, payer: str | None) -> dict[str, Any]:
    """The answer of `/verify` for one that is not."""
    return {"isValid": False, "invalidReason": reason, "invalidMessage": message} | _payer(payer)


def settled(
    transaction: str | None, network: str, payer: str | None, amount: int, extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The answer of `/settle` for what is done; `amount` in atomic units, `transaction` None where none was needed."""
    done = {"success": True, "transaction": transaction or "", "network": network, "amount": str(amount)}
    return done | _payer(payer) | ({} if extra is None else {"extra": extra})


def not_settled(
    reason: str, message: str, network: str, payer: str | None, transaction: str | None = None
) -> dict[str, Any]:
    """The answer of `/settle` otherwise; `transaction` where one is under way, or was the first outcome's."""
    return {
        "success": False,
        "errorReason": reason,
        "errorMessage": message,
        "transaction": transaction or "",
        "network": network,
    } | _payer(payer)


def _read_v1(members: dict[str, Any], networks: Sequence[Network]) -> Requirement:
    name = read_text(members.get("network"), "network")
    known = next((network.caip2 for network in networks if name in (network.v1_name, network.caip2)), name)
    extra = members.get("extra")
    return Requirement(
        scheme=read_text(members.get("scheme"), "scheme"),
        network=known,
        asset=read_address(members.get("asset"), "asset"),
        amount=read_uint256(members.get("maxAmountRequired"), "maxAmountRequired"),
        pay_to=read_address(members.get("payTo"), "payTo"),
        max_timeout_s=read_seconds(members.get("maxTimeoutSeconds"), "maxTimeoutSeconds"),
        extra={} if extra is None else read_object(extra, "extra"),
    )


def _payer(payer: str | None) -> dict[str, str]:
    return {} if payer is None else {"payer": payer}
