"""The USDT-like token's habits, each of which has broken somebody's code."""

from __future__ import annotations

import pytest

from contracts.builds import artifact
from contracts.devnet import OWNER_ADDRESS, Devnet, RpcRefused, allowance, as_owner, balance_of
from tests.contracts.calls import ALWAYS, events, read, send

TRANSFER = "transfer(address,uint256)"
TRANSFER_FROM = "transferFrom(address,address,uint256)"
APPROVE = "approve(address,uint256)"


def test_transfer_approve_and_transfer_from_return_nothing(chain: Devnet) -> None:
    payer, payee = chain.wallets[:2]
    send(chain, payee, chain.usdt.address, APPROVE, OWNER_ADDRESS, 5)
    # Anvil calls from the zero address, which may move nothing: zero tokens are enough to see the answer's length.
    assert read(chain, chain.usdt.address, TRANSFER, payee.address, 0) == b""
    assert read(chain, chain.usdt.address, TRANSFER_FROM, payer.address, payee.address, 0) == b""
    assert read(chain, chain.usdt.address, APPROVE, payee.address, 1) == b""
    assert len(read(chain, chain.usdt.address, "balanceOf(address)", payee.address)) == 32


def test_an_allowance_changes_only_by_way_of_zero(chain: Devnet) -> None:
    owner, spender = chain.wallets[:2]
    send(chain, owner, chain.usdt.address, APPROVE, spender.address, 10)
    for other in (10, 11):
        with pytest.raises(RpcRefused, match="revert"):
            send(chain, owner, chain.usdt.address, APPROVE, spender.address, other)
    send(chain, owner, chain.usdt.address, APPROVE, spender.address, 0)
    send(chain, owner, chain.usdt.address, APPROVE, spender.address, 11)
    assert allowance(chain.rpc_url, chain.usdt, owner.address, spender.address) == 11


def test_an_allowance_is_used_up_unless_unlimited(chain: Devnet) -> None:
    owner, spender, unlimited = chain.wallets[:3]
    send(chain, owner, chain.usdt.address, APPROVE, spender.address, 10)
    send(chain, owner, chain.usdt.address, APPROVE, unlimited.address, ALWAYS)
    send(chain, spender, chain.usdt.address, TRANSFER_FROM, owner.address, spender.address, 4)
    send(chain, unlimited, chain.usdt.address, TRANSFER_FROM, owner.address, spender.address, 4)
    assert allowance(chain.rpc_url, chain.usdt, owner.address, spender.address) == 6
    assert allowance(chain.rpc_url, chain.usdt, owner.address, unlimited.address) == ALWAYS
    with pytest.raises(RpcRefused):
        send(chain, spender, chain.usdt.address, TRANSFER_FROM, owner.address, spender.address, 7)


def test_more_than_the_balance_does_not_move(chain: Devnet) -> None:
    payer, payee = chain.wallets[:2]
    everything = balance_of(chain.rpc_url, chain.usdt, payer.address)
    with pytest.raises(RpcRefused):
        send(chain, payer, chain.usdt.address, TRANSFER, payee.address, everything + 1)
    send(chain, payer, chain.usdt.address, TRANSFER, payee.address, everything)
    assert balance_of(chain.rpc_url, chain.usdt, payer.address) == 0


@pytest.mark.parametrize(
    ("basis_points", "most_usdt", "value", "fee"),
    [(10, 49, 2_000_000, 2_000), (19, 1, 900_000_000, 1_000_000), (19, 0, 900_000_000, 0), (10, 49, 999, 0)],
)
def test_the_fee_comes_out_of_what_arrives(
    chain: Devnet, basis_points: int, most_usdt: int, value: int, fee: int
) -> None:
    payer, payee = chain.wallets[:2]
    as_owner(chain.rpc_url, chain.usdt, "setParams(uint256,uint256)", basis_points, most_usdt)
    parties = (payer.address, payee.address, OWNER_ADDRESS)
    before = [balance_of(chain.rpc_url, chain.usdt, party) for party in parties]
    receipt = send(chain, payer, chain.usdt.address, TRANSFER, payee.address, value)
    after = [balance_of(chain.rpc_url, chain.usdt, party) for party in parties]
    assert [then - first for first, then in zip(before, after, strict=True)] == [-value, value - fee, fee]
    moved = [int(log["data"], 16) for log in events(receipt, chain.usdt.address, "Transfer(address,address,uint256)")]
    assert moved == ([fee, value - fee] if fee else [value])


@pytest.mark.parametrize("arguments", [(20, 1), (1, 50)])
def test_the_fee_has_limits(chain: Devnet, arguments: tuple[int, int]) -> None:
    with pytest.raises(RpcRefused):
        as_owner(chain.rpc_url, chain.usdt, "setParams(uint256,uint256)", *arguments)


def test_a_blacklisted_account_cannot_send_but_still_receives(chain: Devnet) -> None:
    listed, other = chain.wallets[:2]
    send(chain, listed, chain.usdt.address, APPROVE, other.address, 5)
    as_owner(chain.rpc_url, chain.usdt, "addBlackList(address)", listed.address)
    with pytest.raises(RpcRefused):
        send(chain, listed, chain.usdt.address, TRANSFER, other.address, 1)
    with pytest.raises(RpcRefused):
        send(chain, other, chain.usdt.address, TRANSFER_FROM, listed.address, other.address, 1)
    send(chain, other, chain.usdt.address, TRANSFER, listed.address, 1)
    as_owner(chain.rpc_url, chain.usdt, "destroyBlackFunds(address)", listed.address)
    assert balance_of(chain.rpc_url, chain.usdt, listed.address) == 0
    as_owner(chain.rpc_url, chain.usdt, "removeBlackList(address)", listed.address)
    send(chain, listed, chain.usdt.address, TRANSFER, other.address, 0)


def test_nothing_moves_while_paused(chain: Devnet) -> None:
    payer, payee = chain.wallets[:2]
    send(chain, payer, chain.usdt.address, APPROVE, payee.address, 5)
    as_owner(chain.rpc_url, chain.usdt, "pause()")
    with pytest.raises(RpcRefused):
        send(chain, payer, chain.usdt.address, TRANSFER, payee.address, 1)
    with pytest.raises(RpcRefused):
        send(chain, payee, chain.usdt.address, TRANSFER_FROM, payer.address, payee.address, 1)
    as_owner(chain.rpc_url, chain.usdt, "unpause()")
    send(chain, payer, chain.usdt.address, TRANSFER, payee.address, 1)


def test_only_the_owner_administers(chain: Devnet) -> None:
    stranger = chain.wallets[0]
    for signature, arguments in (
        ("issue(uint256)", (1,)),
        ("redeem(uint256)", (0,)),
        ("setParams(uint256,uint256)", (1, 1)),
        ("addBlackList(address)", (stranger.address,)),
        ("removeBlackList(address)", (stranger.address,)),
        ("pause()", ()),
    ):
        with pytest.raises(RpcRefused):
            send(chain, stranger, chain.usdt.address, signature, *arguments)


def test_there_is_neither_a_permit_nor_an_authorization() -> None:
    functions = {entry["name"] for entry in artifact("UsdtLike")["abi"] if entry["type"] == "function"}
    assert functions
    assert not {name for name in functions if "permit" in name.lower() or "authorization" in name.lower()}
    assert "DOMAIN_SEPARATOR" not in functions
