"""One balance is promised once: whatever a payer pays by, in whatever order, through whichever process of the same database."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Literal, cast

import pytest

from contracts.devnet import (
    Devnet,
    approve_permit2,
    balance_of,
    call_data,
    place_operator_contracts,
    send_signed,
)
from payments import promises, withdrawals
from payments.chain.networks import Network, Token
from payments.chain.rpc import Rpc
from payments.channels.keeper import ChannelKeeper
from payments.channels.services import ChannelServices
from payments.errors import AllowanceRequired, PaymentError, PaymentRefused
from payments.facilitator.access import Client
from payments.facilitator.channel_chain import ChannelChain
from payments.facilitator.channels import ChannelFacilitation
from payments.facilitator.exact import ExactFacilitation
from payments.facilitator.schemes import FacilitatedScheme
from payments.facilitator.service import Facilitator
from payments.recovery import put_right
from payments.settlement.engine import Settlements
from payments.sponsoring.records import Budget
from payments.sponsoring.sponsor import Sponsor
from payments.store import Store, Transaction
from payments.tenders.base import Hold, Outcome
from payments.tenders.channel_scheme import ChannelScheme
from payments.tenders.exact import settlement_id
from payments.tenders.exact_scheme import ExactScheme
from payments.tenders.exact_services import ExactServices
from payments.tenders.upto_scheme import UptoScheme
from payments.verification.chain_state import ChainStates
from payments.withdrawals import Limits, Withdrawal, WithdrawalRefused
from tests.payments import facilitating
from tests.payments.channel_desk import Gateway as ChannelDesk
from tests.payments.channelling import Channel
from tests.payments.exact_samples import (
    DETAILS,
    QUOTED,
    USDC,
    HandSettlements,
    open_desk,
    payment_of,
    quote_of,
)
from tests.payments.pledging import Desk as UptoDesk
from tests.payments.settling import PAY_TO, pay

PAYER = 3
VALUE = QUOTED // 1000
SCHEMES = ("exact", "upto", "deposit", "facilitated")


class Process:
    """A gateway and a facilitator of one database. Nothing that they put on its way is mined."""

    def __init__(self, store: Store, node: Rpc, chain: Devnet, network: Network) -> None:
        self.store, self.chain, self.network, self.token = store, chain, network, network.tokens[0]
        self.wallet = chain.wallets[PAYER]
        self.settlements = HandSettlements(store, mine_at_once=False)
        states = ChainStates(node, network)
        signer = chain.wallets[0]
        batch_contract, _ = place_operator_contracts(chain.rpc_url, PAY_TO, signer.address, [signer.address])
        self.services = ExactServices(
            store=store,
            settlements=self.settlements,
            chain_states=states,
            payer_exposure_nano_usd=10 * QUOTED,
            settlement_wait_s=5,
        )
        self.exact_scheme = ExactScheme(network, PAY_TO, self.services)
        upto = UptoScheme(
            network, PAY_TO, batch_contract, self.services, answer_s=60, exposure_max_nano_usd=10 * QUOTED
        )
        self.upto_desk = UptoDesk(chain, network, self.services, upto, batch_contract)
        engine = Settlements(store, node, network, [signer.private_key])
        channels = ChannelServices(
            store=store,
            settlements=self.settlements,
            rpc=node,
            network=network,
            receiver=PAY_TO,
            authorizers=engine.signers,
            withdraw_delay_s=900,
            payers=self.services,
        )
        keeper = cast("ChannelKeeper", None)
        self.channel_desk = ChannelDesk(channels, engine, ChannelScheme(channels), keeper, self.token, self.wallet)
        schemes: list[FacilitatedScheme] = [
            ExactFacilitation(network, states),
            ChannelFacilitation(network, ChannelChain(node, ()), Sponsor(store, engine, Budget(0, 0))),
        ]
        self.facilitator = Facilitator(store, {network.chain_id: engine}, schemes, settlement_wait_s=0)

    async def pay(self, scheme: str) -> Hold | dict[str, Any]:
        """Pay VALUE by a scheme, with an authorization of its own."""
        pays: dict[str, Callable[[], Awaitable[Hold | dict[str, Any]]]] = {
            "exact": self.exact,
            "upto": self.upto,
            "deposit": self.deposit,
            "facilitated": self.facilitated,
        }
        return await pays[scheme]()

    async def exact(self, token: Token | None = None) -> Hold:
        token = token or self.token
        requirement = self.exact_scheme.requirement(token, QUOTED, 300)
        payment = dataclasses.replace(pay(self.wallet, token, VALUE), accepted=requirement)
        tender = self.exact_scheme.tender(payment, token, requirement, secrets.token_bytes(32), int(time.time()))
        return await tender.authorize(quote_of(), DETAILS)

    async def upto(self, token: Token | None = None) -> Hold:
        return await self.upto_desk.authorize(self.upto_desk.sign(self.wallet, token or self.token))

    async def deposit(self) -> Hold:
        # A channel of its own each time: on one, the second voucher would be out of step.
        desk = dataclasses.replace(self.channel_desk, salt=secrets.randbits(256))
        payment = desk.payment(VALUE, deposit=VALUE)
        scheme = desk.scheme
        requirement = scheme.requirement(self.token, QUOTED, 300)
        digest = hashlib.sha256(secrets.token_bytes(8)).digest()
        tender = scheme.tender(payment, self.token, requirement, digest, int(time.time()))
        return await tender.authorize(quote_of(), dict(DETAILS))

    async def facilitated(self) -> dict[str, Any]:
        call = self.facilitator.read(facilitating.body(self.wallet, self.token, self.network, value=VALUE))
        answer = await self.facilitator.settle(call, Client("shop"), None)
        if answer["errorReason"] == "invalid_exact_evm_insufficient_balance":
            raise PaymentRefused("insufficient_funds", answer["errorMessage"])
        assert answer["errorReason"] == "settlement_pending", answer
        return answer

    async def facilitated_deposit(self, method: Literal["eip3009", "permit2"]) -> None:
        token = dataclasses.replace(self.token, transfer_method=method)
        channel = Channel(self.network, self.wallet, self.chain.wallets[8], token, salt=secrets.randbits(256))
        call = self.facilitator.read(channel.deposits(VALUE, 1))
        answer = await self.facilitator.settle(call, Client("shop"), None)
        if answer["errorReason"] != "settlement_pending":
            raise PaymentRefused(answer["errorReason"], answer["errorMessage"])


def leave(chain: Devnet, token: Token, value: int) -> None:
    """Let the payer have no more than this."""
    wallet, coin = chain.wallets[PAYER], chain.usdc if token.address == chain.usdc.address.lower() else chain.usdt
    rest = balance_of(chain.rpc_url, coin, wallet.address) - value
    data = call_data("transfer(address,uint256)", chain.wallets[9].address, rest)
    send_signed(chain.rpc_url, wallet.private_key, coin.address, data)
    assert balance_of(chain.rpc_url, coin, wallet.address) == value


@contextlib.asynccontextmanager
async def processes(location: Path | str, chain: Devnet, network: Network, count: int) -> AsyncIterator[list[Process]]:
    for coin in (chain.usdc, chain.usdt):
        approve_permit2(chain.rpc_url, coin, chain.wallets[PAYER].private_key)
    async with contextlib.AsyncExitStack() as cleanup:
        opened = []
        for _ in range(count):
            store = Store(location)
            cleanup.callback(store.close)
            node = await cleanup.enter_async_context(Rpc([chain.rpc_url], timeout_s=5))
            opened.append(Process(store, node, chain, network))
        yield opened


@pytest.mark.parametrize("schemes", list(itertools.combinations_with_replacement(SCHEMES, 2)), ids="-".join)
async def test_of_two_payments_at_two_gateways_that_one_balance_covers_one_goes_on(
    postgres_database: str, chain: Devnet, network: Network, schemes: tuple[str, str]
) -> None:
    async with processes(postgres_database, chain, network, 2) as two:
        leave(chain, network.tokens[0], VALUE)
        results = await asyncio.gather(
            *(process.pay(scheme) for process, scheme in zip(two, schemes, strict=True)), return_exceptions=True
        )
        refused = [result for result in results if isinstance(result, BaseException)]
        assert [cast("PaymentError", error).code for error in refused] == ["insufficient_funds"], results
        # Whoever comes later, wherever, is refused as well.
        for process, scheme in zip(two, reversed(schemes), strict=True):
            with pytest.raises(PaymentRefused):
                await process.pay(scheme)


async def test_a_balance_for_four_serves_four_of_twelve_at_once(
    database: Path | str, chain: Devnet, network: Network
) -> None:
    count = 1 if isinstance(database, Path) else 2
    async with processes(database, chain, network, count) as several:
        leave(chain, network.tokens[0], 4 * VALUE)
        payments = [several[index % count].pay(scheme) for index, scheme in enumerate(SCHEMES * 3)]
        results = await asyncio.gather(*payments, return_exceptions=True)
        served = [result for result in results if not isinstance(result, BaseException)]
        assert len(served) == 4, results
        codes = {cast("PaymentError", result).code for result in results if isinstance(result, BaseException)}
        assert codes == {"insufficient_funds"}


async def test_the_allowance_of_permit2_is_promised_once_as_well(
    database: Path | str, chain: Devnet, network: Network
) -> None:
    usdc, usdt = network.tokens[:2]
    async with processes(database, chain, network, 1) as (process,):
        approve_permit2(chain.rpc_url, chain.usdc, chain.wallets[PAYER].private_key, VALUE)
        approve_permit2(chain.rpc_url, chain.usdt, chain.wallets[PAYER].private_key, 0)
        approve_permit2(chain.rpc_url, chain.usdt, chain.wallets[PAYER].private_key, VALUE)
        # A transfer by the token's own authorization needs none of it.
        await process.exact(usdc)
        await process.upto(usdc)
        await process.exact(usdc)
        await process.deposit()
        await process.facilitated()
        with pytest.raises(AllowanceRequired):
            await process.upto(usdc)
        # Another token has an allowance of its own; there exact takes from it.
        await process.exact(usdt)
        with pytest.raises(AllowanceRequired):
            await process.upto(usdt)


async def test_a_facilitated_deposit_uses_the_allowance_only_if_it_is_made_by_permit2(
    database: Path | str, chain: Devnet, network: Network
) -> None:
    required = "invalid_batch_settlement_evm_permit2_allowance_required"
    usdc = network.tokens[0]
    async with processes(database, chain, network, 1) as (process,):
        approve_permit2(chain.rpc_url, chain.usdc, chain.wallets[PAYER].private_key, 2 * VALUE)
        await process.facilitated_deposit("eip3009")
        await process.upto(usdc)
        await process.facilitated_deposit("permit2")
        with pytest.raises(AllowanceRequired):
            await process.upto(usdc)
        with pytest.raises(PaymentRefused) as refused:
            await process.facilitated_deposit("permit2")
        assert refused.value.code == required
        await process.facilitated_deposit("eip3009")


async def test_what_has_arrived_or_failed_is_promised_no_more(store: Store) -> None:
    desk = open_desk(store, exposure=2 * QUOTED)
    desk.settlements.mine_at_once = False
    holds = [await desk.tender(payment_of()).authorize(quote_of(), DETAILS) for _ in range(3)]
    payer = holds[0].payer

    async def open_now() -> tuple[int, int]:
        found = await store.read(lambda tx: promises.under_way(tx, payer))
        return len(found), promises.exposure(found)

    assert await open_now() == (3, 2 * QUOTED)
    await desk.settlements.mine(settlement_id(holds[0].receipt_id))
    await desk.settlements.fail(settlement_id(holds[1].receipt_id))
    assert await open_now() == (1, 0)
    await desk.settlements.reorganise(settlement_id(holds[0].receipt_id))
    assert await open_now() == (2, QUOTED), "what a reorganisation took away may never arrive"
    await desk.settlements.mine(settlement_id(holds[0].receipt_id))
    await holds[2].interrupt(Outcome({}))
    # Nobody waits for it any more; it is on its way all the same.
    assert await open_now() == (1, 0)


async def test_what_a_reorganisation_took_away_is_not_paid_out_before_it_is_back(store: Store) -> None:
    desk = open_desk(store)
    hold = await desk.tender(payment_of()).authorize(quote_of(), DETAILS)
    await hold.ready()
    await hold.release(Outcome({}))
    limits = Limits(minimum=1, maximum=QUOTED, daily=QUOTED, review=2 * QUOTED, fee=0)

    def withdraw(tx: Transaction) -> Withdrawal:
        asked = {"idempotency_key": "k", "token": USDC, "amount_nano_usd": None, "limits": limits, "treasury": PAY_TO}
        return withdrawals.request(tx, address=hold.payer, **asked)[0]  # type: ignore[arg-type]

    await desk.settlements.reorganise(settlement_id(hold.receipt_id))
    with pytest.raises(WithdrawalRefused) as refused:
        await store.write(withdraw)
    assert refused.value.code == "topup_unclaimed"
    await desk.settlements.mine(settlement_id(hold.receipt_id))
    assert (await store.write(withdraw)).amount_nano_usd == QUOTED


async def test_exposure_is_counted_across_processes_and_survives_them(postgres_database: str) -> None:
    stores = [Store(postgres_database) for _ in range(3)]
    desks = [open_desk(store, exposure=2 * QUOTED) for store in stores]
    for desk in desks:
        desk.settlements.mine_at_once = False
    payments = [payment_of() for _ in range(6)]
    holds = await asyncio.gather(
        *(desks[index % 2].tender(payment).authorize(quote_of(), DETAILS) for index, payment in enumerate(payments))
    )
    assert sorted(hold.may_start_early for hold in holds) == [False] * 4 + [True] * 2
    # The two die, which the third finds: their transfers are under way all the same.
    await stores[2].write(lambda tx: put_right(tx, alone=True))
    assert not (await desks[2].tender(payment_of()).authorize(quote_of(), DETAILS)).may_start_early
    for hold in holds:
        if hold.may_start_early:
            await desks[2].settlements.mine(settlement_id(hold.receipt_id))
    assert (await desks[2].tender(payment_of()).authorize(quote_of(), DETAILS)).may_start_early
    for store in stores:
        store.close()


async def test_a_deposit_under_way_exposes_what_begins_on_it(
    database: Path | str, chain: Devnet, network: Network
) -> None:
    async with processes(database, chain, network, 1) as (process,):
        process.services.payer_exposure_nano_usd = QUOTED
        held = await process.deposit()
        assert held.may_start_early
        assert not (await process.exact()).may_start_early
        await held.interrupt(Outcome({}))
        assert not (await process.exact()).may_start_early
