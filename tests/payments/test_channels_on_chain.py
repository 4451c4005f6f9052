"""Channels with everything real: the signatures, the contract, the engine, the books."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from contracts.devnet import OWNER_ADDRESS, Devnet, Wallet, balance_of, call_data, rpc, send_signed
from payments import receipts
from payments.chain import channel_contract
from payments.chain.networks import BATCH_SETTLEMENT_ADDRESS, Network, Token
from payments.chain.rpc import Rpc
from payments.chain.transactions import selector, word
from payments.channels import book
from payments.channels.book import Channel
from payments.channels.keeper import ChannelKeeper
from payments.channels.refunds import Refunder
from payments.channels.requests import OutOfStep
from payments.channels.services import ChannelServices
from payments.errors import PaymentRefused
from payments.kinds import register
from payments.leases import Leases
from payments.ledger import transfers
from payments.ledger.accounts import account_id
from payments.ledger.books import check
from payments.recovery import recover
from payments.settlement.engine import Settlements
from payments.store import Store
from payments.tenders.authorizations import AlreadyUsed
from payments.tenders.base import Outcome
from payments.tenders.channel import ChannelHold, deposit_id
from payments.tenders.channel_scheme import ChannelScheme
from payments.tenders.exact_services import ExactServices
from payments.verification import vouchers
from payments.verification.chain_state import ChainStates
from payments.verification.signatures import checksum_address
from payments.x402.channels import ChannelConfig, ChannelPayment, Deposit, Erc3009Deposit, PayloadType, Voucher, hex32
from tests.payments.exact_samples import DETAILS, QUOTED, assert_books_balance, quote_of
from tests.payments.settling import PAY_TO, later_than_the_last_block, sign

PRICE = QUOTED // 1000
DELAY_S = 900
PAYER, SIGNER = 3, 0
INITIATE = "initiateWithdraw((address,address,address,address,address,uint40,bytes32),uint128)"
FINALIZE = "finalizeWithdraw((address,address,address,address,address,uint40,bytes32))"


@dataclasses.dataclass(frozen=True, slots=True)
class Gateway:
    """What a gateway opens, as far as channels go."""

    services: ChannelServices
    settlements: Settlements
    scheme: ChannelScheme
    keeper: ChannelKeeper
    token: Token
    wallet: Wallet
    salt: int = 0

    @property
    def config(self) -> ChannelConfig:
        payer, signer = self.wallet.address.lower(), self.services.authorizer.address
        return ChannelConfig(payer, payer, PAY_TO, signer, self.token.address, DELAY_S, self.salt)

    @property
    def number(self) -> int:
        return vouchers.channel_id(self.config, self.token.chain_id)

    def payment(
        self,
        amount: int,
        *,
        deposit: int = 0,
        valid_after: int = 0,
        type: PayloadType | None = None,
        refund: int | None = None,
    ) -> ChannelPayment:
        """A payment as an official client signs it."""
        chain_id = self.token.chain_id
        signed: Deposit | None = None
        if deposit:
            unsigned = Erc3009Deposit(deposit, valid_after, int(time.time()) + 300, secrets.randbits(256), b"")
            digest = vouchers.erc3009_deposit_digest(unsigned, self.config, self.number, self.token)
            signed = dataclasses.replace(unsigned, signature=sign(self.wallet, digest))
        voucher = sign(self.wallet, vouchers.voucher_digest(self.number, amount, chain_id))
        return ChannelPayment(
            version=2,
            scheme="batch-settlement",
            network=f"eip155:{chain_id}",
            accepted=self.scheme.requirement(self.token, QUOTED, 300),
            quote_token=None,
            digest=secrets.token_bytes(32),
            type=type or ("deposit" if deposit else "voucher"),
            config=self.config,
            voucher=Voucher(self.number, amount, voucher),
            deposit=signed,
            refund_amount=refund,
        )

    async def take(self, payment: ChannelPayment, request: bytes = b"request", *, ready: bool = True) -> ChannelHold:
        requirement = self.scheme.requirement(self.token, QUOTED, 300)
        digest = hashlib.sha256(request).digest()
        tender = self.scheme.tender(payment, self.token, requirement, digest, int(time.time()))
        hold = await tender.authorize(quote_of(QUOTED), dict(DETAILS))
        if ready:
            await hold.ready()
        return hold

    async def pay(self, amount: int, cost: int, *, deposit: int = 0) -> ChannelPayment:
        payment = self.payment(amount, deposit=deposit)
        hold = await self.take(payment)
        await hold.capture(cost * 1000, Outcome())
        return payment

    async def channel(self) -> Channel:
        found = await self.services.store.read(lambda tx: book.find(tx, hex32(self.number)))
        assert found is not None
        return found

    async def receivable(self) -> int:
        account = (await self.channel()).account
        return (await self.services.store.read(lambda tx: transfers.balance(tx, account))).balance

    async def settle_open(self) -> None:
        """Wait for the claims under way."""
        async with asyncio.timeout(20):
            while await self.services.store.read(  # noqa: ASYNC110 - there is no event to wait for
                lambda tx: book.select(tx, "claim_id IS NOT NULL", ())
            ):
                await asyncio.sleep(0.01)

    def payer_calls(self, url: str, function: str, *more: int) -> None:
        """A transaction of the payer's own."""
        data = selector(function) + channel_contract.encode_config(self.config) + b"".join(word(each) for each in more)
        send_signed(url, self.wallet.private_key, checksum_address(BATCH_SETTLEMENT_ADDRESS), "0x" + data.hex())


@contextlib.asynccontextmanager
async def gateway(
    database: Path | str, chain: Devnet, network: Network, *, owner: str = "one"
) -> AsyncIterator[Gateway]:
    store = Store(database)
    await recover(store)
    leases = Leases(store, owner)
    async with Rpc([chain.rpc_url], timeout_s=5) as chain_rpc:
        settlements = Settlements(store, chain_rpc, network, [chain.wallets[SIGNER].private_key], housekeeping_s=0.05)
        register(settlements, store)
        await settlements.start()
        payers = ExactServices(
            store=store,
            settlements=settlements,
            chain_states=ChainStates(chain_rpc, network),
            payer_exposure_nano_usd=QUOTED,
            settlement_wait_s=20,
        )
        services = ChannelServices(
            store=store,
            settlements=settlements,
            rpc=chain_rpc,
            network=network,
            receiver=PAY_TO,
            authorizer=settlements.signers[0],
            withdraw_delay_s=DELAY_S,
            payers=payers,
        )
        keeper = ChannelKeeper(services, settlements, leases, claim_nano_usd=10**15, claim_age_s=3600)
        assert await leases.acquire(f"channels:{network.chain_id}")
        try:
            yield Gateway(
                services, settlements, ChannelScheme(services), keeper, network.tokens[0], chain.wallets[PAYER]
            )
        finally:
            await settlements.stop()
            await leases.stop()
            store.close()


@pytest.fixture
async def opened(database: Path | str, chain: Devnet, network: Network) -> AsyncIterator[Gateway]:
    async with gateway(database, chain, network) as opened:
        yield opened


async def test_several_requests_are_in_flight_on_one_channel(opened: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    await opened.pay(PRICE, PRICE, deposit=20 * PRICE)
    payments = [opened.payment(PRICE * (index + 2)) for index in range(8)]
    # A voucher needs no look at the chain.
    monkeypatch.setattr(opened.services, "_rpc", None)
    holds = await asyncio.gather(*(opened.take(payment) for payment in reversed(payments)))
    with pytest.raises(OutOfStep):
        await opened.take(opened.payment(9 * PRICE + 1))
    await asyncio.gather(*(hold.capture(QUOTED // 2, Outcome()) for hold in holds))
    assert (await opened.channel()).charged_nano_usd == QUOTED + 8 * (QUOTED // 2)


async def test_a_channel_without_money_serves_nobody(opened: Gateway) -> None:
    with pytest.raises(PaymentRefused) as refused:
        await opened.take(opened.payment(PRICE))
    assert refused.value.code == "invalid_batch_settlement_evm_cumulative_exceeds_balance"
    await opened.pay(PRICE, PRICE, deposit=PRICE)
    with pytest.raises(PaymentRefused):
        await opened.take(opened.payment(2 * PRICE))


async def test_a_deposit_may_be_valid_from_later_than_the_last_block_on(opened: Gateway, chain: Devnet) -> None:
    now = await later_than_the_last_block(chain.rpc_url)
    hold = await opened.take(opened.payment(PRICE, deposit=5 * PRICE, valid_after=now - 1))
    await hold.capture(QUOTED, Outcome())
    assert (await opened.channel()).charged_nano_usd == QUOTED


@pytest.mark.parametrize("arrives", [True, False], ids=["it arrives", "it fails"])
async def test_whoever_hangs_up_before_its_deposit_is_there_pays_what_was_spent_when_it_is(
    opened: Gateway, chain: Devnet, arrives: bool
) -> None:
    spent = QUOTED // 4
    rpc(chain.rpc_url, "evm_setAutomine", False)
    hold = await opened.take(opened.payment(PRICE, deposit=5 * PRICE), ready=False)
    assert hold.may_start_early
    going = asyncio.create_task(hold.interrupt(Outcome({"reason": "gone"}), spent))
    await asyncio.sleep(0.3)
    assert (going.done(), (await opened.channel()).charged_nano_usd) == (False, 0)
    if not arrives:
        blacklist = call_data("blacklist(address)", opened.wallet.address)
        first = {"from": OWNER_ADDRESS, "to": chain.usdc.address, "data": blacklist, "gas": hex(100_000)}
        fees = {"maxFeePerGas": hex(900 * 10**9), "maxPriorityFeePerGas": hex(800 * 10**9)}
        rpc(chain.rpc_url, "eth_sendTransaction", first | fees)
    rpc(chain.rpc_url, "evm_mine")
    rpc(chain.rpc_url, "evm_setAutomine", True)
    await going
    assert (await opened.channel()).charged_nano_usd == spent * arrives
    view = await opened.services.store.read(lambda tx: receipts.get(tx, hold.receipt_id))
    assert view is not None
    assert (view.state, view.charged_nano_usd) == (("captured", spent) if arrives else ("released", 0))
    await assert_books_balance(opened.services.store)


async def test_a_stop_ends_the_wait_for_the_deposit_of_whoever_hung_up(opened: Gateway, chain: Devnet) -> None:
    rpc(chain.rpc_url, "evm_setAutomine", False)
    hold = await opened.take(opened.payment(PRICE, deposit=5 * PRICE), ready=False)
    going = asyncio.create_task(hold.interrupt(Outcome({"reason": "gone"}), QUOTED // 4))
    await asyncio.sleep(0.2)
    going.cancel()
    await asyncio.wait({going})
    view = await opened.services.store.read(lambda tx: receipts.get(tx, hold.receipt_id))
    assert view is not None
    assert view.state == "released"
    rpc(chain.rpc_url, "evm_setAutomine", True)
    rpc(chain.rpc_url, "evm_mine")


async def test_a_deposit_is_made_once_and_its_replay_finds_the_first_outcome(opened: Gateway, chain: Devnet) -> None:
    payment = opened.payment(PRICE, deposit=5 * PRICE)
    before = balance_of(chain.rpc_url, chain.usdc, opened.wallet.address)
    hold = await opened.take(payment)
    with pytest.raises(AlreadyUsed):
        await opened.take(payment)
    await hold.interrupt(Outcome())
    # Given back, the same payment is good for its request, and its deposit is there.
    hold = await opened.take(payment)
    await hold.capture(QUOTED, Outcome())
    with pytest.raises(AlreadyUsed):
        await opened.take(payment)
    assert before - balance_of(chain.rpc_url, chain.usdc, opened.wallet.address) == 5 * PRICE
    assert (await opened.channel()).on_chain.balance == 5 * PRICE


async def test_requests_at_once_may_come_with_the_same_deposit(
    opened: Gateway, chain: Devnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = balance_of(chain.rpc_url, chain.usdc, opened.wallet.address)
    first = opened.payment(PRICE, deposit=10 * PRICE)
    second = dataclasses.replace(opened.payment(2 * PRICE, deposit=1), deposit=first.deposit)
    check_deposit = opened.services.check_deposit
    overtaking = [first]

    async def overtaken(*arguments: Any) -> Any:
        while overtaking:
            await opened.take(overtaking.pop(), b"another request")
        return await check_deposit(*arguments)

    monkeypatch.setattr(opened.services, "check_deposit", overtaken)
    hold = await opened.take(second)
    await hold.capture(PRICE * 1000, Outcome())
    assert before - balance_of(chain.rpc_url, chain.usdc, opened.wallet.address) == 10 * PRICE
    assert (await opened.channel()).charged_nano_usd == PRICE * 1000


async def test_a_top_up_is_added(opened: Gateway) -> None:
    await opened.pay(PRICE, PRICE, deposit=PRICE)
    await opened.pay(2 * PRICE, PRICE, deposit=3 * PRICE)
    assert (await opened.channel()).on_chain.balance == 4 * PRICE


async def test_what_is_claimed_is_in_the_treasury_and_no_longer_outstanding(opened: Gateway, chain: Devnet) -> None:
    await opened.pay(PRICE, PRICE, deposit=5 * PRICE)
    await opened.pay(2 * PRICE, PRICE // 2)
    before = balance_of(chain.rpc_url, chain.usdc, PAY_TO)
    assert await opened.keeper.claim_due() == 0, "neither enough nor old enough"
    rpc(chain.rpc_url, "evm_setAutomine", False)
    assert await opened.keeper.claim([await opened.channel()], opened.token) == 1
    assert await opened.keeper.claim([await opened.channel()], opened.token) == 0, "one claim at a time"
    rpc(chain.rpc_url, "evm_setAutomine", True)
    rpc(chain.rpc_url, "evm_mine")
    await opened.settle_open()
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) - before == PRICE + PRICE // 2
    assert await opened.receivable() == 0
    custody = account_id("custody", opened.token.asset)
    store = opened.services.store
    assert (await store.read(lambda tx: transfers.balance(tx, custody))).balance == -(PRICE + PRICE // 2) * 1000
    assert await store.read(check) == []


async def test_a_payers_withdrawal_is_noticed_and_answered_with_a_claim(opened: Gateway, chain: Devnet) -> None:
    await opened.keeper.watch()
    await opened.pay(PRICE, PRICE, deposit=5 * PRICE)
    opened.payer_calls(chain.rpc_url, INITIATE, 5 * PRICE)
    await opened.keeper.watch()
    assert (await opened.channel()).state == "withdrawing"
    with pytest.raises(PaymentRefused):
        await opened.take(opened.payment(2 * PRICE))
    assert await opened.keeper.claim_due() == 1
    await opened.settle_open()
    assert await opened.receivable() == 0
    rpc(chain.rpc_url, "evm_increaseTime", DELAY_S + 1)
    opened.payer_calls(chain.rpc_url, FINALIZE)
    await opened.keeper.watch()
    channel = await opened.channel()
    assert channel.state == "drained"
    assert channel.lost_nano_usd == 0
    assert channel.on_chain.balance == PRICE


async def test_a_channel_that_was_emptied_takes_no_other_channels_claim_with_it(opened: Gateway, chain: Devnet) -> None:
    other = dataclasses.replace(opened, wallet=chain.wallets[PAYER + 1])
    for each in (opened, other):
        await each.pay(PRICE, PRICE, deposit=2 * PRICE)
    opened.payer_calls(chain.rpc_url, INITIATE, 2 * PRICE)
    rpc(chain.rpc_url, "evm_increaseTime", DELAY_S + 1)
    opened.payer_calls(chain.rpc_url, FINALIZE)
    # Nobody watched: the book still believes that there is money.
    assert await opened.keeper.claim([await opened.channel(), await other.channel()], opened.token) == 1
    await opened.settle_open()
    assert await other.receivable() == 0
    await opened.keeper.sync_marked()
    channel = await opened.channel()
    assert channel.lost_nano_usd == QUOTED
    assert await opened.receivable() == 0, "the loss is declared"
    assert await opened.services.store.read(check) == []


async def test_a_refund_gives_back_what_was_not_charged_and_can_be_spent_by_nobody_else(
    opened: Gateway, chain: Devnet
) -> None:
    await opened.pay(PRICE, PRICE, deposit=5 * PRICE)
    refunder = Refunder(opened.services, opened.settlements, opened.scheme.check_channel)
    hold = await opened.take(opened.payment(2 * PRICE))
    before = balance_of(chain.rpc_url, chain.usdc, opened.wallet.address)
    with pytest.raises(OutOfStep):
        await refunder.refund(opened.payment(PRICE // 2, type="refund"), opened.token)
    announced = (await opened.channel()).announced
    refunded = await refunder.refund(opened.payment(announced, type="refund"), opened.token)
    assert refunded.amount == 3 * PRICE, "what is under way stays"
    assert balance_of(chain.rpc_url, chain.usdc, opened.wallet.address) - before == 3 * PRICE
    with pytest.raises(PaymentRefused):
        await opened.take(opened.payment(3 * PRICE))
    await hold.capture(QUOTED, Outcome())
    with pytest.raises(PaymentRefused) as refused:
        await refunder.refund(opened.payment((await opened.channel()).announced, type="refund"), opened.token)
    assert refused.value.code == "invalid_batch_settlement_evm_refund_no_balance"
    assert await opened.keeper.claim([await opened.channel()], opened.token) == 1
    await opened.settle_open()
    assert await opened.receivable() == 0


async def test_a_restart_finds_the_channel_its_deposit_and_its_claim(
    database: Path | str, chain: Devnet, network: Network
) -> None:
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with gateway(database, chain, network) as opened:
        payment = opened.payment(PRICE, deposit=5 * PRICE)
        tender = opened.scheme.tender(
            payment,
            opened.token,
            opened.scheme.requirement(opened.token, QUOTED, 300),
            hashlib.sha256(b"request").digest(),
            int(time.time()),
        )
        await tender.authorize(quote_of(QUOTED), dict(DETAILS))
    # The process is gone with the deposit on its way; it is mined while nobody looks.
    rpc(chain.rpc_url, "evm_mine")
    rpc(chain.rpc_url, "evm_setAutomine", True)
    async with gateway(database, chain, network, owner="two") as opened:
        hold = await opened.take(payment)
        await hold.capture(QUOTED, Outcome())
        identity = deposit_id(payment, opened.token.chain_id)
        assert identity is not None
        assert (await opened.settlements.outcome(identity, 5)).paid
        assert await opened.keeper.claim([await opened.channel()], opened.token) == 1
    async with gateway(database, chain, network, owner="three") as opened:
        await opened.settle_open()
        assert await opened.receivable() == 0
        assert await opened.services.store.read(check) == []
