"""What a payer does with a gateway, as scripts that are run again and again while the gateway dies at every step of them.

A new operation is a subclass of `Operation` and an entry in a table such as `PAYMENTS`, which a test goes through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx

from contracts.devnet import USDC, USDT, DevToken
from tests.crashes.world import MILLION_USD, MODEL, UNAVAILABLE, Run
from tests.e2e.clients import ask, ask_and_sign, decoded, sign, sign_in

SENDING = "asking sendRawTransaction"
INFERRING = "asking a provider"


def question(**changes: Any) -> dict[str, Any]:
    """A request."""
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 64}
    return asked | changes


class Operation:
    """A script. It is made anew for each run."""

    settings: ClassVar[Mapping[str, Any]] = {}
    """Of the gateway, besides the usual ones."""
    loops: ClassVar[Collection[str]] = ()
    """What it is about of that which gateways do by the clock, see `tests.crashes.steps`."""
    own_chain: ClassVar[bool] = False
    """Whether it does to the chain what other runs could not bear."""
    kills_from: ClassVar[str] = ""
    """How the name of the first step begins that is worth a kill; what is before it is another operation's matter."""
    uncharged: ClassVar[int] = 0
    """Inferences that nobody is charged for in it even if nothing is killed, within the exposure that is declared."""
    at_once: ClassVar[int] = 1
    """Requests under way at a time: a kill may waste the inference of each."""
    pause_at: ClassVar[str | None] = None
    """The step at which the gateway waits while something happens, see `intervene`."""

    def prepare(self, run: Run) -> None:
        """What comes before: no steps count yet."""

    def act(self, run: Run) -> None:
        """What the gateway dies in. Raises `httpx.TransportError` if it does so while the payer waits for it."""
        raise NotImplementedError

    def intervene(self, run: Run) -> None:
        """What happens while the gateway is at `pause_at`, in the first life and if it comes to there."""

    def done(self, run: Run) -> bool:
        """Whether all that `act` began has come to its end, in a life that nothing ended."""
        return not run.open_settlements()

    def resume(self, run: Run) -> None:
        """What the payer does in the next life, as it would of its own accord; checks what it is told."""

    def check(self, run: Run) -> None:
        """What must be true in the end, besides what must be true of everything."""


@dataclass(slots=True)
class Exact(Operation):
    """A request paid with itself: authorize, settle, capture. Then the same payment again."""

    token: DevToken = USDC
    changes: dict[str, Any] = field(default_factory=dict)
    expected: frozenset[int] = frozenset({200})
    """How the payment may be answered, in whichever life."""
    headers: dict[str, str] = field(default_factory=dict)
    answers: list[httpx.Response] = field(default_factory=list)

    def prepare(self, run: Run) -> None:
        """Sign a payment."""
        self.headers = ask_and_sign(run.http, run.payer, question(**self.changes), self.token.address)

    def act(self, run: Run) -> None:
        """Pay."""
        self._pay(run)

    def resume(self, run: Run) -> None:
        """Send the same payment."""
        self._pay(run)

    def _pay(self, run: Run) -> None:
        answer = ask(run.http, question(**self.changes), self.headers)
        assert answer.status_code in self.expected, answer.text
        self.answers.append(answer)

    @property
    def amount(self) -> int:
        """What was signed, in atomic units."""
        return int(decoded(self.headers["PAYMENT-SIGNATURE"])["accepted"]["amount"])

    def check(self, run: Run) -> None:
        """One transfer of the whole amount, whatever happened; one charge for it if there was an answer, and one answer."""
        self.check_money(run)
        served = {words(answer) for answer in self.answers if answer.status_code == 200}
        charges = run.rows("SELECT charged_nano_usd FROM receipt WHERE state = 'captured'")
        assert len(charges) == len(served) <= 1
        assert all(charged > 0 for (charged,) in charges)

    def check_money(self, run: Run) -> None:
        """What the payer paid is what it was charged, what it was sent back, and what it has as credit."""
        sent_back = sum(
            int(value)
            for (value,) in run.rows("SELECT value FROM settlement WHERE kind = 'refund' AND state <> 'failed'")
        )
        assert MILLION_USD - run.balance(self.token, run.payer.address) == self.amount - sent_back
        assert run.balance(self.token, run.treasury.address) == self.amount - sent_back
        ((credit,),) = run.rows("SELECT COALESCE(SUM(balance), 0) FROM ledger_account WHERE kind = 'payer'")
        ((charged,),) = run.rows("SELECT COALESCE(SUM(charged_nano_usd), 0) FROM receipt")
        assert self.amount * 1000 == charged + credit + sent_back * 1000


@dataclass(slots=True)
class Streamed(Exact):
    """The same over Permit2, with an answer in parts."""

    kills_from = SENDING
    token: DevToken = USDT
    changes: dict[str, Any] = field(default_factory=lambda: {"stream": True})


@dataclass(slots=True)
class Released(Exact):
    """A request that no provider can answer: authorize, settle, release."""

    kills_from = INFERRING
    changes: dict[str, Any] = field(default_factory=lambda: {"model": UNAVAILABLE})
    expected: frozenset[int] = frozenset({409, 502})


@dataclass(slots=True)
class Refunded(Released):
    """A payment whose request fails, and which is sent back on chain."""

    kills_from = "wrote LedgerHold.release"
    settings = {"payments": {"refund_threshold_usd": "0.000001"}}  # noqa: RUF012 - nobody changes it

    def done(self, run: Run) -> bool:
        """The refund has arrived."""
        return run.rows("SELECT state FROM settlement WHERE kind = 'refund'") in ([("mined",)], [("final",)])

    def resume(self, run: Run) -> None:
        """Send the payment again, if it is not known to have failed; then wait for the money."""
        Exact.resume(self, run)
        run.until(lambda: run.balance(self.token, run.payer.address) == MILLION_USD, "the money is back")


@dataclass(slots=True)
class Balance(Operation):
    """A request on a balance: the pool of an API key, or a wallet's credit."""

    credit: bool
    changes: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    answered: int = 0

    def prepare(self, run: Run) -> None:
        """Have a balance."""
        if not self.credit:
            self.headers = {"Authorization": f"Bearer {run.api_key}"}
            return
        for _ in range(2):  # what one payment for a failing request leaves
            paid = ask_and_sign(run.http, run.payer, question(model=UNAVAILABLE))
            assert ask(run.http, question(model=UNAVAILABLE), paid).status_code == 502
        self.headers = sign_in(run.http, run.payer)

    def act(self, run: Run) -> None:
        """Spend of it."""
        self._ask(run)

    def done(self, run: Run) -> bool:
        """At once."""
        return True

    def resume(self, run: Run) -> None:
        """Ask again, as a new request."""
        self._ask(run)

    def check(self, run: Run) -> None:
        """Every answer was charged, and nothing besides but what was answered when the gateway died."""
        charged = run.rows("SELECT charged_nano_usd FROM receipt WHERE state = 'captured' AND charged_nano_usd > 0")
        assert 1 <= self.answered <= len(charged) <= 2

    def _ask(self, run: Run) -> None:
        answer = ask(run.http, question(**self.changes), self.headers)
        assert answer.status_code == 200, answer.text
        self.answered += 1


@dataclass(slots=True)
class ToppedUp(Exact):
    """A payment that becomes balance."""

    kills_from = SENDING
    usd: str = "0.75"

    def prepare(self, run: Run) -> None:
        """Sign the top-up."""
        self.headers = sign(run.payer, self._ask(run, {}), self.token.address)

    def act(self, run: Run) -> None:
        """Pay it."""
        answer = self._ask(run, self.headers)
        assert answer.status_code == 200, answer.text

    def resume(self, run: Run) -> None:
        """Send the same payment, which says the same however far the first had come."""
        answer = self._ask(run, self.headers)
        assert answer.status_code == 200, answer.text
        assert answer.json()["credited_usd"] == self.usd

    def check(self, run: Run) -> None:
        """All of it is balance, once."""
        self.check_money(run)
        assert run.rows("SELECT balance FROM ledger_account WHERE kind = 'payer'") == [(self.amount * 1000,)]

    def _ask(self, run: Run, headers: dict[str, str]) -> httpx.Response:
        return run.http.post("/v1/wallet/topups", json={"amount_usd": self.usd}, headers=headers)


@dataclass(slots=True)
class Withdrawn(ToppedUp):
    """A balance that its wallet takes out."""

    kills_from = ""
    settings = {"wallet": {"withdrawal_minimum_usd": "0.01"}}  # noqa: RUF012 - nobody changes it
    session: dict[str, str] = field(default_factory=dict)

    def prepare(self, run: Run) -> None:
        """Have a balance."""
        ToppedUp.prepare(self, run)
        ToppedUp.act(self, run)
        self.session = sign_in(run.http, run.payer) | {"idempotency-key": "the-same"}

    def act(self, run: Run) -> None:
        """Take all of it out."""
        self._withdraw(run)

    def done(self, run: Run) -> bool:
        """The money is there, and the books know it."""
        return run.rows("SELECT state FROM withdrawal") == [("paid",)]

    def resume(self, run: Run) -> None:
        """Ask for the same once more, and for all that is left besides; wait for the money."""
        answer = self._withdraw(run)
        assert answer.status_code == 200, answer.text
        another = self._withdraw(run, "another")
        assert another.status_code >= 400, another.text
        run.until(lambda: run.balance(self.token, run.payer.address) == MILLION_USD, "the money is back")
        run.until(lambda: self.done(run), "the withdrawal is paid")

    def check(self, run: Run) -> None:
        """All of it is back, once."""
        assert run.balance(self.token, run.payer.address) == MILLION_USD
        assert run.balance(self.token, run.treasury.address) == 0
        assert run.rows("SELECT balance FROM ledger_account WHERE kind = 'payer'") == [(0,)]

    def _withdraw(self, run: Run, key: str = "the-same") -> httpx.Response:
        headers = self.session | {"idempotency-key": key}
        return run.http.post("/v1/wallet/withdrawals", json={"asset": "USDC", "amount_usd": "all"}, headers=headers)


def words(answer: httpx.Response) -> str:
    """What an answer says, without what the transport adds."""
    with contextlib.suppress(ValueError):
        return str(answer.json()["choices"])
    return "\n".join(line for line in answer.text.splitlines() if line.startswith("data: "))


PAYMENTS: Mapping[str, Callable[[], Operation]] = {
    "exact, EIP-3009": Exact,
    "exact, Permit2, streamed": Streamed,
    "released": Released,
    "refunded": Refunded,
}
BALANCES: Mapping[str, Callable[[], Operation]] = {
    "prepaid credit": lambda: Balance(credit=True),
    "topped up": ToppedUp,
    "withdrawn": Withdrawn,
    "API key": lambda: Balance(credit=False),
}
