"""What all exchanges of one agent share: its settings, its wallet, its journal, and a few things remembered meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import httpx

from agents_sdk.journal import Journal
from agents_sdk.policy import SpendingPolicy
from agents_sdk.quotes import origin_of
from agents_sdk.tokens import TokenBook
from agents_sdk.wallet import Wallet

CreditMode = Literal["known", "start", "never"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How an agent behaves. See `Agent` for what the fields mean."""

    base_url: httpx.URL
    policy: SpendingPolicy
    tokens: TokenBook
    rpc_urls: Mapping[str, httpx.URL] = field(repr=False)
    """CAIP-2 network (or ``*`` for any) → JSON-RPC server. Such URLs often carry a key."""
    credit: CreditMode
    tries_max: int
    patience_s: float
    backoff_s: float
    channel_name: str


@dataclass(frozen=True, slots=True)
class Session:
    """A signed-in wallet."""

    token: str
    expires_at: int

    def __repr__(self) -> str:
        return f"Session(expires_at={self.expires_at})"


@dataclass(slots=True)
class Shared:
    """The state of one agent."""

    settings: Settings
    wallet: Wallet
    journal: Journal
    look_for_credit: bool
    """Ask the gateway for the balance before the next payment: there may be more than we know of."""
    session: Session | None = field(default=None, repr=False)
    allowances: dict[str, int] = field(default_factory=dict)
    """Asset → what Permit2 may still move, in atomic units, as far as we know."""

    @property
    def origin(self) -> str:
        """The gateway: scheme, host, port."""
        return origin_of(self.settings.base_url)

    def rpc_url(self, network: str) -> httpx.URL | None:
        """The JSON-RPC server to use for a network, or None."""
        return self.settings.rpc_urls.get(network) or self.settings.rpc_urls.get("*")
