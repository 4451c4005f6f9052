"""Who asks a facilitator, and how often it may: an API key of this database, or an address where anybody may."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

from payments import accounts
from payments.accounts import ApiKeyView
from payments.buckets import Buckets
from payments.store import Store

CACHE_TTL_S = 5.0
"""How long a revoked key may still work."""
CACHE_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks."""

    name: str
    """``key:<id>`` or ``address:<ip>``."""
    pay_to: str | None = None
    """The one recipient that its key is bound to, lower-case hex, if it is."""


class Denied(Exception):
    """A call is not answered: an HTTP status, a stable word, a sentence, and how long to wait if that helps."""

    def __init__(self, status: int, code: str, message: str, wait_s: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.wait_s = wait_s


class Clients:
    """Tells clients apart.

    Args:
        store: Where the keys are.
        require_key: Whether everybody needs one.
        calls_per_minute: Of one client, `/verify` and `/settle` together.
    """

    def __init__(self, store: Store, *, require_key: bool, calls_per_minute: int) -> None:
        self._store = store
        self._require_key = require_key
        self._calls = Buckets(calls_per_minute, 60)
        self._known: OrderedDict[str, tuple[float, ApiKeyView]] = OrderedDict()

    async def identify(self, authorization: str | None, address: str) -> Client:
        """Whoever calls, with one call counted.

        Raises:
            Denied: 401 without a valid key where one is needed, 429 after too many calls.
            StoreBusy: The database cannot be asked.
        """
        client = await self._find_client(authorization, address)
        wait_s = self._calls.wait_s(client.name)
        if wait_s:
            raise Denied(429, "too_many_calls", f"this client called too often; wait {wait_s} s", wait_s)
        self._calls.take(client.name)
        return client

    async def _find_client(self, authorization: str | None, address: str) -> Client:
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() == "bearer" and key.strip().startswith((accounts.KEY_PREFIX, accounts.ADMIN_PREFIX)):
            view = await self._find(accounts.hash_key(key.strip()))
            # A wallet makes keys as it pleases; the gas spent here is the operator's.
            if view is None or view.revoked_ms is not None or view.wallet is not None:
                raise Denied(401, "invalid_api_key", "this API key is unknown or revoked; see `farebox keys`")
            return Client(f"key:{view.id}", view.pay_to)
        if self._require_key:
            raise Denied(401, "api_key_required", "send an API key as a bearer token: Authorization: Bearer fbk_…")
        return Client(f"address:{address}")

    async def _find(self, key_hash: str) -> ApiKeyView | None:
        now = time.monotonic()
        seen, view = self._known.get(key_hash, (0.0, None))
        if view is None or now - seen > CACHE_TTL_S:
            view = await self._store.read(lambda tx: accounts.find_key(tx, key_hash))
            if view is not None:
                self._known[key_hash] = (now, view)
                self._known.move_to_end(key_hash)
                if len(self._known) > CACHE_MAX:
                    self._known.popitem(last=False)
        return view
