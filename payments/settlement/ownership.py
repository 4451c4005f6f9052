"""Which accounts this process sends transactions with: each account belongs to one process at a time, by a lease.

An account's transactions have one sequence of nonces, so two processes that sign with one key at once would replace each
other's transactions. Every process keeps trying to get the leases of all its accounts, and works without those of others,
who send its orders. A lease that its owner gave back or stopped renewing is another's at once, or after its time.

Accounts that do the same work are spread: every process says which it wants, takes no more than its share of them, and gives
back what is more than that when others come.

One more lease, the *caretaker's*, is for what belongs to no account of anybody alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from fractions import Fraction

from payments import leases
from payments.chain.rpc import RpcError, RpcUnavailable
from payments.chain.signers import Signer
from payments.leases import LeaseLost, Leases
from payments.store import Store, StoreBusy, Transaction

log = logging.getLogger(__name__)

LOOKS_PER_TTL = 15
"""How often a process looks for leases that have expired, while one lasts: so much longer nobody sends at most."""


class Ownership:
    """The accounts of one network, as far as they are this process's.

    Args:
        store: The database.
        held: This process's leases, renewed by whoever made them.
        chain_id: Of the network.
        accounts: All that the configuration names.
        spread: Those of them that any process may as well use as another.
        take: Takes over what is under way of the given accounts, whose leases are held.
        drop: Lets go of an account that is this process's no more.
    """

    def __init__(
        self,
        store: Store,
        held: Leases,
        chain_id: int,
        accounts: Iterable[Signer],
        spread: Iterable[Signer],
        *,
        take: Callable[[list[Signer]], Awaitable[None]],
        drop: Callable[[Signer], None],
    ) -> None:
        self._store, self._leases = store, held
        self._signers = {leases.signer_name(chain_id, signer.address): signer for signer in accounts}
        self._spread = {leases.signer_name(chain_id, signer.address): signer for signer in spread}
        self._wishes = [leases.wish_name(name, held.owner) for name in self._spread]
        self._free_since: dict[str, float] = {}
        self._caretaker = f"caretaker:{chain_id}"
        self._take, self._drop = take, drop
        self._try = asyncio.Event()
        self._sits_out_until = 0.0
        self._task: asyncio.Task[None] | None = None
        self._unlisten: Callable[[], None] | None = None

    @property
    def caretaker(self) -> bool:
        """Whether this process looks after what nobody else does."""
        return self._leases.held(self._caretaker)

    async def start(self) -> None:
        """Take what is free, and keep trying for the rest. On a database of one process all of it is free.

        Raises:
            RpcUnavailable, RpcError: What was taken cannot be taken over, because the chain cannot be asked.
        """
        if not self._store.shared:
            for name in (*self._signers, self._caretaker):
                await self._leases.seize(name)
            await self._take_over(list(self._signers.values()))
            return
        self._unlisten = await self._store.listen(leases.FREED, lambda _: self._try.set())
        await self.round()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Give everything back, so that others go on at once."""
        if self._unlisten is not None:
            self._unlisten()
            self._unlisten = None
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for signer in self._signers.values():
            self._let_go(signer)
        for name in (*self._signers, self._caretaker, *self._wishes):
            with contextlib.suppress(StoreBusy):  # then it expires
                await self._leases.release(name)

    def lost(self, name: str) -> None:
        """A unit found that a lease is another process's."""
        self._leases.lost(name)
        signer = self._signers.get(name)
        if signer is not None and signer.mine:
            log.warning("the account %s is another process's now", signer.address)
            self._let_go(signer)
        self._try.set()

    async def round(self) -> None:
        """Try once for what is not held, and let go of what is held no more, or is more than this process's share.

        Raises:
            RpcUnavailable, RpcError: What was taken cannot be taken over; it is given back.
            StoreBusy: The database takes nothing now.
        """
        for name, signer in self._signers.items():
            if signer.mine and not self._leases.held(name):
                self.lost(name)
        if time.monotonic() < self._sits_out_until:
            return
        for wish in self._wishes:
            if not self._leases.held(wish):
                await self._leases.acquire(wish)
        free, share = await self._store.read(self._look)
        for name in self._to_take(free, share):
            await self._leases.acquire(name)
        for name in self._to_give(share):
            self._let_go(self._spread[name])
            await self._leases.release(name)
        gained = [signer for name, signer in self._signers.items() if not signer.mine and self._leases.held(name)]
        if not gained:
            return
        try:
            await self._take_over(gained)
        except LeaseLost as lost:
            # Stopped between the two, perhaps.
            self.lost(lost.name)
        except (RpcUnavailable, RpcError):
            # Perhaps another process reaches the chain; if none does, they must not hand it round and round.
            self._sits_out_until = time.monotonic() + self._leases.ttl_s
            for name, signer in self._signers.items():
                if signer in gained:
                    await self._leases.release(name)
            for wish in self._wishes:
                await self._leases.release(wish)
            raise

    def _look(self, tx: Transaction) -> tuple[list[str], int]:
        """What is not held and free, and how many of the accounts that are spread are this process's share."""
        wanted = [name for name in (*self._signers, self._caretaker) if not self._leases.held(name)]
        ours = (None, self._leases.owner)
        free = [name for name in wanted if leases.holder(tx, name) in ours]
        return free, math.ceil(sum(Fraction(1, max(leases.wishes(tx, name), 1)) for name in self._spread))

    def _to_take(self, free: Sequence[str], share: int) -> Iterator[str]:
        """Of what is free: what is not spread, the share of what is, and what nobody has taken for long."""
        now = time.monotonic()
        self._free_since = {name: self._free_since.get(name, now) for name in free}
        held = sum(self._leases.held(name) for name in self._spread)
        for name in free:
            forgotten = now - self._free_since[name] > self._leases.ttl_s
            if name not in self._spread or held < share or forgotten:
                held += name in self._spread
                yield name

    def _to_give(self, share: int) -> list[str]:
        """What is more than the share, the idlest first."""
        busy = {name: signer.in_flight for name, signer in self._spread.items() if signer.mine}
        return sorted(busy, key=lambda name: busy[name])[: max(len(busy) - share, 0)]

    async def _take_over(self, gained: list[Signer]) -> None:
        await self._take(gained)
        log.info("this process sends with %s", ", ".join(signer.address for signer in gained))

    def _let_go(self, signer: Signer) -> None:
        if signer.mine:
            signer.mine, signer.in_flight = False, 0
            self._drop(signer)

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._leases.ttl_s / LOOKS_PER_TTL):
                    await self._try.wait()
            self._try.clear()
            try:
                await self.round()
            except (RpcUnavailable, RpcError, StoreBusy) as error:
                log.warning("accounts cannot be taken over now: %s", error)
            except Exception:
                # Without this loop nobody would send once the others are gone.
                log.exception("looking for free accounts failed")
