"""What keeps a signer's queue of transactions moving: deadlines, fee bumps, and gaps in its nonces.

A chain executes an account's transactions strictly by nonce, so one that cannot be mined holds up all that follow. Each round
looks at what the chain waits for from every account, and provides it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

from payments.chain.gas import BytesGas
from payments.chain.rpc import Reply, Request, Rpc, RpcError, RpcUnavailable
from payments.chain.signers import FeeEstimate, Signer
from payments.settlement import loading, outgoing, states
from payments.settlement.account_nonces import user_of
from payments.settlement.courier import Courier
from payments.settlement.outbox import Entry
from payments.settlement.outgoing import Outgoing
from payments.store import Store, Transaction

log = logging.getLogger(__name__)

STALL_BLOCKS = 10
"""A transaction that is not mined in so many blocks needs help."""
DEADLINE_MARGIN_S = 15
"""The chain's clock is asked this long after a deadline, in case ours is ahead."""
NONCE_LOST_ROUNDS = 5
"""Rounds in which a nonce must be seen consumed by an unknown transaction before ours gets a new one."""

Expire = Callable[[Entry, int], object]


class Repairs:
    """Looks after the accounts of one network.

    Args:
        kinds: The kinds of orders that are known here.
        patience_s: How long a transaction may stay unmined before its fees are raised.
        entries: The engine's open entries by id.
        transactions: The engine's open transactions by id; those made here are put there by `adopt`.
        adopt: Takes a transaction into the engine's care: a new one that fills a gap, or an old one that is needed again.
        abandon: Takes one out of it that nothing depends on any more.
        expire: Starts the decision of an entry whose deadline is past at a block.
    """

    def __init__(
        self,
        store: Store,
        rpc: Rpc,
        chain_id: int,
        kinds: Collection[str],
        *,
        patience_s: float,
        fees: FeeEstimate,
        bytes_gas: BytesGas,
        courier: Courier,
        entries: Mapping[str, Entry],
        transactions: Mapping[str, Outgoing],
        adopt: Callable[[Outgoing], None],
        abandon: Callable[[Outgoing], None],
        expire: Expire,
    ) -> None:
        self._store, self._rpc, self._chain_id, self._kinds = store, rpc, chain_id, kinds
        self._patience_s = patience_s
        self._fees, self._bytes_gas, self._courier = fees, bytes_gas, courier
        self._entries, self._transactions = entries, transactions
        self._adopt, self._abandon, self._expire = adopt, abandon, expire
        self._troubles: dict[str, str] = {}
        self._lost: dict[str, int] = {}
        self._expiring: set[str] = set()

    def report(self, transaction: Outgoing, trouble: str) -> None:
        """A node refused a transaction; see `Courier`."""
        self._troubles[transaction.id] = trouble

    async def round(self) -> None:
        """Look at everything once.

        Raises:
            LeaseLost: An account is another process's now.
            RpcUnavailable: No node answered.
            RpcError: A node refused a question.
        """
        await self._look_at_deadlines()
        for notes in (self._troubles, self._lost):
            for transaction_id in notes.keys() - self._transactions.keys():
                del notes[transaction_id]
        now = time.monotonic()
        stuck = {
            transaction.signer.address: transaction.signer
            for transaction in self._transactions.values()
            if transaction.signer is not None
            and (transaction.id in self._troubles or _age(transaction, now) > self._patience_s / 3)
        }
        if not stuck:
            return
        signers = list(stuck.values())
        requests: list[Request] = [("eth_getTransactionCount", (signer.address, "latest")) for signer in signers]
        for signer, count in zip(signers, await self._rpc.ask(requests), strict=True):
            await self._look_at_signer(signer, int(count, 16), now)

    async def _look_at_deadlines(self) -> None:
        now = time.time()
        self._expiring &= self._entries.keys()
        expired = [
            entry
            for entry in self._entries.values()
            if entry.state in states.OPEN and 0 < entry.order.valid_before < now - DEADLINE_MARGIN_S
        ]
        if not expired:
            return
        block = await self._rpc.call("eth_getBlockByNumber", ("latest", False))
        for entry in expired:
            if int(block["timestamp"], 16) > entry.order.valid_before and entry.id not in self._expiring:
                self._expiring.add(entry.id)
                self._expire(entry, int(block["number"], 16))

    async def _look_at_signer(self, signer: Signer, chain_nonce: int, now: float) -> None:
        mine = [transaction for transaction in self._transactions.values() if transaction.signer is signer]
        for transaction in mine:
            if transaction.signer_nonce < chain_nonce:
                await self._look_at_consumed(transaction)
        waiting = sorted(
            (each for each in mine if each.signer_nonce >= chain_nonce), key=lambda each: each.signer_nonce
        )
        if not waiting:
            return
        if waiting[0].signer_nonce > chain_nonce:
            await self._fill(signer, chain_nonce, waiting[0].signer_nonce)
            return
        first = waiting[0]
        trouble = self._troubles.pop(first.id, None)
        if trouble == "underpriced" or _age(first, now) > self._patience_s:
            await self._bump(first)

    async def _look_at_consumed(self, transaction: Outgoing) -> None:
        """The nonce is used. By one of our forms: its receipt will come. By a stranger with our key: start anew.

        Signing again is safe only because the chain proves that no earlier form can be mined any more.
        """
        assert transaction.signer is not None
        requests: list[Request] = [("eth_getTransactionCount", (transaction.signer.address, "latest"))]
        requests += [("eth_getTransactionReceipt", (each,)) for each in transaction.hashes]
        # Each node's count and receipts in one answer: two nodes at different blocks would contradict each other.
        answers = await self._rpc.ask_each(requests)
        if not answers:
            raise RpcUnavailable("no node says whether a transaction is lost")
        if not all(_says_lost(replies, transaction.signer_nonce) for replies in answers):
            self._lost.pop(transaction.id, None)
            return
        self._lost[transaction.id] = self._lost.get(transaction.id, 0) + 1
        if self._lost[transaction.id] < NONCE_LOST_ROUNDS or self._fees.fees is None:
            return
        if not await self._is_used_by_another(transaction):
            self._lost.pop(transaction.id, None)
            return
        if not any(entry.state == "submitted" for entry in transaction.entries):
            await self._store.write(lambda tx: _give_up(tx, transaction))
            self._abandon(transaction)
            return
        pending = int(await self._rpc.call("eth_getTransactionCount", (transaction.signer.address, "pending")), 16)
        transaction.signer.nonce_floor = max(transaction.signer.nonce_floor or 0, pending)
        log.warning(
            "somebody else used nonce %d of %s; transaction %s gets a new one",
            transaction.signer_nonce,
            transaction.signer.address,
            transaction.id,
        )
        fees = self._fees.fees
        await self._store.write(lambda tx: outgoing.move_to_new_nonce(tx, transaction, fees))
        del self._lost[transaction.id]
        self._troubles.pop(transaction.id, None)
        self._courier.carry(transaction)

    async def _is_used_by_another(self, transaction: Outgoing) -> bool:
        """Whether a block shows that the nonce went to none of our forms: receipts may only be late."""
        assert transaction.signer is not None
        head = int(await self._rpc.call("eth_blockNumber"), 16)
        try:
            user = await user_of(self._rpc, transaction.signer.address, transaction.signer_nonce, head)
        except RpcError as error:
            # A node that forgets old states cannot tell. An authorization is executed once, whoever sends it how often.
            log.warning("cannot see who used nonce %d: %s", transaction.signer_nonce, error)
            return all(entry.order.authorization_nonce is not None for entry in transaction.entries)
        return user is not None and user not in transaction.hashes

    async def _fill(self, signer: Signer, start: int, end: int) -> None:
        """Provide what the chain waits for below our lowest open transaction: stored bytes, or an empty transaction."""
        fees = self._fees.fees
        if fees is None:
            return
        stored = await self._store.read(lambda tx: outgoing.load_from(tx, self._chain_id, signer, start))
        by_nonce = {transaction.signer_nonce: transaction for transaction in stored}
        for nonce in range(start, min(end, start + 16)):
            if nonce in by_nonce:
                self._adopt(await self._store.write(partial(_again, transaction=by_nonce[nonce], kinds=self._kinds)))
                continue
            log.warning("nonce %d of %s is a gap; filling it", nonce, signer.address)
            unit = partial(
                outgoing.fill_gap,
                chain_id=self._chain_id,
                signer=signer,
                nonce=nonce,
                fees=fees,
                bytes_gas=self._bytes_gas.besides(0),
            )
            self._adopt(await self._store.write(unit))

    async def _bump(self, transaction: Outgoing) -> None:
        fees = self._fees.raised(transaction.fees)
        if fees is None:
            log.warning("transaction %s stalls, and offers already what we offer at most", transaction.id)
            return
        if transaction.id not in self._transactions:
            return
        await self._store.write(lambda tx: outgoing.replace(tx, transaction, fees))
        log.warning("transaction %s stalls; sent again for %d wei a unit of gas", transaction.id, fees.max_fee)
        self._courier.carry(transaction)


def _again(tx: Transaction, transaction: Outgoing, kinds: Collection[str]) -> Outgoing:
    """A transaction that was in a block which is gone, or was decided otherwise, with what it carries."""
    outgoing.require_care(tx, transaction)
    outgoing.exclude(tx, transaction)
    return loading.with_entries(tx, [transaction], kinds)[0]


def _give_up(tx: Transaction, transaction: Outgoing) -> None:
    outgoing.require_care(tx, transaction)
    states.move_transaction(tx, transaction.id, "lost")


def _says_lost(replies: Sequence[Reply], nonce: int) -> bool:
    """Whether a node has passed a nonce and has no receipt of ours: of the account's count, and of each of our forms."""
    count, *receipts = replies
    return not isinstance(count, RpcError) and int(str(count), 16) > nonce and all(each is None for each in receipts)


def _age(transaction: Outgoing, now: float) -> float:
    """Seconds since a node took the newest form; 0 before."""
    return now - transaction.first_sent if transaction.first_sent else 0.0
