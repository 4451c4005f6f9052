"""Payment channels under whatever order of things: deposits, top-ups, vouchers in flight, stale and corrected ones, claims in
batches, refunds, the payer's own withdrawal, strangers, reorganisations, failing nodes and databases, restarts and kills.

Whatever the order: nothing is claimed beyond the highest voucher or beyond what was charged, nothing is charged beyond what is
deposited and signed, and in the end all that was charged is in the treasury, the book says what the contract says, and what is
left is the payer's.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, replace

import coincurve
import hypothesis.strategies as st
from hypothesis.stateful import initialize, precondition, rule

from payments.chain.channel_contract import ChannelState, encode_config
from payments.chain.networks import BATCH_SETTLEMENT_ADDRESS
from payments.chain.signers import Signer
from payments.chain.transactions import Call, address_of, selector, word
from payments.channels import book
from payments.channels.keeper import ChannelKeeper
from payments.channels.refunds import Refunder
from payments.channels.requests import OutOfStep
from payments.channels.services import ChannelServices
from payments.errors import PaymentError
from payments.leases import Leases
from payments.ledger.accounts import account_id
from payments.reconciliation import reconcile
from payments.store import StoreBusy
from payments.tenders.base import Outcome
from payments.tenders.channel_scheme import ChannelScheme
from payments.verification import vouchers
from payments.x402.channels import ChannelConfig, ChannelPayment, Deposit, Erc3009Deposit, PayloadType, Voucher, hex32
from tests.payments.exact_samples import quote_of
from tests.payments.fake_contracts import FINALIZE, INITIATE
from tests.payments.machines import CHAIN_ID, CONFIRMATIONS, NANO, NETWORK, SIGNER_KEYS, STRANGER, TOKEN, GatewayMachine
from tests.payments.simulation import exploring

TREASURY = "0x" + "7e" * 20
AUTHORIZER = Signer.from_hex(SIGNER_KEYS[0])
KEYS = [coincurve.PrivateKey(bytes([number]) * 32) for number in (0xA1, 0xA2)]
FUNDS, DELAY_S = 1_000_000, 200
ROUNDS_MAX = 200


@dataclass(frozen=True, slots=True)
class Wish:
    """One request: what it may cost and costs (atomic units), what comes with it, and what the client counts."""

    payer: int
    price: int
    cost: int
    deposit: int
    counts: str
    """``all``: charged, under way and the price, as our SDK does; ``charged``: a stock client; ``less`` or ``more``."""
    ending: str


wishes = st.lists(
    st.builds(
        Wish,
        payer=st.integers(0, 1),
        price=st.sampled_from((100, 250, 1_000)),
        cost=st.sampled_from((0, 1, 99, 100, 260, 1_000)),
        deposit=st.sampled_from((0, 0, 0, 2_000, 5_000)),
        counts=st.sampled_from(("all", "all", "all", "charged", "less", "more")),
        ending=st.sampled_from(("capture", "capture", "capture", "capture twice", "release", "interrupt")),
    ),
    min_size=1,
    max_size=5,
)


class Client:
    """What a payer knows of its one channel."""

    def __init__(self, key: coincurve.PrivateKey) -> None:
        self.key, self.address = key, address_of(key)
        self.config = ChannelConfig(self.address, self.address, TREASURY, AUTHORIZER.address, TOKEN.address, DELAY_S, 0)
        self.number = vouchers.channel_id(self.config, CHAIN_ID)
        self.known = self.under_way = self.signed = 0

    @property
    def id(self) -> str:
        return hex32(self.number)


class ChannelsMachine(GatewayMachine):
    """One gateway's channels, again and again, on one database and one chain."""

    rounds_max = ROUNDS_MAX
    calm_blocks = CONFIRMATIONS + 8
    treasury = TREASURY
    undecided = (
        *GatewayMachine.undecided,
        "SELECT id, state FROM channel WHERE claim_id IS NOT NULL OR refund_id IS NOT NULL OR marks <> synced_marks"
        " OR unclaimed_since_ms IS NOT NULL",
    )

    @initialize(seed=st.integers(0, 2**32), deposit=st.sampled_from((1_000, 5_000)), wanted=wishes)
    def start(self, seed: int, deposit: int, wanted: list[Wish]) -> None:
        self.clients = [Client(key) for key in KEYS]
        self.payments: list[tuple[ChannelPayment, Wish]] = []
        self.waited = False
        self.prepare(seed, {client.address: FUNDS for client in self.clients})
        for payer in range(len(self.clients)):
            self.requests_at_once([Wish(payer, 100, 50, deposit, "all", "capture")])
        self.time_passes(2, True, False)
        self.requests_at_once(wanted)

    async def begin(self) -> None:
        store, rpc = self.process.store, self.process.rpc
        payers = await self.open_services(10**12)
        self.services = ChannelServices(
            store=store,
            settlements=self.engine,
            rpc=rpc,
            network=NETWORK,
            receiver=TREASURY,
            authorizers=[AUTHORIZER],
            withdraw_delay_s=DELAY_S,
            payers=payers,
        )
        self.scheme = ChannelScheme(self.services)
        self.requirement = self.scheme.requirement(TOKEN, 10**6, 300)
        self.refunder = Refunder(
            self.services, self.engine, lambda payment, token: self.scheme.check(payment, token, self.requirement)
        )
        # One process at a time: what the dead one held is taken over at once.
        leases = Leases(store, "gateway")
        self.keeper = ChannelKeeper(
            self.services, self.engine, leases, claim_nano_usd=500 * NANO, claim_age_s=5, watch_s=5
        )
        await leases.start()
        await self.engine.start()
        await self.keeper.start()

    def channel(self, client: Client) -> book.Channel | None:
        return self.process.store._database.read(lambda tx: book.find(tx, client.id))

    # --- requests -----------------------------------------------------------------------------------------------------

    @rule(wanted=wishes)
    def requests_at_once(self, wanted: list[Wish]) -> None:
        for wish in wanted:
            self.spawn(self.request(self.sign(wish), wish, self.world.random.randbytes(32)))
        self.run(asyncio.sleep(0.2))

    @precondition(lambda self: self.payments)
    @rule(data=st.data(), other=st.booleans())
    def a_payment_is_sent_again(self, data: st.DataObject, other: bool) -> None:
        payment, wish = self.payments[data.draw(st.integers(0, len(self.payments) - 1))]
        body = b"other".ljust(32) if other else payment.digest
        self.spawn(self.request(payment, wish, body))
        self.run(asyncio.sleep(0.2))

    def sign(self, wish: Wish, type: PayloadType | None = None) -> ChannelPayment:
        client = self.clients[wish.payer]
        offset = {"all": client.under_way, "charged": 0, "less": -50, "more": 777}[wish.counts]
        amount = client.known if type == "refund" else max(client.known + offset + wish.price, 1)
        client.signed = max(client.signed, amount)
        deposit: Deposit | None = None
        if wish.deposit:
            salt = self.world.random.getrandbits(256)
            deposit = Erc3009Deposit(wish.deposit, 0, int(self.world.time()) + 300, salt, b"")
            digest = vouchers.erc3009_deposit_digest(deposit, client.config, client.number, TOKEN)
            deposit = replace(deposit, signature=vouchers.sign_digest(client.key, digest))
        signature = vouchers.sign_digest(client.key, vouchers.voucher_digest(client.number, amount, CHAIN_ID))
        digest = self.world.random.randbytes(32)
        payment = ChannelPayment(
            version=2,
            scheme="batch-settlement",
            network=NETWORK.caip2,
            accepted=self.requirement,
            quote_token=None,
            digest=digest,
            type=type or ("deposit" if deposit else "voucher"),
            config=client.config,
            voucher=Voucher(client.number, amount, signature),
            deposit=deposit,
            refund_amount=None,
        )
        if type is None:
            self.payments.append((payment, wish))
        return payment

    async def request(self, payment: ChannelPayment, wish: Wish, body: bytes) -> None:
        """What the gateway does with a request, and what its client learns."""
        client = self.clients[wish.payer]
        with contextlib.suppress(PaymentError, StoreBusy):
            client.under_way += wish.price
            try:
                tender = self.scheme.tender(payment, TOKEN, self.requirement, body, int(self.world.time()))
                hold = await tender.authorize(quote_of(wish.price * NANO), {})
                try:
                    await asyncio.sleep(self.world.a_while(300))
                    await hold.ready()
                    if wish.ending == "interrupt":
                        raise asyncio.CancelledError
                    if wish.ending == "release":
                        await hold.release(Outcome())
                        return
                    charge = await hold.capture(wish.cost * NANO, Outcome())
                    if wish.ending == "capture twice":
                        assert await hold.capture(wish.cost * NANO, Outcome()) == charge
                except BaseException:
                    await hold.interrupt(Outcome({"reason": "stopped"}))
                    raise
                assert charge.charged_nano_usd == min(wish.cost, wish.price) * NANO
                client.known += min(wish.cost, wish.price)
            except OutOfStep as error:
                client.known = max(client.known, error._status.charged)
                raise
            finally:
                client.under_way -= wish.price

    @rule(payer=st.integers(0, 1))
    def a_payer_asks_for_a_refund(self, payer: int) -> None:
        payment = self.sign(Wish(payer, 0, 0, 0, "all", "refund"), "refund")

        async def refund() -> None:
            with contextlib.suppress(PaymentError, StoreBusy):
                await self.refunder.refund(payment, TOKEN)

        self.spawn(refund())
        self.run(asyncio.sleep(0.2))

    # --- what payers and strangers do on chain --------------------------------------------------------------------------

    @rule(payer=st.integers(0, 1), amount=st.sampled_from((100, 1_000, 10**6)))
    def a_payer_announces_a_withdrawal(self, payer: int, amount: int) -> None:
        client = self.clients[payer]
        state = self.chain.state.channels.get(client.number, ChannelState(0, 0, 0, 0, 0))
        amount = min(amount, state.balance - state.total_claimed)
        data = selector(INITIATE) + encode_config(client.config) + word(max(amount, 0))
        self.chain.act(client.address, Call(BATCH_SETTLEMENT_ADDRESS, data, 100_000))

    @precondition(lambda self: not self.waited)
    @rule()
    def the_delay_passes_and_withdrawals_are_finished(self) -> None:
        self.waited = True
        for _ in range(DELAY_S // 5 + 1):
            self.run(asyncio.sleep(5))
            self.chain.mine()
        for client in self.clients:
            data = selector(FINALIZE) + encode_config(client.config)
            self.chain.act(client.address, Call(BATCH_SETTLEMENT_ADDRESS, data, 100_000))

    @rule(data=st.data())
    def a_stranger_submits_what_we_signed(self, data: st.DataObject) -> None:
        rows = self.read("SELECT call_to, call_data FROM settlement ORDER BY id")
        if rows:
            to, call_data = rows[data.draw(st.integers(0, len(rows) - 1))]
            self.chain.act(STRANGER, Call(to, bytes(call_data), 500_000))

    # --- what must be so ----------------------------------------------------------------------------------------------

    def check_always(self) -> None:
        super().check_always()
        for client in self.clients:
            channel = self.channel(client)
            claimed = self.chain.state.channels.get(client.number, ChannelState(0, 0, 0, 0, 0)).total_claimed
            if channel is not None:
                assert channel.charged_nano_usd <= client.signed * NANO, "charged more than was signed for"
                assert claimed * NANO <= channel.charged_nano_usd, "claimed more than was charged"

    def finish(self) -> None:
        """Requests end, the chain behaves, and everything that is due is claimed."""
        self.put_right()
        self.wait_until_decided()

    def check(self) -> None:
        claimed = 0
        for client in self.clients:
            channel, state = self.channel(client), self.chain.state.channels.get(client.number)
            if channel is None or state is None:
                continue
            assert channel.on_chain == state, "the book says otherwise than the contract"
            assert channel.lost_nano_usd == 0, "somebody took out what we had earned"
            assert channel.charged_nano_usd == state.total_claimed * NANO == channel.claimed_nano_usd
            (charged,) = self.read(
                "SELECT COALESCE(SUM(charged_nano_usd), 0) FROM receipt"
                f" WHERE tender='channel' AND payer='{client.address}'"
            )[0]
            assert charged == channel.charged_nano_usd
            assert self.chain.state.balances[client.address] + state.balance == FUNDS, "the rest is the payer's"
            account = book.receivable(channel.id, TOKEN.asset)
            assert self.read(f"SELECT balance, pending_out FROM ledger_account WHERE id='{account}'") in ([(0, 0)], [])
            claimed += state.total_claimed
        assert self.chain.state.balances.get(TREASURY, 0) == claimed
        balances = dict(self.read("SELECT id, balance FROM ledger_account"))
        # What answers cost beyond their price is the operator's loss, and no payer's.
        earned, overrun = (balances.get(account_id(kind, TOKEN.asset), 0) for kind in ("revenue", "variance"))
        assert earned + overrun == claimed * NANO
        assert -balances.get(account_id("custody", TOKEN.asset), 0) == claimed * NANO
        report = self.run(
            reconcile(self.process.store, self.process.rpc, NETWORK, TREASURY, confirmations=CONFIRMATIONS)
        )
        assert report is not None
        assert report.findings == []


TestChannelsMachine = ChannelsMachine.TestCase
TestChannelsMachine.settings = exploring(40, 20)
