"""Watches the deposit addresses of one network: what arrives there is its wallet's balance, once, whatever the chain does.

Only blocks below the confirmation depth are read, each range in one unit with the cursor's move: a restart goes on where the
last one stopped, and of two replicas one finds the cursor moved and books nothing. A changed hash at the cursor means that the
chain was reorganised below the depth: then the last blocks are read again and compared with the books. All nodes are asked;
what most of them say counts, and while they disagree nothing is booked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from typing import Any

from contracts import operators
from payments import forwarders, leases, wallet_accounts
from payments.chain.batches import forwarder_address
from payments.chain.logs import Log
from payments.chain.networks import Network, Token
from payments.chain.rpc import Request, Rpc, RpcError, RpcUnavailable
from payments.chain.transactions import TRANSFER_TOPIC, address_topic, encode_balance_of, selector
from payments.forwarders import Address, Cursor, Movement
from payments.leases import LeaseLost, Leases
from payments.store import Store, StoreBusy, Transaction

RANGE_MAX = 2_000
"""Blocks in one query; public nodes refuse more."""
ADDRESSES_MAX = 500
"""Addresses in one query."""
REORG_BLOCKS = 256
"""How far is read again after a reorganisation below the confirmation depth."""
REGISTER_WAIT_S = 5.0
"""How long a new address waits for a moment in which the reading of the chain does not overtake it."""
REGISTER_PAUSE_S = 0.02

log = logging.getLogger(__name__)


class FactoryMismatch(Exception):
    """The deposit factory is not one that pays this treasury: money sent to its addresses would go elsewhere."""


class Deposits:
    """The deposits of one network.

    Args:
        store: The database.
        rpc: The chain.
        network: Its tokens.
        treasury: Who is swept to, lower-case hex.
        factory: The operator's `DepositForwarders`, lower-case hex.
        confirmations: Blocks on top of a deposit after which it is credited.
        leased: The leases of this process, where several share the database: one of them watches.
        interval_s: How often the chain is looked at.
    """

    def __init__(
        self,
        store: Store,
        rpc: Rpc,
        network: Network,
        treasury: str,
        factory: str,
        *,
        confirmations: int = 2,
        leased: Leases | None = None,
        interval_s: float = 2.0,
    ) -> None:
        self.network, self.treasury, self.factory = network, treasury.lower(), factory.lower()
        self.credited = 0
        self._store, self._rpc = store, rpc
        self._implementation = operators.forwarder(self.treasury).address
        self._confirmations, self._leased, self._interval_s = confirmations, leased, interval_s
        self._lease = f"watcher:{network.chain_id}"
        self._task: asyncio.Task[None] | None = None

    def address_of(self, wallet: str) -> str:
        """Where a wallet (lower-case hex) deposits; computed, not asked."""
        return forwarder_address(self.factory, self._implementation, wallet)

    async def start(self) -> None:
        """Check the factory, begin to watch.

        Raises:
            FactoryMismatch: Its addresses would not pay the treasury.
            RpcError, RpcUnavailable: It cannot be asked.
        """
        await self.verify()
        await self._begin()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Watch no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def verify(self) -> None:
        """Prove on the chain that what is computed here is what the factory would make.

        Raises:
            FactoryMismatch: It is not.
        """
        probe = "0x" + "11" * 20
        data = selector("addressOf(bytes32)") + bytes(12) + bytes.fromhex(probe[2:])
        try:
            answer = await self._rpc.call("eth_call", [{"to": self.factory, "data": "0x" + data.hex()}, "latest"])
        except RpcError as error:
            raise FactoryMismatch(f"{self.factory} is no deposit factory: {error.message}") from None
        if len(answer) != 66 or "0x" + answer[-40:].lower() != self.address_of(probe):
            raise FactoryMismatch(
                f"{self.factory} on {self.network.caip2} is no deposit factory of the treasury {self.treasury}; "
                "deploy one with `farebox contracts deploy`, or leave deposit_factory out"
            )

    async def register(self, wallet: str) -> str:
        """Give a wallet its address, and watch it from now on. What is there already is credited.

        Raises:
            RpcUnavailable, RpcError: The chain cannot be asked.
        """
        each = Address(self.address_of(wallet), wallet, self.factory)
        end = time.monotonic() + REGISTER_WAIT_S
        while True:
            try:
                if await self._try_to_register(each):
                    return each.address
                overtaken: RpcError | RpcUnavailable = RpcUnavailable(
                    "the chain moves too fast to register an address, or its nodes disagree; try again later"
                )
            except RpcError as error:
                # After a long rest the cursor is at a block whose state nodes have no more; it moves on to newer ones.
                overtaken = error
            if time.monotonic() > end:
                raise overtaken
            await asyncio.sleep(REGISTER_PAUSE_S)

    async def _try_to_register(self, each: Address) -> bool:
        """Watch an address from the cursor on, and credit what it has there; False if the cursor has moved meanwhile, or the
        chain below it.

        What came lately is booked from its logs, as a reorganisation would find it; only what came before can be told from
        the balance alone, since nobody can read all logs of a chain.
        """
        known, seen = await self._store.read(
            lambda tx: (
                each.address in forwarders.addresses(tx, self.network.chain_id),
                forwarders.cursor(tx, self.network.chain_id),
            )
        )
        if known:
            return True
        if seen is None:
            await self._begin()
            return False
        lately = await self._read(None, _first_again(seen), seen.block_number, {each.address: each})
        held = await self._held(each.address, seen)
        if lately is None or lately[0] != seen or held is None:
            return False
        movements = lately[1]
        for movement in movements:
            held[movement.token] -= movement.value if movement.direction == "in" else -movement.value
        if min(held.values()) < 0:
            log.warning("a node of %s has logs at %s that its state knows nothing of", self.network.caip2, each.address)
            return False
        return await self._store.write(lambda tx: self._register(tx, each, seen, held, movements))

    async def catch_up(self) -> int:
        """Read and book everything that is deep enough; returns how many movements were new.

        Raises:
            RpcError, RpcUnavailable: The chain cannot be read now.
        """
        await self._begin()
        total = 0
        while (booked := await self.round()) is not None:
            total += booked
        return total

    async def round(self) -> int | None:
        """Read the next range; returns how many movements were new, or None if there is nothing to read now.

        Raises:
            RpcError, RpcUnavailable: The chain cannot be read now.
            LeaseLost: Another process watches.
        """
        head = int(await self._rpc.call("eth_blockNumber"), 16)
        # The head first: whoever learns an address after this cannot be paid at it below that block.
        seen, known = await self._store.read(
            lambda tx: (
                forwarders.cursor(tx, self.network.chain_id),
                forwarders.addresses(tx, self.network.chain_id),
            )
        )
        if seen is None or head - self._confirmations <= seen.block_number:
            return None
        to_block = min(head - self._confirmations, seen.block_number + RANGE_MAX)
        read = await self._read(seen, seen.block_number + 1, to_block, known)
        if read is None:
            return None
        to, movements, reorganised = read
        since = seen.block_number + 1
        if reorganised:
            since = _first_again(seen)
            log.warning(
                "%s was reorganised below block %d; reading again from %d", self._lease, seen.block_number, since
            )
            again = await self._read(None, since, to_block, known)
            if again is None:
                return None
            to, movements, _ = again
        return await self._store.write(lambda tx: self._book(tx, seen, to, since, movements, known))

    # --- reading ------------------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        """The first time, everything begins at today's depth: no address was known before."""
        if await self._store.read(lambda tx: forwarders.cursor(tx, self.network.chain_id)) is not None:
            return
        head = int(await self._rpc.call("eth_blockNumber"), 16)
        block = await self._rpc.call("eth_getBlockByNumber", [hex(max(head - self._confirmations, 0)), False])
        if block is None:
            raise RpcUnavailable("the node does not know the block below its head")
        at = Cursor(int(block["number"], 16), block["hash"])
        await self._store.write(lambda tx: forwarders.advance(tx, self.network.chain_id, None, at))

    async def _held(self, address: str, at: Cursor) -> dict[Token, int] | None:
        """What an address has at a block, in atomic units by token; None if the block is in the chain no more."""
        call = "0x" + encode_balance_of(address).hex()
        requests: list[Request] = [
            ("eth_call", ({"to": token.address, "data": call}, hex(at.block_number))) for token in self.network.tokens
        ]
        *answers, block = await self._rpc.ask([*requests, ("eth_getBlockByNumber", (hex(at.block_number), False))])
        if block is None or block["hash"] != at.block_hash:
            return None
        return {token: int(answer, 16) for token, answer in zip(self.network.tokens, answers, strict=True)}

    async def _read(
        self, seen: Cursor | None, from_block: int, to_block: int, known: dict[str, Address]
    ) -> tuple[Cursor, list[Movement], bool] | None:
        """What most nodes say of a range: its last block, the movements in it, and whether `seen` is in the chain no more."""
        requests: list[Request] = [("eth_getBlockByNumber", (hex(to_block), False))]
        if seen is not None:
            requests.append(("eth_getBlockByNumber", (hex(seen.block_number), False)))
        first_logs = len(requests)
        tokens = [token.address for token in self.network.tokens]
        ordered = sorted(known)
        for start in range(0, len(ordered), ADDRESSES_MAX):
            names = [address_topic(address) for address in ordered[start : start + ADDRESSES_MAX]]
            window = {"address": tokens, "fromBlock": hex(from_block), "toBlock": hex(to_block)}
            requests.append(("eth_getLogs", (window | {"topics": [TRANSFER_TOPIC, None, names]},)))
            requests.append(("eth_getLogs", (window | {"topics": [TRANSFER_TOPIC, names]},)))
        votes: Counter[Any] = Counter()
        answers: dict[Any, tuple[Cursor, list[Movement], bool]] = {}
        for replies in await self._rpc.ask_each(requests):
            try:
                answer = self._understand(replies, seen, first_logs, from_block, to_block, known)
            except (KeyError, TypeError, ValueError, IndexError):
                log.warning("a node of %s answered nonsense about deposits", self.network.caip2)
                continue
            if answer is not None:
                name = (answer[0], tuple(sorted((each.id, each.value, each.address) for each in answer[1])), answer[2])
                votes[name] += 1
                answers[name] = answer
        if not votes:
            return None
        (best, count), *others = votes.most_common()
        if others and others[0][1] == count:
            log.warning("the nodes of %s disagree about deposits up to block %d", self.network.caip2, to_block)
            return None
        return answers[best]

    def _understand(
        self,
        replies: list[Any],
        seen: Cursor | None,
        first_logs: int,
        from_block: int,
        to_block: int,
        known: dict[str, Address],
    ) -> tuple[Cursor, list[Movement], bool] | None:
        """One node's answer; None if it is behind or refuses."""
        if any(isinstance(reply, RpcError) for reply in replies) or None in replies:
            return None
        last = replies[0]
        if int(last["number"], 16) != to_block:
            return None
        reorganised = seen is not None and replies[1]["hash"] != seen.block_hash
        movements: dict[str, Movement] = {}
        for logs in replies[first_logs:]:
            for each in logs:
                movement = self._movement(each, known)
                if movement is None or not from_block <= movement.block_number <= to_block:
                    raise ValueError("a log that was not asked for")
                movements[movement.id] = movement
        ordered = sorted(movements.values(), key=lambda movement: (movement.block_number, movement.log_index))
        return Cursor(to_block, last["hash"]), ordered, reorganised

    def _movement(self, each: Log, known: dict[str, Address]) -> Movement | None:
        token = self.network.token_at(each["address"])
        topics = each["topics"]
        if token is None or each.get("removed") or len(topics) != 3 or topics[0] != TRANSFER_TOPIC:
            return None
        sender, recipient = ("0x" + topic[-40:].lower() for topic in topics[1:])
        if recipient in known:
            return _movement("in", token, recipient, sender, each)
        return _movement("out", token, sender, recipient, each) if sender in known else None

    # --- booking ------------------------------------------------------------------------------------------------------

    def _book(
        self,
        tx: Transaction,
        seen: Cursor,
        to: Cursor,
        since: int,
        movements: list[Movement],
        known: dict[str, Address],
    ) -> int | None:
        if self._leased is not None:
            leases.require(tx, self._lease, self._leased.owner)
        if not forwarders.advance(tx, self.network.chain_id, seen, to):
            return None
        still, new, gone = forwarders.match(forwarders.known_since(tx, self.network.chain_id, since), movements)
        for movement_id, each in still:
            forwarders.relocate(tx, movement_id, each)
        for movement_id in gone:
            log.error("a reorganisation took the movement %s away", movement_id)
            forwarders.reverse(tx, movement_id)
        booked = [each for each in new if forwarders.book(tx, each, known[each.address].wallet, self.treasury)]
        self.credited += sum(each.direction == "in" for each in booked)
        return len(booked)

    def _register(
        self, tx: Transaction, each: Address, seen: Cursor, before: dict[Token, int], movements: list[Movement]
    ) -> bool:
        if forwarders.cursor(tx, self.network.chain_id) != seen:
            return False
        wallet_accounts.open_account(tx, each.wallet)
        if forwarders.register(tx, self.network.chain_id, each):
            for token, value in before.items():
                # Deeper than anything that is ever read again: there is no log that would be found for it.
                name, deep = f"before-{each.address}-{token.symbol}", seen.block_number - REORG_BLOCKS - 1
                earlier = Movement("in", token, each.address, "", value, name, 0, deep)
                forwarders.book(tx, earlier, each.wallet, self.treasury)
            for movement in movements:
                forwarders.book(tx, movement, each.wallet, self.treasury)
        return True

    async def _run(self) -> None:
        while True:
            try:
                if self._leased is None or await self._leased.acquire(self._lease):
                    await self.catch_up()
            except LeaseLost:
                log.info("another process watches %s", self._lease)
            except (RpcUnavailable, RpcError, StoreBusy) as error:
                log.warning("deposits on %s must wait: %s", self.network.caip2, error)
            except Exception:
                # Whatever a node makes up, tomorrow's deposits are watched all the same.
                log.exception("watching deposits on %s failed", self.network.caip2)
            await asyncio.sleep(self._interval_s)


def _first_again(seen: Cursor) -> int:
    """The first block that a reorganisation noticed at `seen` has read again."""
    return max(seen.block_number - REORG_BLOCKS, 0)


def _movement(direction: forwarders.Direction, token: Token, address: str, other: str, each: Log) -> Movement:
    return Movement(
        direction=direction,
        token=token,
        address=address,
        other=other,
        value=int(each["data"], 16),
        transaction_hash=each["transactionHash"],
        log_index=int(each["logIndex"], 16),
        block_number=int(each["blockNumber"], 16),
    )
