"""What the tests of withdrawals share: how a wallet asks for one, and within which limits."""

from __future__ import annotations

from contracts.devnet import Wallet
from payments import withdrawals
from payments.chain.networks import Token
from payments.store import Store
from payments.withdrawals import Limits, Withdrawal
from tests.payments.settling import PAY_TO

USD = 1_000_000_000
LIMITS = Limits(minimum=USD, maximum=100 * USD, daily=150 * USD, review=50 * USD, fee=0)


async def ask(
    store: Store,
    wallet: Wallet,
    token: Token,
    amount: int | None,
    key: str = "key-1",
    limits: Limits = LIMITS,
    treasury: str = PAY_TO,
) -> tuple[Withdrawal, bool]:
    return await store.write(
        lambda tx: withdrawals.request(
            tx,
            address=wallet.address.lower(),
            idempotency_key=key,
            token=token,
            amount_nano_usd=amount,
            limits=limits,
            treasury=treasury,
        )
    )
