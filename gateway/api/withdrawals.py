"""`/v1/wallet/withdrawals`: a signed-in wallet takes its balance out, to its own address."""

from __future__ import annotations

from typing import Any

from gateway.access.keys import Access
from gateway.api.errors import ApiError
from gateway.api.http import Call, read_json
from gateway.api.wallet import looking, signed_in
from payments import withdrawals
from payments.chain.networks import Token
from payments.ledger import transfers
from payments.ledger.accounts import payer_account
from payments.money import usd_to_nano
from payments.settlement.withdrawer import Withdrawer
from payments.store import Store
from payments.withdrawals import Limits, Withdrawal

LISTED_MAX = 100
FIELDS = frozenset({"asset", "amount_usd"})
"""Of a withdrawal. What is not among them is refused: `to` in particular must not look as if it had been heeded."""


class WithdrawalApi:
    """Makes and shows withdrawals.

    Args:
        store: The database.
        access: Tells who is calling.
        withdrawers: Of each network.
        limits: The operator's.
        json_depth_max: How deep a body may be nested.
    """

    def __init__(
        self, store: Store, access: Access, withdrawers: list[Withdrawer], limits: Limits, json_depth_max: int
    ) -> None:
        self._store = store
        self._access = access
        self._withdrawers = [withdrawer for withdrawer in withdrawers if withdrawer.open]
        self._limits = limits
        self._json_depth_max = json_depth_max

    def limits_json(self) -> dict[str, str] | None:
        """What `GET /v1/wallet` says of withdrawals; None where there are none."""
        return self._limits.as_json() if self._withdrawers else None

    async def create(self, call: Call) -> dict[str, Any]:
        """Make a withdrawal, or find the one that was made with the same `Idempotency-Key`."""
        address = await signed_in(self._access, call)
        body = read_json(call.body, self._json_depth_max)
        unknown = sorted(body.keys() - FIELDS)
        if unknown:
            raise ApiError(
                400,
                "unknown_field",
                f"a withdrawal has no `{unknown[0]}`: it has `asset` and `amount_usd`, and goes to the wallet's own address",
                param=unknown[0],
            )
        withdrawer, token = self._token(body.get("asset"))
        amount = _amount(body.get("amount_usd"))
        key = call.header(b"idempotency-key") or ""
        if await self._store.read(lambda tx: withdrawals.find(tx, address, key)) is None:
            account = payer_account(address, token.asset)
            available = await self._store.read(lambda tx: transfers.balance(tx, account).available)
            await withdrawer.require_possible(address, token, min(available, available if amount is None else amount))
        made, new = await self._store.write(
            lambda tx: withdrawals.request(
                tx,
                address=address,
                idempotency_key=key,
                token=token,
                amount_nano_usd=amount,
                limits=self._limits,
                treasury=withdrawer.treasury,
            )
        )
        if new and made.state == "queued":
            withdrawer.take(made.id)
        return _json(made)

    async def get(self, call: Call) -> dict[str, Any]:
        """One of the wallet's withdrawals."""
        address = await looking(self._access, call)
        withdrawal_id = call.scope["path_params"]["withdrawal"]
        found = await self._store.read(lambda tx: withdrawals.get(tx, withdrawal_id))
        if found is None or found.address != address:
            raise ApiError(404, "withdrawal_not_found", "this wallet has no such withdrawal", param="withdrawal")
        return _json(found)

    async def list(self, call: Call) -> dict[str, Any]:
        """The wallet's newest withdrawals."""
        address = await looking(self._access, call)
        found = await self._store.read(lambda tx: withdrawals.of_wallet(tx, address, LISTED_MAX))
        return {"withdrawals": [_json(each) for each in found]}

    def _token(self, asset: Any) -> tuple[Withdrawer, Token]:
        if not self._withdrawers:
            raise ApiError(503, "withdrawals_unavailable", "this gateway pays nothing out by itself; ask its operator")
        for withdrawer in self._withdrawers:
            for token in withdrawer.tokens.values():
                if asset in (token.asset, token.symbol):
                    return withdrawer, token
        known = ", ".join(name for withdrawer in self._withdrawers for name in withdrawer.tokens)
        raise ApiError(400, "invalid_field", f"`asset` must be one of: {known}", param="asset")


def _amount(text: Any) -> int | None:
    if text == "all":
        return None
    try:
        return usd_to_nano(text) if isinstance(text, str) else usd_to_nano("")
    except ValueError:
        raise ApiError(
            400, "invalid_field", '`amount_usd` must be a text such as "12.50", or "all"', param="amount_usd"
        ) from None


def _json(made: Withdrawal) -> dict[str, Any]:
    return made.as_json() | {"poll": f"/v1/wallet/withdrawals/{made.id}"}
