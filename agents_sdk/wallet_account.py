"""`agent.wallet`, and `agent.async_wallet` for asyncio: the wallet's balance with its gateway, and its payment channels.

Each method signs in with the wallet if it has not. Amounts are dollar texts.

Example:
    >>> agent = Agent(key, "https://gateway.example", policy=SpendingPolicy(max_per_request="5"))
    >>> agent.wallet.topup("5")
    TopUp(asset='eip155:8453/USDC', credited_usd='5.00', receipt='rcpt_…', transaction='0x…')
    >>> agent.wallet.withdraw("all", asset="USDC").state
    'paid'
"""

from __future__ import annotations

from typing import Any, TypeVar

import httpx

from agents_sdk import account
from agents_sdk.results import (
    ApiKey,
    Balance,
    Channel,
    DepositAddress,
    HistoryPage,
    NewApiKey,
    Refund,
    TopUp,
    Withdrawal,
)
from agents_sdk.shared import Shared
from agents_sdk.steps import Steps
from agents_sdk.transport import AsyncPayingTransport, PayingTransport

T = TypeVar("T")
WITHDRAWAL_WAIT_S = 60.0


class WalletAccount:
    """The wallet's account with its gateway.

    Every method may raise `RequestRefused` (the gateway says no, and why), `SignInRefused`, `AnswerUnreadable`, or httpx's
    transport errors.
    """

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self.keys = WalletKeys(shared)

    def balance(self) -> list[Balance]:
        """What the wallet has with the gateway, per token."""
        return _run(self._shared, account.balance(self._shared))

    def history(self, limit: int = 50, before: str | None = None) -> HistoryPage:
        """What came in, was charged and left, newest first; `before` is the `next` of the page before."""
        return _run(self._shared, account.history(self._shared, limit, before))

    def topup(self, usd: str, *, asset: str | None = None) -> TopUp:
        """Pay `usd` into the balance, by an x402 payment within the policy: a top-up counts as one request.

        When the answer is lost the same payment is sent again, also by the same call in a later process.

        Args:
            usd: How much, such as ``"5"``.
            asset: ``"USDC"`` or ``"eip155:8453/USDC"``; by default what the policy prefers.

        Raises:
            PolicyViolation: The policy does not allow it.
            OutcomeUnknown: It may have been paid: call the same again.
        """
        return _run(self._shared, account.topup(self._shared, usd, asset))

    def withdraw(
        self,
        usd: str,
        *,
        asset: str | None = None,
        idempotency_key: str | None = None,
        wait_s: float = WITHDRAWAL_WAIT_S,
    ) -> Withdrawal:
        """Take `usd` (or ``"all"``) out of the balance, to the wallet's own address.

        Args:
            usd: What shall arrive.
            asset: In which token; may be left out if the balance is in one.
            idempotency_key: The same key is the same withdrawal. By default one is kept in the log until the answer is here, so
                that the same call after a crash or a lost answer is the same withdrawal.
            wait_s: How long to wait for the transfer, in seconds. What is not done then has the state ``queued``.
        """
        return _run(self._shared, account.withdraw(self._shared, usd, asset, idempotency_key, wait_s))

    def withdrawal(self, withdrawal_id: str) -> Withdrawal:
        """How a withdrawal stands."""
        return _run(self._shared, account.withdrawal(self._shared, withdrawal_id))

    def withdrawals(self) -> list[Withdrawal]:
        """The newest withdrawals."""
        return _run(self._shared, account.withdrawals(self._shared))

    def deposit_address(self, network: str | None = None) -> DepositAddress:
        """The wallet's own deposit address on a network; what is sent there becomes its balance."""
        return _run(self._shared, account.deposit_address(self._shared, network))

    def channels(self) -> list[Channel]:
        """The wallet's payment channels, by the agent's own log: nothing is asked."""
        return account.channels(self._shared)

    def open_channel(self, usd: str, *, asset: str | None = None) -> Channel:
        """Fill a channel with the gateway up before it is needed.

        A deposit travels with a request, so this asks a tiny question, which is charged. Nothing is asked, deposited or
        charged if the channel has so much already that the gateway wants no deposit for the rest.

        Args:
            usd: The most that then lies in the channel, such as ``"2"``.
            asset: ``"USDC"`` or ``"eip155:8453/USDC"``; by default what the policy prefers.

        Raises:
            PolicyViolation: The policy does not allow it.
        """
        return _run(self._shared, account.open_channel(self._shared, usd, asset))

    def refund_channel(self, channel_id: str | None = None, usd: str | None = None) -> Refund:
        """Get back what a channel holds beyond what was charged.

        Args:
            channel_id: Which one; may be left out if only one that the gateway serves holds something.
            usd: How much; by default all of it. The channel can be paid through again after another deposit.

        Raises:
            ChannelDisputed: The gateway claims more than was signed.
        """
        return _run(self._shared, account.refund_channel(self._shared, channel_id, usd))


class WalletKeys:
    """API keys that see (balance and history) and spend the wallet's balance, and can do nothing else."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared

    def create(self, name: str) -> NewApiKey:
        """Make a key. It is shown here and never again."""
        return _run(self._shared, account.create_key(self._shared, name))

    def list(self) -> list[ApiKey]:
        """The wallet's keys, revoked ones included."""
        return _run(self._shared, account.list_keys(self._shared))

    def revoke(self, key_id: str) -> ApiKey:
        """Make a key useless, at once and for good."""
        return _run(self._shared, account.revoke_key(self._shared, key_id))


class AsyncWalletAccount:
    """The same as `WalletAccount`, for asyncio."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self.keys = AsyncWalletKeys(shared)

    async def balance(self) -> list[Balance]:
        """See `WalletAccount.balance`."""
        return await _run_async(self._shared, account.balance(self._shared))

    async def history(self, limit: int = 50, before: str | None = None) -> HistoryPage:
        """See `WalletAccount.history`."""
        return await _run_async(self._shared, account.history(self._shared, limit, before))

    async def topup(self, usd: str, *, asset: str | None = None) -> TopUp:
        """See `WalletAccount.topup`."""
        return await _run_async(self._shared, account.topup(self._shared, usd, asset))

    async def withdraw(
        self,
        usd: str,
        *,
        asset: str | None = None,
        idempotency_key: str | None = None,
        wait_s: float = WITHDRAWAL_WAIT_S,
    ) -> Withdrawal:
        """See `WalletAccount.withdraw`."""
        return await _run_async(self._shared, account.withdraw(self._shared, usd, asset, idempotency_key, wait_s))

    async def withdrawal(self, withdrawal_id: str) -> Withdrawal:
        """See `WalletAccount.withdrawal`."""
        return await _run_async(self._shared, account.withdrawal(self._shared, withdrawal_id))

    async def withdrawals(self) -> list[Withdrawal]:
        """See `WalletAccount.withdrawals`."""
        return await _run_async(self._shared, account.withdrawals(self._shared))

    async def deposit_address(self, network: str | None = None) -> DepositAddress:
        """See `WalletAccount.deposit_address`."""
        return await _run_async(self._shared, account.deposit_address(self._shared, network))

    def channels(self) -> list[Channel]:
        """See `WalletAccount.channels`."""
        return account.channels(self._shared)

    async def open_channel(self, usd: str, *, asset: str | None = None) -> Channel:
        """See `WalletAccount.open_channel`."""
        return await _run_async(self._shared, account.open_channel(self._shared, usd, asset))

    async def refund_channel(self, channel_id: str | None = None, usd: str | None = None) -> Refund:
        """See `WalletAccount.refund_channel`."""
        return await _run_async(self._shared, account.refund_channel(self._shared, channel_id, usd))


class AsyncWalletKeys:
    """The same as `WalletKeys`, for asyncio."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared

    async def create(self, name: str) -> NewApiKey:
        """See `WalletKeys.create`."""
        return await _run_async(self._shared, account.create_key(self._shared, name))

    async def list(self) -> list[ApiKey]:
        """See `WalletKeys.list`."""
        return await _run_async(self._shared, account.list_keys(self._shared))

    async def revoke(self, key_id: str) -> ApiKey:
        """See `WalletKeys.revoke`."""
        return await _run_async(self._shared, account.revoke_key(self._shared, key_id))


def _run(shared: Shared, steps: Steps[T]) -> T:
    transport = PayingTransport(shared, httpx.HTTPTransport())
    try:
        result: Any = transport.run(steps)
    finally:
        transport.close()
    done: T = result
    return done


async def _run_async(shared: Shared, steps: Steps[T]) -> T:
    transport = AsyncPayingTransport(shared, httpx.AsyncHTTPTransport())
    try:
        result: Any = await transport.run(steps)
    finally:
        await transport.aclose()
    done: T = result
    return done
