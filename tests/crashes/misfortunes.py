"""Payments that the chain spoils, as scripts for the kills: wallets that are empty when it counts, and blocks that vanish."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import httpx

from contracts.devnet import USDC
from contracts.jsonrpc import rpc
from tests.crashes.channels import Opened
from tests.crashes.operations import Exact, Operation, question
from tests.crashes.upto import Upto
from tests.crashes.world import MILLION_USD, Run
from tests.e2e.clients import ask, ask_and_sign

SIGNED = "wrote Dispatcher._round"
"""The transaction is signed, and not sent."""


@dataclass(slots=True)
class Unfunded(Exact):
    """A payer that empties its wallet once its transfer is on the way: it is not served, and nothing is taken."""

    pause_at = SIGNED
    emptied: bool = False

    def intervene(self, run: Run) -> None:
        """Take the money away."""
        run.give(USDC, run.payer.address, 0)
        self.emptied = True

    def act(self, run: Run) -> None:
        """Pay in vain."""
        assert_failed(ask(run.http, question(), self.headers), "settlement_failed")

    def resume(self, run: Run) -> None:
        """Send the same: it has failed, if it was begun; then a new one is as good as ever."""
        if self.emptied:
            assert_failed(ask(run.http, question(), self.headers), "settlement_failed")
            run.give(USDC, run.payer.address, MILLION_USD)
            self.headers = ask_and_sign(run.http, run.payer, question(), USDC.address)
        Exact.resume(self, run)


@dataclass(slots=True)
class UnfundedDeposit(Opened):
    """A payer that empties its wallet once the deposit that opens its channel is on the way."""

    pause_at = SIGNED
    emptied: bool = False

    def intervene(self, run: Run) -> None:
        """Take the money away."""
        run.give(USDC, run.payer.address, 0)
        self.emptied = True

    def act(self, run: Run) -> None:
        """Pay in vain."""
        assert_failed(ask(run.http, question(), self.headers), "deposit_transaction_failed")

    def resume(self, run: Run) -> None:
        """Send the same: it has failed, if it was begun; then a new deposit is as good as ever."""
        if self.emptied:
            assert_failed(ask(run.http, question(), self.headers), "deposit_transaction_failed")
            run.give(USDC, run.payer.address, MILLION_USD)
            self.deposited = 0
            self.headers = self._sign(run)
        Opened.resume(self, run)


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
    kills_from = "asking sendRawTransaction"
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


def assert_failed(answer: httpx.Response, code: str) -> None:
    """Nothing was taken, and the payer is told why."""
    assert answer.status_code == 402, answer.text
    assert code in answer.text, answer.text


MISFORTUNES: Mapping[str, Callable[[], Operation]] = {
    "exact, unfunded": Unfunded,
    "channel, unfunded": UnfundedDeposit,
    "exact, vanished": lambda: Vanished(Exact()),
    "upto, vanished": lambda: Vanished(Upto()),
    "deposit to a channel, vanished": lambda: Vanished(Opened()),
}
