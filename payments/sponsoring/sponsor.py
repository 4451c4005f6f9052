"""Brings payers' approvals of Permit2 to the chain, with coin of ours where they have none, and lets the payments go then.

An ordinary node cannot carry funding, approval and settlement in one: each follows the other's block, so that a payer may take
the coin and use its nonce for something else, or take its approval back before our settlement. What that can cost is bounded:
coin is given once per payer and token, within a budget of the hour, and no more after a few losses; a settlement that reverts
counts against its payer as any other. An exact payment, and whatever a facilitator settles, is bound to its approval in the
same commit, so that hanging up does not get anybody an approval for nothing; a gateway's `upto` and channels take money later,
and so may come to nothing.

Every step is a state in the database (`records`), and whichever process looks carries on from there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from payments.chain.networks import PERMIT2_ADDRESS, Token
from payments.chain.rpc import Request, RpcError, RpcUnavailable
from payments.chain.transactions import encode_allowance, encode_nonce_bitmap, nonce_is_set
from payments.errors import AllowanceRequired, PaymentRefused, SettlementUnavailable
from payments.settlement import states
from payments.settlement.engine import Settlements
from payments.settlement.orders import SettlementOrder
from payments.sponsoring import prospects, records
from payments.sponsoring.funding import GAS
from payments.sponsoring.records import Budget, Sponsored, Wanted
from payments.store import Store, StoreBusy, Transaction
from payments.verification.approvals import check_approval
from payments.x402.extensions.erc20_approval import Erc20Approval

log = logging.getLogger(__name__)

PATIENCE_S = 300
"""How long an approval may take to be mined, if its payment does not expire before."""
POLLS_PER_BLOCK = 4
POLL_S_MIN, POLL_S_MAX = 0.05, 1.0
IDLE_S = 2.0
"""How often the database is asked for what other processes began and left behind."""
SEND_AGAIN_S = 2.0
REPLACED_LOOKS = 5
"""How often a nonce must be seen used up without an allowance: nodes are not all at the same block."""


class Sponsor:
    """The approvals of one network.

    Args:
        store: The database.
        settlements: The network's engine; it knows `payments.sponsoring.funding`.
        budget: What may be given away. With nothing to give, approvals are brought to the chain no more, and those that were
            begun come to their end.
    """

    def __init__(self, store: Store, settlements: Settlements, budget: Budget) -> None:
        self.budget = budget
        self._store, self._settlements = store, settlements
        self._network, self._rpc = settlements.network, settlements.rpc
        block_s = self._network.block_time_ms / 1000
        self._poll_s = min(max(block_s / POLLS_PER_BLOCK, POLL_S_MIN), POLL_S_MAX)
        self._wake = asyncio.Event()
        self._sent: dict[str, float] = {}
        self._replaced: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Carry on with what is under way, and with what begins."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Stop looking; everything is in the database."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def active(self) -> bool:
        """Whether approvals are brought to the chain at all."""
        return self.budget.hourly_wei > 0

    async def consider(
        self,
        approval: Erc20Approval | None,
        refused: AllowanceRequired,
        token: Token,
        order: SettlementOrder,
        sender: str | None = None,
        client: str = "",
    ) -> Wanted:
        """Whether an approval that came with a payment would come through, and the payment after it; nothing is written.

        Args:
            approval: As it came, checked before.
            refused: Why the payment cannot be settled without one.
            token: What it approves.
            order: What would settle the payment, over Permit2.
            sender: Who alone can make its call, lower-case hex; None if anybody can.
            client: Who asks, for a facilitator.

        Raises:
            AllowanceRequired: `refused`, if there is no approval or none is brought to the chain here; or it costs more than is
                given to anybody.
            PaymentRefused: It, or the payment, would fail.
            SettlementUnavailable: The chain cannot be asked.
        """
        if approval is None or not self.active:
            raise refused
        assert order.authorization_nonce is not None
        transaction = check_approval(approval, order.payer, order.value, token, self._network)
        wei = await prospects.lacking(self._rpc, transaction, order, sender or self._settlements.signers[0].address)
        if wei > self.budget.payer_wei:
            raise AllowanceRequired(
                "sponsoring_too_dear",
                f"the approval's transaction may cost {wei} wei more than the wallet has, and {self.budget.payer_wei} are"
                " given at most: sign one with a lower maxFeePerGas, or approve with coin of the wallet's own",
            )
        fees = self._settlements.fees.fees
        own_gas = GAS * (0 if fees is None else fees.max_fee)
        return Wanted(
            token=token.address,
            transaction=transaction,
            needed=order.value,
            permit2_nonce=order.authorization_nonce,
            funding_wei=wei,
            cost_wei=wei + own_gas if wei else 0,
            give_up_ms=min(states.now_ms() + PATIENCE_S * 1000, order.valid_before * 1000),
            client=client,
        )

    async def approving(
        self,
        approval: Erc20Approval | None,
        refused: AllowanceRequired,
        token: Token,
        order: SettlementOrder,
        sender: str | None,
        client: str,
    ) -> Approving:
        """As `consider`, for an order that is to be written together with its approval."""
        return Approving(self, await self.consider(approval, refused, token, order, sender, client))

    def begin(self, tx: Transaction, wanted: Wanted, order: SettlementOrder | None) -> str | None:
        """See `payments.sponsoring.records.begin`; once it is durable, `begun` has to be told."""
        return records.begin(tx, wanted, self.budget, order, self._settlements.from_block)

    def begun(self, funding_id: str | None = None, settlement_id: str | None = None) -> None:
        """What `begin` wrote is durable: look after it."""
        for each in (funding_id, settlement_id):
            if each is not None:
                self._settlements.take_queued(each)
        self._wake.set()

    async def approve(self, wanted: Wanted, timeout_s: float) -> None:
        """Bring an approval to the chain and wait for it, for a payment that is settled later.

        Raises:
            AllowanceRequired, PaymentRefused: It was not begun, or has failed.
            SettlementUnavailable: It is still on its way after `timeout_s`, or cannot be begun now.
        """
        funding_id = await self._store.write(lambda tx: self.begin(tx, wanted, None))
        self.begun(funding_id)
        until = time.monotonic() + timeout_s
        while True:
            found = await self._store.read(lambda tx: records.find(tx, wanted.name))
            assert found is not None
            if found.state == "approved":
                return
            if found.state == "failed":
                raise PaymentRefused("approval_failed", f"the approval did not come through: {found.reason}")
            if time.monotonic() >= until:
                message = "the approval is on its way and not mined yet; send the same payment again"
                raise SettlementUnavailable("approval_under_way", message)
            await asyncio.sleep(self._poll_s)

    async def _run(self) -> None:
        while True:
            busy = False
            try:
                busy = await self.round()
            except StoreBusy as error:
                log.warning("approvals must wait: %s", error)
            except Exception:
                # Whatever it meets, orders wait for it.
                log.exception("looking after approvals failed")
            try:
                async with asyncio.timeout(self._poll_s if busy else IDLE_S):
                    await self._wake.wait()
            except TimeoutError:
                continue
            finally:
                self._wake.clear()

    async def round(self) -> bool:
        """Look at everything under way once; returns whether there was anything. One that cannot be looked at holds up none of
        the others.

        Raises:
            StoreBusy: The database cannot be asked now.
        """
        under_way = await self._store.read(lambda tx: records.under_way(tx, self._network.chain_id))
        ids = {sponsored.id for sponsored, _ in under_way}
        for notes in (self._sent, self._replaced):
            for name in notes.keys() - ids:
                del notes[name]
        for sponsored, funding_state in under_way:
            try:
                if sponsored.state == "funding":
                    await self._look_at_funding(sponsored, funding_state)
                else:
                    await self._look_at_approval(sponsored)
            except (RpcUnavailable, RpcError, StoreBusy) as error:
                log.warning("the approval %s must wait: %s", sponsored.id, error)
            except Exception:
                # Nonsense from a node about one of them; the others are looked at.
                log.exception("looking after the approval %s failed", sponsored.id)
        return bool(under_way)

    async def _look_at_funding(self, sponsored: Sponsored, state: str | None) -> None:
        if state in states.PAID:
            await self._store.write(lambda tx: records.move(tx, sponsored.id, "approving"))
            self._wake.set()
        elif state == "queued" and sponsored.funding_id is not None:
            self._settlements.take_queued(sponsored.funding_id)  # whoever wrote it may be gone
        elif state == "failed":
            await self._fail(sponsored, "the coin for it could not be given")

    async def _look_at_approval(self, sponsored: Sponsored) -> None:
        requests: list[Request] = [
            _call(sponsored.token, encode_allowance(sponsored.payer, PERMIT2_ADDRESS)),
            _call(PERMIT2_ADDRESS, encode_nonce_bitmap(sponsored.payer, sponsored.permit2_nonce)),
            ("eth_getTransactionCount", (sponsored.payer, "latest")),
        ]
        try:
            allowance, bitmap, count = (int(answer, 16) for answer in await self._rpc.ask(requests))
        except (RpcError, ValueError):
            if states.now_ms() <= sponsored.give_up_ms:
                raise
            # A token that does not answer any more, perhaps; should the payment be executed all the same, it is found.
            await self._fail(sponsored, "nobody can say whether it was mined")
            return
        # Once the payment's own nonce is used, somebody has executed it: the engine finds out how.
        if allowance >= sponsored.needed or nonce_is_set(bitmap, sponsored.permit2_nonce):
            if await self._store.write(lambda tx: records.approved(tx, sponsored)) and sponsored.settlement_id:
                self._settlements.take_queued(sponsored.settlement_id)
            return
        if count > sponsored.nonce:
            self._replaced[sponsored.id] = self._replaced.get(sponsored.id, 0) + 1
            if self._replaced[sponsored.id] >= REPLACED_LOOKS:
                await self._fail(sponsored, "its wallet used the transaction's nonce for something else")
            return
        if states.now_ms() > sponsored.give_up_ms:
            await self._fail(sponsored, "it was not mined in time")
            return
        await self._send(sponsored)

    async def _send(self, sponsored: Sponsored) -> None:
        now = time.monotonic()
        if now - self._sent.get(sponsored.id, float("-inf")) < SEND_AGAIN_S:
            return
        self._sent[sponsored.id] = now
        try:
            await self._rpc.call("eth_sendRawTransaction", ["0x" + sponsored.raw.hex()])
        except RpcError as error:
            # Known already, or replaced, or the coin is gone: the chain's state says which.
            log.info("a node did not take approval %s: %s", sponsored.id, error)

    async def _fail(self, sponsored: Sponsored, reason: str) -> None:
        if sponsored.settlement_id is not None:
            # First what waits for it: after a crash in between it is looked at once more.
            await self._settlements.give_up(sponsored.settlement_id, f"its approval failed: {reason}")
        await self._store.write(lambda tx: records.move(tx, sponsored.id, "failed", reason))


@dataclass(frozen=True, slots=True)
class Approving:
    """An approval that has to go before a payment, and who brings it to the chain."""

    sponsor: Sponsor
    wanted: Wanted

    def begin(self, tx: Transaction, order: SettlementOrder) -> None:
        """See `Sponsor.begin`."""
        self.sponsor.begin(tx, self.wanted, order)


def _call(to: str, data: bytes) -> Request:
    return "eth_call", ({"to": to, "data": "0x" + data.hex()}, "latest")
