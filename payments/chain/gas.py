"""What a chain charges in gas for a transaction's bytes, beyond what Ethereum does.

Rollups such as Arbitrum take the price of publishing a transaction on the chain below as gas of the transaction itself, and it
changes with that chain's fees: a limit that fits today is too low tomorrow, and the transaction fails having paid. So it is
measured now and then: by what the chain says that bytes alone would use.
"""

from __future__ import annotations

import time

from payments.chain.rpc import Reply, Request, RpcError

SAMPLE_BYTES = 512
SAMPLE_TO = "0x000000000000000000000000000000000000dead"
BASE_GAS = 21_000
GAS_PER_BYTE = 16
"""Of a byte that is not zero (EIP-2028); fixed limits contain it."""
ENVELOPE_BYTES = 180
"""Of a transaction besides its calldata: nonce, fees, recipient, signature."""
MARGIN_PERCENT = 50
"""The price of publishing may rise while a transaction waits."""
EXTRA_GAS_MAX = 3_000_000
"""Whatever a node says."""
TTL_S = 60.0


class BytesGas:
    """The gas that a transaction's bytes need on one chain, besides its fixed limit. Nothing until it was measured."""

    REQUEST: Request = ("eth_estimateGas", ({"to": SAMPLE_TO, "data": "0x" + "a5" * SAMPLE_BYTES},))

    def __init__(self) -> None:
        self._sample_gas = 0
        """Of `SAMPLE_BYTES` and an envelope."""
        self._asked_at = float("-inf")

    @property
    def stale(self) -> bool:
        """Whether it is time to ask the chain again."""
        return time.monotonic() - self._asked_at > TTL_S

    def read(self, reply: Reply) -> None:
        """Take the chain's answer to `REQUEST`. A refusal leaves the last measurement in place."""
        self._asked_at = time.monotonic()
        if isinstance(reply, RpcError):
            return
        self._sample_gas = max(int(str(reply), 16) - BASE_GAS - GAS_PER_BYTE * SAMPLE_BYTES, 0)

    def besides(self, calldata_bytes: int) -> int:
        """What to add to the limit of a transaction with so much calldata."""
        gas = self._sample_gas * (calldata_bytes + ENVELOPE_BYTES) // (SAMPLE_BYTES + ENVELOPE_BYTES)
        return min(gas * (100 + MARGIN_PERCENT) // 100, EXTRA_GAS_MAX)
