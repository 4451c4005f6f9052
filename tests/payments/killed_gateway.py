"""A process that serves one paid request and is killed right after its Nth durable write. Run by `test_recovery`.

Usage: python -m tests.payments.killed_gateway <directory> <tender> <writes>
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from payments import accounts
from payments.ledger import transfers
from payments.ledger.accounts import payer_account
from payments.store import Store, Transaction
from payments.tenders.account import AccountTender
from payments.tenders.base import Outcome, Tender
from payments.tenders.prepaid import PrepaidTender
from tests.payments.exact_samples import ASSET, DETAILS, PAYER, QUOTED, open_desk, payment_of, quote_of

NONCE = 77
FUNDS = 3 * QUOTED
CHARGED = 6_000_000
POOL = "team"


class KilledStore(Store):
    """A store whose process dies between two durable writes."""

    writes_left: float = float("inf")

    async def write(self, unit: Any, *, done: Any = None, if_abandoned: Any = None) -> Any:
        if self.writes_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.writes_left -= 1
        return await super().write(unit, done=done, if_abandoned=if_abandoned)


def fund(tx: Transaction) -> None:
    """Give the pool and the payer something to spend."""
    accounts.fund_pool(tx, POOL, FUNDS, "first")
    account = payer_account(PAYER, ASSET)
    transfers.post(tx, id="log:1", debit=f"custody@{ASSET}", credit=account, amount=FUNDS, reference="log")


async def serve(directory: Path, tender_name: str, writes: int) -> None:
    store = KilledStore(directory / "farebox.db")
    store.own()
    await store.write(fund)
    tenders: dict[str, Tender] = {
        "exact": open_desk(store).tender(payment_of(nonce=NONCE)),
        "prepaid": PrepaidTender(store, PAYER, (ASSET,)),
        "account": AccountTender(store, "key_1", POOL),
    }
    store.writes_left = writes
    hold = await tenders[tender_name].authorize(quote_of(), DETAILS)
    await hold.ready()
    await hold.capture(CHARGED, Outcome({"model": "m"}))
    await store.write(lambda tx: None)
    raise AssertionError("still alive: there were fewer writes than that")


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
