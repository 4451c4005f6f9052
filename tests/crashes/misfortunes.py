"""Payments that the chain spoils, as scripts for the kills: wallets that are empty when it counts, and blocks that vanish."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import httpx

from contracts.devnet import USDC, send_signed
from contracts.jsonrpc import rpc
from payments.chain.transactions import settle_call
from payments.tenders.evidence import PAID_LATE
from payments.verification.signatures import checksum_address
from payments.x402.wire import Payment, decode_payment
from tests.crashes.channels import Opened
from tests.crashes.operations import SENDING, Exact, Operation, question
from tests.crashes.upto import Upto
from tests.crashes.world import MILLION_USD, Run
from tests.e2e.clients import ask

SIGNED = "wrote Dispatcher._round"
"""The transaction is signed, and not sent."""


@dataclass(slots=True)
class Unfunded(Operation):
    """A payer that empties its wallet once what pays is on the way: it is not served, and nothing is taken.

    Args:
        of: What pays.
        told: The code that says that it failed.
    """

    of: Exact | Opened
    told: str
    emptied: bool = False
    pause_at = SIGNED
    kills_from = SIGNED
    uncharged = 1

    def prepare(self, run: Run) -> None:
        """Sign."""
        self.of.prepare(run)

    def intervene(self, run: Run) -> None:
        """Take the money away."""
        run.give(USDC, run.payer.address, 0)
        self.emptied = True

    def act(self, run: Run) -> None:
        """Pay in vain."""
        self._assert_failed(ask(run.http, question(), self.of.headers))

    def resume(self, run: Run) -> None:
        """Send the same: it has failed, unless a cut came before it was signed; then a new one is as good as ever."""
        if self.emptied:
            self._assert_failed(ask(run.http, question(), self.of.headers))
            run.give(USDC, run.payer.address, MILLION_USD)
            self.of.prepare(run)
        self.of.resume(run)

    def check(self, run: Run) -> None:
        """As if nothing had been."""
        self.of.check(run)

    def _assert_failed(self, answer: httpx.Response) -> None:
        assert (answer.status_code, self.told in answer.text) == (402, True), answer.text


@dataclass(slots=True)
class ExecutedLate(Unfunded):
    """A payment that failed and that a stranger executes when its payer has money again: all of it is credit, by itself."""

    executed: bool = False
    kills_from = "housekeeping: wrote LateExecutions"
    loops: ClassVar[Collection[str]] = ("housekeeping",)

    def act(self, run: Run) -> None:
        """Pay in vain; then somebody does what the gateway could not."""
        Unfunded.act(self, run)
        self._execute(run)

    def done(self, run: Run) -> bool:
        """It is credited."""
        return self.executed and run.rows("SELECT state FROM settlement") == [("superseded",)]

    def resume(self, run: Run) -> None:
        """Be told of the failure, if that was not yet so; wait for the credit."""
        if not self.executed:
            self.act(run)
        run.until(lambda: self.done(run), "it is credited")
        again = ask(run.http, question(), self.of.headers)
        assert (again.status_code, "payment_already_credited" in again.text) == (409, True), again.text

    def check(self, run: Run) -> None:
        """Once, and the receipt says why."""
        assert isinstance(self.of, Exact)
        amount = self.of.amount
        receipts = run.rows("SELECT state, reason, paid_nano_usd, charged_nano_usd FROM receipt")
        assert receipts == [("released", PAID_LATE, amount * 1000, 0)]
        assert run.rows("SELECT balance FROM ledger_account WHERE kind = 'payer'") == [(amount * 1000,)]
        self.of.check_money(run)

    def _execute(self, run: Run) -> None:
        run.give(USDC, run.payer.address, MILLION_USD)
        payment = decode_payment(self.of.headers["PAYMENT-SIGNATURE"], "payment-signature")
        assert isinstance(payment, Payment)
        to, data = settle_call(payment, run.world.network.tokens[0])
        stranger = "0x" + bytes(run.treasury.key).hex()
        send_signed(run.world.rpc_url, stranger, checksum_address(to), "0x" + data.hex())
        self.executed = True


@dataclass(slots=True)
class Vanished(Operation):
    """The block of a settlement vanishes after it was booked: the same bytes are sent again, and what they did is booked once.

    Args:
        of: What is settled.
    """

    of: Operation
    before: int = 0
    vanished: bool = False
    own_chain = True
    kills_from = SENDING
    loops: ClassVar[Collection[str]] = ("finality",)

    def prepare(self, run: Run) -> None:
        """Whatever comes before is deep in the chain."""
        self.of.prepare(run)
        run.mine(3)
        self.before = head_of(run)

    def act(self, run: Run) -> None:
        """Settle it; then take its block away."""
        try:
            self.of.act(run)
            while run.gateway.alive and not self.of.done(run):
                pass
        finally:
            run.until(lambda: head_of(run) > self.before or not run.gateway.alive, "a block is there")
            if head_of(run) > self.before:
                rpc(run.world.rpc_url, "anvil_reorg", head_of(run) - self.before, [])
            self.vanished = True

    def done(self, run: Run) -> bool:
        """It is in the chain again, and booked there."""
        return self.of.done(run) and is_in_the_chain(run)

    def resume(self, run: Run) -> None:
        """What the payer does otherwise."""
        run.until(lambda: is_in_the_chain(run) and not run.open_settlements(), "what vanished is in the chain again")
        self.of.resume(run)
        run.until(lambda: self.done(run), "everything is in the chain")

    def check(self, run: Run) -> None:
        """As if nothing had been."""
        self.of.check(run)


def head_of(run: Run) -> int:
    """The chain's newest block."""
    return int(rpc(run.world.rpc_url, "eth_blockNumber"), 16)


def is_in_the_chain(run: Run) -> bool:
    """Whether every settlement that counts as paid is where the book says."""
    for transaction, block in run.rows(
        "SELECT transaction_hash, block_number FROM settlement WHERE state IN ('mined', 'superseded', 'final')"
    ):
        receipt = rpc(run.world.rpc_url, "eth_getTransactionReceipt", transaction)
        if receipt is None or int(receipt["blockNumber"], 16) != block:
            return False
    return True


MISFORTUNES: Mapping[str, Callable[[], Operation]] = {
    "exact, unfunded": lambda: Unfunded(Exact(), "settlement_failed"),
    "channel, unfunded": lambda: Unfunded(Opened(), "deposit_transaction_failed"),
    "exact, unfunded, executed late": lambda: ExecutedLate(Exact(), "settlement_failed"),
    "exact, vanished": lambda: Vanished(Exact()),
    "upto, vanished": lambda: Vanished(Upto()),
    "deposit to a channel, vanished": lambda: Vanished(Opened()),
}
