"""Signing in with a wallet, its balances, its history, and the API keys that spend for it."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import parse_qs

from gateway.access.keys import Access, WalletCaller, WalletKeyCaller
from gateway.api.errors import ApiError
from gateway.api.http import Call, read_json
from payments import accounts, forwarders, wallet_accounts
from payments.accounts import ApiKeyView, TooManyKeys, UnknownKey
from payments.chain.rpc import RpcError, RpcUnavailable
from payments.deposits import Deposits
from payments.ledger import history, transfers
from payments.ledger.accounts import payer_account
from payments.ledger.history import PAGE_MAX, BadCursor
from payments.money import nano_to_usd
from payments.sign_in import SignIn, use_nonce
from payments.store import Store, Transaction
from payments.verification.signatures import checksum_address

PAGE_DEFAULT = 50
TEXT_CHARACTERS_MAX = 4096
KEY_NAME_CHARACTERS_MAX = 100
SIGN_IN = "sign in first: POST /v1/wallet/challenges, sign the message, POST /v1/wallet/sessions"


async def signed_in(access: Access, call: Call) -> str:
    """The wallet that has signed in, lower-case hex. A key of the wallet is not enough: it may only spend and look.

    Raises:
        ApiError: 401 or 403.
    """
    caller = await access.caller(call.header(b"authorization"))
    if isinstance(caller, WalletKeyCaller):
        raise ApiError(403, "sign_in_required", f"an API key may not do this; {SIGN_IN}")
    if not isinstance(caller, WalletCaller):
        raise ApiError(401, "sign_in_required", SIGN_IN)
    return caller.address


async def looking(access: Access, call: Call) -> str:
    """The wallet whose balance may be looked at: it has signed in, or one of its keys asks.

    Raises:
        ApiError: 401.
    """
    caller = await access.caller(call.header(b"authorization"))
    if not isinstance(caller, WalletCaller | WalletKeyCaller):
        raise ApiError(401, "sign_in_required", SIGN_IN)
    return caller.address


class WalletApi:
    """`/v1/wallet` but for what moves money.

    Args:
        store: The database.
        sign_in: Makes and checks challenges and sessions.
        access: Tells who is calling.
        assets: The ledger's names of the tokens taken, such as ``eip155:8453/USDC``.
        limits: Of top-ups and withdrawals, for whoever looks; None for what is not to be had here.
        deposits: Of each network that has deposit addresses.
        json_depth_max: How deep a body may be nested.
    """

    def __init__(
        self,
        store: Store,
        sign_in: SignIn,
        access: Access,
        assets: tuple[str, ...],
        limits: dict[str, dict[str, str] | None],
        deposits: list[Deposits],
        json_depth_max: int,
    ) -> None:
        self._store = store
        self._sign_in = sign_in
        self._access = access
        self._assets = assets
        self._limits = limits
        self._deposits = deposits
        self._json_depth_max = json_depth_max

    async def create_challenge(self, call: Call) -> dict[str, Any]:
        """A message for the wallet to sign with `personal_sign`."""
        address = self._text(call, "address", "0x followed by 40 hexadecimal digits")
        challenge = self._sign_in.challenge(address, int(time.time()))
        return {"message": challenge.message, "nonce": challenge.nonce, "expires_at": challenge.expires_at}

    async def create_session(self, call: Call) -> dict[str, Any]:
        """A short-lived token, for a challenge that was signed. It works once."""
        message = self._text(call, "message", "the challenge's message, unchanged")
        signature = self._text(
            call, "signature", "the wallet's signature of the message by personal_sign, in hexadecimal"
        )
        now = int(time.time())
        address, nonce, expires_at = self._sign_in.verify(message, signature, now)
        await self._store.write(lambda tx: use_nonce(tx, nonce, expires_at))
        session = self._sign_in.open_session(address, now)
        return {"token": session.token, "address": session.address, "expires_at": session.expires_at}

    # ------------------------------------------------------------------ looking

    async def get_wallet(self, call: Call) -> dict[str, Any]:
        """What the wallet has here, per token."""
        address = await looking(self._access, call)
        balances, deposits = await self._store.read(
            lambda tx: (
                [self._balance(tx, address, asset) for asset in self._assets],
                forwarders.of_wallet(tx, address),
            )
        )
        return {
            "address": address,
            "balances": balances,
            "deposit_addresses": [_deposit_json(f"eip155:{chain_id}", to) for chain_id, to in deposits],
            "limits": self._limits,
        }

    async def create_deposit_addresses(self, call: Call) -> dict[str, Any]:
        """The wallet's own address on every network that has such: what is sent there is its balance. Made once."""
        address = await signed_in(self._access, call)
        if not self._deposits:
            message = "this gateway has no deposit addresses; POST /v1/wallet/topups instead"
            raise ApiError(503, "deposits_unavailable", message)
        try:
            made = [_deposit_json(each.network.caip2, await each.register(address)) for each in self._deposits]
        except (RpcError, RpcUnavailable):
            message = "the chain cannot be asked right now; try again shortly"
            raise ApiError(503, "settlement_unavailable", message, headers={"retry-after": "2"}) from None
        tokens = [
            {"network": each.network.caip2, "symbol": token.symbol, "address": token.address}
            for each in self._deposits
            for token in each.network.tokens
        ]
        return {"address": address, "deposit_addresses": made, "tokens": tokens}

    async def get_history(self, call: Call) -> dict[str, Any]:
        """A page of what came in, was charged for and left, newest first; `limit` and `before` are in the query."""
        address = await looking(self._access, call)
        query = parse_qs(call.scope.get("query_string", b"").decode("latin-1"))
        limit = query.get("limit", [str(PAGE_DEFAULT)])[-1]
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:6]) <= PAGE_MAX):
            raise ApiError(400, "invalid_field", f"`limit` must be a number from 1 to {PAGE_MAX}", param="limit")
        before = query.get("before", [None])[-1]
        try:
            page = await self._store.read(lambda tx: history.page(tx, address, int(limit), before))
        except BadCursor as error:
            raise ApiError(400, "invalid_field", f"`before`: {error}", param="before") from None
        return {"address": address, "history": [entry.as_json() for entry in page.entries], "next": page.next}

    @staticmethod
    def _balance(tx: Transaction, address: str, asset: str) -> dict[str, Any]:
        balance = transfers.balance(tx, payer_account(address, asset))
        network, _, symbol = asset.partition("/")
        return {
            "asset": asset,
            "symbol": symbol,
            "network": network,
            "available_usd": nano_to_usd(balance.available),
            "held_usd": nano_to_usd(balance.pending_out),
        }

    # ------------------------------------------------------------------ keys

    async def create_key(self, call: Call) -> dict[str, Any]:
        """An API key that spends this wallet's balance. It is shown here and never again."""
        address = await signed_in(self._access, call)
        wanted = f"1 to {KEY_NAME_CHARACTERS_MAX} printable characters"
        name = self._text(call, "name", wanted)
        if not name or len(name) > KEY_NAME_CHARACTERS_MAX or not name.isprintable():
            raise ApiError(400, "invalid_field", f"`name` must be {wanted}", param="name")

        def unit(tx: Transaction) -> tuple[ApiKeyView, str]:
            wallet_accounts.open_account(tx, address)
            return accounts.create_wallet_key(tx, name, address)

        try:
            view, secret = await self._store.write(unit)
        except TooManyKeys as error:
            raise ApiError(409, "too_many_keys", str(error)) from None
        return {"key": secret} | _key_json(view)

    async def list_keys(self, call: Call) -> dict[str, Any]:
        """The wallet's keys, revoked ones included; not the keys themselves, which nobody has."""
        address = await signed_in(self._access, call)
        keys = await self._store.read(lambda tx: accounts.list_wallet_keys(tx, address))
        return {"keys": [_key_json(key) for key in keys]}

    async def revoke_key(self, call: Call) -> dict[str, Any]:
        """Make one of the wallet's keys useless."""
        address = await signed_in(self._access, call)
        key_id = call.scope["path_params"]["key"]
        try:
            view = await self._store.write(lambda tx: accounts.revoke_key(tx, key_id, address))
        except UnknownKey:
            raise ApiError(404, "key_not_found", "this wallet has no key with this id", param="key") from None
        self._access.forget(view.id)
        return _key_json(view)

    def _text(self, call: Call, field: str, wanted: str) -> str:
        value = read_json(call.body, self._json_depth_max).get(field)
        if value is None:
            raise ApiError(400, "invalid_field", f"`{field}` is required: {wanted}", param=field)
        if not isinstance(value, str) or len(value) > TEXT_CHARACTERS_MAX:
            raise ApiError(400, "invalid_field", f"`{field}` must be {wanted}", param=field)
        return value


def _deposit_json(network: str, address: str) -> dict[str, str]:
    return {"network": network, "address": checksum_address(address)}


def _key_json(view: ApiKeyView) -> dict[str, Any]:
    return {
        "id": view.id,
        "name": view.name,
        "prefix": view.prefix,
        "created_ms": view.created_ms,
        "revoked_ms": view.revoked_ms,
    }
