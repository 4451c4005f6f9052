"""The configuration: `farebox.toml` and `FAREBOX_*` variables, checked once at start.

Secrets (signer and treasury keys, provider keys, the gateway's own secret) come from the environment only; the file names the
variables. Every field is documented where it stands, and the README's table is made from here. `gateway.config` reads the file
and the environment and reports mistakes with their place; a `Settings` made in code reads neither.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from payments.chain.networks import KNOWN_NETWORKS, Network, Token

DATABASE_FILE = "farebox.db"


def _whole_dollars(value: Any) -> Any:
    """A whole number is as clear as its digits; a binary fraction is not, so those have to be text (TOML's become text)."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Usd = Annotated[str, BeforeValidator(_whole_dollars), Field(pattern=r"^[0-9]{1,12}(\.[0-9]{1,9})?$")]
Address = Annotated[str, Field(pattern=r"^0x[0-9a-fA-F]{40}$")]
Capability = Literal["tools", "json_object", "json_schema", "vision", "audio", "reasoning", "prefill"]
Dialect = Literal["openai_chat", "anthropic_messages", "gemini"]
TokenizerFamily = Literal[
    "o200k_base", "cl100k_base", "llama3", "deepseek", "qwen", "mistral", "gemini", "claude", "other"
]
Scheme = Literal["exact", "upto", "batch-settlement"]
Extension = Literal[
    "payment-identifier",
    "sign-in-with-x",
    "offer-receipt",
    "bazaar",
    "eip2612GasSponsoring",
    "erc20ApprovalGasSponsoring",
]
StrategyName = Literal["balanced", "cost-first", "latency-first", "availability-first"]


class Section(BaseModel):
    """A part of the configuration; unknown fields are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TokenSettings(Section):
    """A token on a network. Known tokens need only their symbol."""

    symbol: str
    """Such as USDC."""
    address: Address | None = None
    """The contract."""
    decimals: int | None = Field(default=None, ge=6, le=36)
    """Of the contract; in units coarser than a millionth of a dollar nobody can pay what one answer costs."""
    transfer_method: Literal["eip3009", "permit2"] | None = None
    """eip3009 needs no set-up of the payer; permit2 needs one approval."""
    domain_name: str | None = None
    """Of the token's own EIP-712 domain, for eip3009."""
    domain_version: str | None = None
    """Of the token's own EIP-712 domain, for eip3009."""


class NetworkSettings(Section):
    """A chain on which payments are taken."""

    chain_id: int = Field(gt=0)
    """Such as 8453 (Base)."""
    rpc_urls: list[str] = Field(min_length=1)
    """JSON-RPC nodes in order of preference."""
    tokens: list[TokenSettings] = Field(default_factory=list)
    """Empty: every token known on this chain."""
    pay_to: Address | None = None
    """The treasury on this chain; the default is the top-level `pay_to`."""
    confirmations: int = Field(default=2, ge=0)
    """Blocks on top of a transfer after which it is final."""
    batch_contract: Address | None = None
    """The operator's own `FareboxBatch`: payments that arrive together are settled in one transaction; without it singly."""
    deposit_factory: Address | None = None
    """The operator's own `DepositForwarders`: wallets can deposit by plain transfer to an address of their own."""
    wallet_factories: list[Address] = Field(default_factory=list)
    """Factories (ERC-6492) whose contract wallets may pay before they exist: the payment deploys them, for our gas."""
    block_time_ms: int | None = Field(default=None, gt=0)
    """How often the chain makes a block; known for known chains."""
    max_fee_gwei: int | None = Field(default=None, gt=0, lt=10**9)
    """What is offered at most for a unit of gas; above it settlements wait. Known for known chains, else 500."""
    max_priority_fee_gwei: int | None = Field(default=None, gt=0, lt=10**9)
    """The part of it for the block's builder, at most; known for known chains, else 50."""
    sponsor_hourly_native: Usd = "0"
    """What payers without the chain's coin are given at most within an hour, in all, to approve Permit2 (the extension
    erc20ApprovalGasSponsoring); 0 offers that to nobody."""
    sponsor_payer_native: Usd = "0.0001"
    """Of that, to one payer, once per token: gas limit times maxFeePerGas of the approval that it signed."""

    def resolve(self) -> Network:
        """The network that this describes: what is known about the chain and its tokens, with what is said here on top.

        Raises:
            ValueError: If the chain or a token is unknown and not described in full; says what is missing.
        """
        known = KNOWN_NETWORKS.get(self.chain_id)
        block_time_ms = self.block_time_ms or (known.block_time_ms if known else None)
        if block_time_ms is None:
            raise ValueError(f"chain {self.chain_id} is not known here: give its block_time_ms and describe its tokens")
        known_tokens = {token.symbol: token for token in known.tokens} if known else {}
        tokens = tuple(_resolve_token(token, self.chain_id, known_tokens.get(token.symbol)) for token in self.tokens)
        if not tokens:
            tokens = tuple(known_tokens.values())
        if not tokens:
            raise ValueError(f"no token is known on chain {self.chain_id}: add [[networks.tokens]]")
        for name in ("symbol", "address"):
            if len({getattr(token, name) for token in tokens}) < len(tokens):
                raise ValueError(f"two tokens on chain {self.chain_id} have the same {name}")
        network = Network(self.chain_id, known.v1_name if known else None, tokens, block_time_ms)
        return replace(
            network,
            max_fee_gwei=self.max_fee_gwei or (known or network).max_fee_gwei,
            max_priority_fee_gwei=self.max_priority_fee_gwei or (known or network).max_priority_fee_gwei,
        )


def _resolve_token(settings: TokenSettings, chain_id: int, known: Token | None) -> Token:
    def value(name: str, own: Any, default: Any = None) -> Any:
        found = own if own is not None else getattr(known, name, default)
        if found is None:
            raise ValueError(
                f"token {settings.symbol!r} is not known on chain {chain_id}: give its address, decimals and transfer_method"
                ", and for eip3009 its EIP-712 domain_name and domain_version"
            )
        return found

    method = value("transfer_method", settings.transfer_method)
    # Permit2 signs in its own domain; only an EIP-3009 signature depends on the token's name and version.
    guess = method == "permit2"
    return Token(
        symbol=settings.symbol,
        chain_id=chain_id,
        address=str(value("address", settings.address)).lower(),
        decimals=value("decimals", settings.decimals),
        transfer_method=method,
        domain_name=value("domain_name", settings.domain_name, settings.symbol if guess else None),
        domain_version=value("domain_version", settings.domain_version, "1" if guess else None),
    )


class ProviderSettings(Section):
    """How to reach an upstream that speaks one of the known dialects."""

    dialect: Dialect
    """What the upstream speaks."""
    base_url: str
    """Such as https://api.openai.com/v1."""
    api_key_env: str | None = None
    """The variable that holds the key; none for an upstream that needs none."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Sent with every request; no secrets."""


class ModelSettings(Section):
    """A model that callers can name, at one provider. Prices are dollars per million tokens."""

    id: str
    """What callers name."""
    provider: str
    """One of `providers`."""
    upstream_model: str | None = None
    """The provider's own name for it; the default is `id`."""
    input_usd: Usd
    """Per million input tokens."""
    output_usd: Usd
    """Per million output tokens, reasoning included."""
    cached_input_usd: Usd | None = None
    """Per million input tokens read from the cache; the default is `input_usd`."""
    cache_write_usd: Usd | None = None
    """Per million input tokens written to the cache; the default is `input_usd`."""
    request_usd: Usd = "0"
    """Per request, on top."""
    context_tokens: int = Field(default=128_000, gt=0)
    """Input and output together."""
    max_output_tokens: int = Field(default=16_384, gt=0)
    """The most that it can write."""
    capabilities: list[Capability] = ["tools", "json_object"]
    """What requests may ask of it."""
    tokenizer: TokenizerFamily = "o200k_base"
    """Whose margin widens the token count of a quote; see `gateway.routing.tokens.FAMILIES`."""
    quality: float = Field(default=0.5, ge=0, le=1)
    """0 to 1: how good its answers are, for ranking."""
    first_token_ms: int = Field(default=800, ge=0)
    """How long it usually takes to begin, for ranking."""
    tokens_per_second: int = Field(default=60, gt=0)
    """How fast it usually writes, for ranking and for patience."""
    failure_rate: float = Field(default=0.01, ge=0, le=1)
    """0 to 1: how often it usually fails, for ranking."""


class TimeoutSettings(Section):
    """Limits of one attempt at an upstream, in milliseconds."""

    connect_ms: int = Field(default=3_000, gt=0)
    """To connect."""
    first_token_ms: int = Field(default=30_000, gt=0)
    """To the first token."""
    between_tokens_ms: int = Field(default=20_000, gt=0)
    """Between two tokens."""
    total_ms: int = Field(default=600_000, gt=0)
    """All attempts of one request together."""


class RoutingSettings(Section):
    """How a model is chosen."""

    strategy: StrategyName = "balanced"
    """Where the caller names none."""
    fallbacks: dict[str, list[str]] = Field(default_factory=dict)
    """Model id → models to try after it, in order."""
    attempts_max: int = Field(default=4, ge=1, le=10)
    """Attempts at upstreams for one request."""
    auto_models: list[str] = Field(default_factory=list)
    """What `model: "auto"` chooses from; empty: all models."""


class PaymentSettings(Section):
    """Prices, quotes and settlement."""

    quote_ttl_s: int = Field(default=300, ge=10, le=3600)
    """How long a quoted price is honoured."""
    default_max_output_tokens: int = Field(default=4_096, gt=0)
    """Quoted, and sent upstream, where the caller gives no max_tokens."""
    markup_percent: int = Field(default=0, ge=0, le=1000)
    """Added to the models' prices."""
    schemes: list[Scheme] = ["exact"]
    """x402 schemes that a 402 offers to whoever asks for none (by `Accept-Payment`), the first choice first."""
    extensions: list[Extension] = ["payment-identifier"]
    """x402 extensions that a 402 declares to whoever asks for none (by `Accept-Payment`); what does not fit is left out."""
    network_fee_usd: Usd = "0"
    """What a quote passes on for settling the payment, as an item of its own."""
    minimum_charge_usd: Usd = "0"
    """The least that an answer costs."""
    settlement_wait_s: int = Field(default=60, gt=0)
    """How long a paid request waits for its transfer before it answers 202."""
    payer_exposure_usd: Usd = "0.05"
    """Inference that one payer may have under way, by all schemes, before its money is there; above that money comes first."""
    upto_exposure_usd: Usd = "0.25"
    """What one payer may owe, by all schemes, to pay by `upto`; beyond it exact or a channel is asked for."""
    replay_ttl_s: int = Field(default=600, ge=0)
    """How long an answer is kept, encrypted, for the same payment sent again; 0 keeps none."""
    refund_threshold_usd: Usd = "1"
    """Credit at or above this is sent back on chain by itself; needs the treasury key."""
    channel_withdraw_delay_s: int = Field(default=86_400, ge=900, le=2_592_000)
    """What payment channels leave us to claim after their payer announced a withdrawal."""
    channel_claim_usd: Usd = "5"
    """Channels are claimed once this much is outstanding in a token, and before their payer withdraws."""
    channel_claim_age_s: int = Field(default=3600, gt=0)
    """Channels are claimed at the latest after this long."""
    cross_check_usd: Usd = "1"
    """What settles more than this at once counts only when two nodes have it, on networks with several `rpc_urls`."""
    gas_alarm_native: Usd = "0.005"
    """A signer below this balance of the chain's own coin raises an alarm."""
    treasury_alarm_usd: Usd = "0"
    """A treasury with less of a token raises an alarm; 0 for never."""
    session_ttl_s: int = Field(default=3600, gt=0)
    """How long a wallet's sign-in lasts."""


class FacilitatorSettings(Section):
    """`farebox facilitator`: verifies and settles payments for other resource servers."""

    port: int = Field(default=8403, ge=0, le=65535)
    """The port to listen on, at the address `host`; 0 takes a free one."""
    require_key: bool = True
    """Whether resource servers need an API key of this database (`farebox keys create`); otherwise anybody's gas is paid."""
    pay_to: list[Address] = Field(default_factory=list)
    """Whom payments are settled for; empty: anybody."""
    minimum_usd: Usd = "0"
    """The least that a payment must be worth (of upto, its maximum), and a claim, settle or refund of channels."""
    settlement_wait_s: int = Field(default=30, gt=0)
    """How long /settle waits for the transfer before it answers settlement_pending; at most `limits.drain_s` counts."""
    calls_per_minute: int = Field(default=6_000, gt=0)
    """Of one client, /verify and /settle together."""
    client_failures_per_hour: int = Field(default=100, gt=0)
    """Settlements of one client that may fail and cost gas, before it has to wait."""


class WalletSettings(Section):
    """Balances that wallets keep here on purpose."""

    topup_minimum_usd: Usd = "0.10"
    """The least that a payment can top a balance up with; its gas is the operator's."""
    topup_maximum_usd: Usd = "10000"
    """The most that a payment can top a balance up with."""
    sweep_threshold_usd: Usd = "1"
    """A deposit address with less stays unswept; what is on it is the wallet's balance all the same."""
    sweep_interval_s: int = Field(default=300, gt=0)
    """How often deposit addresses are swept to the treasury."""
    withdrawal_minimum_usd: Usd = "1"
    """The least that a wallet can withdraw at once; withdrawals need the treasury key."""
    withdrawal_maximum_usd: Usd = "10000"
    """The most that a wallet can withdraw at once."""
    withdrawal_daily_usd: Usd = "20000"
    """The most that a wallet can withdraw of one token within 24 hours."""
    withdrawal_review_usd: Usd = "1000"
    """From here on, counted over 24 hours, a withdrawal waits for `farebox withdrawals approve`."""
    withdrawal_fee_usd: Usd = "0"
    """Charged with each withdrawal, for its gas."""


class LimitSettings(Section):
    """What one caller can ask of the gateway."""

    header_bytes: int = Field(default=32_768, gt=1024)
    """Of a request; more is 431."""
    body_bytes: int = Field(default=4_194_304, gt=1024)
    """Of a request; more is 413."""
    json_depth: int = Field(default=64, gt=4)
    """Of a request body."""
    quotes_per_minute: int = Field(default=600, gt=0)
    """Unpaid quotes per client address."""
    concurrency: int = Field(default=1_000, gt=0)
    """Requests under way; more get 503."""
    drain_s: int = Field(default=30, ge=0)
    """How long requests under way may take after SIGTERM."""


class Settings(BaseSettings):
    """The whole configuration of a gateway."""

    model_config = SettingsConfigDict(
        env_prefix="FAREBOX_", env_nested_delimiter="__", extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    host: str = "127.0.0.1"
    """The address to listen on."""
    port: int = Field(default=8402, ge=0, le=65535)
    """The port to listen on; 0 takes a free one."""
    public_url: str | None = None
    """How clients reach the gateway; appears as the resource in a 402."""
    data_dir: Path = Path(".farebox")
    """Where the database is, unless `database_url` says otherwise."""
    database_url: str | None = None
    """sqlite:///… or postgresql://… (several replicas may share it; with a password only as FAREBOX_DATABASE_URL)."""
    lease_s: int = Field(default=15, ge=3)
    """With several replicas: how long one that died or hangs is waited for before the others take over its work."""
    secret: str | None = Field(default=None, min_length=32, repr=False)
    """FAREBOX_SECRET: signs quotes and sessions. The same on all replicas."""
    signer_keys: list[str] = Field(default_factory=list, repr=False)
    """FAREBOX_SIGNER_KEYS (JSON list): pay the gas of settlements; sign for the channels that name them, new ones the first."""
    treasury_key: str | None = Field(default=None, repr=False)
    """FAREBOX_TREASURY_KEY: sends refunds and withdrawals; its address must be `pay_to`."""
    pay_to: Address | None = None
    """The treasury: who is paid."""
    networks: list[NetworkSettings] = Field(default_factory=list)
    """Where payments are taken, the first choice first; none: API keys only."""
    providers: dict[str, ProviderSettings] = Field(default_factory=dict)
    """Upstreams by name."""
    models: list[ModelSettings] = Field(default_factory=list)
    """What can be called."""
    routing: RoutingSettings = RoutingSettings()
    timeouts: TimeoutSettings = TimeoutSettings()
    payments: PaymentSettings = PaymentSettings()
    wallet: WalletSettings = WalletSettings()
    limits: LimitSettings = LimitSettings()
    facilitator: FacilitatorSettings = FacilitatorSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed in: `gateway.config.load` merges the environment itself, to know the place of each value."""
        return (init_settings,)

    @property
    def database(self) -> Path | str:
        """Where the database is: a SQLite file, or a PostgreSQL URL."""
        if self.database_url is None:
            return self.data_dir / DATABASE_FILE
        path = self.database_url.removeprefix("sqlite:///")
        return self.database_url if path == self.database_url else Path(path)

    def resolved_networks(self) -> tuple[Network, ...]:
        """The networks on which payments are taken, the operator's first choice first.

        Raises:
            ValueError: If one is not described in full; `gateway.config.load` has then reported it already.
        """
        return tuple(network.resolve() for network in self.networks)

    def pay_to_for(self, chain_id: int) -> str:
        """The lower-case address that is paid on a chain.

        Raises:
            LookupError: If the chain is not configured or has no address.
        """
        for network in self.networks:
            if network.chain_id == chain_id:
                pay_to = network.pay_to or self.pay_to
                if pay_to is not None:
                    return pay_to.lower()
        raise LookupError(f"nothing says where payments on chain {chain_id} go: set pay_to")
