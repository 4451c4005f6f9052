"""Whether an EIP-2612 permit gives Permit2 the allowance that a payment needs, as far as that can be told without the chain.

Source: EIP-2612; x402 `specs/extensions/eip2612_gas_sponsoring.md`.
"""

from __future__ import annotations

from payments.chain.networks import PERMIT2_ADDRESS, Token
from payments.errors import PaymentRefused
from payments.verification.checks import SETTLEMENT_MARGIN_S
from payments.verification.eip712 import token_domain_separator
from payments.verification.signatures import keccak256, recover
from payments.x402.extensions.eip2612 import Eip2612Permit
from payments.x402.wire import Permit2Authorization

_PERMIT = keccak256(b"Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)")


def permit_digest(permit: Eip2612Permit, token: Token) -> bytes:
    """The 32 bytes that the owner signs, in the domain of `token`."""
    owner, spender = (bytes(12) + bytes.fromhex(address[2:]) for address in (permit.owner, permit.spender))
    numbers = b"".join(number.to_bytes(32, "big") for number in (permit.value, permit.nonce, permit.deadline))
    struct = keccak256(_PERMIT + owner + spender + numbers)
    return keccak256(b"\x19\x01" + token_domain_separator(token) + struct)


def check_permit(permit: Eip2612Permit, authorization: Permit2Authorization, token: Token, *, now: int) -> None:
    """Return if the permit fits the payment; its nonce is the chain's to judge. `now` in Unix seconds.

    Raises:
        PaymentRefused: ``eip2612_from_mismatch``, ``eip2612_asset_mismatch``, ``eip2612_spender_not_permit2``,
            ``eip2612_amount_mismatch``, ``eip2612_deadline_expired`` or ``eip2612_invalid_signature``.
    """
    for code, theirs, ours in (
        ("eip2612_from_mismatch", permit.owner, authorization.payer),
        ("eip2612_asset_mismatch", permit.asset, token.address),
        ("eip2612_spender_not_permit2", permit.spender, PERMIT2_ADDRESS),
        # The proxy demands it, so that a payment cannot leave a greater allowance behind.
        ("eip2612_amount_mismatch", permit.value, authorization.amount),
    ):
        if theirs != ours:
            raise PaymentRefused(code, f"the permit's value must be {ours} there")
    if permit.deadline < now + SETTLEMENT_MARGIN_S:
        raise PaymentRefused(
            "eip2612_deadline_expired", f"the permit must hold for {SETTLEMENT_MARGIN_S} s from now on"
        )
    try:
        signer = recover(permit_digest(permit, token), permit.signature)
    except PaymentRefused:
        signer = ""
    if signer != permit.owner:
        raise PaymentRefused("eip2612_invalid_signature", "the permit was not signed by its owner for this token")
