"""The accounts that pay the gas, and what a unit of gas costs.

A signer's nonces are allocated by the outbox in the very transaction that stores the signed bytes, so that a failure between
the two cannot leave a gap; here is only what the chain says about the account.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import coincurve

from payments.chain.rpc import Request, RpcError
from payments.chain.transactions import Fees, address_of

IN_FLIGHT_MAX = 64
"""Unmined transactions of one signer: nodes limit them, and Anvil's automine stalls with hundreds pending."""
PRIORITY_FEE_MIN = 1_000_000
"""Wei (0.001 gwei): what a quiet chain's fee history rounds down to nothing."""
WEI_PER_GWEI = 10**9
NO_CAP = Fees(2**63, 2**63)


@dataclass(slots=True)
class Signer:
    """One account that sends transactions."""

    key: coincurve.PrivateKey = field(repr=False)
    address: str
    """Lower-case hex."""
    nonce_floor: int | None = None
    """The lowest nonce that the chain still accepts, pending transactions counted; None until the chain was asked."""
    in_flight: int = 0
    mine: bool = False
    """Whether this process sends the account's transactions now: of all that share a database one does."""

    @classmethod
    def from_hex(cls, private_key: str) -> Signer:
        """Read a private key of 64 hex digits, with or without 0x.

        Raises:
            ValueError: If it is not one; the message does not repeat it.
        """
        try:
            key = coincurve.PrivateKey(bytes.fromhex(private_key.removeprefix("0x")).rjust(32, b"\0"))
        except ValueError:
            raise ValueError("a signer key is not 64 hex digits of a secp256k1 private key") from None
        return cls(key, address_of(key))


def least_loaded(signers: list[Signer]) -> Signer | None:
    """Of this process's signers the one with the fewest unmined transactions, or None if all are at their limit."""
    free = [signer for signer in signers if signer.mine and signer.in_flight < IN_FLIGHT_MAX]
    return min(free, key=lambda candidate: candidate.in_flight, default=None)


class FeeEstimate:
    """The fees to offer now, from the last blocks.

    Args:
        ttl_s: How long an estimate is good: a block, as fees change once a block.
        cap: What is offered at most. Nodes lie and chains have bad hours; a transaction that offers too little waits, and costs
            nothing meanwhile.
    """

    REQUEST: Request = ("eth_feeHistory", ("0x4", "latest", (50,)))

    def __init__(self, ttl_s: float, cap: Fees = NO_CAP) -> None:
        self.fees: Fees | None = None
        self.capped = False
        """Whether the chain takes more now than we offer at most, so that transactions wait."""
        self.cap = cap
        self._ttl_s = ttl_s
        self._read_at = 0.0

    @property
    def known(self) -> bool:
        """Whether the chain has said what it takes; once it has, there is always an estimate."""
        return self.fees is not None

    @property
    def stale(self) -> bool:
        """Whether it is time to ask the chain again."""
        return self.fees is None or time.monotonic() - self._read_at > self._ttl_s

    def read(self, reply: Any) -> None:
        """Take the chain's answer to `REQUEST`. An error or nonsense leaves the last estimate in place."""
        if isinstance(reply, RpcError) or not isinstance(reply, dict):
            return
        try:
            base_fee = int(reply["baseFeePerGas"][-1], 16)
            rewards = [int(reward[0], 16) for reward in reply.get("reward") or () if reward]
        except (IndexError, KeyError, TypeError, ValueError):
            return
        priority_fee = max([PRIORITY_FEE_MIN, *rewards])
        # Twice the base fee stays valid while it rises by an eighth for six full blocks.
        self.fees = Fees(2 * base_fee + priority_fee, priority_fee).at_most(self.cap)
        self.capped = base_fee + self.fees.priority_fee > self.cap.max_fee
        self._read_at = time.monotonic()

    def raised(self, fees: Fees) -> Fees | None:
        """What a transaction that stalls with `fees` is to offer instead; None if that is more than we offer at most."""
        least = fees.raised()
        wanted = least if self.fees is None else least.at_least(self.fees)
        allowed = wanted.at_most(self.cap)
        return allowed if allowed.at_least(least) == allowed else None
