"""API keys: shown once, kept as a hash, revoked for good; pools funded once for each reference."""

from __future__ import annotations

from pathlib import Path

import pytest

from payments import accounts
from payments.accounts import UnknownKey, pool_account
from payments.ledger import transfers
from payments.ledger.transfers import TransferConflict
from payments.store import Store
from tests.payments.exact_samples import assert_books_balance

USD = 1_000_000_000


async def available(store: Store, pool: str) -> int:
    return await store.read(lambda tx: transfers.balance(tx, pool_account(pool)).available)


@pytest.mark.parametrize(("admin", "prefix"), [(False, "fbk_"), (True, "fba_")])
async def test_a_key_is_found_by_its_hash(store: Store, admin: bool, prefix: str) -> None:
    view, secret = await store.write(lambda tx: accounts.create_key(tx, "agent", "research", admin))
    assert secret.startswith(prefix)
    assert secret.startswith(view.prefix)
    assert (view.name, view.pool, view.admin, view.revoked_ms) == ("agent", "research", admin, None)
    assert await store.read(lambda tx: accounts.find_key(tx, accounts.hash_key(secret))) == view
    assert await store.read(lambda tx: accounts.find_key(tx, accounts.hash_key(secret[:-1]))) is None
    assert await store.read(lambda tx: accounts.find_key(tx, secret)) is None


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_the_key_itself_is_nowhere_in_the_database(store: Store) -> None:
    _, secret = await store.write(lambda tx: accounts.create_key(tx, "agent", "research"))
    written = b"".join(path.read_bytes() for path in Path(store.location).parent.iterdir())
    assert b"research" in written
    assert secret.encode() not in written
    assert secret[10:].encode() not in written


async def test_keys_are_listed_oldest_first_with_the_revoked_ones(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for name, at_ms in (("new", 3), ("newer", 4), ("old", 2), ("oldest", 1)):
        monkeypatch.setattr("payments.accounts.time.time_ns", lambda at_ms=at_ms: at_ms * 1_000_000)
        made.append((await store.write(lambda tx, name=name: accounts.create_key(tx, name, "p")))[0])  # type: ignore[misc]
    await store.write(lambda tx: accounts.revoke_key(tx, made[1].id))
    listed = await store.read(accounts.list_keys)
    assert [view.name for view in listed] == ["oldest", "old", "new", "newer"]
    assert [view.revoked_ms is None for view in listed] == [True, True, True, False]


async def test_revoking_again_keeps_the_first_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    view, secret = await store.write(lambda tx: accounts.create_key(tx, "agent", "p"))
    first = await store.write(lambda tx: accounts.revoke_key(tx, view.id))
    assert first.revoked_ms is not None
    later_ns = (first.revoked_ms + 5_000) * 1_000_000
    monkeypatch.setattr("payments.accounts.time.time_ns", lambda: later_ns)
    assert await store.write(lambda tx: accounts.revoke_key(tx, view.id)) == first
    assert await store.read(lambda tx: accounts.find_key(tx, accounts.hash_key(secret))) == first


async def test_revoking_a_key_that_is_not_there_says_so(store: Store) -> None:
    view, _ = await store.write(lambda tx: accounts.create_key(tx, "agent", "p"))
    with pytest.raises(UnknownKey, match="key_nobody"):
        await store.write(lambda tx: accounts.revoke_key(tx, "key_nobody"))
    assert await store.read(accounts.list_keys) == [view]


async def test_a_pool_is_funded_once_for_each_reference(store: Store) -> None:
    for reference in ("march", "march", "april"):
        await store.write(lambda tx, reference=reference: accounts.fund_pool(tx, "p", 5 * USD, reference))  # type: ignore[misc]
    assert await available(store, "p") == 10 * USD
    assert await available(store, "q") == 0
    await assert_books_balance(store)


async def test_the_same_reference_with_another_amount_is_refused(store: Store) -> None:
    await store.write(lambda tx: accounts.fund_pool(tx, "p", 5 * USD, "march"))
    with pytest.raises(TransferConflict):
        await store.write(lambda tx: accounts.fund_pool(tx, "p", 6 * USD, "march"))
    assert await available(store, "p") == 5 * USD


async def test_making_a_key_does_not_change_what_its_pool_has(store: Store) -> None:
    await store.write(lambda tx: accounts.fund_pool(tx, "p", 5 * USD, "march"))
    await store.write(lambda tx: accounts.create_key(tx, "agent", "p"))
    await store.write(lambda tx: accounts.create_key(tx, "another", "new"))
    assert await available(store, "p") == 5 * USD
    assert await available(store, "new") == 0
