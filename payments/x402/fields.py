"""Strict readers for the members of a payment: one spelling for each kind of value.

Every reader takes the value and the dotted name of its field, and raises `PaymentMalformed` naming that field. The value itself
is never repeated in the message: it would end up in logs and error bodies.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

from payments.errors import PaymentMalformed

UINT256_MAX = 2**256 - 1
SIGNATURE_BYTES_MAX = 4_096
"""An ECDSA signature has 65 bytes, a wrapped one of a contract wallet (ERC-6492) seldom more than two thousand."""
SECONDS_MAX = 2**31 - 1

_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")
_BYTES32 = re.compile(r"0x[0-9a-fA-F]{64}")
_HEX = re.compile(r"0x(?:[0-9a-fA-F]{2})+")
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,77}")


def malformed(field: str, expectation: str) -> NoReturn:
    """Raise the error for a field that is not what it must be."""
    raise PaymentMalformed("malformed_payment", f"{field} must be {expectation}")


def read_object(value: object, field: str) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        malformed(field, "a JSON object")
    return value


def read_members(value: object, field: str, names: frozenset[str]) -> dict[str, Any]:
    """A JSON object with exactly the members `names`: what is signed leaves no room for more or for less."""
    members = read_object(value, field)
    if members.keys() != names:
        missing = sorted(names - members.keys())
        if missing:
            malformed(f"{field}.{missing[0]}", "present")
        malformed(field, f"an object with exactly the members {', '.join(sorted(names))}")
    return members


def read_text(value: object, field: str, length_max: int = 128) -> str:
    """A short string that is not empty."""
    if not isinstance(value, str) or not 0 < len(value) <= length_max:
        malformed(field, f"a string of 1 to {length_max} characters")
    return value


def read_address(value: object, field: str) -> str:
    """An address in any letter case (an EIP-55 checksum is not demanded). Returns it in lower case."""
    if not isinstance(value, str) or not _ADDRESS.fullmatch(value):
        malformed(field, "0x and 40 hex digits")
    return value.lower()


def read_uint256(value: object, field: str) -> int:
    """A uint256 as a decimal string: no sign, no leading zero, no blank, no exponent."""
    if not isinstance(value, str) or not _DECIMAL.fullmatch(value):
        malformed(field, "a string of decimal digits without sign, leading zeros or blanks")
    number = int(value)
    if number > UINT256_MAX:
        malformed(field, "at most 2^256 - 1")
    return number


def read_bytes32(value: object, field: str) -> int:
    """32 bytes as hex. Returns them as a big-endian integer, so that letter case makes no second nonce."""
    if not isinstance(value, str) or not _BYTES32.fullmatch(value):
        malformed(field, "0x and 64 hex digits")
    return int(value, 16)


def read_signature(value: object, field: str) -> bytes:
    """Hex bytes of any length up to `SIGNATURE_BYTES_MAX`."""
    if not isinstance(value, str) or len(value) > 2 + 2 * SIGNATURE_BYTES_MAX or not _HEX.fullmatch(value):
        malformed(field, f"0x and an even number of hex digits, at most {SIGNATURE_BYTES_MAX} bytes")
    return bytes.fromhex(value[2:])


def read_seconds(value: object, field: str) -> int:
    """A duration as a JSON integer, in seconds. (`True` is an int to Python, but not to anybody else.)"""
    if type(value) is not int or not 0 <= value <= SECONDS_MAX:
        malformed(field, f"an integer from 0 to {SECONDS_MAX}")
    return value


def is_deeper_than(document: object, levels: int) -> bool:
    """Whether containers nest deeper than `levels`. Level by level rather than recursive: the depth is the sender's."""
    layer: list[Any] = [document]
    for _ in range(levels + 1):
        layer = [node for node in layer if isinstance(node, (dict, list))]
        if not layer:
            return False
        layer = [inner for node in layer for inner in (node.values() if isinstance(node, dict) else node)]
    return True
