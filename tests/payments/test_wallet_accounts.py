"""A wallet's own keys, its history in its own words, and the books as rows for accountants."""

from __future__ import annotations

import asyncio

import pytest

from payments import accounts, receipts, wallet_accounts
from payments.accounts import TooManyKeys, UnknownKey
from payments.errors import PaymentRefused
from payments.ledger import export, history, transfers
from payments.ledger.accounts import account_id, payer_account
from payments.ledger.history import BadCursor
from payments.store import Store, Transaction
from payments.tenders.base import Hold, Outcome
from payments.tenders.prepaid import PrepaidTender
from tests.payments.exact_samples import ASSET, DETAILS, PAYER, QUOTED, assert_books_balance, quote_of

OTHER = "0x" + "b2" * 20
USDT = "eip155:84532/USDT"


async def deposit(store: Store, amount_nano_usd: int, asset: str = ASSET, name: str = "0xaa:1") -> None:
    await store.write(
        lambda tx: transfers.post(
            tx,
            id=f"log:{name}:{asset[-4:]}",
            debit=account_id("custody", asset),
            credit=payer_account(PAYER, asset),
            amount=amount_nano_usd,
            reference="0xaa",
        )
    )


# --- keys ------------------------------------------------------------------------------------------------------------


async def test_a_wallets_key_spends_its_balance_and_the_receipt_names_the_key(store: Store) -> None:
    view, secret = await store.write(lambda tx: accounts.create_wallet_key(tx, "my agent", PAYER))
    assert (view.pool, view.wallet, view.admin) == (None, PAYER, False)
    assert await store.read(lambda tx: accounts.find_key(tx, accounts.hash_key(secret))) == view
    await deposit(store, QUOTED)
    tender = PrepaidTender(store, PAYER, [ASSET], view.id)
    hold = await tender.authorize(quote_of(), DETAILS)
    await hold.capture(QUOTED // 4, Outcome({"finish": "stop"}))
    receipt = await store.read(lambda tx: receipts.get(tx, hold.receipt_id))
    assert receipt is not None
    assert (receipt.payer, receipt.details["api_key"], receipt.charged_nano_usd) == (PAYER, view.id, QUOTED // 4)
    await assert_books_balance(store)


async def test_a_wallet_sees_and_revokes_its_own_keys_only(store: Store) -> None:
    mine, _ = await store.write(lambda tx: accounts.create_wallet_key(tx, "mine", PAYER))
    pools, _ = await store.write(lambda tx: accounts.create_key(tx, "pool's", "p"))
    assert await store.read(lambda tx: accounts.list_wallet_keys(tx, PAYER)) == [mine]
    assert await store.read(lambda tx: accounts.list_wallet_keys(tx, OTHER)) == []
    for key_id, wallet in ((mine.id, OTHER), (pools.id, PAYER)):
        with pytest.raises(UnknownKey):
            await store.write(lambda tx, key_id=key_id, wallet=wallet: accounts.revoke_key(tx, key_id, wallet))  # type: ignore[misc]
    assert [view.revoked_ms for view in await store.read(accounts.list_keys)] == [None, None]
    revoked = await store.write(lambda tx: accounts.revoke_key(tx, mine.id, PAYER))
    assert revoked.revoked_ms is not None


async def test_the_number_of_a_wallets_keys_is_bounded_and_revoked_ones_make_room(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts, "WALLET_KEYS_MAX", 2)
    first, _ = await store.write(lambda tx: accounts.create_wallet_key(tx, "a", PAYER))
    await store.write(lambda tx: accounts.create_wallet_key(tx, "b", PAYER))
    with pytest.raises(TooManyKeys):
        await store.write(lambda tx: accounts.create_wallet_key(tx, "c", PAYER))
    await store.write(lambda tx: accounts.create_wallet_key(tx, "c", OTHER))
    await store.write(lambda tx: accounts.revoke_key(tx, first.id))
    await store.write(lambda tx: accounts.create_wallet_key(tx, "c", PAYER))


async def test_a_hundred_parallel_debits_never_go_below_zero(store: Store) -> None:
    await deposit(store, 7 * QUOTED + 1)
    tender = PrepaidTender(store, PAYER, [ASSET], "key_1")

    async def spend(number: int) -> str:
        try:
            hold: Hold = await tender.authorize(quote_of(), DETAILS)
        except PaymentRefused as refused:
            return refused.code
        await (hold.capture(QUOTED, Outcome()) if number % 2 else hold.release(Outcome()))
        return "held"

    outcomes = await asyncio.gather(*(spend(number) for number in range(100)))
    assert set(outcomes) <= {"held", "insufficient_credit"}
    left = await store.read(lambda tx: transfers.balance(tx, payer_account(PAYER, ASSET)))
    revenue = await store.read(lambda tx: transfers.balance(tx, account_id("revenue", ASSET)).balance)
    assert left.pending_out == 0
    assert 0 < left.available < QUOTED or revenue < 7 * QUOTED
    assert left.balance + revenue == 7 * QUOTED + 1
    assert outcomes.count("held") >= 7
    await assert_books_balance(store)


async def test_holds_at_once_take_what_there_is_and_no_more(store: Store) -> None:
    await deposit(store, 7 * QUOTED + 1)
    tender = PrepaidTender(store, PAYER, [ASSET])
    outcomes = await asyncio.gather(
        *(tender.authorize(quote_of(), DETAILS) for _ in range(100)), return_exceptions=True
    )
    assert sum(not isinstance(outcome, BaseException) for outcome in outcomes) == 7
    left = await store.read(lambda tx: transfers.balance(tx, payer_account(PAYER, ASSET)))
    assert (left.available, left.pending_out) == (1, 7 * QUOTED)


# --- history ---------------------------------------------------------------------------------------------------------


async def test_history_says_what_came_in_and_what_it_was_spent_on(store: Store) -> None:
    await deposit(store, 3 * QUOTED)
    tender = PrepaidTender(store, PAYER, [ASSET])
    charged = await tender.authorize(quote_of(), DETAILS)
    await charged.capture(QUOTED // 2, Outcome())
    freed = await tender.authorize(quote_of(), DETAILS)
    await freed.release(Outcome())
    held = await tender.authorize(quote_of(), DETAILS)
    page = await store.read(lambda tx: history.page(tx, PAYER, 10))
    lines = {entry.id: (entry.kind, entry.amount_nano_usd, entry.state, entry.receipt) for entry in page.entries}
    assert lines == {
        "log:0xaa:1:USDC": ("deposit", 3 * QUOTED, "posted", None),
        f"hold:{charged.receipt_id}": ("charge", -QUOTED // 2, "posted", charged.receipt_id),
        f"hold:{held.receipt_id}": ("charge", -QUOTED, "pending", held.receipt_id),
    }
    assert page.next is None
    assert next(entry for entry in page.entries if entry.kind == "deposit").transaction_hash == "0xaa"
    assert (await store.read(lambda tx: history.page(tx, OTHER, 10))).entries == ()


async def test_pages_hold_every_line_once_over_all_tokens(store: Store) -> None:
    for number in range(7):
        await deposit(store, number + 1, ASSET if number % 2 else USDT, name=f"0x{number}:0")
    seen: list[int] = []
    before = None
    for _ in range(10):
        page = await store.read(lambda tx, before=before: history.page(tx, PAYER, 2, before))  # type: ignore[misc]
        seen += [entry.amount_nano_usd for entry in page.entries]
        before = page.next
        if before is None:
            break
    assert sorted(seen) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("cursor", ["x", "é", "%%%%", "MTIz", "LTEuYQ", "OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5LmE"])
async def test_a_cursor_of_somebody_elses_making_is_refused(store: Store, cursor: str) -> None:
    if cursor == "MTIz":  # "123": a time without an id is as good as any
        assert (await store.read(lambda tx: history.page(tx, PAYER, 2, cursor))).entries == ()
        return
    with pytest.raises(BadCursor):
        await store.read(lambda tx: history.page(tx, PAYER, 2, cursor))


# --- export ----------------------------------------------------------------------------------------------------------


async def test_export_has_every_posted_transfer_once_in_order(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "PAGE_ROWS", 3)
    for number in range(8):
        await deposit(store, (number + 1) * QUOTED, name=f"0x{number}:0")
    await PrepaidTender(store, PAYER, [ASSET]).authorize(quote_of(), DETAILS)

    def everything(tx: Transaction, selection: export.Selection) -> list[export.Row]:
        rows: list[export.Row] = []
        after: export.Position | None = export.first(selection)
        while after is not None:
            more, after = export.page(tx, selection, after)
            rows += more
        return rows

    rows = await store.read(lambda tx: everything(tx, export.Selection(0, 2**53)))
    assert sorted(row[5] for row in rows) == [f"0.{2 * n:02d}" for n in range(1, 9)]
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert len(await store.read(lambda tx: everything(tx, export.Selection(0, 2**53, unposted=True)))) == 9
    revenue = export.Selection(0, 2**53, account_id("revenue", ASSET))
    assert await store.read(lambda tx: everything(tx, revenue)) == []
    assert await store.read(lambda tx: everything(tx, export.Selection(0, 1))) == []


# --- accounts --------------------------------------------------------------------------------------------------------


async def test_an_account_is_opened_once(store: Store) -> None:
    assert not await store.read(lambda tx: wallet_accounts.keeps_balance(tx, PAYER))
    for _ in range(2):
        await store.write(lambda tx: wallet_accounts.open_account(tx, PAYER))
    assert await store.read(lambda tx: wallet_accounts.keeps_balance(tx, PAYER))
    assert not await store.read(lambda tx: wallet_accounts.keeps_balance(tx, OTHER))
