"""API keys and what they draw on: an organisation's pool, or the balance of the wallet that made them.

A key is shown once, when it is made; only its hash is stored.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import asdict, dataclass
from typing import Any

from payments.ledger import transfers
from payments.store import Transaction

KEY_PREFIX = "fbk_"
ADMIN_PREFIX = "fba_"
POOL_ASSET = "USD"
GRANTS_ACCOUNT = f"grants@{POOL_ASSET}"
WALLET_KEYS_MAX = 100
"""Working keys of one wallet: anybody can be a wallet, and rows are not free."""
_COLUMNS = "id, name, pool, wallet, prefix, admin, created_ms, revoked_ms, pay_to"


@dataclass(frozen=True, slots=True)
class ApiKeyView:
    """What may be shown of a key. `prefix` is its first characters, so that people can recognise it."""

    id: str
    name: str
    pool: str | None
    """What it draws on; None for a wallet's key."""
    wallet: str | None
    """The wallet (lower-case hex) whose balance it spends; None for a pool's key."""
    prefix: str
    admin: bool
    created_ms: int
    revoked_ms: int | None
    pay_to: str | None = None
    """The one recipient (lower-case hex) that a facilitator settles for at this key's request; None for any."""

    def as_json(self) -> dict[str, Any]:
        """All fields, for programs."""
        return asdict(self)


class UnknownKey(Exception):
    """There is no API key with this id."""


class TooManyKeys(Exception):
    """The wallet has as many working keys as it may have."""


def pool_account(pool: str) -> str:
    """The ledger account of a pool."""
    return f"pool:{pool}@{POOL_ASSET}"


def hash_key(secret: str) -> str:
    """What is stored of a key. It has 256 random bits, so one round of SHA-256 is as good as a slow hash."""
    return hashlib.sha256(secret.encode()).hexdigest()


def create_key(
    tx: Transaction, name: str, pool: str, admin: bool = False, pay_to: str | None = None
) -> tuple[ApiKeyView, str]:
    """Make a key that draws on `pool`, and at a facilitator speaks for the recipient `pay_to` (lower-case hex), if given.

    Returns:
        What may be shown of it, and the key itself, which is not stored and cannot be shown again.
    """
    transfers.ensure_account(tx, pool_account(pool))
    return _make_key(tx, name, pool, None, admin, pay_to)


def create_wallet_key(tx: Transaction, name: str, wallet: str) -> tuple[ApiKeyView, str]:
    """Make a key that sees and spends a wallet's balance, and can do nothing else.

    Args:
        tx: The unit's transaction.
        name: For people.
        wallet: The signed-in wallet, lower-case hex.

    Returns:
        What may be shown of it, and the key itself, which cannot be shown again.

    Raises:
        TooManyKeys: If the wallet has `WALLET_KEYS_MAX` already.
    """
    count = tx.execute("SELECT COUNT(*) FROM api_key WHERE wallet = ? AND revoked_ms IS NULL", (wallet,)).fetchone()[0]
    if count >= WALLET_KEYS_MAX:
        raise TooManyKeys(f"a wallet can have {WALLET_KEYS_MAX} keys; revoke one that is not used any more")
    return _make_key(tx, name, None, wallet, False)


def _make_key(
    tx: Transaction, name: str, pool: str | None, wallet: str | None, admin: bool, pay_to: str | None = None
) -> tuple[ApiKeyView, str]:
    secret = (ADMIN_PREFIX if admin else KEY_PREFIX) + secrets.token_urlsafe(32)
    view = ApiKeyView(
        id=f"key_{secrets.token_hex(8)}",
        name=name,
        pool=pool,
        wallet=wallet,
        prefix=secret[:10],
        admin=admin,
        created_ms=time.time_ns() // 1_000_000,
        revoked_ms=None,
        pay_to=pay_to,
    )
    tx.execute(
        "INSERT INTO api_key (id, name, pool, wallet, key_hash, prefix, admin, created_ms, pay_to)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            view.id,
            view.name,
            view.pool,
            view.wallet,
            hash_key(secret),
            view.prefix,
            view.admin,
            view.created_ms,
            view.pay_to,
        ),
    )
    return view, secret


def list_keys(tx: Transaction) -> list[ApiKeyView]:
    """All keys, revoked ones included, oldest first."""
    rows = tx.execute(f"SELECT {_COLUMNS} FROM api_key ORDER BY created_ms, id").fetchall()  # noqa: S608 - a constant
    return [_view(row) for row in rows]


def list_wallet_keys(tx: Transaction, wallet: str) -> list[ApiKeyView]:
    """A wallet's keys, revoked ones included, oldest first."""
    rows = tx.execute(
        f"SELECT {_COLUMNS} FROM api_key WHERE wallet = ? ORDER BY created_ms, id",  # noqa: S608 - a constant
        (wallet,),
    ).fetchall()
    return [_view(row) for row in rows]


def find_key(tx: Transaction, key_hash: str) -> ApiKeyView | None:
    """The key with this hash, revoked or not; None if there is none."""
    row = tx.execute(f"SELECT {_COLUMNS} FROM api_key WHERE key_hash = ?", (key_hash,)).fetchone()  # noqa: S608
    return None if row is None else _view(row)


def revoke_key(tx: Transaction, key_id: str, wallet: str | None = None) -> ApiKeyView:
    """Make a key useless; revoking it again changes nothing.

    Args:
        tx: The unit's transaction.
        key_id: The key's id.
        wallet: Whose key it must be; None for the operator, who may revoke any.

    Raises:
        UnknownKey: If there is no such key.
    """
    row = tx.execute(f"SELECT {_COLUMNS} FROM api_key WHERE id = ?", (key_id,)).fetchone()  # noqa: S608
    if row is None or wallet not in (None, row[3]):
        raise UnknownKey(f"there is no API key {key_id}")
    now_ms = time.time_ns() // 1_000_000
    tx.execute("UPDATE api_key SET revoked_ms = ? WHERE id = ? AND revoked_ms IS NULL", (now_ms, key_id))
    return _view(tx.execute(f"SELECT {_COLUMNS} FROM api_key WHERE id = ?", (key_id,)).fetchone())  # noqa: S608


def fund_pool(tx: Transaction, pool: str, amount_nano_usd: int, reference: str) -> None:
    """Grant a pool money from the operator. The same `reference` again changes nothing."""
    transfers.ensure_account(tx, GRANTS_ACCOUNT)
    transfers.ensure_account(tx, pool_account(pool))
    transfers.post(
        tx,
        id=grant_id(pool, reference),
        debit=GRANTS_ACCOUNT,
        credit=pool_account(pool),
        amount=amount_nano_usd,
        reference=reference,
    )


def grant_id(pool: str, reference: str) -> str:
    """The ledger transfer of a grant."""
    return f"grant:{pool}:{reference}"


def _view(row: tuple[Any, ...]) -> ApiKeyView:
    return ApiKeyView(row[0], row[1], row[2], row[3], row[4], bool(row[5]), row[6], row[7], row[8])
