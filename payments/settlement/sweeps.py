"""Moves what lies at deposit addresses to the treasury, many addresses in one transaction, when it is worth the gas.

A sweep is an order of the settlement engine without any effect on the ledger of its own: the books follow the token's logs
(`payments.forwarders`), because anybody may call the factory.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import Any

from payments import forwarders
from payments.chain.batches import SWEPT_TOPIC, account_of, encode_sweep
from payments.chain.logs import Log
from payments.chain.networks import Token
from payments.chain.rpc import Request, RpcError, RpcUnavailable
from payments.chain.transactions import TRANSFER_TOPIC, encode_balance_of
from payments.deposits import Deposits
from payments.forwarders import Address
from payments.money import atomic_to_nano_down
from payments.settlement import outbox
from payments.settlement.engine import Settlements
from payments.settlement.orders import Evidence, Kind, NoEvidence, Search, SettlementOrder
from payments.store import Store, StoreBusy, Transaction

ACCOUNTS_MAX = 20
"""Addresses in one transaction."""
GAS_BASE = 450_000
"""What the factory wants to have left before an address, which it may need for a heavy token."""
GAS_PER_ACCOUNT = 180_000
"""A clone is created with the first sweep of its address."""
RETRY_AFTER_S = 1800.0
"""After a sweep that left money behind (the token is paused, or has blocked the address): gas would be burnt for ever."""

log = logging.getLogger(__name__)


class SweepProof:
    """A sweep did something if its own call says `Swept` for its token."""

    def of_call(self, order: SettlementOrder, receipt: dict[str, Any], logs: list[Log]) -> Evidence | None:
        """See `payments.settlement.orders.Proof`."""
        swept = [
            int(each["data"], 16)
            for each in logs
            if each["address"].lower() == order.call_to
            and each["topics"][0] == SWEPT_TOPIC
            and each["topics"][2][-40:].lower() == order.token[2:]
        ]
        moved = [
            each
            for each in logs
            if each["address"].lower() == order.token
            and each["topics"][0] == TRANSFER_TOPIC
            and each["topics"][2][-40:].lower() == order.pay_to[2:]
        ]
        if not swept or not moved:
            return None
        return Evidence(
            transaction_hash=receipt["transactionHash"],
            block_number=int(receipt["blockNumber"], 16),
            block_hash=receipt["blockHash"],
            transfer_log_index=int(moved[0]["logIndex"], 16),
            received_value=sum(swept),
        )

    async def search(self, order: SettlementOrder, where: Search) -> Evidence | NoEvidence:
        """See `payments.settlement.orders.Proof`. Somebody else's sweep is not this one; the books know it all the same."""
        return NoEvidence(nonce_consumed=False)


class Sweeps:
    """Sweeps one network's deposit addresses.

    Args:
        store: The database.
        settlements: Started after this is made.
        deposits: Knows the addresses.
        threshold_nano_usd: An address with less is not worth its gas.
        interval_s: How often to look.
    """

    def __init__(
        self,
        store: Store,
        settlements: Settlements,
        deposits: Deposits,
        *,
        threshold_nano_usd: int,
        interval_s: float,
    ) -> None:
        self.sent = 0
        self._store, self._settlements, self._deposits = store, settlements, deposits
        self._threshold, self._interval_s = max(threshold_nano_usd, 1), interval_s
        self._not_before: dict[tuple[str, str], float] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Sweep now and then."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Begin no more sweeps; those that are durable are the settlement engine's."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def round(self) -> int:
        """Begin a sweep for every token that has enough to sweep; returns how many were begun. A token that the chain does not
        tell of, now or ever, holds up no other."""
        begun = 0
        for token in self._deposits.network.tokens:
            try:
                begun += await self._sweep(token)
            except (RpcUnavailable, RpcError, StoreBusy) as error:
                log.warning("sweeps of %s must wait: %s", token.asset, error)
            except Exception:
                # A node that is out of step answers with nothing, for example.
                log.exception("sweeping %s failed", token.asset)
        return begun

    async def _sweep(self, token: Token) -> bool:
        now = time.monotonic()
        unswept, over = await self._store.read(
            lambda tx: (forwarders.unswept(tx, token.chain_id, token.asset, self._threshold), _count_over(tx, token))
        )
        candidates = [
            each
            for each, _ in unswept
            if each.factory == self._deposits.factory and now >= self._not_before.get((each.address, token.asset), 0.0)
        ][:ACCOUNTS_MAX]
        full = await self._still_full(token, candidates)
        if not full:
            return False
        settlement_id = await self._store.write(lambda tx: self._begin(tx, token, full, over))
        if settlement_id is None:
            return False
        for each, _ in full:
            self._not_before[(each.address, token.asset)] = now + RETRY_AFTER_S
        self._settlements.take_queued(settlement_id)
        self.sent += 1
        return True

    async def _still_full(self, token: Token, candidates: list[Address]) -> list[tuple[Address, int]]:
        """The chain has the last word: another sweep may be on its way to the books."""
        requests: list[Request] = [
            ("eth_call", ({"to": token.address, "data": "0x" + encode_balance_of(each.address).hex()}, "latest"))
            for each in candidates
        ]
        held = [int(answer, 16) for answer in await self._settlements.rpc.ask(requests)] if requests else []
        return [
            (each, value)
            for each, value in zip(candidates, held, strict=True)
            if atomic_to_nano_down(value, token.decimals) >= self._threshold
        ]

    def _begin(self, tx: Transaction, token: Token, full: list[tuple[Address, int]], over: int) -> str | None:
        under_way = tx.execute(
            "SELECT 1 FROM settlement WHERE kind = 'sweep' AND chain_id = ? AND token = ?"
            " AND state IN ('queued', 'submitted')",
            (token.chain_id, token.address),
        ).fetchone()
        # One that was mined while the chain was asked has emptied what was seen: another process's, or one from before a start.
        if under_way is not None or _count_over(tx, token) != over:
            return None
        settlement_id = f"sweep_{secrets.token_hex(16)}"
        order = SettlementOrder(
            id=settlement_id,
            kind="sweep",
            reference=settlement_id,
            chain_id=token.chain_id,
            token=token.address,
            payer=full[0][0].address,
            pay_to=self._deposits.treasury,
            value=sum(value for _, value in full),
            authorization_nonce=None,
            call_to=self._deposits.factory,
            call_data=encode_sweep(token.address, [account_of(each.wallet) for each, _ in full]),
            valid_before=0,
        )
        outbox.enqueue(tx, order)
        return settlement_id

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self.round()


def kind() -> Kind:
    """How the settlement engine carries sweeps: any signer, no effect on the ledger."""
    return Kind(SweepProof(), _nothing, _nothing, _gas)


def _count_over(tx: Transaction, token: Token) -> int:
    """How many sweeps of a token have come to their end."""
    row = tx.execute(
        "SELECT COUNT(*) FROM settlement WHERE kind = 'sweep' AND chain_id = ? AND token = ?"
        " AND state NOT IN ('queued', 'submitted')",
        (token.chain_id, token.address),
    ).fetchone()
    return int(row[0])


def _gas(order: SettlementOrder) -> int:
    accounts = (len(order.call_data) - 100) // 32
    return GAS_BASE + accounts * GAS_PER_ACCOUNT


def _nothing(tx: Transaction, row: dict[str, Any]) -> None:
    return
