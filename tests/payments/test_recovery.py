"""Killed at every step: after a restart the books balance, and the payer has either the answer or the money."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from payments import receipts
from payments.leases import Leases, instance_name
from payments.ledger import transfers
from payments.ledger.transfers import Balance
from payments.recovery import Recovered, recover, sweep_expired, watch
from payments.store import Store, StoreOwned, Transaction
from payments.tenders.base import Outcome
from payments.tenders.exact import AlreadyUsed, ExactHold, settlement_id
from payments.tenders.prepaid import PrepaidTender
from tests.databases import open_store
from tests.payments.exact_samples import (
    ASSET,
    DETAILS,
    PAYER,
    QUOTED,
    Desk,
    assert_books_balance,
    credit_of,
    open_desk,
    payment_of,
    quote_of,
)
from tests.payments.killed_gateway import CHARGED, FUNDS, NONCE
from tests.payments.settling import until

ANSWERED = Outcome({"model": "m"})
RESERVED, SUBMITTED, MINED, CAPTURED = 1, 2, 3, 4
"""The durable writes of an exact payment, in their order."""


def kill(directory: Path, tender: str, writes: int) -> None:
    """Run a gateway on a new database until it is killed after so many writes."""
    open_store(directory).close()
    command = [sys.executable, "-m", "tests.payments.killed_gateway", str(directory), tender, str(writes)]
    killed = subprocess.run(command, check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


async def restart(directory: Path) -> tuple[Desk, Recovered]:
    store = open_store(directory)
    recovered = await recover(store)
    await assert_books_balance(store)
    assert (await credit_of(store)).pending_out == 0
    return open_desk(store), recovered


async def again(desk: Desk) -> ExactHold | AlreadyUsed:
    try:
        return await desk.tender(payment_of(nonce=NONCE)).authorize(quote_of(), DETAILS)
    except AlreadyUsed as used:
        return used


async def spend(desk: Desk, amount: int) -> None:
    hold = await PrepaidTender(desk.store, PAYER, (ASSET,)).authorize(quote_of(amount), {})
    await hold.capture(amount, ANSWERED)


@pytest.mark.parametrize(
    ("writes", "found"),
    [
        (0, Recovered(0, 0, 0, 0)),
        (RESERVED, Recovered(0, 0, 0, 1)),
        (SUBMITTED, Recovered(0, 1, 0, 0)),
        (MINED, Recovered(1, 1, 0, 0)),
    ],
)
async def test_payer_killed_before_the_answer_gets_it_by_sending_the_same_payment(
    tmp_path: Path, writes: int, found: Recovered
) -> None:
    kill(tmp_path, "exact", writes)
    desk, recovered = await restart(tmp_path)
    assert recovered == found
    credited = FUNDS + (QUOTED if writes == MINED else 0)
    assert await credit_of(desk.store) == Balance(credited, 0)
    results = await asyncio.gather(*(again(desk) for _ in range(10)))
    (hold,) = [result for result in results if isinstance(result, ExactHold)]
    await hold.ready()
    charge = await hold.capture(CHARGED, ANSWERED)
    assert (charge.charged_nano_usd, charge.credited_nano_usd) == (CHARGED, QUOTED - CHARGED)
    assert await credit_of(desk.store) == Balance(FUNDS + QUOTED - CHARGED, 0)
    count = await desk.store.read(lambda tx: tx.execute("SELECT COUNT(*) FROM settlement").fetchone()[0])
    assert count == 1
    await assert_books_balance(desk.store)
    desk.store.close()


async def test_payer_killed_after_the_charge_is_told_so(tmp_path: Path) -> None:
    kill(tmp_path, "exact", CAPTURED)
    desk, recovered = await restart(tmp_path)
    assert recovered == Recovered(0, 0, 0, 0)
    used = await again(desk)
    assert isinstance(used, AlreadyUsed)
    assert used.state == "captured"
    assert await credit_of(desk.store) == Balance(FUNDS + QUOTED - CHARGED, 0)
    desk.store.close()


@pytest.mark.parametrize("writes", [SUBMITTED, MINED])
async def test_transfer_found_mined_after_a_kill_is_credit(tmp_path: Path, writes: int) -> None:
    kill(tmp_path, "exact", writes)
    desk, _ = await restart(tmp_path)
    (receipt_id,) = await desk.store.read(lambda tx: tx.execute("SELECT id FROM receipt").fetchone())
    await desk.settlements.mine(settlement_id(receipt_id))
    assert await credit_of(desk.store) == Balance(FUNDS + QUOTED, 0)
    receipt = await desk.store.read(lambda tx: receipts.get(tx, receipt_id))
    assert receipt is not None
    assert (receipt.state, receipt.reason, receipt.credited_nano_usd) == ("interrupted", "gateway_restarted", QUOTED)
    # Spent elsewhere, it cannot pay for the interrupted request as well.
    await spend(desk, FUNDS + 1_000_000)
    used = await again(desk)
    assert isinstance(used, AlreadyUsed)
    assert used.state == "credited"
    await assert_books_balance(desk.store)
    desk.store.close()


@pytest.mark.parametrize("writes", [SUBMITTED, MINED])
async def test_second_crash_in_the_resumed_use_loses_nothing(tmp_path: Path, writes: int) -> None:
    kill(tmp_path, "exact", writes)
    desk, _ = await restart(tmp_path)
    hold = await again(desk)
    assert isinstance(hold, ExactHold)
    await hold.ready()
    desk.store.close()  # the hold is never ended

    desk, recovered = await restart(tmp_path)
    assert recovered == Recovered(1, 1, 0, 0)
    assert await credit_of(desk.store) == Balance(FUNDS + QUOTED, 0)
    third = await again(desk)
    assert isinstance(third, ExactHold)
    await third.ready()
    await third.capture(CHARGED, ANSWERED)
    assert await credit_of(desk.store) == Balance(FUNDS + QUOTED - CHARGED, 0)
    await assert_books_balance(desk.store)
    desk.store.close()


@pytest.mark.parametrize("tender", ["prepaid", "account"])
async def test_request_on_a_balance_that_was_killed_is_released(tmp_path: Path, tender: str) -> None:
    kill(tmp_path, tender, 1)
    desk, recovered = await restart(tmp_path)
    assert recovered == Recovered(1, 0, 1, 0)
    assert await credit_of(desk.store) == Balance(FUNDS, 0)
    state = await desk.store.read(
        lambda tx: tx.execute("SELECT state, reason, charged_nano_usd FROM receipt").fetchall()
    )
    assert state == [("released", "gateway_restarted", 0)]
    desk.store.close()


async def test_recovery_does_not_touch_a_refund_under_way(tmp_path: Path) -> None:
    def refund(tx: Transaction) -> None:
        credit, custody = f"payer:{PAYER}@{ASSET}", f"custody@{ASSET}"
        transfers.post(tx, id="log:1", debit=custody, credit=credit, amount=100, reference="log")
        transfers.hold(tx, id="refund:1", debit=credit, credit=custody, amount=60, reference="refund_1")

    store = open_store(tmp_path)
    await store.write(refund)
    assert await recover(store) == Recovered(0, 0, 0, 0)
    assert await credit_of(store) == Balance(100, 60)
    await assert_books_balance(store)
    store.close()


async def test_recovery_needs_the_database_for_itself(tmp_path: Path) -> None:
    first, second = open_store(tmp_path), open_store(tmp_path)
    await recover(first)
    with pytest.raises(StoreOwned):
        await recover(second)
    await recover(first)
    first.close()
    await recover(second)
    second.close()


async def test_sweep_deletes_what_has_expired_and_nothing_else(tmp_path: Path) -> None:
    def fill(tx: Transaction) -> None:
        for expires_ms in (99, 100, 101):
            tx.execute("INSERT INTO replay VALUES (?, ?, ?)", (f"r{expires_ms}", b"x", expires_ms))
            tx.execute("INSERT INTO sign_in_nonce VALUES (?, ?)", (f"n{expires_ms}", expires_ms))

    store: Store = open_store(tmp_path)
    await store.write(fill)
    assert await store.write(lambda tx: sweep_expired(tx, 100)) == 4
    kept = "SELECT receipt_id FROM replay UNION ALL SELECT nonce FROM sign_in_nonce"
    assert await store.read(lambda tx: tx.execute(kept).fetchall()) == [("r101",), ("n101",)]
    store.close()


async def test_a_process_goes_on_proving_that_it_lives_whatever_a_round_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, true_acquire = open_store(tmp_path), Leases.acquire
    leases, refused = Leases(store, store.instance, ttl_s=0.1), list[str]()

    async def acquire(self: Leases, name: str) -> bool:
        if not refused:
            refused.append(name)
            raise RuntimeError("nobody foresaw this")
        return await true_acquire(self, name)

    monkeypatch.setattr(Leases, "acquire", acquire)
    watcher = asyncio.create_task(watch(store, leases))
    await until(lambda: leases.held(instance_name(store.instance)))
    assert refused
    watcher.cancel()
    store.close()
