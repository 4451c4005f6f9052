"""A node that lies about a receipt must not make money: above an amount, what one node says a second one must say too.

Only where the operator configured several nodes. While no second node has the receipt, the payment is neither paid nor failed:
its caller is told to come back, and the receipt is asked for again.
"""

from __future__ import annotations

from typing import Any

from payments.chain.networks import Network
from payments.chain.rpc import Request, Rpc
from payments.money import atomic_to_nano_down
from payments.settlement.orders import Evidence, SettlementOrder

WITNESSES = 2


class Witnesses:
    """Hears the nodes of one network.

    Args:
        above_nano_usd: Transactions that settle more are checked; None checks nothing.
    """

    def __init__(self, rpc: Rpc, network: Network, above_nano_usd: int | None) -> None:
        self._rpc, self._network = rpc, network
        self._above = None if len(rpc.nodes.all) < WITNESSES else above_nano_usd

    def needed_for(self, *orders: SettlementOrder) -> bool:
        """Whether what proves these orders together has to be heard twice."""
        return self._above is not None and sum(self._nano_usd(order) for order in orders) > self._above

    async def confirm(self, receipt: dict[str, Any]) -> bool:
        """Whether at least two nodes have this receipt."""
        heard = await self._hear(receipt["transactionHash"])
        return sum(_essence(other) == _essence(receipt) for other in heard) >= WITNESSES

    async def confirm_evidence(self, evidence: Evidence) -> bool:
        """Whether at least two nodes have the log, in the same block of the chain."""
        return sum(_has(other, evidence) for other in await self._hear(evidence.transaction_hash)) >= WITNESSES

    async def _hear(self, transaction_hash: str) -> list[dict[str, Any]]:
        request: Request = ("eth_getTransactionReceipt", (transaction_hash,))
        answers = await self._rpc.ask_each([request])
        return [reply for (reply,) in answers if isinstance(reply, dict) and reply.get("blockNumber")]

    def _nano_usd(self, order: SettlementOrder) -> int:
        token = self._network.token_at(order.token)
        # What is no token of ours has no known worth, so it is looked at as if it were worth much.
        return 2**63 if token is None else atomic_to_nano_down(order.value, token.decimals)


def _essence(receipt: dict[str, Any]) -> tuple[Any, ...]:
    logs = [
        (log["address"].lower(), tuple(log["topics"]), log["data"], int(log["logIndex"], 16)) for log in receipt["logs"]
    ]
    return receipt["blockHash"], receipt["status"], logs


def _has(receipt: dict[str, Any], evidence: Evidence) -> bool:
    return (
        receipt["status"] == "0x1"
        and receipt["blockHash"] == evidence.block_hash
        and any(
            int(log["logIndex"], 16) == evidence.transfer_log_index
            and int(log["data"][:66] or "0x0", 16) == evidence.received_value
            for log in receipt["logs"]
        )
    )
