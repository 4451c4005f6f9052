"""RLP, the encoding of Ethereum's transactions: integers, byte strings and lists of them.

Source: the Yellow Paper, appendix B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

DEPTH_MAX = 8
"""Of lists in lists; a transaction with an access list has three. The bytes may be a stranger's."""

RlpItem = int | bytes | Sequence["RlpItem"]


def _length_prefix(length: int, offset: int) -> bytes:
    if length < 56:
        return bytes((offset + length,))
    size = (length.bit_length() + 7) // 8
    return bytes((offset + 55 + size,)) + length.to_bytes(size, "big")


def rlp_encode(item: RlpItem) -> bytes:
    """Encode integers (as their shortest big-endian bytes), byte strings and sequences of them."""
    if isinstance(item, int):
        item = item.to_bytes((item.bit_length() + 7) // 8, "big")
    if isinstance(item, bytes):
        if len(item) == 1 and item[0] < 0x80:
            return item
        return _length_prefix(len(item), 0x80) + item
    payload = b"".join([rlp_encode(element) for element in item])
    return _length_prefix(len(payload), 0xC0) + payload


def rlp_decode(data: bytes) -> bytes | list[Any]:
    """Decode one item: a byte string, or a list of items.

    Raises:
        ValueError: The bytes are not one RLP item, or nested deeper than `DEPTH_MAX`. Whether they are its shortest form is for
            the caller to see, by encoding the item again.
    """
    item, end = _rlp_item(data, 0, DEPTH_MAX)
    if end != len(data):
        raise ValueError("something follows the RLP item")
    return item


def _rlp_item(data: bytes, at: int, depth: int) -> tuple[bytes | list[Any], int]:
    if at >= len(data):
        raise ValueError("RLP is cut short")
    first = data[at]
    if first < 0x80:
        return data[at : at + 1], at + 1
    offset = 0x80 if first < 0xC0 else 0xC0
    start, length = at + 1, first - offset
    if length > 55:
        start, length = at + 1 + length - 55, int.from_bytes(data[at + 1 : at + 1 + length - 55], "big")
    end = start + length
    if end > len(data):
        raise ValueError("RLP is cut short")
    if offset == 0x80:
        return data[start:end], end
    if depth == 0:
        raise ValueError("RLP is nested too deep")
    items = []
    while start < end:
        item, start = _rlp_item(data[:end], start, depth - 1)
        items.append(item)
    return items, end
