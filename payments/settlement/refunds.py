"""Credit is not a dead end: above a threshold it is sent back to its payer on chain, from the treasury, by itself. Wallets that
keep a balance here on purpose (`payments.wallet_accounts`) are left alone.

A refund is a payout (`payments.settlement.payouts`) that is held and ordered in one unit. What is sent rounds down to the
token's unit.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from functools import partial

from payments import promises, wallet_accounts
from payments.chain.networks import Token
from payments.chain.rpc import RpcError, RpcUnavailable
from payments.chain.transactions import encode_transfer
from payments.ledger import transfers
from payments.ledger.accounts import payer_account
from payments.money import nano_to_atomic_down
from payments.settlement import payouts
from payments.settlement.engine import Settlements
from payments.settlement.orders import Kind
from payments.settlement.outcomes import SettlementOutcome
from payments.store import Store, StoreBusy, Transaction

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
SCAN_INTERVAL_S = 600.0
RETRY_AFTER_S = 3600.0
"""After a refund that the token refuses (a blacklisted payer, an empty treasury): trying at once would burn gas for ever."""

Account = tuple[str, Token]
"""A payer's address and the token of its credit."""


def kind(tokens: Sequence[Token]) -> Kind:
    """How the settlement engine carries refunds of these tokens."""
    by_address = {token.address: token for token in tokens}
    return payouts.kind(lambda tx, row: payouts.paid(tx, row, by_address[row["token"]]), payouts.failed)


class Refunds:
    """Sends credit back on one network.

    Args:
        settlements: Started after this is made. Refunds are begun only with the treasury's key, see `start`.
        tokens: Whose credit is sent back.
        threshold_nano_usd: Credit from here on is sent back.
    """

    def __init__(
        self, store: Store, settlements: Settlements, tokens: Sequence[Token], threshold_nano_usd: int
    ) -> None:
        self.sent = 0
        self.refused = 0
        self._store, self._rpc, self._settlements = store, settlements.rpc, settlements
        self._treasury = "" if settlements.treasury is None else settlements.treasury.address
        self._tokens = {token.asset: token for token in tokens}
        self._threshold = threshold_nano_usd
        self._considered: set[tuple[str, str]] = set()
        self._not_before: dict[tuple[str, str], float] = {}
        self._task: asyncio.Task[None] | None = None

    def consider(self, payer: str, asset: str) -> None:
        """A payer's credit may have grown: look at it soon. Costs nothing."""
        if asset in self._tokens:
            self._considered.add((payer, asset))

    async def start(self) -> None:
        """Begin with a scan of every payer's credit, and repeat it now and then. Not called, refunds only come to their end."""
        assert self._treasury
        assert self._threshold > 0
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Stop beginning refunds; those that are durable are the settlement engine's."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def round(self) -> int:
        """Begin a refund for everybody considered whose credit reaches the threshold; returns how many were begun.

        Raises:
            RpcUnavailable: No node answered.
            StoreBusy: The database takes nothing now.
        """
        considered, self._considered = self._considered, set()
        begun = 0
        for payer, asset in considered:
            if time.monotonic() >= self._not_before.get((payer, asset), 0.0):
                try:
                    begun += await self._refund(payer, self._tokens[asset])
                except (RpcUnavailable, StoreBusy):
                    raise
                except Exception:
                    # Whatever one payer's credit meets, the others get theirs.
                    log.exception("a refund of %s failed", asset)
                    self._wait(payer, asset)
        return begun

    async def scan(self) -> None:
        """Consider everybody whose credit reaches the threshold."""
        marks = ",".join("?" * len(self._tokens))
        rows = await self._store.read(
            lambda tx: tx.execute(
                f"SELECT owner, asset FROM ledger_account WHERE kind='payer' AND asset IN ({marks})"  # noqa: S608 - only marks
                " AND balance - pending_out >= ?"
                " AND NOT EXISTS (SELECT 1 FROM wallet_account WHERE wallet_account.address = ledger_account.owner)",
                (*self._tokens, self._threshold),
            ).fetchall()
        )
        self._considered.update((owner, asset) for owner, asset in rows)

    async def _run(self) -> None:
        next_scan = 0.0
        while True:
            try:
                if time.monotonic() >= next_scan:
                    await self.scan()
                    next_scan = time.monotonic() + SCAN_INTERVAL_S
                await self.round()
            except (RpcUnavailable, StoreBusy) as error:
                log.warning("refunds must wait: %s", error)
                next_scan = 0.0
            except Exception:
                # Credit that grows later is sent back all the same.
                log.exception("refunds failed")
                next_scan = 0.0
            await asyncio.sleep(INTERVAL_S)

    async def _refund(self, payer: str, token: Token) -> bool:
        credit = await self._store.read(lambda tx: transfers.balance(tx, payer_account(payer, token.asset)).available)
        if credit < self._threshold or not await self._would_succeed(payer, token, credit):
            return False
        settlement_id = await self._store.write(lambda tx: self._begin(tx, payer, token))
        if settlement_id is None:
            return False
        self._settlements.outcomes.follow(settlement_id, partial(self._decided, payer, token.asset))
        self._settlements.take_queued(settlement_id)
        return True

    async def _would_succeed(self, payer: str, token: Token, credit: int) -> bool:
        data = "0x" + encode_transfer(payer, nano_to_atomic_down(credit, token.decimals)).hex()
        try:
            await self._rpc.call("eth_call", [{"from": self._treasury, "to": token.address, "data": data}, "latest"])
        except RpcError as error:
            self._wait(payer, token.asset)
            log.warning("a refund of %s would fail: %s", token.asset, error.message)
            return False
        return True

    def _begin(self, tx: Transaction, payer: str, token: Token) -> str | None:
        account = payer_account(payer, token.asset)
        credit = transfers.balance(tx, account).available
        if credit < self._threshold or wallet_accounts.keeps_balance(tx, payer):
            return None
        if promises.reopened_nano_usd(tx, payer, token.asset):
            return None  # the next scan looks again
        value = nano_to_atomic_down(credit, token.decimals)
        settlement_id = f"refund_{secrets.token_hex(16)}"
        payouts.hold(tx, "refund", settlement_id, payer, token, value)
        payouts.enqueue(tx, "refund", settlement_id, payer, token, value, self._treasury)
        return settlement_id

    def _decided(self, payer: str, asset: str, outcome: SettlementOutcome) -> None:
        if outcome.paid:
            self.sent += 1
        else:
            self._wait(payer, asset)

    def _wait(self, payer: str, asset: str) -> None:
        self.refused += 1
        self._not_before[(payer, asset)] = time.monotonic() + RETRY_AFTER_S
