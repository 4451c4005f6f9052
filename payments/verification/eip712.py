"""The EIP-712 digests of the authorizations that we take, written out by hand.

The general encoders cost 115 µs and more a digest; with the type hashes and domain separators ready it is two keccaks of a
fixed layout, about 3 µs. The token's domain is ours, from `Token`: what the payer claims in `extra` never reaches a digest.

Source: EIP-712, EIP-3009, Permit2's `PermitHash` with witness, and the x402 scheme `exact` on EVM.
"""

from __future__ import annotations

from functools import lru_cache

from payments.chain.networks import PERMIT2_ADDRESS, Token
from payments.verification.signatures import keccak256
from payments.x402.wire import Eip3009Authorization, Permit2Authorization, UptoAuthorization

_TRANSFER_WITH_AUTHORIZATION = keccak256(
    b"TransferWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,bytes32 nonce)"
)
_TOKEN_PERMISSIONS = keccak256(b"TokenPermissions(address token,uint256 amount)")
_WITNESS = keccak256(b"Witness(address to,uint256 validAfter)")
_PERMIT_WITNESS_TRANSFER_FROM = keccak256(
    b"PermitWitnessTransferFrom(TokenPermissions permitted,address spender,uint256 nonce,uint256 deadline,Witness witness)"
    b"TokenPermissions(address token,uint256 amount)"
    b"Witness(address to,uint256 validAfter)"
)
_UPTO_WITNESS = keccak256(b"Witness(address to,address facilitator,uint256 validAfter)")
_UPTO_PERMIT_WITNESS_TRANSFER_FROM = keccak256(
    b"PermitWitnessTransferFrom(TokenPermissions permitted,address spender,uint256 nonce,uint256 deadline,Witness witness)"
    b"TokenPermissions(address token,uint256 amount)"
    b"Witness(address to,address facilitator,uint256 validAfter)"
)
_DOMAIN = keccak256(b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)")
_DOMAIN_WITHOUT_VERSION = keccak256(b"EIP712Domain(string name,uint256 chainId,address verifyingContract)")
_ADDRESS_PADDING = bytes(12)


def eip3009_digest(authorization: Eip3009Authorization, token: Token) -> bytes:
    """The 32 bytes that the payer of a `TransferWithAuthorization` signs, in the domain of `token`."""
    payer = _word(authorization.payer)
    to = _usual_word(authorization.to)
    value = authorization.value.to_bytes(32, "big")
    valid_after = authorization.valid_after.to_bytes(32, "big")
    valid_before = authorization.valid_before.to_bytes(32, "big")
    nonce = authorization.nonce.to_bytes(32, "big")
    struct = keccak256(_TRANSFER_WITH_AUTHORIZATION + payer + to + value + valid_after + valid_before + nonce)
    return keccak256(token_prefix(token) + struct)


def permit2_exact_digest(authorization: Permit2Authorization, chain_id: int) -> bytes:
    """The 32 bytes that the payer of a `PermitWitnessTransferFrom` with the exact scheme's witness signs, on `chain_id`."""
    witness = keccak256(_WITNESS + _usual_word(authorization.to) + authorization.valid_after.to_bytes(32, "big"))
    return _permit2_digest(_PERMIT_WITNESS_TRANSFER_FROM, authorization, witness, chain_id)


def permit2_upto_digest(authorization: UptoAuthorization, chain_id: int) -> bytes:
    """The same with the witness of the scheme `upto`."""
    valid_after = authorization.valid_after.to_bytes(32, "big")
    witness = keccak256(
        _UPTO_WITNESS + _usual_word(authorization.to) + _usual_word(authorization.facilitator) + valid_after
    )
    return _permit2_digest(_UPTO_PERMIT_WITNESS_TRANSFER_FROM, authorization, witness, chain_id)


def token_domain_separator(token: Token) -> bytes:
    """What the token's own `DOMAIN_SEPARATOR()` must return."""
    return keccak256(
        _DOMAIN
        + keccak256(token.domain_name.encode())
        + keccak256(token.domain_version.encode())
        + token.chain_id.to_bytes(32, "big")
        + _word(token.address)
    )


def permit2_domain_separator(chain_id: int) -> bytes:
    """What Permit2's `DOMAIN_SEPARATOR()` must return on `chain_id`."""
    return keccak256(
        _DOMAIN_WITHOUT_VERSION + keccak256(b"Permit2") + chain_id.to_bytes(32, "big") + _word(PERMIT2_ADDRESS)
    )


def _permit2_digest(type_hash: bytes, authorization: Permit2Authorization, witness: bytes, chain_id: int) -> bytes:
    amount = authorization.amount.to_bytes(32, "big")
    permitted = keccak256(_TOKEN_PERMISSIONS + _usual_word(authorization.token) + amount)
    spender = _usual_word(authorization.spender)
    nonce = authorization.nonce.to_bytes(32, "big")
    deadline = authorization.deadline.to_bytes(32, "big")
    struct = keccak256(type_hash + permitted + spender + nonce + deadline + witness)
    return keccak256(permit2_prefix(chain_id) + struct)


@lru_cache(maxsize=256)
def token_prefix(token: Token) -> bytes:
    """What every digest in the token's own domain begins with."""
    return b"\x19\x01" + token_domain_separator(token)


@lru_cache(maxsize=256)
def permit2_prefix(chain_id: int) -> bytes:
    """What every digest in Permit2's domain begins with."""
    return b"\x19\x01" + permit2_domain_separator(chain_id)


def _word(address: str) -> bytes:
    return _ADDRESS_PADDING + bytes.fromhex(address[2:])


@lru_cache(maxsize=256)
def _usual_word(address: str) -> bytes:
    """The same of an address that is in nearly every authorization: ours, or a contract's."""
    return _word(address)
