"""Payers without coin, and without an approval, in a token without permits: we bring their approvals to the chain."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from contracts.devnet import Devnet, Wallet, as_owner, balance_of, rpc
from payments.chain.networks import PERMIT2_ADDRESS, Network
from payments.chain.rpc import Rpc, RpcError
from payments.chain.transactions import encode_allowance, encode_transfer
from payments.errors import AllowanceRequired, PaymentError, PaymentRefused, SettlementUnavailable
from payments.ledger import transfers
from payments.ledger.accounts import account_id, native_asset
from payments.reconciliation import open_books, reconcile
from payments.sponsoring import funding
from payments.sponsoring.records import Budget
from payments.tenders.base import Outcome
from payments.tenders.exact import ExactHold
from payments.verification.approvals import encode_approve
from payments.x402.fields import UINT256_MAX
from tests.e2e.chain_acts import send_dearly
from tests.payments.desks import VALUE
from tests.payments.exact_samples import QUOTED, assert_books_balance
from tests.payments.settling import PAY_TO, mine, rows, until
from tests.payments.sponsoring import (
    GWEI,
    Desk,
    allowance,
    coin_of,
    gateway,
    penniless,
    signed_approval,
)

ANSWERED = Outcome({"model": "m"})


@pytest.fixture
async def desk(database: Path | str, chain: Devnet, network: Network) -> AsyncIterator[Desk]:
    async with gateway(database, chain, network) as opened:
        async with Rpc([chain.rpc_url]) as node:
            await open_books(opened.store, node, network, PAY_TO)
        yield opened


async def check_books(desk: Desk) -> None:
    await assert_books_balance(desk.store)
    mine(desk.chain.rpc_url, 3)
    async with Rpc([desk.chain.rpc_url]) as node:
        report = await reconcile(desk.store, node, desk.network, PAY_TO)
    assert report.findings == []
    assert all(token.booked == () for token in report.tokens)


async def refused(desk: Desk, wallet: Wallet, **changes: Any) -> PaymentError:
    with pytest.raises(PaymentError) as error:
        await desk.authorize(desk.payment(wallet, **changes))
    return error.value


async def test_a_payer_without_coin_is_funded_approved_and_pays(desk: Desk, chain: Devnet) -> None:
    wallet = penniless(chain)
    signer = chain.wallets[0]
    before = coin_of(chain, signer)
    hold = await desk.authorize(desk.payment(wallet))
    assert not hold.may_start_early
    await hold.ready()
    await hold.capture(QUOTED, ANSWERED)
    assert balance_of(chain.rpc_url, chain.usdt, PAY_TO) == VALUE
    assert allowance(chain, wallet) == UINT256_MAX
    assert await desk.rows("state, settlement_id IS NULL OR funding_id IS NULL") == [("approved", False)]
    await check_books(desk)
    spent = before - coin_of(chain, signer)
    account = account_id("gas", native_asset(desk.network.chain_id))
    booked = (await desk.store.read(lambda tx: transfers.balance(tx, account))).balance
    assert spent <= booked * GWEI < spent + 5 * GWEI, "what was given is in the ledger, in gwei, each item rounded up"
    # Afterwards it pays like anybody else.
    again = await desk.authorize(desk.payment(wallet, nonce=7))
    await again.ready()


async def test_whoever_has_coin_pays_for_its_approval_itself(desk: Desk, chain: Devnet) -> None:
    wallet = penniless(chain)
    rpc(chain.rpc_url, "anvil_setBalance", wallet.address, hex(10**18))
    hold = await desk.authorize(desk.payment(wallet))
    await hold.ready()
    assert await desk.rows("state, funding_id, cost_gwei") == [("approved", None, 0)]
    assert coin_of(chain, wallet) < 10**18
    assert [row[0].partition(":")[0] for row in await rows(desk.store)] == ["pay"]


async def test_only_what_is_lacking_is_given(desk: Desk, chain: Devnet) -> None:
    wallet = penniless(chain)
    rpc(chain.rpc_url, "anvil_setBalance", wallet.address, hex(10**14))
    await (await desk.authorize(desk.payment(wallet))).ready()
    given = [row for row in await rows(desk.store, "id, value") if row[0].startswith("fund:")]
    assert [int(value) for _, value in given] == [70_000 * 3 * GWEI - 10**14]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"to": "0x" + "11" * 20}, "erc20_approval_tx_wrong_target"),
        ({"data": encode_approve("0x" + "11" * 20, UINT256_MAX)}, "erc20_approval_tx_wrong_call"),
        ({"data": encode_approve(PERMIT2_ADDRESS, 1)}, "erc20_approval_tx_wrong_call"),
        ({"data": encode_approve(PERMIT2_ADDRESS, UINT256_MAX) + b"\0"}, "erc20_approval_tx_wrong_call"),
        ({"data": encode_transfer("0x" + "11" * 20, 1)}, "erc20_approval_tx_wrong_call"),
        ({"value": 1}, "erc20_approval_tx_value"),
        ({"chain_id": 1}, "erc20_approval_tx_wrong_chain"),
        ({"nonce": 1}, "erc20_approval_nonce"),
        ({"gas": 20_000}, "erc20_approval_tx_gas"),
        ({"gas": 10**7}, "erc20_approval_tx_gas"),
        ({"max_fee": 1, "priority_fee": 1}, "erc20_approval_tx_fees"),
        ({"max_fee": 10_000 * GWEI}, "erc20_approval_tx_fees"),
        ({"priority_fee": 4 * GWEI}, "erc20_approval_tx_fees"),
        ({"max_fee": 100 * GWEI}, "sponsoring_too_dear"),
        ({"access": ((b"\x11" * 20, ()),)}, "erc20_approval_tx_parse_failed"),
    ],
)
async def test_an_approval_that_is_anything_else_is_refused_before_anything_is_given(
    sqlite_database: Path, chain: Devnet, network: Network, changes: dict[str, Any], code: str
) -> None:
    wallet = penniless(chain)
    async with gateway(sqlite_database, chain, network) as desk:
        assert (await refused(desk, wallet, **changes)).code == code
        assert await rows(desk.store) == await desk.rows() == []
        assert coin_of(chain, wallet) == 0
        assert await desk.store.read(lambda tx: tx.execute("SELECT COUNT(*) FROM receipt").fetchone()[0]) == 0


async def test_what_is_said_about_an_approval_must_be_what_it_is(
    sqlite_database: Path, chain: Devnet, network: Network
) -> None:
    wallet, other = penniless(chain), penniless(chain)
    async with gateway(sqlite_database, chain, network) as desk:
        good = desk.payment(wallet)
        assert good.approval is not None
        for change, code in (
            ({"owner": other.address.lower()}, "erc20_approval_from_mismatch"),
            ({"asset": network.tokens[0].address}, "erc20_approval_asset_mismatch"),
            ({"spender": "0x" + "11" * 20}, "erc20_approval_spender_not_permit2"),
            ({"amount": VALUE - 1}, "erc20_approval_amount_too_small"),
            ({"amount": VALUE}, "erc20_approval_tx_wrong_call"),
            ({"raw": signed_approval(wallet, desk.usdt, signer=other).raw}, "erc20_approval_tx_signer_mismatch"),
            ({"raw": b"\x01" + good.approval.raw[1:]}, "erc20_approval_tx_parse_failed"),
            ({"raw": b"\x02" + b"\xc1" * 400}, "erc20_approval_tx_parse_failed"),
            ({"raw": good.approval.raw + b"\0"}, "erc20_approval_tx_parse_failed"),
            ({"raw": b"\x02"}, "erc20_approval_tx_parse_failed"),
        ):
            approval = dataclasses.replace(good.approval, **change)
            with pytest.raises(PaymentRefused) as error:
                await desk.authorize(dataclasses.replace(good, approval=approval))
            assert error.value.code == code, change
        assert await rows(desk.store) == []


async def test_nobody_is_funded_for_a_payment_that_would_not_settle(
    sqlite_database: Path, chain: Devnet, network: Network
) -> None:
    wallet = penniless(chain)
    async with gateway(sqlite_database, chain, network) as desk:
        as_owner(chain.rpc_url, chain.usdt, "addBlackList(address)", wallet.address)
        assert (await refused(desk, wallet)).code == "transfer_would_fail"
        as_owner(chain.rpc_url, chain.usdt, "removeBlackList(address)", wallet.address)
        as_owner(chain.rpc_url, chain.usdt, "pause()")
        assert (await refused(desk, wallet)).code == "transfer_would_fail"
        as_owner(chain.rpc_url, chain.usdt, "unpause()")
        assert (await refused(desk, penniless(chain, usd=0))).code == "insufficient_funds"
        rpc(chain.rpc_url, "anvil_setCode", wallet.address, "0xef0100" + chain.usdc.address[2:])
        assert (await refused(desk, wallet)).code in ("erc20_approval_needs_a_key", "bad_signature")
        assert await rows(desk.store) == []


class CannotSimulate(Rpc):
    """A node that knows nothing of `eth_simulateV1`."""

    async def _post(self, requests: Any) -> Any:
        known = [("eth_unknown", ()) if method == "eth_simulateV1" else (method, params) for method, params in requests]
        return await super()._post(known)


async def test_nodes_that_cannot_simulate_in_a_row_are_asked_for_what_they_can(
    sqlite_database: Path, chain: Devnet, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.payments.desks.Rpc", CannotSimulate)
    wallet = penniless(chain)
    async with gateway(sqlite_database, chain, network) as desk:
        as_owner(chain.rpc_url, chain.usdt, "pause()")
        assert (await refused(desk, wallet)).code == "transfer_would_fail"
        as_owner(chain.rpc_url, chain.usdt, "unpause()")
        await (await desk.authorize(desk.payment(wallet))).ready()


async def test_what_may_be_given_is_bounded_by_the_hour_and_by_payer(
    database: Path | str, chain: Devnet, network: Network
) -> None:
    each = 70_000 * 3 * GWEI
    async with gateway(database, chain, network, budget=Budget(3 * each, each)) as desk:
        wallets = [penniless(chain) for _ in range(6)]
        found = await asyncio.gather(*(desk.authorize(desk.payment(each)) for each in wallets), return_exceptions=True)
        holds = [one for one in found if isinstance(one, ExactHold)]
        turned_away = [one.code for one in found if isinstance(one, AllowanceRequired)]
        assert len(holds) == 2, "each costs its own gas besides"
        assert turned_away == ["sponsoring_exhausted"] * 4
        await asyncio.gather(*(hold.ready() for hold in holds))
    async with gateway(database, chain, network, budget=Budget(10 * each, each - 1)) as desk:
        assert (await refused(desk, penniless(chain))).code == "sponsoring_too_dear"
    async with gateway(database, chain, network, budget=Budget(0, each)) as desk:
        assert (await refused(desk, penniless(chain))).code == "permit2_allowance_required"


async def test_a_payer_is_funded_once_whatever_it_does_with_it(desk: Desk, chain: Devnet) -> None:
    wallet = penniless(chain)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    hold = await desk.authorize(desk.payment(wallet))
    await until(lambda: rpc(chain.rpc_url, "txpool_status")["pending"] != "0x0")
    mine(chain.rpc_url)  # the coin is there
    await until(lambda: coin_of(chain, wallet) > 0)
    # It takes the coin, and uses the nonce of its approval for something else.
    rpc(chain.rpc_url, "anvil_impersonateAccount", wallet.address)
    rpc(
        chain.rpc_url,
        "eth_sendTransaction",
        {
            "from": wallet.address,
            "to": "0x" + "99" * 20,
            "value": hex(10**12),
            "gas": hex(21_000),
            "maxFeePerGas": hex(9 * GWEI),
            "maxPriorityFeePerGas": hex(9 * GWEI),
            "nonce": "0x0",
        },
    )
    mine(chain.rpc_url)
    rpc(chain.rpc_url, "evm_setAutomine", True)
    with pytest.raises(PaymentRefused) as failed:
        await hold.ready()
    assert failed.value.code == "settlement_failed"
    assert "nonce" in failed.value.message
    async with asyncio.timeout(5):
        while await desk.rows() != [("failed",)]:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.01)
    assert balance_of(chain.rpc_url, chain.usdt, PAY_TO) == 0
    assert (await refused(desk, wallet, nonce=1)).code == "sponsored_before"
    # With coin of its own it is brought to the chain all the same.
    rpc(chain.rpc_url, "anvil_setBalance", wallet.address, hex(10**18))
    again = await desk.authorize(desk.payment(wallet, nonce=1))
    await again.ready()
    assert await desk.rows() == [("approved",)]
    await check_books(desk)


async def test_coin_that_reorganisations_take_back_and_give_again_is_booked_as_it_is(desk: Desk, chain: Devnet) -> None:
    await (await desk.authorize(desk.payment(penniless(chain)))).ready()
    coin, kind = native_asset(chain.chain_id), funding.kind()
    ((name, value),) = [row for row in await rows(desk.store, "id, value") if row[0].startswith("fund:")]
    row = {"id": name, "chain_id": chain.chain_id, "value": value}
    given = int(value) // GWEI

    async def booked(signer: str) -> tuple[int, int]:
        """As paid by the signer, and as gas."""
        names = account_id("signer", coin, signer.lower()), account_id("gas", coin)
        await assert_books_balance(desk.store)
        paid, gas = await desk.store.read(lambda tx: [transfers.balance(tx, each).balance for each in names])
        return paid, gas

    signer, other = chain.wallets[0].address, chain.wallets[4].address
    paid, gas = await booked(signer)
    for _ in range(2):
        for _ in range(2):
            await desk.store.write(lambda tx: kind.on_failed(tx, row))
            assert await booked(signer) == (paid + given, gas - given)
        for _ in range(2):
            await desk.store.write(lambda tx: kind.on_paid(tx, row))
            assert await booked(signer) == (paid, gas)
    # And by another signer's transaction.
    await desk.store.write(lambda tx: tx.execute("UPDATE chain_transaction SET signer = ?", (other.lower(),)))
    await desk.store.write(lambda tx: kind.on_paid(tx, row))
    assert await booked(signer) == (paid + given, gas)
    assert await booked(other) == (-given, gas)


async def test_after_a_few_losses_nobody_is_funded(sqlite_database: Path, chain: Devnet, network: Network) -> None:
    async with gateway(sqlite_database, chain, network) as desk:
        await (await desk.authorize(desk.payment(penniless(chain)))).ready()
        await desk.store.write(
            lambda tx: [
                tx.execute(
                    "INSERT INTO sponsored_approval SELECT id || ?, chain_id, token, payer, 'failed', nonce, raw_transaction,"
                    " needed, permit2_nonce, settlement_id, client, funding_id, 0, funded_ms, give_up_ms, reason, created_ms,"
                    " updated_ms FROM sponsored_approval LIMIT 1",
                    (str(number),),
                )
                for number in range(5)
            ]
        )
        assert (await refused(desk, penniless(chain))).code == "sponsoring_exhausted"


async def test_two_payments_at_once_are_funded_once(desk: Desk, chain: Devnet) -> None:
    wallet = penniless(chain)
    found = await asyncio.gather(*(desk.authorize(desk.payment(wallet)) for _ in range(5)), return_exceptions=True)
    (hold,) = [one for one in found if isinstance(one, ExactHold)]
    others = [one for one in found if one is not hold]
    assert all(isinstance(one, SettlementUnavailable) and one.code == "approval_under_way" for one in others), others
    await hold.ready()
    assert sum(row[0].startswith("fund:") for row in await rows(desk.store)) == 1


async def test_whoever_hangs_up_after_the_funding_has_paid(
    database: Path | str, chain: Devnet, network: Network
) -> None:
    wallet = penniless(chain)
    async with gateway(database, chain, network) as desk:
        payment = desk.payment(wallet)
        hold = await desk.authorize(payment)
        await hold.interrupt(ANSWERED)
        await until(lambda: balance_of(chain.rpc_url, chain.usdt, PAY_TO) == VALUE)


@pytest.mark.parametrize("mined", [0, 1, 2])
async def test_a_restart_between_funding_approval_and_settlement_goes_on(
    database: Path | str, chain: Devnet, network: Network, mined: int
) -> None:
    wallet = penniless(chain)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with gateway(database, chain, network) as desk:
        payment = desk.payment(wallet)
        await desk.authorize(payment)
        for _ in range(mined):
            await until(lambda: rpc(chain.rpc_url, "txpool_status")["pending"] != "0x0")
            mine(chain.rpc_url)
    rpc(chain.rpc_url, "evm_setAutomine", True)
    async with gateway(database, chain, network) as desk:
        mine(chain.rpc_url)
        hold = await desk.authorize(payment)
        await hold.ready()
        await hold.capture(QUOTED, ANSWERED)
        assert balance_of(chain.rpc_url, chain.usdt, PAY_TO) == VALUE
        assert sum(row[0].startswith("fund:") for row in await rows(desk.store)) == 1
        mine(chain.rpc_url, 3)
        async with asyncio.timeout(20):
            while {state for _, state in await rows(desk.store)} != {"final"}:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.02)
        assert desk.settlements.reorganised == 0, "nothing was"
        await assert_books_balance(desk.store)


async def test_an_approval_that_its_payer_makes_otherwise_will_do(desk: Desk, chain: Devnet) -> None:
    wallet = penniless(chain)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    hold = await desk.authorize(desk.payment(wallet))
    rpc(chain.rpc_url, "anvil_setBalance", wallet.address, hex(10**18))
    rpc(chain.rpc_url, "anvil_impersonateAccount", wallet.address)
    data = "0x" + encode_approve(PERMIT2_ADDRESS, 2 * VALUE).hex()
    send_dearly(chain.rpc_url, wallet.address, data, chain.usdt.address)
    rpc(chain.rpc_url, "evm_setAutomine", True)
    mine(chain.rpc_url)
    await hold.ready()
    assert balance_of(chain.rpc_url, chain.usdt, PAY_TO) == VALUE


async def test_an_approval_that_is_never_mined_fails_the_payment(
    sqlite_database: Path, chain: Devnet, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("payments.sponsoring.sponsor.PATIENCE_S", 1)
    wallet = penniless(chain)
    async with gateway(sqlite_database, chain, network) as desk:
        monkeypatch.setattr(desk.sponsor, "_send", _swallow)
        hold = await desk.authorize(desk.payment(wallet))
        with pytest.raises(PaymentRefused) as failed:
            await hold.ready()
        assert "not mined in time" in failed.value.message


async def test_an_approval_that_no_node_tells_of_fails_in_time_and_holds_up_no_other(
    desk: Desk, chain: Devnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("payments.sponsoring.sponsor.PATIENCE_S", 2)
    first, second, true_batch = penniless(chain), penniless(chain), Rpc.batch

    async def batch(self: Rpc, requests: Sequence[Any]) -> list[Any]:
        untold = encode_allowance(first.address.lower(), PERMIT2_ADDRESS).hex()
        replies = await true_batch(self, requests)
        return [
            RpcError(-32000, "no state") if untold in str(params) else reply
            for (_, params), reply in zip(requests, replies, strict=True)
        ]

    hold = await desk.authorize(desk.payment(first))
    monkeypatch.setattr(Rpc, "batch", batch)
    other = await desk.authorize(desk.payment(second))
    await other.ready()
    with pytest.raises(PaymentRefused, match="nobody can say"):
        await hold.ready()


async def _swallow(*_: Any) -> None:
    return


async def test_what_is_taken_back_before_the_settlement_costs_a_revert_and_no_more(desk: Desk, chain: Devnet) -> None:
    wallet = penniless(chain)
    rpc(chain.rpc_url, "anvil_setBalance", wallet.address, hex(10**18))
    rpc(chain.rpc_url, "evm_setAutomine", False)
    hold = await desk.authorize(desk.payment(wallet))
    await until(lambda: rpc(chain.rpc_url, "txpool_status")["pending"] == "0x1")
    mine(chain.rpc_url)
    await until(lambda: rpc(chain.rpc_url, "txpool_status")["pending"] == "0x1", 20)  # the settlement
    rpc(chain.rpc_url, "anvil_impersonateAccount", wallet.address)
    data = "0x" + encode_approve(PERMIT2_ADDRESS, 0).hex()
    send_dearly(chain.rpc_url, wallet.address, data, chain.usdt.address)
    rpc(chain.rpc_url, "evm_setAutomine", True)
    mine(chain.rpc_url)
    with pytest.raises(PaymentRefused) as failed:
        await hold.ready()
    assert failed.value.code == "settlement_failed"
    await check_books(desk)
