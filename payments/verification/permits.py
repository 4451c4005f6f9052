"""Whether an EIP-2612 permit gives Permit2 the allowance that a payment needs, as far as that can be told without the chain.

Which tokens take permits at all is learnt from the chain, once at the start.

Source: EIP-2612; x402 `specs/extensions/eip2612_gas_sponsoring.md`.
"""

from __future__ import annotations

from dataclasses import replace

from payments.chain.networks import NOBODY, PERMIT2_ADDRESS, Network, Token
from payments.chain.replies import Reply
from payments.chain.rpc import Request, Rpc
from payments.errors import PaymentRefused
from payments.verification.eip712 import token_domain_separator
from payments.verification.signatures import keccak256, recover
from payments.x402.extensions.eip2612 import Eip2612Permit

DEADLINE_EXPIRED = "eip2612_deadline_expired"
_NONCES = "0x" + keccak256(b"nonces(address)")[:4].hex()
_DOMAIN_SEPARATOR = "0x" + keccak256(b"DOMAIN_SEPARATOR()")[:4].hex()
_PERMIT = keccak256(b"Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)")


def permit_digest(permit: Eip2612Permit, token: Token) -> bytes:
    """The 32 bytes that the owner signs, in the domain of `token`."""
    owner, spender = (bytes(12) + bytes.fromhex(address[2:]) for address in (permit.owner, permit.spender))
    numbers = b"".join(number.to_bytes(32, "big") for number in (permit.value, permit.nonce, permit.deadline))
    struct = keccak256(_PERMIT + owner + spender + numbers)
    return keccak256(b"\x19\x01" + token_domain_separator(token) + struct)


def check_permit(permit: Eip2612Permit, payer: str, value: int, token: Token, *, now: int, valid_s: int) -> None:
    """Return if the permit fits a payment; its nonce is the chain's to judge.

    Args:
        permit: Decoded.
        payer: Who pays, lower-case hex.
        value: What the payment is of, in atomic units.
        token: What it is in.
        now: Unix seconds.
        valid_s: How much longer it must hold, so that the payment can still be settled.

    Raises:
        PaymentRefused: ``eip2612_from_mismatch``, ``eip2612_asset_mismatch``, ``eip2612_spender_not_permit2``,
            ``eip2612_amount_mismatch``, ``eip2612_deadline_expired`` or ``eip2612_invalid_signature``.
    """
    for code, theirs, ours in (
        ("eip2612_from_mismatch", permit.owner, payer),
        ("eip2612_asset_mismatch", permit.asset, token.address),
        ("eip2612_spender_not_permit2", permit.spender, PERMIT2_ADDRESS),
        # The proxies demand it, so that a payment cannot leave a greater allowance behind.
        ("eip2612_amount_mismatch", permit.value, value),
    ):
        if theirs != ours:
            raise PaymentRefused(code, f"the permit's value must be {ours} there")
    if permit.deadline < now + valid_s:
        raise PaymentRefused(DEADLINE_EXPIRED, f"the permit must hold for {valid_s} s from now on")
    try:
        signer = recover(permit_digest(permit, token), permit.signature)
    except PaymentRefused:
        signer = ""
    if signer != permit.owner:
        raise PaymentRefused("eip2612_invalid_signature", "the permit was not signed by its owner for this token")


async def with_permits(rpc: Rpc, network: Network) -> Network:
    """The network with those tokens marked that take permits in the domain that the configuration names, as the chain says.

    Raises:
        RpcUnavailable: No node answers.
    """
    requests: list[Request] = []
    for token in network.tokens:
        for data in (_NONCES + NOBODY[2:].rjust(64, "0"), _DOMAIN_SEPARATOR):
            requests.append(("eth_call", ({"to": token.address, "data": data}, "latest")))
    replies = iter(await rpc.batch(requests))
    tokens = [
        replace(token, has_permit=_takes_permits(token, next(replies), next(replies))) for token in network.tokens
    ]
    return replace(network, tokens=tuple(tokens))


def _takes_permits(token: Token, nonces: Reply, separator: Reply) -> bool:
    counts = isinstance(nonces, str) and len(nonces) == len("0x") + 64
    return counts and separator == "0x" + token_domain_separator(token).hex()
