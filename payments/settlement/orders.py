"""What the settlement engine is asked to do: one transfer of a token, as a call that any signer can make.

An order is data. The engine adds a signer, a nonce and fees, and keeps the row; evidence on the chain decides its outcome.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class SettlementOrder:
    """A transfer of `value` atomic units of `token` from `payer` to `pay_to`.

    Addresses are lower-case hex. The same `id` submitted again is the same settlement, not a second one.
    """

    id: str
    kind: Literal["payment", "refund"]
    reference: str
    """A payment's receipt id, or a refund's ledger transfer id."""
    chain_id: int
    token: str
    payer: str
    pay_to: str
    value: int
    authorization_nonce: int | None
    """The nonce whose use, together with the Transfer, is the evidence; None for a refund."""
    call_to: str
    call_data: bytes
    valid_before: int
    """Unix seconds after which the call cannot succeed any more; 0 if never."""

    def __post_init__(self) -> None:
        assert self.value > 0
        assert (self.authorization_nonce is None) == (self.kind == "refund")
        assert all(address == address.lower() for address in (self.token, self.payer, self.pay_to, self.call_to))
