"""Networks and tokens: what is known, and what the configuration says on top."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.settings import NetworkSettings, Settings, TokenSettings


def network(chain_id: int, *tokens: TokenSettings, **fields: Any) -> NetworkSettings:
    return NetworkSettings(chain_id=chain_id, rpc_urls=["http://localhost"], tokens=list(tokens), **fields)


def test_a_known_network_needs_no_description() -> None:
    (base,) = Settings(networks=[network(8453)]).resolved_networks()
    assert [token.symbol for token in base.tokens] == ["USDC", "USDT"]
    assert (base.v1_name, base.block_time_ms) == ("base", 2000)


def test_configured_tokens_select_override_and_add() -> None:
    address = "0x" + "Ab" * 20
    (sepolia,) = Settings(
        networks=[
            network(
                84532,
                TokenSettings(symbol="USDT", address=address, decimals=6, transfer_method="permit2"),
                TokenSettings(symbol="USDC", domain_name="Test Coin"),
                block_time_ms=500,
            )
        ]
    ).resolved_networks()
    usdt, usdc = sepolia.tokens
    assert (usdt.address, usdt.transfer_method, usdt.domain_name) == (address.lower(), "permit2", "USDT")
    assert (usdc.domain_name, usdc.domain_version, usdc.decimals) == ("Test Coin", "2", 6)
    assert sepolia.block_time_ms == 500


@pytest.mark.parametrize(
    "bad",
    [
        network(777),
        network(777, block_time_ms=1000),
        network(8453, TokenSettings(symbol="DAI")),
        network(8453, TokenSettings(symbol="DAI", address="0x" + "1" * 40, decimals=18, transfer_method="eip3009")),
        network(8453, TokenSettings(symbol="USDC"), TokenSettings(symbol="USDC")),
    ],
)
def test_what_is_not_known_has_to_be_described(bad: NetworkSettings) -> None:
    with pytest.raises(ValueError, match=r"chain \d+"):
        Settings(networks=[bad]).resolved_networks()


def test_each_network_is_paid_at_its_own_address_or_the_common_one() -> None:
    common, own = "0x" + "Aa" * 20, "0x" + "Bb" * 20
    settings = Settings(pay_to=common, networks=[network(8453), network(1, pay_to=own)])
    assert settings.pay_to_for(8453) == common.lower()
    assert settings.pay_to_for(1) == own.lower()
    with pytest.raises(LookupError, match="chain 10"):
        settings.pay_to_for(10)
