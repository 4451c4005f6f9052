"""Transactions that others signed, read as strictly as money demands: one spelling, one type (EIP-1559), nothing left over.

Sources: EIP-2718, EIP-1559, EIP-2 (low s).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from payments.chain.rlp import rlp_decode, rlp_encode
from payments.chain.transactions import SECP256K1_HALF_ORDER, Call, Fees
from payments.errors import PaymentRefused
from payments.verification.signatures import keccak256, recover

EIP1559 = b"\x02"
_FIELDS = 12
_ADDRESS_BYTES = 20


@dataclass(frozen=True, slots=True)
class ForeignTransaction:
    """What a signed transaction does, and who signed it. Addresses are lower-case hex."""

    sender: str
    chain_id: int
    nonce: int
    fees: Fees
    call: Call
    hash: str
    raw: bytes

    @property
    def cost_max(self) -> int:
        """Wei that its sender must have for a node to take it, besides what a rollup charges for its bytes."""
        return self.call.gas * self.fees.max_fee + self.call.value


def read_transaction(raw: bytes) -> ForeignTransaction:
    """Decode a signed EIP-1559 transaction without an access list.

    Raises:
        ValueError: It is something else, or spelled otherwise than the chain spells it.
    """
    if raw[:1] != EIP1559:
        raise ValueError("it must be an EIP-1559 transaction")
    fields = rlp_decode(raw[1:])
    if not isinstance(fields, list) or len(fields) != _FIELDS or fields[8] != []:
        raise ValueError("it must be an EIP-1559 transaction without an access list")
    if not all(isinstance(field, bytes) for field in fields[:8] + fields[9:]):
        raise ValueError("its fields must be byte strings")
    chain_id, nonce, priority_fee, max_fee, gas = (_number(field) for field in fields[:5])
    to, value, data = fields[5], _number(fields[6]), fields[7]
    parity, r, s = (_number(field) for field in fields[9:])
    if len(to) != _ADDRESS_BYTES:
        raise ValueError("it must call a contract")
    unsigned: list[Any] = [chain_id, nonce, priority_fee, max_fee, gas, to, value, data, ()]
    if EIP1559 + rlp_encode([*unsigned, parity, r, s]) != raw:
        raise ValueError("it is not in the shortest form")
    if parity > 1 or s > SECP256K1_HALF_ORDER:
        raise ValueError("its signature is not in the canonical form")
    digest = keccak256(EIP1559 + rlp_encode(unsigned))
    try:
        sender = recover(digest, r.to_bytes(32, "big") + s.to_bytes(32, "big") + bytes((27 + parity,)))
    except (PaymentRefused, OverflowError) as error:
        raise ValueError("its signature is nobody's") from error
    return ForeignTransaction(
        sender=sender,
        chain_id=chain_id,
        nonce=nonce,
        fees=Fees(max_fee, priority_fee),
        call=Call("0x" + to.hex(), data, gas, value),
        hash="0x" + keccak256(raw).hex(),
        raw=raw,
    )


def _number(field: bytes) -> int:
    return int.from_bytes(field, "big")
