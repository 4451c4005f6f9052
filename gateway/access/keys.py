"""Who is calling: an API key, a signed-in wallet, or nobody in particular (who pays with the request)."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

from gateway.api.errors import ApiError
from payments import accounts
from payments.sign_in import SESSION_PREFIX, SignIn, SignInRefused
from payments.store import Store

CACHE_TTL_S = 5.0
"""How long a revoked key may still work on a replica that has just used it."""
CACHE_MAX = 10_000


@dataclass(frozen=True, slots=True)
class KeyCaller:
    """A caller with an API key that draws on a pool."""

    key_id: str
    pool: str
    admin: bool


@dataclass(frozen=True, slots=True)
class WalletKeyCaller:
    """A caller with an API key of a wallet, which may spend its balance and look at it; `address` is lower-case."""

    key_id: str
    address: str


@dataclass(frozen=True, slots=True)
class WalletCaller:
    """A signed-in wallet; `address` is lower-case."""

    address: str


Caller = KeyCaller | WalletKeyCaller | WalletCaller


class Access:
    """Tells callers apart by their `Authorization` header."""

    def __init__(self, store: Store, sign_in: SignIn) -> None:
        self._store = store
        self._sign_in = sign_in
        self._known: OrderedDict[str, tuple[float, accounts.ApiKeyView]] = OrderedDict()

    async def caller(self, authorization: str | None) -> Caller | None:
        """Identify the caller.

        A bearer token of another kind is ignored: clients that cannot leave the header out (the stock OpenAI SDK) send
        something there while they pay per request.

        Raises:
            ApiError: 401 for a key or session of ours that is not valid.
        """
        if authorization is None:
            return None
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return None
        token = token.strip()
        if token.startswith((accounts.KEY_PREFIX, accounts.ADMIN_PREFIX)):
            return await self._key_caller(token)
        if token.startswith(SESSION_PREFIX):
            try:
                return WalletCaller(self._sign_in.session(token, int(time.time())).address)
            except SignInRefused as error:
                raise ApiError(401, error.code, error.message) from None
        return None

    def forget(self, key_id: str) -> None:
        """Look a key up anew at its next use: it was revoked here."""
        self._known = OrderedDict((name, seen) for name, seen in self._known.items() if seen[1].id != key_id)

    async def _key_caller(self, token: str) -> KeyCaller | WalletKeyCaller:
        # The lookup is by hash: nothing here compares secrets character by character.
        key_hash = accounts.hash_key(token)
        now = time.monotonic()
        seen, view = self._known.get(key_hash, (0.0, None))
        if view is None or now - seen > CACHE_TTL_S:
            view = await self._store.read(lambda tx: accounts.find_key(tx, key_hash))
            if view is not None:
                self._known[key_hash] = (now, view)
                self._known.move_to_end(key_hash)
                if len(self._known) > CACHE_MAX:
                    self._known.popitem(last=False)
        if view is None:
            raise ApiError(401, "invalid_api_key", "this API key is not known; check its spelling, or make a new one")
        if view.revoked_ms is not None:
            raise ApiError(401, "revoked_api_key", "this API key was revoked")
        if view.wallet is not None:
            return WalletKeyCaller(view.id, view.wallet)
        assert view.pool is not None
        return KeyCaller(view.id, view.pool, view.admin)
