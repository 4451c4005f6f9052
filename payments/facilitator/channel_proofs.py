"""What proves on the chain that claims were recorded, and that a receiver was sent what was claimed: the contract's own events.

Both may be done by anybody, and then our call does nothing; whoever did it, it is done.
"""

from __future__ import annotations

from typing import Any

from payments.chain.channel_contract import (
    CLAIMED_TOPIC,
    SETTLED_TOPIC,
    decode_claims,
    decode_states,
    receiver_call,
    states_call,
)
from payments.chain.logs import Log, get_logs, receipt_with
from payments.chain.networks import BATCH_SETTLEMENT_ADDRESS
from payments.chain.transactions import WORD, address_topic
from payments.channels.kinds import evidence_of
from payments.settlement.orders import Evidence, NoEvidence, Search, SettlementOrder
from payments.verification.vouchers import channel_id
from payments.x402.channels import hex32


class ClaimedProof:
    """Claims without a transfer: a `Claimed` for one of the order's channels in our own call, which is all or nothing; or the
    totals of all of them on the chain."""

    def of_call(self, order: SettlementOrder, receipt: dict[str, Any], logs: list[Log]) -> Evidence | None:
        """See `payments.settlement.orders.Proof`."""
        channels = {hex32(number) for number, _ in _rows(order)}
        claimed = [log for log in logs if _is(log, CLAIMED_TOPIC) and log["topics"][1] in channels]
        if not claimed:
            return None
        return evidence_of(receipt, claimed[0], sum(_amount(log) for log in claimed))

    async def search(self, order: SettlementOrder, where: Search) -> Evidence | NoEvidence:
        """See `payments.settlement.orders.Proof`."""
        rows = _rows(order)
        (answer,) = await where.rpc.ask([states_call([number for number, _ in rows])])
        _, found, _ = decode_states(answer, len(rows))
        if any(state.total_claimed < total for state, (_, total) in zip(found, rows, strict=True)):
            return NoEvidence(nonce_consumed=False)
        for number, _ in rows:
            logs = await get_logs(
                where.rpc, BATCH_SETTLEMENT_ADDRESS, [CLAIMED_TOPIC, hex32(number)], where.from_block, where.head
            )
            if logs:
                return evidence_of(await receipt_with(where.rpc, logs[-1]), logs[-1], _amount(logs[-1]))
        return NoEvidence(nonce_consumed=True)


class SettledProof:
    """The contract's `Settled` for this receiver and token."""

    def of_call(self, order: SettlementOrder, receipt: dict[str, Any], logs: list[Log]) -> Evidence | None:
        """See `payments.settlement.orders.Proof`."""
        for log in logs:
            if _is(log, *_settled(order)):
                return evidence_of(receipt, log, _amount(log))
        return None

    async def search(self, order: SettlementOrder, where: Search) -> Evidence | NoEvidence:
        """See `payments.settlement.orders.Proof`."""
        to, data = receiver_call(order.pay_to, order.token)
        answer = await where.rpc.call("eth_call", [{"to": to, "data": "0x" + data.hex()}, "latest"])
        claimed, settled = int(answer[2 : 2 + 2 * WORD], 16), int(answer[2 + 2 * WORD :], 16)
        if claimed > settled:
            return NoEvidence(nonce_consumed=False)
        logs = await get_logs(where.rpc, BATCH_SETTLEMENT_ADDRESS, [*_settled(order)], where.from_block, where.head)
        if logs:
            return evidence_of(await receipt_with(where.rpc, logs[-1]), logs[-1], _amount(logs[-1]))
        return NoEvidence(nonce_consumed=True)


def _rows(order: SettlementOrder) -> list[tuple[int, int]]:
    return [(channel_id(config, order.chain_id), total) for config, total in decode_claims(order.call_data)]


def _settled(order: SettlementOrder) -> tuple[str, str, str]:
    return SETTLED_TOPIC, address_topic(order.pay_to), address_topic(order.token)


def _is(log: Log, *topics: str) -> bool:
    return log["address"].lower() == BATCH_SETTLEMENT_ADDRESS and tuple(log["topics"][: len(topics)]) == topics


def _amount(log: Log) -> int:
    return int(log["data"][2 : 2 + 2 * WORD], 16)
