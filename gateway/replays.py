"""The same payment sent again gets the same answer: kept for minutes, as a ciphertext that only the payer can open.

The key is derived from the full payment header and the body, neither of which is stored, so the database alone reveals
nothing of prompts or answers.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from payments.store import Store, Transaction

ANSWER_BYTES_MAX = 1_048_576
NONCE_BYTES = 12


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """A response as it was first given."""

    status: int
    headers: dict[str, str]
    content_type: str
    body: bytes


class Replays:
    """Keeps and finds answers.

    Args:
        store: Where the ciphertexts are.
        ttl_s: How long an answer is kept, in seconds; 0 keeps none.
    """

    def __init__(self, store: Store, ttl_s: int) -> None:
        self._store = store
        self._ttl_s = ttl_s

    def sealed(self, receipt_id: str, secret: bytes, answer: KeptAnswer) -> Sealed | None:
        """Encrypt an answer, to be kept by calling the result inside the unit that captures the charge.

        Args:
            receipt_id: The receipt of the first use.
            secret: Payment header and body, see `replay_secret`.
            answer: What was answered.

        Returns:
            A unit, or None if such an answer is not kept (too large, or keeping is switched off).
        """
        if self._ttl_s == 0 or len(answer.body) > ANSWER_BYTES_MAX:
            return None
        head = orjson.dumps([answer.status, answer.headers, answer.content_type])
        plain = len(head).to_bytes(4, "big") + head + answer.body
        nonce = os.urandom(NONCE_BYTES)
        ciphertext = nonce + AESGCM(_derive(secret)).encrypt(nonce, plain, receipt_id.encode())
        return Sealed(receipt_id, ciphertext, time.time_ns() // 1_000_000 + self._ttl_s * 1000)

    async def find(self, receipt_id: str, secret: bytes) -> KeptAnswer | None:
        """The answer kept for this receipt, or None if there is none (any more)."""
        now_ms = time.time_ns() // 1_000_000
        row = await self._store.read(
            lambda tx: tx.execute(
                "SELECT ciphertext FROM replay WHERE receipt_id = ? AND expires_ms > ?", (receipt_id, now_ms)
            ).fetchone()
        )
        if row is None:
            return None
        raw = bytes(row[0])
        try:
            plain = AESGCM(_derive(secret)).decrypt(raw[:NONCE_BYTES], raw[NONCE_BYTES:], receipt_id.encode())
        except InvalidTag:
            return None
        head_bytes = int.from_bytes(plain[:4], "big")
        status, headers, content_type = orjson.loads(plain[4 : 4 + head_bytes])
        return KeptAnswer(status, headers, content_type, plain[4 + head_bytes :])


@dataclass(frozen=True, slots=True)
class Sealed:
    """An encrypted answer, ready to be kept in somebody's transaction."""

    receipt_id: str
    ciphertext: bytes
    expires_ms: int

    def __call__(self, tx: Transaction) -> None:
        """Keep it."""
        tx.execute(
            "INSERT INTO replay (receipt_id, ciphertext, expires_ms) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            (self.receipt_id, self.ciphertext, self.expires_ms),
        )


def replay_secret(payment_header: bytes, body: bytes) -> bytes:
    """What the key is derived from: all that the payer sent and that is not stored."""
    return len(payment_header).to_bytes(8, "big") + payment_header + body


def _derive(secret: bytes) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"farebox replay v1").derive(secret)
