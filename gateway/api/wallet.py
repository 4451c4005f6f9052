"""Signing in with a wallet, and looking at its balance."""

from __future__ import annotations

import time
from typing import Any

from gateway.access.keys import Access, WalletCaller
from gateway.api.errors import ApiError
from gateway.api.http import Call, read_json
from payments.ledger import transfers
from payments.money import nano_to_usd
from payments.sign_in import SignIn, use_nonce
from payments.store import Store, Transaction


class WalletApi:
    """`POST /v1/wallet/challenges`, `POST /v1/wallet/sessions` and `GET /v1/wallet`.

    Args:
        store: The database.
        sign_in: Makes and checks challenges and sessions.
        access: Tells who is calling.
        assets: The ledger's names of the tokens taken, such as ``eip155:8453/USDC``.
        json_depth_max: How deep a body may be nested.
    """

    def __init__(
        self, store: Store, sign_in: SignIn, access: Access, assets: tuple[str, ...], json_depth_max: int
    ) -> None:
        self._store = store
        self._sign_in = sign_in
        self._access = access
        self._assets = assets
        self._json_depth_max = json_depth_max

    async def create_challenge(self, call: Call) -> dict[str, Any]:
        """A message for the wallet to sign with `personal_sign`."""
        address = self._text(call, "address")
        challenge = self._sign_in.challenge(address, int(time.time()))
        return {"message": challenge.message, "nonce": challenge.nonce, "expires_at": challenge.expires_at}

    async def create_session(self, call: Call) -> dict[str, Any]:
        """A short-lived token, for a challenge that was signed. It works once."""
        message, signature = self._text(call, "message"), self._text(call, "signature")
        now = int(time.time())
        address, nonce, expires_at = self._sign_in.verify(message, signature, now)
        await self._store.write(lambda tx: use_nonce(tx, nonce, expires_at))
        session = self._sign_in.open_session(address, now)
        return {"token": session.token, "address": session.address, "expires_at": session.expires_at}

    async def get_wallet(self, call: Call) -> dict[str, Any]:
        """What the signed-in wallet has here, per token."""
        caller = await self._access.caller(call.header(b"authorization"))
        if not isinstance(caller, WalletCaller):
            raise ApiError(
                401,
                "sign_in_required",
                "sign in first: POST /v1/wallet/challenges, sign the message, POST /v1/wallet/sessions",
            )
        balances = await self._store.read(
            lambda tx: [self._balance(tx, caller.address, asset) for asset in self._assets]
        )
        return {"address": caller.address, "balances": balances}

    @staticmethod
    def _balance(tx: Transaction, address: str, asset: str) -> dict[str, Any]:
        balance = transfers.balance(tx, f"payer:{address}@{asset}")
        network, _, symbol = asset.partition("/")
        return {
            "asset": asset,
            "symbol": symbol,
            "network": network,
            "available_usd": nano_to_usd(balance.available),
            "held_usd": nano_to_usd(balance.pending_out),
        }

    def _text(self, call: Call, field: str) -> str:
        value = read_json(call.body, self._json_depth_max).get(field)
        if not isinstance(value, str) or len(value) > 4096:
            raise ApiError(400, "invalid_field", f"`{field}` must be a text of at most 4096 characters", param=field)
        return value
