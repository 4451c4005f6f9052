"""Keeps a network's channels: looks at the chain where something happened, and claims what was charged.

What is charged is claimed in batches once it is worth it or old enough, and at once where the payer has announced a withdrawal:
only what is claimed is safe from it. Top-ups are claimed at once too, for the balance that they are may be withdrawn only then.
A claim is signed with the key, and sent to the treasury, that its channels name: those of now may be others.
One process of all that share the database does this at a time.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence, Sized

from payments.chain.channel_contract import CHANNEL_TOPICS, encode_claim_and_settle
from payments.chain.logs import get_logs
from payments.chain.networks import BATCH_SETTLEMENT_ADDRESS, Token
from payments.chain.rpc import Rpc, RpcError, RpcUnavailable
from payments.channels import book
from payments.channels.book import Channel
from payments.channels.kinds import CLAIM_RETRY_MS
from payments.channels.services import ChannelServices
from payments.errors import PaymentError
from payments.leases import LeaseLost, Leases, require
from payments.money import atomic_to_nano_down, nano_to_atomic_down, nano_to_usd
from payments.settlement import outbox
from payments.settlement.alarms import Alarm
from payments.settlement.engine import Settlements
from payments.settlement.orders import SettlementOrder
from payments.store import StoreBusy, Transaction
from payments.verification.vouchers import claim_batch_digest, sign_digest
from payments.x402.channel_actions import CLAIMS_MAX, Claim

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
DUE_MAX = 1_000
"""Channels looked at in one round."""
ALARM_NANO_USD = 10_000_000
"""Less that cannot be claimed is not worth an alarm: anybody may owe us a little, and a key may be gone for good."""
REORGANISED_BLOCKS = 64
"""Blocks that are read again each time: what a reorganisation changed is looked at once more."""

_OWES = "chain_id = ? AND unclaimed_since_ms IS NOT NULL AND charged_nano_usd - lost_nano_usd - claimed_nano_usd >= ?"
_DUE = """
    {owes} AND token = ? AND receiver_authorizer IN ({authorizers}) AND claim_id IS NULL AND claim_from_ms <= ?
    AND marks = synced_marks
    ORDER BY CASE WHEN state = 'withdrawing' THEN 0 ELSE 1 END, unclaimed_since_ms LIMIT ?
"""
_OWING = f"""
    SELECT receiver_authorizer, token, COUNT(*), SUM(charged_nano_usd - lost_nano_usd - claimed_nano_usd) FROM channel
    WHERE {_OWES} GROUP BY receiver_authorizer, token
    HAVING SUM(charged_nano_usd - lost_nano_usd - claimed_nano_usd) >= ?
"""  # noqa: S608 - a condition of this module's


class ChannelKeeper:
    """Looks after the channels of one network.

    Args:
        services: Of the network.
        settlements: Started before this is.
        leases: This process's.
        claim_nano_usd: Claim once this much is outstanding in a token.
        claim_age_s: Claim what has been outstanding for this long.
        interval_s: How often to look.
        watch_s: How often to read the contract's events; far less than a channel's withdrawal delay.
    """

    def __init__(
        self,
        services: ChannelServices,
        settlements: Settlements,
        leases: Leases,
        *,
        claim_nano_usd: int,
        claim_age_s: float,
        interval_s: float = INTERVAL_S,
        watch_s: float = 15.0,
    ) -> None:
        self.claims = 0
        self._services = services
        self._store = services.store
        self._settlements = settlements
        self._rpc: Rpc = settlements.rpc
        self._leases = leases
        self._chain_id = services.network.chain_id
        self._lease = f"channels:{self._chain_id}"
        self._claim_nano_usd = claim_nano_usd
        self._claim_age_ms = int(claim_age_s * 1000)
        self._interval_s = interval_s
        self._watch_s = watch_s
        self._next_watch = 0.0
        self._touched: list[str] = []
        self._alarms: list[Alarm] = []
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin; what a crash left half-known is looked at first."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Stop beginning anything; what is durable is the settlement engine's."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            # Whatever one of these meets, the others go on: a node that refuses logs may still take claims.
            for part in (self._watch_in_time, self.sync_marked, self.claim_due):
                try:
                    if self._leases.held(self._lease) or await self._leases.acquire(self._lease):
                        await part()
                except (RpcUnavailable, RpcError, StoreBusy, PaymentError, LeaseLost) as error:
                    log.warning("channels must wait: %s", error)
                except Exception:
                    # Nothing that one channel meets may keep the others from being claimed in time.
                    log.exception("looking after channels failed")
            await asyncio.sleep(self._interval_s)

    # --- the chain ----------------------------------------------------------------------------------------------------

    async def _watch_in_time(self) -> None:
        if time.monotonic() >= self._next_watch:
            await self.watch()
            self._next_watch = time.monotonic() + self._watch_s

    async def watch(self) -> int:
        """Look at every channel of ours that the contract has had an event of since the last time; returns how many."""
        head = int(await self._rpc.call("eth_blockNumber", []), 16)
        cursor = await self._store.read(self._cursor)
        start = max(0, (head if cursor is None else min(cursor, head)) - REORGANISED_BLOCKS)
        logs = await get_logs(self._rpc, BATCH_SETTLEMENT_ADDRESS, [list(CHANNEL_TOPICS)], start, head)
        touched = list(dict.fromkeys(entry["topics"][1] for entry in logs))
        known = await self._store.read(
            lambda tx: [channel_id for channel_id in touched if book.find(tx, channel_id) is not None]
        )
        if cursor is None:
            # The first look at this chain: whatever happened before is in the channels' states.
            known = await self._store.read(
                lambda tx: [channel.id for channel in book.select(tx, "chain_id = ?", (self._chain_id,))]
            )
        await self._services.sync(known)
        # Their events are deep enough by now, or a reorganisation took them away.
        gone = [channel_id for channel_id in self._touched if channel_id not in touched]

        def unit(tx: Transaction) -> None:
            for channel_id in gone:
                book.mark(tx, channel_id, None)
            self._set_cursor(tx, head)

        await self._store.write(unit)
        self._touched = touched
        self._alarms = await self._look_at_keys()
        return len(known)

    def alarms(self) -> list[Alarm]:
        """What cannot be claimed with this configuration: its payers may take it out, and are served no more."""
        return self._alarms

    async def _look_at_keys(self) -> list[Alarm]:
        owing = await self._store.read(lambda tx: tx.execute(_OWING, (self._chain_id, 1, ALARM_NANO_USD)).fetchall())
        alarms = []
        for authorizer, token, count, nano_usd in owing:
            owed = f"{count} channels owe ${nano_to_usd(int(nano_usd))} that cannot be claimed"
            if authorizer not in self._services.authorizers:
                message = f"{owed}: the key of {authorizer}, which they name, is not among the signer keys; put it back"
                alarms.append(Alarm("unclaimable", authorizer, message))
            elif self._services.network.token_at(token) is None:
                message = f"{owed}: their token is not configured for {self._services.network.caip2}; put it back"
                alarms.append(Alarm("unclaimable", token, message))
        return alarms

    async def sync_marked(self) -> None:
        """Ask the chain about every channel that something happened to, as after a crash between the two."""
        tokens = [token.address for token in self._services.network.tokens]
        condition = f"chain_id = ? AND marks <> synced_marks AND token IN ({_marks(tokens)}) LIMIT ?"
        marked = await self._store.read(lambda tx: book.select(tx, condition, (self._chain_id, *tokens, DUE_MAX)))
        if marked:
            await self._services.sync([channel.id for channel in marked])

    # --- claims -------------------------------------------------------------------------------------------------------

    async def claim_due(self) -> int:
        """Begin to claim what is due; returns how many channels."""
        begun = 0
        for token in self._services.network.tokens:
            now = book.now_ms()
            due = self._due(await self._store.read(lambda tx, token=token, now=now: self._owing(tx, token, now)), now)  # type: ignore[misc]
            for start in range(0, len(due), CLAIMS_MAX):
                begun += await self.claim(due[start : start + CLAIMS_MAX], token)
        return begun

    def _owing(self, tx: Transaction, token: Token, now: int) -> list[Channel]:
        """What may be claimed now: at least a unit of the token, of which less cannot be."""
        authorizers, unit_nano_usd = self._services.authorizers, max(1, atomic_to_nano_down(1, token.decimals))
        condition = _DUE.format(owes=_OWES, authorizers=_marks(authorizers))
        return book.select(tx, condition, (self._chain_id, unit_nano_usd, token.address, *authorizers, now, DUE_MAX))

    def _due(self, channels: Sequence[Channel], now: int) -> list[Channel]:
        outstanding = sum(channel.claimable_nano_usd for channel in channels)
        oldest = min((channel.unclaimed_since_ms or now for channel in channels), default=now)
        if outstanding >= self._claim_nano_usd or oldest + self._claim_age_ms <= now:
            return list(channels)
        return [channel for channel in channels if channel.state == "withdrawing" or channel.uncollected_nano_usd]

    async def claim(self, channels: Sequence[Channel], token: Token) -> int:
        """Claim everything that is outstanding in these channels, as one settlement for each treasury and authorizer that they
        name; returns of how many channels. Those whose authorizer's key we do not have are left out."""
        together: dict[tuple[str, str], list[Channel]] = {}
        for channel in channels:
            together.setdefault((channel.config.receiver, channel.config.receiver_authorizer), []).append(channel)
        groups = [group for (_, signer), group in together.items() if signer in self._services.authorizers]
        return sum([await self._claim_together(group, token) for group in groups])

    async def _claim_together(self, channels: Sequence[Channel], token: Token) -> int:
        """The very call is tried first: a channel for which it would fail must not take the others' claims with it."""
        claims = [(channel, claim_of(channel, token)) for channel in channels]
        claims = [(channel, claim) for channel, claim in claims if claim.total > channel.on_chain.total_claimed]
        if not claims:
            return 0
        if not await self._would_succeed(claims, token):
            if len(claims) == 1:
                await self._postpone(claims[0][0])
                return 0
            middle = len(claims) // 2
            halves = (claims[:middle], claims[middle:])
            return sum([await self._claim_together([channel for channel, _ in half], token) for half in halves])
        settlement_id = await self._store.write(lambda tx: self._begin(tx, claims, token))
        if settlement_id is None:
            return 0
        self.claims += 1
        self._settlements.take_queued(settlement_id)
        return len(claims)

    async def _would_succeed(self, claims: Sequence[tuple[Channel, Claim]], token: Token) -> bool:
        data = self._call_data([claim for _, claim in claims], [channel.number for channel, _ in claims], token)
        call = {"to": BATCH_SETTLEMENT_ADDRESS, "data": "0x" + data.hex()}
        try:
            await self._rpc.call("eth_call", [call, "latest"])
        except RpcError as error:
            log.warning("a claim of %d channels would fail: %s", len(claims), error.message)
            return False
        return True

    def _call_data(self, claims: Sequence[Claim], numbers: Sequence[int], token: Token) -> bytes:
        entries = [(number, claim.voucher_amount, claim.total) for number, claim in zip(numbers, claims, strict=True)]
        config = claims[0].config
        authorizer = self._services.authorizers[config.receiver_authorizer]
        signature = sign_digest(authorizer.key, claim_batch_digest(entries, self._chain_id))
        return encode_claim_and_settle(claims, signature, config.receiver, token.address)

    def _begin(self, tx: Transaction, claims: Sequence[tuple[Channel, Claim]], token: Token) -> str | None:
        require(tx, self._lease, self._leases.owner)
        free = []
        for channel, claim in claims:
            current = book.find(tx, channel.id)
            if current is not None and current.claim_id is None and claim.total > current.on_chain.total_claimed:
                free.append((channel, claim))
        if not free:
            return None
        settlement_id = f"claim_{secrets.token_hex(16)}"
        for channel, claim in free:
            gain = claim.total - channel.on_chain.total_claimed
            tx.execute(
                "INSERT INTO channel_claim (settlement_id, channel_id, amount_nano_usd, total) VALUES (?, ?, ?, ?)",
                (settlement_id, channel.id, atomic_to_nano_down(gain, token.decimals), str(claim.total)),
            )
            book.put(tx, channel.id, claim_id=settlement_id)
        order = SettlementOrder(
            id=settlement_id,
            kind="channel_claim",
            reference=settlement_id,
            chain_id=self._chain_id,
            token=token.address,
            payer=BATCH_SETTLEMENT_ADDRESS,
            pay_to=free[0][0].config.receiver,
            value=sum(claim.total - channel.on_chain.total_claimed for channel, claim in free),
            authorization_nonce=None,
            call_to=BATCH_SETTLEMENT_ADDRESS,
            call_data=self._call_data([claim for _, claim in free], [channel.number for channel, _ in free], token),
            valid_before=0,
        )
        outbox.enqueue(tx, order)
        return settlement_id

    async def _postpone(self, channel: Channel) -> None:
        """Ask the chain what has become of a channel before its claim is tried again."""

        def unit(tx: Transaction) -> None:
            book.put(tx, channel.id, claim_from_ms=book.now_ms() + CLAIM_RETRY_MS)
            book.mark(tx, channel.id, None)

        await self._store.write(unit)

    def _cursor(self, tx: Transaction) -> int | None:
        row = tx.execute("SELECT block_number FROM chain_cursor WHERE asset = ?", (self._lease,)).fetchone()
        return None if row is None else int(row[0])

    def _set_cursor(self, tx: Transaction, block_number: int) -> None:
        require(tx, self._lease, self._leases.owner)
        tx.execute(
            "INSERT INTO chain_cursor (asset, block_number) VALUES (?, ?)"
            " ON CONFLICT (asset) DO UPDATE SET block_number = excluded.block_number",
            (self._lease, block_number),
        )


def _marks(values: Sized) -> str:
    return ",".join("?" * len(values))


def claim_of(channel: Channel, token: Token) -> Claim:
    """All that was charged, as far as the payer signed for it and the channel holds it."""
    charged = nano_to_atomic_down(channel.charged_nano_usd, token.decimals)
    total = min(charged, channel.voucher, channel.on_chain.balance)
    return Claim(channel.config, channel.voucher, channel.signature, total)
