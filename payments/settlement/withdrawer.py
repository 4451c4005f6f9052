"""Carries withdrawals on one network: says beforehand whether the token lets one through, and sends what was approved."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from payments import withdrawals
from payments.chain.networks import Token
from payments.chain.rpc import RpcError, RpcUnavailable
from payments.chain.transactions import encode_balance_of, encode_transfer
from payments.errors import SettlementUnavailable
from payments.ledger import transfers
from payments.ledger.accounts import account_id
from payments.money import atomic_to_nano_down, nano_to_atomic_down, nano_to_usd
from payments.settlement import payouts
from payments.settlement.engine import Settlements
from payments.settlement.orders import Kind
from payments.store import Store, StoreBusy
from payments.withdrawals import WithdrawalRefused

log = logging.getLogger(__name__)

INTERVAL_S = 1.0


def kind(tokens: Sequence[Token]) -> Kind:
    """How the settlement engine carries withdrawals of these tokens."""
    by_address = {token.address: token for token in tokens}
    return payouts.kind(lambda tx, row: withdrawals.on_paid(tx, row, by_address[row["token"]]), withdrawals.on_failed)


class Withdrawer:
    """The withdrawals of one network.

    Args:
        store: The database.
        settlements: Started after this is made. Without the treasury's key nothing new can be withdrawn.
        tokens: What can be withdrawn.
        treasury: Who pays, lower-case hex.
    """

    def __init__(self, store: Store, settlements: Settlements, tokens: Sequence[Token], treasury: str) -> None:
        self.treasury = treasury
        self.tokens = {token.asset: token for token in tokens}
        self._store, self._settlements = store, settlements
        self._task: asyncio.Task[None] | None = None

    @property
    def open(self) -> bool:
        """Whether withdrawals can be made: the treasury's key is there."""
        return self._settlements.treasury is not None

    async def start(self) -> None:
        """Send what is approved, now and whenever a person approves more."""
        if self.open:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Send no more; what is in the outbox is the settlement engine's."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def require_possible(self, address: str, token: Token, amount_nano_usd: int) -> None:
        """Ask the token whether it would pay this out now: a transfer that reverts costs gas and helps nobody.

        Raises:
            WithdrawalRefused: It would not: the wallet is blocked, the token paused, or the treasury short.
            SettlementUnavailable: No node answers.
        """
        value = nano_to_atomic_down(amount_nano_usd, token.decimals)
        call = {"from": self.treasury, "to": token.address, "data": "0x" + encode_transfer(address, value).hex()}
        try:
            await self._settlements.rpc.call("eth_call", [call, "latest"])
        except RpcError as error:
            await self._require_covered(token, value)
            raise WithdrawalRefused(
                "withdrawal_impossible",
                f"{token.asset} refuses this transfer now ({error.message}); your balance is untouched, try again later",
            ) from None
        except RpcUnavailable:
            raise SettlementUnavailable(
                "settlement_unavailable", "the chain cannot be asked right now; your balance is untouched, try again"
            ) from None

    async def _require_covered(self, token: Token, value: int) -> None:
        """Deposits are in a wallet's balance before they are in the treasury: see `payments.settlement.sweeps`.

        Raises:
            WithdrawalRefused: The treasury has not as much now, and when it will.
        """
        call = {"to": token.address, "data": "0x" + encode_balance_of(self.treasury).hex()}
        try:
            held = int(await self._settlements.rpc.call("eth_call", [call, "latest"]), 16)
        except (RpcError, RpcUnavailable):
            return
        if held >= value:
            return
        account = account_id("forwarders", token.asset)
        unswept = -(await self._store.read(lambda tx: transfers.balance(tx, account))).balance
        has = nano_to_usd(atomic_to_nano_down(held, token.decimals))
        why, until = "", "later"
        if unswept > 0:
            why = f", and {nano_to_usd(unswept)} USD lie at deposit addresses until they are swept into it"
            until = "in some minutes"
        raise WithdrawalRefused(
            "treasury_short",
            f"the treasury has {has} USD in {token.asset} now, less than this{why}; your balance is untouched: try again"
            f" {until}, or ask for less",
        )

    def take(self, withdrawal_id: str) -> None:
        """A withdrawal's order is durable: put it on its way."""
        self._settlements.take_queued(withdrawal_id)

    async def round(self) -> int:
        """Send what is approved; returns how many that were."""
        if not await self._store.read(lambda tx: withdrawals.approved(tx, self.tokens, 1)):
            return 0
        enqueued = await self._store.write(lambda tx: withdrawals.enqueue_approved(tx, self.tokens, self.treasury))
        for withdrawal_id in enqueued:
            self.take(withdrawal_id)
        return len(enqueued)

    async def _run(self) -> None:
        while True:
            try:
                await self.round()
            except StoreBusy as error:
                log.warning("approved withdrawals must wait: %s", error)
            except Exception:
                # What is approved tomorrow is sent all the same.
                log.exception("sending approved withdrawals failed")
            await asyncio.sleep(INTERVAL_S)
