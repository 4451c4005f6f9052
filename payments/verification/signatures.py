"""Who signed a digest: libsecp256k1's public key recovery, on canonical signatures only.

The library is called directly: coincurve's classes around it check and copy more than is needed here, and what they cost pays
for the digest. Contract wallets' signatures (ERC-1271, ERC-6492) are not judged here: only the chain can.

Source: SEC 1 section 4.1.6, EIP-2 (low s), the Yellow Paper's appendix F.
"""

from __future__ import annotations

from coincurve._libsecp256k1 import ffi, lib
from coincurve.context import GLOBAL_CONTEXT
from sha3 import keccak_256

from payments.errors import PaymentError, PaymentMalformed, PaymentRefused

DIGEST_BYTES = 32
ECDSA_BYTES = 65
_POINT_BYTES = 65
_HALF_ORDER = (0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0).to_bytes(32, "big")

_CONTEXT = GLOBAL_CONTEXT.ctx
_SIGNATURE = ffi.typeof("secp256k1_ecdsa_recoverable_signature *")
_KEY = ffi.typeof("secp256k1_pubkey *")
_POINT = ffi.typeof(f"unsigned char[{_POINT_BYTES}]")
_LENGTH = ffi.typeof("size_t *")


def recover(digest: bytes, signature: bytes) -> str:
    """The address whose key signed `digest`.

    Args:
        digest: 32 bytes.
        signature: r, s, v: 65 bytes, v in {27, 28}, s in the lower half of the order. Nobody can turn such a signature into a
            second one.

    Returns:
        The address, lower-case hex. Nearly every canonical signature recovers to some address: compare it with the payer.

    Raises:
        PaymentMalformed: ``malformed_signature`` if it is shorter than an ECDSA signature.
        PaymentRefused: ``bad_signature`` if it is longer (a contract wallet's), not canonical, or no key can have made it.
    """
    assert len(digest) == DIGEST_BYTES
    if len(signature) != ECDSA_BYTES:
        raise _wrong_length(len(signature))
    recovery_id = signature[64] - 27
    if recovery_id not in (0, 1):
        raise PaymentRefused("bad_signature", "the signature's last byte (v) must be 27 or 28")
    if signature[32:64] > _HALF_ORDER:
        raise PaymentRefused("bad_signature", "the signature's s must be in the lower half of the curve's order")
    # Fresh buffers each time: cffi releases the interpreter lock during a call.
    parsed = ffi.new(_SIGNATURE)
    key = ffi.new(_KEY)
    # The two refuse r and s that are zero or not below the order.
    if not (
        lib.secp256k1_ecdsa_recoverable_signature_parse_compact(_CONTEXT, parsed, signature, recovery_id)
        and lib.secp256k1_ecdsa_recover(_CONTEXT, key, parsed, digest)
    ):
        raise PaymentRefused("bad_signature", "no key can have made the signature")
    point = ffi.new(_POINT)
    length = ffi.new(_LENGTH, _POINT_BYTES)
    lib.secp256k1_ec_pubkey_serialize(_CONTEXT, point, length, key, lib.SECP256K1_EC_UNCOMPRESSED)
    # The first byte only says that both coordinates follow; an address is the last 20 bytes of their keccak.
    address: str = keccak_256(ffi.buffer(point)[1:_POINT_BYTES]).hexdigest()[24:]
    return "0x" + address


def keccak256(data: bytes) -> bytes:
    """Keccak-256 as Ethereum uses it (not NIST's SHA3-256)."""
    digest: bytes = keccak_256(data).digest()
    return digest


def checksum_address(address: str) -> str:
    """An address in the mixed case of EIP-55."""
    digits = address[2:].lower()
    marks = keccak_256(digits.encode("ascii")).hexdigest()
    return "0x" + "".join(digit.upper() if mark >= "8" else digit for digit, mark in zip(digits, marks, strict=False))


def _wrong_length(length: int) -> PaymentError:
    if length < ECDSA_BYTES:
        return PaymentMalformed("malformed_signature", f"a signature has {ECDSA_BYTES} bytes, not {length}")
    return PaymentRefused(
        "bad_signature",
        f"a signature of {length} bytes can only be a contract wallet's, and the payer is none; one of a key has {ECDSA_BYTES}",
    )
