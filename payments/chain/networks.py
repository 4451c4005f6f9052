"""The chains and tokens that Farebox knows, as data.

Sources: the token contracts themselves (`DOMAIN_SEPARATOR()`, `decimals()`), which `farebox doctor` and the start of the
gateway read again; an operator may add networks and tokens, or override these, in the configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

TransferMethod = Literal["eip3009", "permit2"]

NOBODY = "0x" + "0" * 40
PERMIT2_ADDRESS = "0x000000000022d473030f116ddee9f6b43ac78ba3"
MULTICALL3_ADDRESS = "0xca11bde05977b3631167028862be2a173976ca11"
EXACT_PERMIT2_PROXY_ADDRESS = "0x402085c248eea27d92e8b30b2c58ed07f9e20001"
BATCH_SETTLEMENT_ADDRESS = "0x4020074e9df2ce1dee5a9c1b5c3f541d02a10003"
ERC3009_DEPOSIT_COLLECTOR_ADDRESS = "0x4020806089470a89826cb9fb1f4059150b550004"
PERMIT2_DEPOSIT_COLLECTOR_ADDRESS = "0x4020425faf3b746c082c2f942b4e5159887b0005"
UPTO_PERMIT2_PROXY_ADDRESS = "0x4020a4f3b7b90cca423b9fabcc0ce57c6c240002"


@dataclass(frozen=True, slots=True)
class Token:
    """A stablecoin on one chain.

    `address` is lower-case hex. `domain_name` and `domain_version` are the token's own EIP-712 domain, used by EIP-3009
    and copied into a 402's `extra` for clients.
    """

    symbol: str
    chain_id: int
    address: str
    decimals: int
    transfer_method: TransferMethod
    domain_name: str
    domain_version: str
    has_permit: bool = field(default=False, compare=False)
    """Whether it takes EIP-2612 permits in that domain: the chain's word, see `payments.verification.permits.with_permits`."""

    def __post_init__(self) -> None:
        assert self.address == self.address.lower()
        assert len(self.address) == 42

    @property
    def asset(self) -> str:
        """The ledger's name of balances in this token, such as ``eip155:8453/USDC``."""
        return f"eip155:{self.chain_id}/{self.symbol}"


@dataclass(frozen=True, slots=True)
class Network:
    """A chain on which payments are taken. `v1_name` is the name that x402 v1 clients use, if there is one."""

    chain_id: int
    v1_name: str | None
    tokens: tuple[Token, ...]
    block_time_ms: int = 2000
    max_fee_gwei: int = 500
    """What we offer at most for a unit of gas, whatever a node says that it costs."""
    max_priority_fee_gwei: int = 50
    """The part of it that goes to the block's builder, at most."""

    @property
    def caip2(self) -> str:
        """The CAIP-2 identifier that x402 v2 uses, such as ``eip155:8453``."""
        return f"eip155:{self.chain_id}"

    @property
    def lag_blocks_max(self) -> int:
        """How far two nodes of this chain may be from each other: what a chain makes in ten seconds, three blocks at least."""
        return max(3, 10_000 // self.block_time_ms)

    def token_at(self, address: str) -> Token | None:
        """The token with this contract address in any spelling, or None if it is not accepted here."""
        wanted = address.lower()
        return next((token for token in self.tokens if token.address == wanted), None)


def _network(
    chain_id: int,
    v1_name: str | None,
    block_time_ms: int,
    caps_gwei: tuple[int, int],
    *tokens: tuple[str, str, int, TransferMethod, str, str],
) -> Network:
    return Network(
        chain_id=chain_id,
        v1_name=v1_name,
        block_time_ms=block_time_ms,
        max_fee_gwei=caps_gwei[0],
        max_priority_fee_gwei=caps_gwei[1],
        tokens=tuple(
            Token(symbol, chain_id, address.lower(), decimals, method, name, version)
            for symbol, address, decimals, method, name, version in tokens
        ),
    )


KNOWN_NETWORKS: dict[int, Network] = {
    network.chain_id: network
    for network in (
        _network(
            8453,
            "base",
            2000,
            (50, 5),
            ("USDC", "0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913", 6, "eip3009", "USD Coin", "2"),
            ("USDT", "0xfde4C96c8593536E31F229EA8f37b2ADa2699bb2", 6, "permit2", "Tether USD", "1"),
        ),
        _network(
            84532,
            "base-sepolia",
            2000,
            (50, 5),
            ("USDC", "0x036CbD53842c5426634e7929541eC2318f3dCF7e", 6, "eip3009", "USDC", "2"),
        ),
        _network(
            1,
            None,
            12000,
            (500, 20),
            ("USDC", "0xA0b86991c6218b36c1d19D4a2e9Eb0cE3606eB48", 6, "eip3009", "USD Coin", "2"),
            ("USDT", "0xdAC17F958D2ee523a2206206994597C13D831ec7", 6, "permit2", "Tether USD", "1"),
        ),
        _network(
            42161,
            None,
            250,
            (50, 5),
            ("USDC", "0xaf88d065e77c8cC2239327C5EDb3A432268e5831", 6, "eip3009", "USD Coin", "2"),
            ("USDT", "0xFd086bC7CD5C481DCC9C85ebE478A1C0b69FCbb9", 6, "eip3009", "USD₮0", "1"),
        ),
        _network(
            10,
            None,
            2000,
            (50, 5),
            ("USDC", "0x0b2C639c533813f4Aa9D7837CAf62653d097Ff85", 6, "eip3009", "USD Coin", "2"),
            ("USDT", "0x01bFF41798a0BcF287b996046Ca68b395DbC1071", 6, "eip3009", "USD₮0", "1"),
        ),
        _network(
            137,
            "polygon",
            2000,
            (3000, 500),
            ("USDC", "0x3c499c542cEF5E3811e1192ce70d8cC03d5c3359", 6, "eip3009", "USD Coin", "2"),
            ("USDT", "0xc2132D05D31c914a87C6611C10748AEb04B58e8F", 6, "permit2", "Tether USD", "1"),
        ),
        _network(
            43114,
            "avalanche",
            2000,
            (500, 50),
            ("USDC", "0xB97EF9Ef8734C71904D8002F8b6Bc66Dd9c48a6E", 6, "eip3009", "USD Coin", "2"),
            ("USDT", "0x9702230A8Ea53601f5cD2dc00fDBc13d4dF4A8c7", 6, "permit2", "Tether USD", "1"),
        ),
        _network(
            56,
            None,
            750,
            (50, 10),
            ("USDC", "0x8AC76a51cc950d9822D68b83fE1Ad97B32Cd580d", 18, "permit2", "USD Coin", "1"),
            ("USDT", "0x55d398326f99059fF775485246999027B3197955", 18, "permit2", "Tether USD", "1"),
        ),
    )
}
