"""The agent's own log: payments under way, receipts, known credit. One SQLite file, shared safely by several processes.
What is in its tables of channels is `agents_sdk.channels.book`'s matter.

It is what makes limits survive restarts and what makes a payment be sent again rather than made again. It holds no prompts and
no answers: a request is known by its digest. A signed payment is kept only until its outcome is known.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agents_sdk.errors import LimitExceeded
from agents_sdk.journal_schema import LEFT, SCHEMA, SPENT
from agents_sdk.policy import Window

CLAIM_TTL_MS = 900_000
"""A claim of a process that cannot be asked whether it lives (another machine) ends after this."""
REPLAY_GRACE_S = 600
"""A payment may be sent again this long after it has expired: the gateway may still have its answer."""
_PROCESS = secrets.token_hex(4)

_TRANSITIONS: dict[str, tuple[str, ...]] = {
    "signed": ("reserved",),
    "void": ("reserved",),
    "answered": ("signed",),
    "used": ("signed",),
    "credited": ("signed",),
    "refused": ("signed",),
    "expired": ("signed",),
}
"""New state → states it may follow. `signed` is the only state in which a payment may be sent (again).

void: never signed. answered, used, credited: the gateway took it. refused: the gateway says it did not; that is its word and no
proof, so the payment counts against the limits until its signature expires. expired: nothing was heard of it.
"""


@dataclass(frozen=True, slots=True)
class StoredPayment:
    """A payment in the journal. `header` is None until it is signed."""

    id: str
    amount_nano_usd: int
    """What the request costs at most."""
    asset: str
    expires_at: int
    """Unix seconds after which nobody takes it any more."""
    header: str | None = None


class Journal:
    """The log in one file.

    Args:
        path: The SQLite file; it and its folder are made readable by their owner only. ``:memory:`` keeps nothing.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = str(path)
        if self._path != ":memory:":
            Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Signed payments are in it: nobody else may read them, not even between creation and chmod.
            os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
        self._lock = threading.RLock()
        self._database = sqlite3.connect(
            self._path, timeout=30, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.executescript(SCHEMA)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    # ------------------------------------------------------------------ payments

    def reserve(
        self,
        *,
        origin: str,
        payer: str,
        request: str,
        amount_nano_usd: int,
        asset: str,
        recipient: str,
        expires_at: int,
        windows: Sequence[Window],
    ) -> StoredPayment:
        """Take an amount out of the limits, before it is signed, and claim the new payment for this process.

        Raises:
            LimitExceeded: If a limit would be broken. Several processes on one file cannot break it together.
        """
        with self.transaction() as database:
            self.check_limits(database, payer, windows, spending=amount_nano_usd, leaving=amount_nano_usd)
            payment_id = self.insert(
                database,
                origin=origin,
                payer=payer,
                request=request,
                amount_nano_usd=amount_nano_usd,
                asset=asset,
                recipient=recipient,
                expires_at=expires_at,
            )
        return StoredPayment(payment_id, amount_nano_usd, asset, expires_at)

    @staticmethod
    def insert(
        database: sqlite3.Connection,
        *,
        origin: str,
        payer: str,
        request: str,
        amount_nano_usd: int,
        asset: str,
        recipient: str,
        expires_at: int,
    ) -> str:
        """Write a payment down that is about to be signed, claimed for this process; returns its id. Inside a transaction."""
        payment_id, created_ms = f"pay_{secrets.token_hex(10)}", milliseconds()
        database.execute(
            "INSERT INTO payment VALUES (?, ?, ?, ?, 'reserved', ?, ?, ?, NULL, ?, ?, ?, ?)",
            (
                payment_id, origin, payer, request, amount_nano_usd, asset, recipient,
                created_ms, expires_at, _claim(), created_ms,
            ),
        )  # fmt: skip
        return payment_id

    @staticmethod
    def check_limits(
        database: sqlite3.Connection,
        payer: str,
        windows: Sequence[Window],
        *,
        spending: int,
        leaving: int,
        what: str = "this request may cost",
    ) -> None:
        """Check what is about to be signed against the limits over time. Inside a transaction.

        Args:
            database: The transaction's.
            payer: The wallet.
            windows: The limits.
            spending: Nano-USD that somebody else gets a right to.
            leaving: Nano-USD that leave the wallet, if only for a channel.
            what: Begins the error's sentence.

        Raises:
            LimitExceeded: If a limit would be broken.
        """
        for window in windows:
            for query, asked in ((SPENT, spending), (LEFT, leaving)):
                used = _sum(database, query, payer, window.seconds)
                if asked and used + asked > window.limit_nano_usd:
                    raise LimitExceeded(
                        window.name,
                        limit_nano_usd=window.limit_nano_usd,
                        asked_nano_usd=asked,
                        used_nano_usd=used,
                        what=what,
                    )

    def signed(self, payment: StoredPayment, header: str, expires_at: int) -> StoredPayment:
        """Keep the signed payment, so that from here on this very one is sent."""
        with self.transaction() as database:
            return self.sign(database, payment, header, expires_at)

    def sign(self, database: sqlite3.Connection, payment: StoredPayment, header: str, expires_at: int) -> StoredPayment:
        """The same as a part of a transaction."""
        self._move(database, payment.id, "signed")
        database.execute("UPDATE payment SET header = ?, expires_at = ? WHERE id = ?", (header, expires_at, payment.id))
        return replace(payment, header=header, expires_at=expires_at)

    def take_open(self, *, origin: str, payer: str, request: str) -> StoredPayment | None:
        """Claim a payment for this very request whose outcome is unknown, if no living exchange is at it.

        Args:
            origin: The gateway.
            payer: The wallet.
            request: The request's digest.
        """
        with self._lock:
            # Nearly every request has none: a read, so that writers of other processes are not in the way.
            if not self._database.execute(
                "SELECT 1 FROM payment WHERE request = ? AND state = 'signed' LIMIT 1", (request,)
            ).fetchone():
                return None
        now_ms = milliseconds()
        with self.transaction() as database:
            rows = database.execute(
                "SELECT id, COALESCE(price_nano_usd, amount_nano_usd), asset, expires_at, header, claim, claimed_ms "
                "FROM payment LEFT JOIN voucher ON payment_id = id "
                "WHERE request = ? AND state = 'signed' AND origin = ? AND payer = ? AND expires_at > ? "
                "ORDER BY created_ms",
                (request, origin, payer, now_ms // 1000 - REPLAY_GRACE_S),
            ).fetchall()
            for *fields, claim, claimed_ms in rows:
                if claim is None or _is_dead(claim, claimed_ms, now_ms):
                    database.execute(
                        "UPDATE payment SET claim = ?, claimed_ms = ? WHERE id = ?", (_claim(), now_ms, fields[0])
                    )
                    return StoredPayment(*fields)
        return None

    def let_go(self, payment: StoredPayment) -> None:
        """End this process's claim: the payment's outcome is unknown and the next try may take it up."""
        with self.transaction() as database:
            database.execute(
                "UPDATE payment SET claim = NULL, state = CASE state WHEN 'reserved' THEN 'void' ELSE state END "
                "WHERE id = ?",
                (payment.id,),
            )

    def close_payment(self, payment: StoredPayment, state: str) -> None:
        """Write down what became of a payment; its signature is forgotten. See the table of transitions."""
        with self.transaction() as database:
            self.end(database, payment.id, state)

    def end(self, database: sqlite3.Connection, payment_id: str, state: str) -> None:
        """The same as a part of a transaction."""
        self._move(database, payment_id, state)
        database.execute("UPDATE payment SET header = NULL, claim = NULL WHERE id = ?", (payment_id,))

    @staticmethod
    def is_open(database: sqlite3.Connection, payment_id: str) -> bool:
        """Whether nothing is written down of what became of a signed payment."""
        query = "SELECT 1 FROM payment WHERE id = ? AND state = 'signed'"
        return database.execute(query, (payment_id,)).fetchone() is not None

    @staticmethod
    def is_abandoned(database: sqlite3.Connection, payment_id: str) -> bool:
        """Whether nobody is going to sign or send a payment, unless the same request is asked again."""
        claim, claimed_ms = database.execute(
            "SELECT claim, claimed_ms FROM payment WHERE id = ?", (payment_id,)
        ).fetchone()
        return claim is None or _is_dead(claim, claimed_ms, milliseconds())

    def expire_open(self, origin: str, payer: str) -> int:
        """Give up payments that can no longer be sent and of which nothing was heard; returns how many there were."""
        latest = milliseconds() // 1000 - REPLAY_GRACE_S
        with self.transaction() as database:
            return database.execute(
                "UPDATE payment SET state = 'expired', header = NULL, claim = NULL "
                "WHERE state = 'signed' AND origin = ? AND payer = ? AND expires_at <= ? "
                "AND id NOT IN (SELECT payment_id FROM voucher)",
                (origin, payer, latest),
            ).rowcount

    def used(self, payer: str, seconds: int) -> int:
        """What was signed away, or may have been, in the last `seconds`, in nano-USD."""
        with self._lock:
            return _sum(self._database, SPENT, payer, seconds)

    def left(self, payer: str, seconds: int) -> int:
        """What left the wallet, deposits included, or may have, in the last `seconds`, in nano-USD."""
        with self._lock:
            return _sum(self._database, LEFT, payer, seconds)

    @staticmethod
    def _move(database: sqlite3.Connection, payment_id: str, state: str) -> None:
        before = _TRANSITIONS[state]
        marks = ",".join("?" * len(before))
        changed = database.execute(
            f"UPDATE payment SET state = ? WHERE id = ? AND state IN ({marks})",  # noqa: S608 - only question marks
            (state, payment_id, *before),
        ).rowcount
        assert changed == 1, f"payment {payment_id} cannot become {state}"

    # ------------------------------------------------------------------ receipts and credit

    def add_receipt(self, receipt_id: str, payer: str, document: Mapping[str, Any]) -> None:
        """Keep a receipt; the same one again replaces it."""
        with self.transaction() as database:
            database.execute(
                "INSERT INTO receipt (id, payer, created_ms, document) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET document = excluded.document",
                (receipt_id, payer, milliseconds(), json.dumps(dict(document))),
            )

    def amend_receipt(self, receipt_id: str, known: Mapping[str, Any]) -> None:
        """Add to a receipt what became known later."""
        with self.transaction() as database:
            row = database.execute("SELECT document FROM receipt WHERE id = ?", (receipt_id,)).fetchone()
            if row is not None:
                document = json.dumps(json.loads(row[0]) | dict(known))
                database.execute("UPDATE receipt SET document = ? WHERE id = ?", (document, receipt_id))

    def receipts(self, payer: str, limit: int) -> list[tuple[int, dict[str, Any]]]:
        """The latest receipts, newest first: when (milliseconds since 1970) and what."""
        with self._lock:
            rows = self._database.execute(
                "SELECT created_ms, document FROM receipt WHERE payer = ? ORDER BY number DESC LIMIT ?", (payer, limit)
            ).fetchall()
        return [(created_ms, json.loads(document)) for created_ms, document in rows]

    def credit(self, origin: str, payer: str) -> dict[str, int]:
        """What this wallet has as credit with a gateway, as far as we know: asset → nano-USD."""
        with self._lock:
            rows = self._database.execute(
                "SELECT asset, amount_nano_usd FROM credit WHERE origin = ? AND payer = ? AND amount_nano_usd > 0",
                (origin, payer),
            ).fetchall()
        return dict(rows)

    def add_credit(self, origin: str, payer: str, asset: str, amount_nano_usd: int) -> None:
        """Note that credit grew (or shrank: it never goes below zero)."""
        with self.transaction() as database:
            database.execute(
                "INSERT INTO credit VALUES (:origin, :payer, :asset, MAX(0, :amount)) ON CONFLICT (origin, payer, asset) "
                "DO UPDATE SET amount_nano_usd = MAX(0, amount_nano_usd + :amount)",
                {"origin": origin, "payer": payer, "asset": asset, "amount": amount_nano_usd},
            )

    def set_credit(self, origin: str, payer: str, amounts: Mapping[str, int]) -> None:
        """Replace what is known by what the gateway said."""
        with self.transaction() as database:
            database.execute("DELETE FROM credit WHERE origin = ? AND payer = ?", (origin, payer))
            database.executemany(
                "INSERT INTO credit VALUES (?, ?, ?, ?)",
                [(origin, payer, asset, amount) for asset, amount in amounts.items()],
            )

    # ------------------------------------------------------------------ intents

    def intend(self, name: str) -> tuple[str, bool]:
        """Something is about to be asked for that must not be done twice. Returns its key, and whether it was intended before:
        until `end_intent` the same name has the same key, also after a crash."""
        with self.transaction() as database:
            made = database.execute(
                "INSERT INTO intent VALUES (?, ?, ?) ON CONFLICT (name) DO NOTHING",
                (name, secrets.token_hex(16), milliseconds()),
            ).rowcount
            (key,) = database.execute("SELECT key FROM intent WHERE name = ?", (name,)).fetchone()
        return str(key), made == 0

    def end_intent(self, name: str) -> None:
        """Its outcome is known."""
        with self.transaction() as database:
            database.execute("DELETE FROM intent WHERE name = ?", (name,))

    # ------------------------------------------------------------------ leases

    def take_lease(self, name: str, ttl_s: int) -> bool:
        """Take the right to do something that must not be done twice at once; False if somebody has it."""
        now_ms = milliseconds()
        with self.transaction() as database:
            taken = database.execute(
                "INSERT INTO lease VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE "
                "SET holder = excluded.holder, until_ms = excluded.until_ms WHERE until_ms < ?",
                (name, _claim(), now_ms + ttl_s * 1000, now_ms),
            ).rowcount
        return taken == 1

    def end_lease(self, name: str) -> None:
        """Give it back."""
        with self.transaction() as database:
            database.execute("DELETE FROM lease WHERE name = ?", (name,))

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One atomic change: others of this process and of other processes wait."""
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")


def milliseconds() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def _sum(database: sqlite3.Connection, query: str, payer: str, seconds: int) -> int:
    now_ms = milliseconds()
    found = database.execute(
        query, {"payer": payer, "since": now_ms - seconds * 1000, "now": now_ms // 1000}
    ).fetchone()
    return int(found[0])


def _claim() -> str:
    return f"{socket.gethostname()}|{os.getpid()}|{_PROCESS}"


def _is_dead(claim: str, claimed_ms: int, now_ms: int) -> bool:
    """Whether the process that claimed a payment is gone, so that its payment may be taken up."""
    if now_ms - claimed_ms > CLAIM_TTL_MS:
        return True
    host, pid_text, process = claim.rsplit("|", 2)
    if host != socket.gethostname() or sys.platform == "win32":  # os.kill would end the process there
        return False
    pid = int(pid_text)
    if pid == os.getpid():
        return process != _PROCESS  # a container's processes have the same number again after a restart
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
