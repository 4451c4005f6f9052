"""What is paid after the answer, as scripts for the kills: an authorization that a cut has burnt buys no second answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from contracts.devnet import USDC
from tests.crashes.operations import INFERRING, Operation, ToppedUp, question
from tests.crashes.world import MILLION_USD, TERSE, UNAVAILABLE, Run
from tests.e2e.clients import UPTO, ask, ask_and_sign, sign_upto

_PLEDGES = """
    SELECT pledge.receipt_id, pledge.state, receipt.state, receipt.charged_nano_usd
    FROM payment_authorization AS pledge JOIN receipt ON receipt.id = pledge.receipt_id WHERE receipt.tender = 'upto'
"""


@dataclass(slots=True)
class Upto(Operation):
    """A request whose answer is there before it is paid: authorize, answer, capture, settle."""

    changes: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    served: set[str] = field(default_factory=set)
    """The receipts of the answers that arrived whole."""

    def prepare(self, run: Run) -> None:
        """Sign an authorization."""
        self.headers = self._sign(run)

    def act(self, run: Run) -> None:
        """Ask."""
        assert self._ask(run).status_code == 200

    def resume(self, run: Run) -> None:
        """Send the same once more: it finds its answer, or is burnt; then a new one is as good as ever."""
        answer = self._ask(run)
        if answer.status_code != 200:
            assert_burnt(answer)
            self.headers = self._sign(run)
            assert self._ask(run).status_code == 200

    def check(self, run: Run) -> None:
        """Each answer was charged, each charge was answered, and both are what was taken."""
        pledges = run.rows(_PLEDGES)
        assert {state for _, state, _, _ in pledges} <= {"paid", "burnt"}, pledges
        charges = {receipt: charged for receipt, _, state, charged in pledges if state == "captured"}
        assert charges.keys() == self.served
        assert all(charge > 0 for charge in charges.values())
        taken = sum(-(-charge // 1000) for charge in charges.values())
        assert MILLION_USD - run.balance(USDC, run.payer.address) == taken
        assert run.balance(USDC, run.treasury.address) == taken
        # Less than an atomic unit of each is the payer's.
        assert credit(run) == taken * 1000 - sum(charges.values())

    def _sign(self, run: Run) -> dict[str, str]:
        return UPTO | sign_upto(run.payer, ask(run.http, question(**self.changes), UPTO))

    def _ask(self, run: Run) -> httpx.Response:
        answer = ask(run.http, question(**self.changes), self.headers)
        if answer.status_code == 200:
            self.served.add(answer.headers["x-farebox-receipt"])
        return answer


@dataclass(slots=True)
class StreamedUpto(Upto):
    """The same, with an answer in parts."""

    kills_from = INFERRING
    changes: dict[str, Any] = field(default_factory=lambda: {"stream": True})


@dataclass(slots=True)
class ReleasedUpto(Upto):
    """A request that no provider can answer: nothing is taken, and the authorization is spent."""

    kills_from = INFERRING
    changes: dict[str, Any] = field(default_factory=lambda: {"model": UNAVAILABLE})

    def act(self, run: Run) -> None:
        """Ask in vain."""
        assert self._ask(run).status_code == 502

    def resume(self, run: Run) -> None:
        """Send the same again and again: it is tried once at most, and burnt then."""
        if (answer := self._ask(run)).status_code != 502:
            assert_burnt(answer)
        assert_burnt(self._ask(run))

    def check(self, run: Run) -> None:
        """Nothing has moved."""
        Upto.check(self, run)
        assert [state for _, state, _, _ in run.rows(_PLEDGES)] == ["burnt"]


@dataclass(slots=True)
class FreeUpto(Upto):
    """An answer that costs nothing: nothing is settled, and the authorization buys no other."""

    kills_from = INFERRING
    uncharged = 1
    changes: dict[str, Any] = field(default_factory=lambda: {"model": TERSE})

    def resume(self, run: Run) -> None:
        """Send the same: it finds its answer, or is burnt."""
        for _ in range(2):
            if (answer := self._ask(run)).status_code != 200:
                assert_burnt(answer)

    def check(self, run: Run) -> None:
        """Nothing has moved, and there was one use."""
        ((receipt, pledge, state, charged),) = run.rows(_PLEDGES)
        assert (pledge, charged) == ("burnt", 0)
        assert state == ("captured" if self.served else "released")
        assert self.served <= {receipt}
        assert run.rows("SELECT id FROM settlement") == []
        assert run.balance(USDC, run.payer.address) == MILLION_USD


@dataclass(slots=True)
class OwedUpto(Upto):
    """A payer that empties its wallet while the answer is made: it owes the answer, and pays before it gets another one."""

    kills_from = INFERRING
    pause_at = INFERRING

    def intervene(self, run: Run) -> None:
        """Take the money away."""
        run.give(USDC, run.payer.address, 0)

    def resume(self, run: Run) -> None:
        """Ask again: after an answer that could not be paid that takes another payment first, which pays for both."""
        again = self._ask(run)
        run.until_settled()
        if again.status_code == 200:
            assert [(state, left) for _, state, left, _ in run.rows(_PLEDGES)] == [("defaulted", "captured")]
        run.give(USDC, run.payer.address, MILLION_USD)
        if again.status_code == 200:
            self.headers = self._sign(run)
            refused = self._ask(run)
            if refused.status_code == 200:
                return  # its settlement was tried again already, now that the money is back
            assert (refused.status_code, "unpaid_answers" in refused.text) == (402, True), refused.text
            # What is left over of it covers the debt.
            generous = question(max_tokens=1024)
            paid = ask_and_sign(run.http, run.payer, generous, USDC.address)
            assert ask(run.http, generous, paid).status_code == 200
        else:
            assert_burnt(again)
        self.headers = self._sign(run)
        assert self._ask(run).status_code == 200

    def check(self, run: Run) -> None:
        """Every answer is paid in the end: those that arrived, and no others."""
        pledges = run.rows(_PLEDGES)
        charges = {receipt: charged for receipt, _, state, charged in pledges if state == "captured"}
        assert charges.keys() == self.served
        states = sorted(state for _, state, _, _ in pledges)
        # A debt is paid from what another payment left over, or by another try of its settlement, whichever comes first.
        assert states in ([["paid", "repaid"], ["paid", "paid"]] if len(self.served) == 2 else [["burnt", "paid"]]), (
            pledges
        )
        ((elsewhere,),) = run.rows("SELECT COALESCE(SUM(charged_nano_usd), 0) FROM receipt WHERE tender = 'exact'")
        paid = MILLION_USD - run.balance(USDC, run.payer.address)
        assert run.balance(USDC, run.treasury.address) == paid
        assert paid * 1000 == sum(charges.values()) + elsewhere + credit(run)


@dataclass(slots=True)
class ToppedUpByUpto(ToppedUp):
    """An authorization that becomes balance: all of it is taken, at once."""

    kills_from = ""

    def prepare(self, run: Run) -> None:
        """Sign the top-up."""
        self.headers = UPTO | sign_upto(run.payer, self._ask(run, UPTO))

    def check(self, run: Run) -> None:
        """All of it is balance, once, and came by upto."""
        ToppedUp.check(self, run)
        assert run.rows("SELECT tender, state, charged_nano_usd FROM receipt") == [("upto", "captured", 0)]


def credit(run: Run) -> int:
    """Nano-USD that payers have in the ledger."""
    ((total,),) = run.rows("SELECT COALESCE(SUM(balance), 0) FROM ledger_account WHERE kind = 'payer'")
    return int(total)


def assert_burnt(answer: httpx.Response) -> None:
    """The authorization was used, nothing was taken under it, and nothing will be."""
    assert answer.status_code == 409, answer.text
    assert answer.json()["error"]["code"] == "authorization_spent", answer.text


UPTOS: Mapping[str, Callable[[], Operation]] = {
    "upto": Upto,
    "upto, streamed": StreamedUpto,
    "upto, released": ReleasedUpto,
    "upto, of nothing": FreeUpto,
    "upto, owed": OwedUpto,
    "upto, a top-up": ToppedUpByUpto,
}
