"""The dollar tokens that an agent recognises, as data: what they are called when signing, and how they move.

A token that is not here is never paid with, unless you describe it yourself: `Agent(..., tokens=[Token(...)])`. Its symbol is
your word for it, not the contract's: anybody can deploy a token that calls itself USDC.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

TransferMethod = Literal["eip3009", "permit2"]

PERMIT2_ADDRESS = "0x000000000022d473030f116ddee9f6b43ac78ba3"
NETWORK = re.compile(r"eip155:[1-9][0-9]{0,17}", re.ASCII)
ADDRESS = re.compile(r"0x[0-9a-f]{40}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Token:
    """A dollar token on one network.

    Args:
        symbol: What policies call it, such as ``USDC``.
        network: CAIP-2 identifier, such as ``eip155:8453``.
        address: The contract, 0x and 40 hexadecimal digits in any spelling.
        decimals: Atomic units per dollar, as a power of ten.
        transfer_method: ``eip3009`` (signed transfer, needs no set-up) or ``permit2`` (needs one approval).
        name: The token's own EIP-712 domain name; signed over by EIP-3009.
        version: The token's own EIP-712 domain version.

    Raises:
        ValueError: If a field is malformed.

    Example:
        >>> Token("USDT", "eip155:84532", "0x00000000000000000000000000000000000000aa", 6, "permit2")
    """

    symbol: str
    network: str
    address: str
    decimals: int
    transfer_method: TransferMethod
    name: str = ""
    version: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", self.address.lower())
        if not ADDRESS.fullmatch(self.address):
            raise ValueError(f"{self.address!r} is not an address")
        if not NETWORK.fullmatch(self.network):
            raise ValueError(f"{self.network!r} is not a CAIP-2 network such as eip155:8453")
        if not 0 <= self.decimals <= 36:
            raise ValueError("decimals must be between 0 and 36")
        if self.transfer_method == "eip3009" and not (self.name and self.version):
            raise ValueError("an EIP-3009 token needs the name and version of its EIP-712 domain")

    @property
    def chain_id(self) -> int:
        """The EVM chain id."""
        return int(self.network.removeprefix("eip155:"))

    @property
    def asset(self) -> str:
        """What the gateway's books call a balance in this token, such as ``eip155:8453/USDC``."""
        return f"{self.network}/{self.symbol}"


class TokenBook:
    """The tokens that one agent recognises: the known ones, and those that its owner described."""

    def __init__(self, described: tuple[Token, ...] = ()) -> None:
        self._tokens = {(token.network, token.address): token for token in (*KNOWN_TOKENS, *described)}

    def find(self, network: str, address: str) -> Token | None:
        """The token with this contract, or None."""
        return self._tokens.get((network, address.lower()))

    def by_asset(self, asset: str) -> Token | None:
        """The token with this name, such as ``eip155:8453/USDC``; one that the owner described comes before a known one."""
        return next((token for token in reversed(self._tokens.values()) if token.asset == asset), None)


def _known(
    chain_id: int, symbol: str, address: str, decimals: int, method: TransferMethod, name: str, version: str
) -> Token:
    return Token(symbol, f"eip155:{chain_id}", address, decimals, method, name, version)


# Source: the contracts' own DOMAIN_SEPARATOR() and decimals().
KNOWN_TOKENS: tuple[Token, ...] = (
    _known(8453, "USDC", "0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913", 6, "eip3009", "USD Coin", "2"),
    _known(8453, "USDT", "0xfde4C96c8593536E31F229EA8f37b2ADa2699bb2", 6, "permit2", "Tether USD", "1"),
    _known(84532, "USDC", "0x036CbD53842c5426634e7929541eC2318f3dCF7e", 6, "eip3009", "USDC", "2"),
    # On the development chain only, see contracts.devnet; there is none on Base Sepolia.
    _known(84532, "USDT", "0x05D7000000000000000000000000000000084532", 6, "permit2", "Tether USD", "1"),
    _known(1, "USDC", "0xA0b86991c6218b36c1d19D4a2e9Eb0cE3606eB48", 6, "eip3009", "USD Coin", "2"),
    _known(1, "USDT", "0xdAC17F958D2ee523a2206206994597C13D831ec7", 6, "permit2", "Tether USD", "1"),
    _known(42161, "USDC", "0xaf88d065e77c8cC2239327C5EDb3A432268e5831", 6, "eip3009", "USD Coin", "2"),
    _known(42161, "USDT", "0xFd086bC7CD5C481DCC9C85ebE478A1C0b69FCbb9", 6, "eip3009", "USD₮0", "1"),
    _known(10, "USDC", "0x0b2C639c533813f4Aa9D7837CAf62653d097Ff85", 6, "eip3009", "USD Coin", "2"),
    _known(10, "USDT", "0x01bFF41798a0BcF287b996046Ca68b395DbC1071", 6, "eip3009", "USD₮0", "1"),
    _known(137, "USDC", "0x3c499c542cEF5E3811e1192ce70d8cC03d5c3359", 6, "eip3009", "USD Coin", "2"),
    _known(137, "USDT", "0xc2132D05D31c914a87C6611C10748AEb04B58e8F", 6, "permit2", "Tether USD", "1"),
    _known(43114, "USDC", "0xB97EF9Ef8734C71904D8002F8b6Bc66Dd9c48a6E", 6, "eip3009", "USD Coin", "2"),
    _known(43114, "USDT", "0x9702230A8Ea53601f5cD2dc00fDBc13d4dF4A8c7", 6, "permit2", "Tether USD", "1"),
    _known(56, "USDC", "0x8AC76a51cc950d9822D68b83fE1Ad97B32Cd580d", 18, "permit2", "USD Coin", "1"),
    _known(56, "USDT", "0x55d398326f99059fF775485246999027B3197955", 18, "permit2", "Tether USD", "1"),
)
