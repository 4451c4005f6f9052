"""Callers that hang up while their answer is made, as scripts for the kills: what that cost is charged once, whatever pays."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx

from tests.crashes.channels import Paid
from tests.crashes.operations import INFERRING, Balance, Exact, Operation, question
from tests.crashes.upto import Upto
from tests.crashes.world import PATIENCE_S, THOUGHTFUL, Run


def _of_slow_wit() -> dict[str, Any]:
    return {"model": THOUGHTFUL}


@dataclass(slots=True)
class HungUp(Operation):
    """A request whose caller is gone as soon as a provider has it, and sends the same again later.

    Args:
        of: What it is paid by.
    """

    of: Exact | Balance | Upto | Paid
    kills_from: ClassVar[str] = INFERRING

    def prepare(self, run: Run) -> None:
        """Sign, or have a balance."""
        self.of.prepare(run)

    def act(self, run: Run) -> None:
        """Ask, and hang up."""
        asyncio.run(self._hang_up(run))

    def done(self, run: Run) -> bool:
        """What that cost is in the book, and paid."""
        return not run.rows("SELECT id FROM receipt WHERE state = 'open'") and self.of.done(run)

    def resume(self, run: Run) -> None:
        """Send the same again; now the answer comes at once, if there is to be one."""
        run.make_prompt(THOUGHTFUL)
        self.of.resume(run)

    def check(self, run: Run) -> None:
        """As ever."""
        self.of.check(run)

    async def _hang_up(self, run: Run) -> None:
        before = run.inferences()
        async with httpx.AsyncClient(base_url=run.http.base_url, timeout=PATIENCE_S, trust_env=False) as caller:
            body, headers = question(**self.of.changes), self.of.headers
            asking = asyncio.create_task(caller.post("/v1/chat/completions", json=body, headers=headers))
            while run.inferences() == before:
                answered, _ = await asyncio.wait({asking}, timeout=0.01)
                assert not answered, asking.result().text
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asking


@dataclass(slots=True)
class UnseenUpto(Upto):
    """By upto: what was taken for the answer that nobody waited for used the authorization up."""

    changes: dict[str, Any] = field(default_factory=_of_slow_wit)

    def resume(self, run: Run) -> None:
        """Be told so, unless a cut came first; then pay for another one."""
        unseen = charged_unseen(self._ask(run))
        if unseen is not None:
            self.served.add(unseen)
            self.headers = self._sign(run)
        Upto.resume(self, run)


@dataclass(slots=True)
class UnseenPaid(Paid):
    """By voucher: the next one starts from what was charged, which its payer learns from the corrective 402."""

    changes: dict[str, Any] = field(default_factory=_of_slow_wit)

    def prepare(self, run: Run) -> None:
        """Open the channel with an answer that comes."""
        thoughtful, self.changes = self.changes, {}
        Paid.prepare(self, run)
        self.changes = thoughtful
        self.headers = self._sign(run)

    def resume(self, run: Run) -> None:
        """Be told so, unless a cut came first; then pay for another one."""
        again = self._ask(run, self.headers)
        unseen = charged_unseen(again)
        if unseen is not None:
            self.served.add(unseen)
            self.payer.correct(self._ask(run, self._sign(run)))
            self.headers = self._sign(run)
        Paid.resume(self, run)


def charged_unseen(answer: httpx.Response) -> str | None:
    """The receipt of an answer that was charged and that nobody saw, if this is what a payment is told; else None."""
    if answer.status_code != 409 or answer.json()["error"]["code"] != "payment_already_used":
        return None
    return answer.headers["x-farebox-receipt"]


HANG_UPS: Mapping[str, Callable[[], Operation]] = {
    "exact": lambda: HungUp(Exact(changes=_of_slow_wit())),
    "upto": lambda: HungUp(UnseenUpto()),
    "voucher": lambda: HungUp(UnseenPaid()),
    "prepaid credit": lambda: HungUp(Balance(credit=True, changes=_of_slow_wit())),
}
