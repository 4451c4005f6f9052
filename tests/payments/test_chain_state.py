"""Whether the chain would let a payment succeed, asked for many payments at once and answered for each alone."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import pytest

from contracts.devnet import Devnet, approve_permit2, as_owner, mint, rpc, send_as
from payments.chain.networks import MULTICALL3_ADDRESS, PERMIT2_ADDRESS, Network
from payments.chain.rpc import Rpc
from payments.chain.transactions import settle_call
from payments.errors import AllowanceRequired, PaymentRefused, SettlementUnavailable
from payments.promises import Earlier, InUse
from payments.verification.chain_state import ChainStates, Seen
from tests.payments.settling import PAY_TO, later_than_the_last_block, pay

BURNS_ALL_GAS = "0x5b600056"
"""JUMPDEST, PUSH 0, JUMP: an endless loop."""


@pytest.fixture
async def node(chain: Devnet) -> AsyncIterator[Rpc]:
    async with Rpc([chain.rpc_url]) as opened:
        yield opened


async def test_a_good_payment_passes_in_one_round_trip(chain: Devnet, network: Network, node: Rpc) -> None:
    usdc, usdt = network.tokens
    approve_permit2(chain.rpc_url, chain.usdt, chain.wallets[2].private_key)
    states = ChainStates(node, network)
    await asyncio.gather(
        *(states.check(pay(chain.wallets[1], usdc, 100 + i), usdc, PAY_TO) for i in range(10)),
        *(states.check(pay(chain.wallets[2], usdt, 100 + i), usdt, PAY_TO) for i in range(10)),
    )
    assert node.round_trips == 1


async def test_bad_payments_are_refused_with_their_reason_and_good_ones_beside_them_pass(
    chain: Devnet, network: Network, node: Rpc
) -> None:
    usdc, usdt = network.tokens
    approve_permit2(chain.rpc_url, chain.usdt, chain.wallets[2].private_key)
    as_owner(chain.rpc_url, chain.usdc, "blacklist(address)", chain.wallets[5].address)
    forged = dataclasses.replace(pay(chain.wallets[1], usdc, 100), signature=b"\1" * 64 + b"\x1b")
    payments = [
        (pay(chain.wallets[1], usdc, 100), usdc, None),
        (pay(chain.wallets[1], usdc, 10**15), usdc, "insufficient_funds"),
        (forged, usdc, "transfer_would_fail"),
        (pay(chain.wallets[5], usdc, 100), usdc, "transfer_would_fail"),
        (pay(chain.wallets[3], usdt, 100), usdt, "permit2_allowance_required"),
        (pay(chain.wallets[2], usdt, 100), usdt, None),
        (pay(chain.wallets[1], usdc, 100, valid_s=-10), usdc, "transfer_would_fail"),
    ]
    states = ChainStates(node, network)
    verdicts = await asyncio.gather(
        *(states.check(payment, token, PAY_TO) for payment, token, _ in payments), return_exceptions=True
    )
    assert [getattr(verdict, "code", None) for verdict in verdicts] == [code for _, _, code in payments]
    assert "blacklisted" in str(verdicts[3])
    assert isinstance(verdicts[4], AllowanceRequired)
    assert PERMIT2_ADDRESS in str(verdicts[4])
    assert usdt.address in str(verdicts[4])


async def test_a_used_nonce_is_refused(chain: Devnet, network: Network, node: Rpc) -> None:
    usdc, usdt = network.tokens
    approve_permit2(chain.rpc_url, chain.usdt, chain.wallets[2].private_key)
    states = ChainStates(node, network)
    for wallet, token in ((chain.wallets[1], usdc), (chain.wallets[2], usdt)):
        payment = pay(wallet, token, 100)
        await states.check(payment, token, PAY_TO)
        to, data = settle_call(payment, token)
        send_as(chain.rpc_url, chain.wallets[0].address, to, "0x" + data.hex())
        with pytest.raises(PaymentRefused) as refused:
            await states.check(payment, token, PAY_TO)
        assert refused.value.code == "authorization_used"


async def test_what_is_valid_from_now_on_passes_on_a_chain_whose_last_block_is_older(
    chain: Devnet, network: Network, node: Rpc
) -> None:
    usdc, usdt = network.tokens
    approve_permit2(chain.rpc_url, chain.usdt, chain.wallets[2].private_key)
    states = ChainStates(node, network)
    now = await later_than_the_last_block(chain.rpc_url)
    await asyncio.gather(
        states.check(pay(chain.wallets[1], usdc, 100, valid_after=now - 1), usdc, PAY_TO),
        states.check(pay(chain.wallets[2], usdt, 100, valid_after=now - 1), usdt, PAY_TO),
    )
    with pytest.raises(PaymentRefused) as refused:
        await states.check(pay(chain.wallets[1], usdc, 100, valid_after=now + 60), usdc, PAY_TO)
    assert refused.value.code == "transfer_would_fail"


class Promised(Earlier):
    """Amounts that are promised at one look after the other; the last one stays."""

    def __init__(self, *amounts: int) -> None:
        self.in_use = InUse(amounts[0])
        self._later = amounts[1:] or amounts

    async def again(self) -> Earlier:
        return Promised(*self._later)


async def test_two_payments_that_the_balance_covers_once_do_not_both_pass(
    chain: Devnet, network: Network, node: Rpc
) -> None:
    usdc = network.tokens[0]
    payments = [pay(chain.wallets[1], usdc, 600_000_000) for _ in range(2)]
    states = ChainStates(node, network)
    await states.check(payments[0], usdc, PAY_TO)
    with pytest.raises(PaymentRefused) as refused:
        await states.check(payments[1], usdc, PAY_TO, Promised(600_000_000))
    assert refused.value.code == "insufficient_funds"


async def test_what_has_just_left_the_balance_is_not_counted_twice(chain: Devnet, network: Network, node: Rpc) -> None:
    usdc = network.tokens[0]
    states = ChainStates(node, network)
    await states.check(pay(chain.wallets[1], usdc, 600_000_000), usdc, PAY_TO, Promised(600_000_000, 0))


async def test_an_account_whose_code_burns_all_gas_harms_nobody_else(
    chain: Devnet, network: Network, node: Rpc
) -> None:
    usdc = network.tokens[0]
    burner = chain.wallets[6]
    rpc(chain.rpc_url, "anvil_setCode", burner.address, BURNS_ALL_GAS)
    forged = dataclasses.replace(pay(burner, usdc, 100), signature=b"\1" * 64 + b"\x1b")
    states = ChainStates(node, network)
    good = [pay(chain.wallets[1], usdc, 100 + i) for i in range(4)]
    verdicts = await asyncio.gather(
        *(states.check(payment, usdc, PAY_TO) for payment in (good[0], forged, *good[1:])), return_exceptions=True
    )
    assert [type(verdict) for verdict in verdicts] == [Seen, PaymentRefused, *[Seen] * 3]


async def test_a_chain_that_cannot_be_asked_takes_nothing(chain: Devnet, network: Network, node: Rpc) -> None:
    usdc = network.tokens[0]
    payment = pay(chain.wallets[1], usdc, 100)
    async with Rpc(["http://127.0.0.1:1"]) as nobody:
        with pytest.raises(SettlementUnavailable):
            await ChainStates(nobody, network).check(payment, usdc, PAY_TO)
    rpc(chain.rpc_url, "anvil_setCode", MULTICALL3_ADDRESS, "0x")
    with pytest.raises(SettlementUnavailable):
        await ChainStates(node, network).check(payment, usdc, PAY_TO)


async def test_many_checks_are_cut_into_calls_that_nodes_allow(chain: Devnet, network: Network, node: Rpc) -> None:
    usdc = network.tokens[0]
    mint(chain.rpc_url, chain.usdc, chain.wallets[1].address, 10**9)
    states = ChainStates(node, network)
    await asyncio.gather(*(states.check(pay(chain.wallets[1], usdc, 10), usdc, PAY_TO) for _ in range(120)))
    assert states.checks == 120
    assert states.refusals == 0
