"""Who is calling, and who may read an answer that was kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.access import keys
from gateway.access.keys import Access, KeyCaller, WalletCaller, WalletKeyCaller
from gateway.api.errors import ApiError
from gateway.replays import ANSWER_BYTES_MAX, KeptAnswer, Replays, replay_secret
from payments import accounts
from payments.sign_in import SignIn
from payments.store import Store
from tests.databases import open_store

ADDRESS = "0x" + "a1" * 20
HEADER, BODY = b"a signed payment", b'{"model": "auto"}'
ANSWER = KeptAnswer(200, {"x-farebox-receipt": "rcpt_1"}, "application/json", b'{"secret words": "\x00\xff"}')


class Clock:
    """Stands for the module `time` where it is used, and is moved by hand."""

    def __init__(self) -> None:
        self.now = 1_790_000_000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return int(self.now * 1e9)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("gateway.access.keys.time", clock)
    monkeypatch.setattr("gateway.replays.time", clock)
    return clock


@pytest.fixture
def sign_in() -> SignIn:
    return SignIn(secret=b"s" * 32, domain="d", uri="https://d", chain_id=1, session_ttl_s=60)


@pytest.fixture
def access(store: Store, sign_in: SignIn) -> Access:
    return Access(store, sign_in)


async def new_key(store: Store, admin: bool = False) -> tuple[str, str]:
    """Its id and the key."""
    view, secret = await store.write(lambda tx: accounts.create_key(tx, "agent", "research", admin))
    return view.id, secret


async def refusal(access: Access, token: str) -> tuple[int, str]:
    with pytest.raises(ApiError) as refused:
        await access.caller(f"Bearer {token}")
    assert token not in refused.value.message
    return refused.value.status, refused.value.code


@pytest.mark.parametrize("admin", [False, True])
@pytest.mark.parametrize("spelling", ["Bearer {}", "bearer {}", "BEARER  {} "])
async def test_a_key_is_known_with_its_pool(store: Store, access: Access, admin: bool, spelling: str) -> None:
    key_id, secret = await new_key(store, admin)
    assert await access.caller(spelling.format(secret)) == KeyCaller(key_id, "research", admin)


@pytest.mark.parametrize("token", ["fbk_unknown", "fba_unknown", "fbk_", "fbk_é", "fbk_" + "a" * 5000])
async def test_an_unknown_key_is_401(access: Access, token: str) -> None:
    assert await refusal(access, token) == (401, "invalid_api_key")


async def test_a_keys_prefix_is_not_the_key(store: Store, access: Access) -> None:
    _, secret = await new_key(store)
    assert await refusal(access, secret[:-1]) == (401, "invalid_api_key")
    assert await refusal(access, secret + "a") == (401, "invalid_api_key")
    assert await refusal(access, "fba_" + secret.removeprefix("fbk_")) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer sk-not-ours",
        "Bearer not-needed",
        "Basic ZmJrX3g6eA==",
        "Basic fbk_x",
        "fbk_x",
    ],
)
async def test_what_is_no_token_of_ours_is_nobody_in_particular(access: Access, authorization: str | None) -> None:
    assert await access.caller(authorization) is None


async def test_a_revoked_key_is_401_at_once_where_it_was_not_used(store: Store, access: Access) -> None:
    key_id, secret = await new_key(store)
    await store.write(lambda tx: accounts.revoke_key(tx, key_id))
    assert await refusal(access, secret) == (401, "revoked_api_key")


async def test_a_revoked_key_works_no_longer_than_it_is_remembered(store: Store, access: Access, clock: Clock) -> None:
    key_id, secret = await new_key(store)
    caller = await access.caller(f"Bearer {secret}")
    await store.write(lambda tx: accounts.revoke_key(tx, key_id))
    clock.now += keys.CACHE_TTL_S
    assert await access.caller(f"Bearer {secret}") == caller
    clock.now += 0.01
    assert await refusal(access, secret) == (401, "revoked_api_key")
    assert await refusal(access, secret) == (401, "revoked_api_key")


async def test_using_a_key_does_not_prolong_how_long_it_is_remembered(
    store: Store, access: Access, clock: Clock
) -> None:
    key_id, secret = await new_key(store)
    await access.caller(f"Bearer {secret}")
    await store.write(lambda tx: accounts.revoke_key(tx, key_id))
    for _ in range(4):
        clock.now += keys.CACHE_TTL_S / 4
        await access.caller(f"Bearer {secret}")
    clock.now += keys.CACHE_TTL_S / 4
    assert await refusal(access, secret) == (401, "revoked_api_key")


async def test_a_key_made_after_it_was_refused_works_at_once(store: Store, access: Access) -> None:
    """What is not there is not remembered."""
    secret = "fbk_soon"
    assert await refusal(access, secret) == (401, "invalid_api_key")
    await store.write(
        lambda tx: tx.execute(
            "INSERT INTO api_key (id, name, pool, key_hash, prefix, admin, created_ms) VALUES ('key_1','n','p',?,'fbk',0,0)",
            (accounts.hash_key(secret),),
        )
    )
    assert await access.caller(f"Bearer {secret}") == KeyCaller("key_1", "p", False)


async def test_remembered_keys_are_few_and_not_the_keys_themselves(
    store: Store, access: Access, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "CACHE_MAX", 3)
    for _ in range(10):
        _, secret = await new_key(store)
        await access.caller(f"Bearer {secret}")
        assert secret not in access._known
    assert len(access._known) <= 3


async def test_a_session_is_its_wallet_until_it_expires(access: Access, sign_in: SignIn, clock: Clock) -> None:
    session = sign_in.open_session(ADDRESS, int(clock.now))
    assert await access.caller(f"Bearer {session.token}") == WalletCaller(ADDRESS)
    clock.now += 60
    assert await refusal(access, session.token) == (401, "session_expired")
    assert await refusal(access, session.token[:-8] + "AAAAAAAA") == (401, "invalid_session")


# ---------------------------------------------------------------------- kept answers


async def keep(store: Store, header: bytes = HEADER, body: bytes = BODY, ttl_s: int = 600) -> Replays:
    replays = Replays(store, ttl_s)
    sealed = replays.sealed("rcpt_1", replay_secret(header, body), ANSWER)
    assert sealed is not None
    await store.write(sealed)
    return replays


async def test_who_sent_the_payment_and_the_body_gets_the_answer_again(store: Store) -> None:
    replays = await keep(store)
    assert await replays.find("rcpt_1", replay_secret(HEADER, BODY)) == ANSWER
    # Another process with the same database, which has nothing in memory.
    assert await Replays(store, 600).find("rcpt_1", replay_secret(HEADER, BODY)) == ANSWER


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (HEADER + b" ", BODY),
        (HEADER, BODY + b" "),
        (HEADER + BODY[:1], BODY[1:]),
        (HEADER[:-1], HEADER[-1:] + BODY),
        (b"", HEADER + BODY),
        (BODY, HEADER),
        (b"", b""),
    ],
)
async def test_who_lacks_the_header_or_the_body_gets_nothing(store: Store, header: bytes, body: bytes) -> None:
    replays = await keep(store)
    assert await replays.find("rcpt_1", replay_secret(header, body)) is None


async def test_an_answer_is_gone_after_its_time(store: Store, clock: Clock) -> None:
    replays = await keep(store, ttl_s=10)
    clock.now += 9.999
    assert await replays.find("rcpt_1", replay_secret(HEADER, BODY)) == ANSWER
    clock.now += 0.001
    assert await replays.find("rcpt_1", replay_secret(HEADER, BODY)) is None


@pytest.mark.parametrize("at", [0, 11, 12, 40, -1])
async def test_a_ciphertext_that_was_touched_opens_to_nobody(store: Store, at: int) -> None:
    replays = await keep(store)
    kept = bytearray((await store.read(lambda tx: tx.execute("SELECT ciphertext FROM replay").fetchone()))[0])
    kept[at] ^= 1
    await store.write(lambda tx: tx.execute("UPDATE replay SET ciphertext = ?", (bytes(kept),)))
    assert await replays.find("rcpt_1", replay_secret(HEADER, BODY)) is None


async def test_a_ciphertext_moved_to_another_receipt_opens_to_nobody(store: Store) -> None:
    replays = await keep(store)
    await store.write(lambda tx: tx.execute("UPDATE replay SET receipt_id = 'rcpt_2'"))
    assert await replays.find("rcpt_2", replay_secret(HEADER, BODY)) is None


async def test_nothing_of_the_payment_or_the_answer_is_in_the_database(store: Store) -> None:
    await keep(store)
    written = b"".join(path.read_bytes() for path in Path(store.location).parent.iterdir())
    assert b"rcpt_1" in written
    for secret in (HEADER, BODY, ANSWER.body, b"x-farebox-receipt"):
        assert secret not in written


async def test_the_same_answer_is_never_the_same_ciphertext(store: Store) -> None:
    replays = Replays(store, 600)
    sealed = [replays.sealed("rcpt_1", replay_secret(HEADER, BODY), ANSWER) for _ in range(2)]
    assert len({each.ciphertext for each in sealed if each is not None}) == 2


async def test_the_first_answer_stays(store: Store) -> None:
    replays = await keep(store)
    other = replays.sealed("rcpt_1", replay_secret(HEADER, BODY), KeptAnswer(500, {}, "text/plain", b"other"))
    assert other is not None
    await store.write(other)
    assert await replays.find("rcpt_1", replay_secret(HEADER, BODY)) == ANSWER


@pytest.mark.parametrize(("ttl_s", "length"), [(0, 1), (600, ANSWER_BYTES_MAX + 1)])
async def test_what_is_not_to_be_kept_is_not(store: Store, ttl_s: int, length: int) -> None:
    answer = KeptAnswer(200, {}, "text/plain", b"a" * length)
    assert Replays(store, ttl_s).sealed("rcpt_1", replay_secret(HEADER, BODY), answer) is None


async def test_a_wallets_key_is_its_wallets_and_stops_at_once_where_it_was_revoked(
    store: Store, access: Access
) -> None:
    view, secret = await store.write(lambda tx: accounts.create_wallet_key(tx, "agent", ADDRESS))
    assert await access.caller(f"Bearer {secret}") == WalletKeyCaller(view.id, ADDRESS)
    await store.write(lambda tx: accounts.revoke_key(tx, view.id, ADDRESS))
    access.forget(view.id)
    with pytest.raises(ApiError) as refused:
        await access.caller(f"Bearer {secret}")
    assert (refused.value.status, refused.value.code) == (401, "revoked_api_key")
