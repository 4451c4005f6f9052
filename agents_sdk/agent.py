"""An agent: a wallet with a policy that pays for its own requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import httpx
import platformdirs
from eth_account.signers.local import LocalAccount

from agents_sdk.journal import Journal
from agents_sdk.money import nano_to_usd
from agents_sdk.policy import HOUR_S, SpendingPolicy
from agents_sdk.receipts import Receipt
from agents_sdk.results import Balance
from agents_sdk.shared import CreditMode, Settings, Shared
from agents_sdk.tokens import Token, TokenBook
from agents_sdk.transport import AsyncPayingTransport, PayingTransport
from agents_sdk.wallet import Wallet
from agents_sdk.wallet_account import AsyncWalletAccount, WalletAccount

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

TIMEOUTS = httpx.Timeout(600, connect=10, write=60, pool=60)
"""httpx gives up after 5 seconds, which is before most answers begin; a paid answer is worth waiting for."""
NO_API_KEY = "paid-by-wallet"
"""What the OpenAI SDK, which insists on a key, is given; it never leaves the agent."""


class Agent:
    """Pays a Farebox gateway for each request, within a policy.

    Args:
        wallet: The private key (hexadecimal) or an eth-account `LocalAccount`. It never leaves this process.
        base_url: The gateway, such as ``https://gateway.example``. Only requests to it are paid.
        policy: What may be spent; the default allows 1 USD a request and 10 USD a day.
        receipts: The file of the agent's log (SQLite); limits and receipts live in it, and agents of one wallet that share
            it share the limits. Default: one file per user, see `platformdirs.user_data_dir`.
        rpc_url: A JSON-RPC server of the chain, or a mapping from CAIP-2 network to one. Needed only to approve Permit2,
            once, before paying in a token that moves through it (most USDT).
        tokens: Further tokens to recognise, or other facts about known ones.
        credit: When to look for credit left over from earlier payments, which is spent before a new payment is signed:
            ``known`` (when this log knows of some), ``start`` (also once at the start), ``never``.
        tries_max: How often one payment is sent when answers get lost or are 5xx.
        patience_s: How long to wait for a payment that is still being settled, in seconds.
        backoff_s: The first pause between tries, in seconds; it doubles. `Retry-After` is honoured.
        channel_name: What this agent calls its payment channels. Agents of one wallet that share a log share channels; those
            that do not need names of their own.

    Raises:
        ValueError: If the key or the URL cannot be used.

    Example:
        >>> agent = Agent(os.environ["FAREBOX_WALLET_KEY"], "https://gateway.example",
        ...               policy=SpendingPolicy(max_per_request="0.05", max_per_day="2"))
        >>> client = agent.openai()
        >>> client.chat.completions.create(model="auto", messages=[{"role": "user", "content": "Hello!"}])
        >>> agent.receipts(limit=1)[0].charged_usd
        '0.000113'
    """

    def __init__(
        self,
        wallet: str | bytes | LocalAccount,
        base_url: str,
        *,
        policy: SpendingPolicy | None = None,
        receipts: Path | str | None = None,
        rpc_url: str | Mapping[str, str] | None = None,
        tokens: Iterable[Token] = (),
        credit: CreditMode = "known",
        tries_max: int = 5,
        patience_s: float = 600,
        backoff_s: float = 0.5,
        channel_name: str = "",
    ) -> None:
        if credit not in ("known", "start", "never"):
            raise ValueError("credit must be 'known', 'start' or 'never'")
        if tries_max < 1:
            raise ValueError("tries_max must be at least 1")
        settings = Settings(
            base_url=_base(base_url),
            policy=policy or SpendingPolicy(),
            tokens=TokenBook(tuple(tokens)),
            rpc_urls=_rpc_urls(rpc_url),
            credit=credit,
            tries_max=tries_max,
            patience_s=patience_s,
            backoff_s=backoff_s,
            channel_name=channel_name,
        )
        path = Path(platformdirs.user_data_dir("farebox")) / "agent.sqlite3" if receipts is None else receipts
        self._shared = Shared(settings, Wallet(wallet), Journal(path), look_for_credit=credit == "start")

    @property
    def address(self) -> str:
        """The wallet's address."""
        return self._shared.wallet.address

    @property
    def policy(self) -> SpendingPolicy:
        """What it may spend."""
        return self._shared.settings.policy

    @property
    def base_url(self) -> str:
        """The gateway."""
        return str(self._shared.settings.base_url)

    def __repr__(self) -> str:
        return f"Agent({self.address}, {self._shared.origin})"

    @property
    def wallet(self) -> WalletAccount:
        """The wallet's balance with the gateway, its keys, and its payment channels."""
        return WalletAccount(self._shared)

    @property
    def async_wallet(self) -> AsyncWalletAccount:
        """The same for asyncio."""
        return AsyncWalletAccount(self._shared)

    # ------------------------------------------------------------------ clients

    def http_client(self, **options: Any) -> httpx.Client:
        """An httpx client that pays; relative URLs are the gateway's. `options` are httpx's own.

        Close it when done. It also serves as `http_client` of `openai.OpenAI`, whose `base_url` then ends in ``/v1``.
        """
        inner = options.pop("transport", None) or httpx.HTTPTransport(limits=_limits(options), **_tls(options))
        options = {"base_url": self.base_url, "timeout": TIMEOUTS, "follow_redirects": False, **options}
        return httpx.Client(transport=PayingTransport(self._shared, inner), **options)

    def async_http_client(self, **options: Any) -> httpx.AsyncClient:
        """The same for asyncio; serves as `http_client` of `openai.AsyncOpenAI`."""
        inner = options.pop("transport", None) or httpx.AsyncHTTPTransport(limits=_limits(options), **_tls(options))
        options = {"base_url": self.base_url, "timeout": TIMEOUTS, "follow_redirects": False, **options}
        return httpx.AsyncClient(transport=AsyncPayingTransport(self._shared, inner), **options)

    def openai(self, **options: Any) -> OpenAI:
        """A stock OpenAI client that pays (needs the `openai` package). `options` are its own."""
        from openai import OpenAI

        # Since version 3 the SDK's annotations name httpx2 only, but it takes the clients of either.
        http_client: Any = self.http_client()
        return OpenAI(http_client=http_client, **self._openai_options(options))

    def async_openai(self, **options: Any) -> AsyncOpenAI:
        """A stock asynchronous OpenAI client that pays."""
        from openai import AsyncOpenAI

        http_client: Any = self.async_http_client()
        return AsyncOpenAI(http_client=http_client, **self._openai_options(options))

    def _openai_options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"api_key": NO_API_KEY, "base_url": f"{self.base_url.rstrip('/')}/v1", **options}

    # ------------------------------------------------------------------ looking back

    def receipts(self, limit: int = 100) -> list[Receipt]:
        """The latest receipts of this wallet, newest first."""
        rows = self._shared.journal.receipts(self.address, limit)
        return [Receipt.read(created_ms, document) for created_ms, document in rows]

    def spent(self, *, hours: int = 24) -> str:
        """What was paid within the last `hours`, in dollars: what the limits count.

        Payments whose outcome is unknown count in full. What was not used of a payment is credit, see `credit`. From a channel
        it is what vouchers were signed for; what lies there unspent is not counted here.
        """
        return nano_to_usd(self._shared.journal.used(self.address, hours * HOUR_S))

    def remaining(self) -> str | None:
        """What the policy still lets leave the wallet now, in dollars; None if it sets no limit over time."""
        journal, payer = self._shared.journal, self.address
        rooms = [
            window.limit_nano_usd - max(journal.used(payer, window.seconds), journal.left(payer, window.seconds))
            for window in self.policy.windows()
        ]
        return nano_to_usd(max(0, min(rooms))) if rooms else None

    def credit(self) -> list[Balance]:
        """The same as `wallet.balance`."""
        return self.wallet.balance()

    def close(self) -> None:
        """Close the log. Clients made before cannot be used any more."""
        self._shared.journal.close()

    def __enter__(self) -> Agent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _base(base_url: str) -> httpx.URL:
    try:
        url = httpx.URL(base_url.rstrip("/").removesuffix("/v1"))
    except httpx.InvalidURL as error:
        raise ValueError(f"{base_url!r} is not a URL such as https://gateway.example: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"{base_url!r} is not a URL such as https://gateway.example")
    if url.raw_path not in (b"", b"/") or url.fragment:
        raise ValueError(
            f"{base_url!r} has a path: a gateway is named by scheme, host and port, such as https://gateway.example"
        )
    return url


def _rpc_urls(rpc_url: str | Mapping[str, str] | None) -> dict[str, httpx.URL]:
    if rpc_url is None:
        return {}
    if isinstance(rpc_url, str):
        return {"*": httpx.URL(rpc_url)}
    return {network: httpx.URL(url) for network, url in rpc_url.items()}


def _limits(options: dict[str, Any]) -> httpx.Limits:
    limits: httpx.Limits = options.pop("limits", httpx.Limits(max_connections=1000, max_keepalive_connections=100))
    return limits


def _tls(options: dict[str, Any]) -> dict[str, Any]:
    """Options that belong to the sending transport, which httpx ignores on a client with a transport of its own."""
    return {name: options.pop(name) for name in ("verify", "cert", "http1", "http2", "proxy") if name in options}
