"""Contract wallets that mean harm: their code says who signed, and may say it otherwise in the block than when it is asked.

No inference begins before their money is there, and what they make us burn has an end.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from contracts.devnet import PERMIT2_ADDRESS, USDC, call_data, load, mint, send_as
from tests.e2e.conftest import QUESTION
from tests.e2e.grounds import Ground, amount_of, error_of, turn
from tests.e2e.grounds import ground as new_ground
from tests.e2e.payers import DEV_TOKENS, Payer, Way
from tests.payments import contract_wallets as wallets

GAS_MAX = 1_000_000
"""More than any settlement of one wallet's payment may use."""
EXACT: tuple[Way, ...] = ("exact USDC", "exact USDT")


class SmartPayer(Payer):
    """A contract wallet of one key, as `Wallets.sol` has it: what the key signs, the wallet signs."""

    def __init__(self, ground: Ground) -> None:
        super().__init__(ground.stack, usdc=0, usdt=0, approved=False)
        owner, self.address = self.address, "0x" + secrets.token_hex(20)
        self.chain = load(ground.stack.rpc_url)
        wallets.place(self.chain, self.address, owner)
        url = ground.stack.rpc_url
        ground.rpc("anvil_setBalance", self.address, hex(10**18))
        ground.rpc("anvil_impersonateAccount", self.address)
        for dev in DEV_TOKENS.values():
            mint(url, dev, self.address, 10**7)
            send_as(url, self.address, dev.address, call_data("approve(address,uint256)", PERMIT2_ADDRESS, 2**255))

    def turns(self, mood: int) -> None:
        """Behave otherwise from now on."""
        wallets.set_mood(self.chain, self.address, mood)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with new_ground(tmp_path_factory.mktemp("wallets")) as made:
        yield made


@pytest.fixture
def ground(shared: Ground) -> Iterator[Ground]:
    with turn(shared) as mine:
        yield mine


def gas_used(ground: Ground) -> int:
    return int(ground.query("SELECT COALESCE(SUM(gas_used), 0) FROM chain_transaction")[0][0])


def settlements(ground: Ground, payer: Payer) -> int:
    return int(ground.query("SELECT COUNT(*) FROM settlement WHERE payer = ?", payer.address)[0][0])


@pytest.mark.parametrize("way", EXACT)
def test_a_wallet_that_is_honest_is_served_when_its_money_is_there(ground: Ground, way: Way) -> None:
    payer = SmartPayer(ground)
    headers = payer.pay(ground.http, way, QUESTION)
    with ground.stopped():
        asked = ground.begin(headers, QUESTION)
        ground.until_broadcast(payer.address)
        asked.join(0.5)
        assert not ground.simulator.attempts()
        answer = ground.mine_until_answered(asked)
    assert answer.status_code == 200, answer.text
    assert ground.served() == 1
    assert ground.balance(DEV_TOKENS[way.split()[1]], payer.address) == 10**7 - amount_of(headers)


@pytest.mark.parametrize("mood", [wallets.NEVER, wallets.BURNING, wallets.BOMB, wallets.REVERTING])
@pytest.mark.parametrize("way", EXACT)
def test_a_wallet_that_signs_nothing_is_refused_before_it_costs_anything(ground: Ground, way: Way, mood: int) -> None:
    payer = SmartPayer(ground)
    payer.turns(mood)
    refused = ground.ask(payer.pay(ground.http, way, QUESTION), QUESTION)
    assert (refused.status_code, error_of(refused)) == (402, "transfer_would_fail")
    assert (ground.simulator.attempts(), settlements(ground, payer)) == ([], 0)


@pytest.mark.parametrize(
    "mood", [wallets.FICKLE, wallets.FICKLE_BURNING, wallets.FICKLE_REVERTING, wallets.LATER], ids=str
)
@pytest.mark.parametrize("way", EXACT)
def test_a_wallet_that_signs_only_for_who_asks_gets_nothing_and_is_soon_told_to_wait(
    ground: Ground, way: Way, mood: int
) -> None:
    """It says yes to a simulation and no in the block, by the price of gas or the block's number."""
    payer, dev = SmartPayer(ground), DEV_TOKENS[way.split()[1]]
    for turn_ in range(6):
        body = QUESTION | {"seed": turn_}
        headers = payer.pay(ground.http, way, body)
        head = int(ground.rpc("eth_blockNumber"), 16)
        ground.rpc("anvil_setStorageAt", payer.address, "0x" + "0" * 63 + "2", f"0x{head:064x}")
        payer.turns(mood)
        before, sent = gas_used(ground), settlements(ground, payer)
        answer = ground.ask(headers, body)
        assert answer.status_code == 402, answer.text
        if error_of(answer) == "payments_reverted":
            assert settlements(ground, payer) == sent
            break
        assert error_of(answer) == "settlement_failed"
        assert 0 < gas_used(ground) - before < GAS_MAX
    else:
        pytest.fail("it may burn gas for ever")
    assert 1 <= turn_ <= 3
    assert ground.simulator.attempts() == []
    assert ground.balance(dev, payer.address) == 10**7
    # Others are not held up by it.
    other = Payer(ground.stack)
    assert ground.ask(other.pay(ground.http, "exact USDC", QUESTION), QUESTION).status_code == 200
    assert ground.balance(USDC, other.address) < 10**7
