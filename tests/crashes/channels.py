"""Payment channels, as scripts for the kills: the official client deposits, pays by vouchers, is refunded, and withdraws."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from x402.client import x402ClientSync
from x402.http import x402HTTPClientSync
from x402.mechanisms.evm.batch_settlement.client import (
    BatchSettlementEvmScheme,
    BatchSettlementEvmSchemeOptions,
    InMemoryClientChannelStorage,
)
from x402.mechanisms.evm.batch_settlement.client.channel import process_payment_response
from x402.mechanisms.evm.batch_settlement.client.refund import RefundOptions, _RefundResponse
from x402.mechanisms.evm.signers import EthAccountSignerWithRPC
from x402.schemas import PaymentRequired

from contracts.devnet import USDC, USDT, DevToken, send_signed
from contracts.jsonrpc import rpc
from payments.chain.channel_contract import ChannelState, decode_states, encode_config, states_call
from payments.chain.networks import BATCH_SETTLEMENT_ADDRESS
from payments.chain.transactions import selector, word
from payments.verification.signatures import checksum_address
from payments.x402.channels import ChannelConfig
from tests.crashes.operations import Operation, question
from tests.crashes.world import MILLION_USD, SLOW, Run
from tests.e2e.clients import ask, decoded, sign_in

ASKING = {"accept-payment": "batch-settlement"}
INITIATE = "initiateWithdraw((address,address,address,address,address,uint40,bytes32),uint128)"


class Payer:
    """The official client, with a channel of its own.

    Args:
        run: Whose payer it is.
        token: What it pays in.
        thrifty: Whether it deposits no more than the request at hand needs.
    """

    def __init__(self, run: Run, token: DevToken, *, thrifty: bool) -> None:
        self.storage = InMemoryClientChannelStorage()
        self.scheme = BatchSettlementEvmScheme(
            EthAccountSignerWithRPC(run.payer, run.world.rpc_url),
            BatchSettlementEvmSchemeOptions(
                storage=self.storage,
                deposit_strategy=(lambda context: context.minimum_deposit_amount) if thrifty else None,
            ),
        )
        self._client = x402ClientSync()
        self._client.register("eip155:*", self.scheme)
        self._client.set_spend_controls({"allowed_assets": True})
        self._client.register_policy(
            lambda _, offers: [offer for offer in offers if offer.asset.lower() == token.address.lower()]
        )

    def sign(self, run: Run, body: dict[str, Any]) -> dict[str, str]:
        """Ask for a quote and sign for it."""
        return self.sign_for(ask(run.http, body, ASKING))

    def sign_for(self, asked: httpx.Response) -> dict[str, str]:
        """Sign what a 402 asks for."""
        assert asked.status_code == 402, asked.text
        wrapped = x402HTTPClientSync(self._client)
        required = wrapped.get_payment_required_response(asked.headers.get, asked.json())
        return ASKING | dict(wrapped.encode_payment_signature_header(self._client.create_payment_payload(required)))

    def learn(self, headers: dict[str, str], answer: httpx.Response) -> None:
        """Take over what an answer says of the channel."""
        sent = decoded(headers["PAYMENT-SIGNATURE"])
        local: Any = {
            "channel_id": sent["payload"]["voucher"]["channelId"],
            "request_amount": sent["accepted"]["amount"],
        }
        if "deposit" in sent["payload"]:
            local["deposit_amount"] = sent["payload"]["deposit"]["amount"]
        process_payment_response(self.storage, answer.headers.get, local)

    def correct(self, answer: httpx.Response) -> None:
        """Take over what a 402 says of the channel, to a voucher that was not the next one."""
        assert answer.status_code == 402, answer.text
        required = x402HTTPClientSync(self._client).get_payment_required_response(answer.headers.get, answer.json())
        assert isinstance(required, PaymentRequired)
        assert self.scheme.process_corrective_payment_required(required)

    def count(self, headers: dict[str, str]) -> None:
        """Count a request that is still under way as charged, so that the next voucher goes beyond it."""
        voucher = decoded(headers["PAYMENT-SIGNATURE"])["payload"]["voucher"]
        context = self.storage.get(voucher["channelId"])
        assert context is not None
        context.charged_cumulative_amount = voucher["maxClaimableAmount"]
        self.storage.set(voucher["channelId"], context)


@dataclass(slots=True)
class Opened(Operation):
    """A deposit that opens a channel, with its first request."""

    token: DevToken = USDC
    changes: dict[str, Any] = field(default_factory=dict)
    thrifty: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    served: set[str] = field(default_factory=set)
    """The receipts of the answers that arrived whole."""
    deposited: int = 0
    _payer: Payer | None = None

    @property
    def payer(self) -> Payer:
        """The client."""
        assert self._payer is not None
        return self._payer

    def prepare(self, run: Run) -> None:
        """Sign a deposit and the first voucher."""
        self.deposited = 0
        self._payer = Payer(run, self.token, thrifty=self.thrifty)
        self.headers = self._sign(run)

    def act(self, run: Run) -> None:
        """Pay with them."""
        self._pay(run, self.headers)

    def resume(self, run: Run) -> None:
        """Send the same again, then another request with the next voucher."""
        self._pay(run, self.headers)
        self._pay(run, self._sign(run))

    def check(self, run: Run) -> None:
        """Each answer was charged once, each charge answered; deposits are in the channel, what is claimed is ours."""
        captured = run.rows("SELECT id, charged_nano_usd FROM receipt WHERE state = 'captured' AND tender = 'channel'")
        assert {receipt for receipt, _ in captured} == self.served
        ((charged, claimed, lost, voucher),) = run.rows(
            "SELECT charged_nano_usd, claimed_nano_usd, lost_nano_usd, voucher FROM channel"
        )
        assert charged == sum(each for _, each in captured) > 0
        assert lost == 0
        assert charged <= int(voucher) * 1000
        state = self.on_chain(run)
        assert MILLION_USD - run.balance(self.token, run.payer.address) == state.balance == self.deposited
        assert run.balance(self.token, run.treasury.address) == state.total_claimed == claimed // 1000
        assert credit_is_nothing(run)

    def on_chain(self, run: Run) -> ChannelState:
        """What the contract says of the channel."""
        ((channel,),) = run.rows("SELECT id FROM channel")
        method, parameters = states_call([int(channel, 16)])
        return decode_states(rpc(run.world.rpc_url, method, *parameters), 1)[1][0]

    def _sign(self, run: Run, **changes: Any) -> dict[str, str]:
        headers = self.payer.sign(run, question(**(self.changes | changes)))
        deposit = decoded(headers["PAYMENT-SIGNATURE"])["payload"].get("deposit", {"amount": 0})
        self.deposited += int(deposit["amount"])
        return headers

    def _pay(self, run: Run, headers: dict[str, str], **changes: Any) -> None:
        answer = self._ask(run, headers, **changes)
        assert answer.status_code == 200, answer.text
        receipt = answer.headers["x-farebox-receipt"]
        if receipt not in self.served:
            self.served.add(receipt)
            self.payer.learn(headers, answer)

    def _ask(self, run: Run, headers: dict[str, str], **changes: Any) -> httpx.Response:
        return ask(run.http, question(**(self.changes | changes)), headers)


@dataclass(slots=True)
class Paid(Opened):
    """A request by voucher, on a channel that is open."""

    def prepare(self, run: Run) -> None:
        """Open it."""
        Opened.prepare(self, run)
        self._pay(run, self.headers)
        self.headers = self._sign(run)


@dataclass(slots=True)
class PaidAtOnce(Paid):
    """Two requests under way on one channel."""

    at_once = 2
    changes: dict[str, Any] = field(default_factory=lambda: {"model": SLOW})
    second: dict[str, str] = field(default_factory=dict)

    def prepare(self, run: Run) -> None:
        """Sign for both."""
        Paid.prepare(self, run)
        known = self.payer.storage.get(self._channel)
        assert known is not None
        self.payer.count(self.headers)
        self.second = self._sign(run, seed=2)
        self.payer.storage.set(self._channel, known)

    def act(self, run: Run) -> None:
        """Send both."""
        lost: list[httpx.TransportError] = []

        def pay_second() -> None:
            try:
                self._pay(run, self.second, seed=2)
            except httpx.TransportError as error:
                lost.append(error)

        other = threading.Thread(target=pay_second)
        other.start()
        try:
            self._pay(run, self.headers)
        finally:
            other.join()
        if lost:
            raise lost[0]

    def resume(self, run: Run) -> None:
        """Send both again, whichever had come how far."""
        self._pay(run, self.headers)
        self._pay(run, self.second, seed=2)

    def check(self, run: Run) -> None:
        """As ever; and there were two."""
        Opened.check(self, run)
        assert len(self.served) == 3

    @property
    def _channel(self) -> str:
        return str(decoded(self.headers["PAYMENT-SIGNATURE"])["payload"]["voucher"]["channelId"])


@dataclass(slots=True)
class Claimed(Paid):
    """What was charged is claimed on chain as soon as there is anything."""

    settings = {"payments": {"channel_claim_usd": "0.000001"}}  # noqa: RUF012 - nobody changes it
    loops = ("channels",)

    def prepare(self, run: Run) -> None:
        """Have claimed what was charged before."""
        Paid.prepare(self, run)
        run.until(lambda: self.done(run), "what was charged is claimed")

    def done(self, run: Run) -> bool:
        """Nothing is outstanding that the token could express, and the book has looked at the chain since."""
        return is_claimed(run)

    def resume(self, run: Run) -> None:
        """Send the same again; what it cost is claimed without anybody's doing."""
        self._pay(run, self.headers)
        run.until(lambda: self.done(run), "what was charged is claimed")


@dataclass(slots=True)
class ToppedUp(Opened):
    """A voucher that becomes balance: credited at once, and claimed at once, with the limits for claims far away."""

    settings = {"wallet": {"withdrawal_minimum_usd": "0.01"}}  # noqa: RUF012 - nobody changes it
    loops = ("channels",)
    usd: str = "0.75"
    amount: int = 750_000

    def prepare(self, run: Run) -> None:
        """Open the channel by one, and have it claimed; then sign another."""
        self._payer = Payer(run, self.token, thrifty=False)
        headers = self._signed(run)
        self.deposited = int(decoded(headers["PAYMENT-SIGNATURE"])["payload"]["deposit"]["amount"])
        answer = self._top_up(run, headers)
        assert answer.status_code == 200, answer.text
        self.payer.learn(headers, answer)
        run.until(lambda: is_claimed(run), "the first one is claimed")
        self.headers = self._signed(run)

    def act(self, run: Run) -> None:
        """Pay it."""
        self._top_up(run, self.headers)

    def done(self, run: Run) -> bool:
        """All of it is in the treasury."""
        return is_claimed(run)

    def resume(self, run: Run) -> None:
        """Send the same payment, which says the same however far the first had come; and take all of it out in the end."""
        answer = self._top_up(run, self.headers)
        assert (answer.status_code, answer.json().get("credited_usd")) == (200, self.usd), answer.text
        run.until(lambda: is_claimed(run), "both are claimed")
        assert run.rows("SELECT balance FROM ledger_account WHERE kind = 'payer'") == [(2 * self.amount * 1000,)]
        assert run.balance(self.token, run.treasury.address) == 2 * self.amount
        headers = sign_in(run.http, run.payer) | {"idempotency-key": "all"}
        taken = run.http.post("/v1/wallet/withdrawals", json={"asset": "USDC", "amount_usd": "all"}, headers=headers)
        assert taken.status_code == 200, taken.text
        run.until_settled()

    def check(self, run: Run) -> None:
        """Each was charged to the channel once, claimed once, and came back once."""
        assert run.rows("SELECT charged_nano_usd, claimed_nano_usd, lost_nano_usd FROM channel") == [
            (2 * self.amount * 1000, 2 * self.amount * 1000, 0)
        ]
        state = self.on_chain(run)
        assert (state.balance, state.total_claimed) == (self.deposited, 2 * self.amount)
        assert MILLION_USD - run.balance(self.token, run.payer.address) == self.deposited - 2 * self.amount
        assert run.balance(self.token, run.treasury.address) == 0
        assert credit_is_nothing(run)

    def _signed(self, run: Run) -> dict[str, str]:
        return self.payer.sign_for(self._top_up(run, ASKING))

    def _top_up(self, run: Run, headers: dict[str, str]) -> httpx.Response:
        return run.http.post("/v1/wallet/topups", json={"amount_usd": self.usd}, headers=headers)


@dataclass(slots=True)
class Refunded(Opened):
    """What a channel holds beyond what was charged goes back to its payer, who asks for it."""

    given_back: bool = False

    def prepare(self, run: Run) -> None:
        """Open it."""
        Opened.prepare(self, run)
        self._pay(run, self.headers)

    def act(self, run: Run) -> None:
        """Ask for the rest."""
        self._refund(run)

    def resume(self, run: Run) -> None:
        """Ask again: it goes on, or there is nothing left to give."""
        if not self.given_back:
            with contextlib.suppress(RuntimeError):
                self._refund(run)
        run.until_settled()
        self.deposited = -(-self._charged(run) // 1000)

    def _refund(self, run: Run) -> None:
        assert self.payer.scheme.refund("", RefundOptions(fetch=lambda _, headers: _get(run, headers))).success
        self.given_back = True

    def _charged(self, run: Run) -> int:
        ((charged,),) = run.rows("SELECT charged_nano_usd FROM channel")
        return int(charged)


@dataclass(slots=True)
class Withdrawn(Opened):
    """The payer announces that it takes its money out: what it owes is claimed before it can."""

    loops = ("channels",)

    def prepare(self, run: Run) -> None:
        """Owe something."""
        Opened.prepare(self, run)
        self._pay(run, self.headers)

    def act(self, run: Run) -> None:
        """Announce it, as only the payer can: on the chain."""
        self._announce(run)

    def done(self, run: Run) -> bool:
        """What was owed is claimed."""
        return is_claimed(run) and bool(run.rows("SELECT id FROM channel WHERE state = 'withdrawing'"))

    def resume(self, run: Run) -> None:
        """Wait for that."""
        run.until(lambda: self.done(run), "what was charged is claimed")

    def check(self, run: Run) -> None:
        """As ever, and the channel buys nothing more."""
        Opened.check(self, run)
        headers = self.payer.sign(run, question())
        answer = ask(run.http, question(), headers)
        assert (answer.status_code, "exceeds_balance" in answer.text) == (402, True), answer.text

    def _announce(self, run: Run) -> None:
        sent = decoded(self.headers["PAYMENT-SIGNATURE"])["payload"]["channelConfig"]
        config = ChannelConfig(
            payer=sent["payer"].lower(),
            payer_authorizer=sent["payerAuthorizer"].lower(),
            receiver=sent["receiver"].lower(),
            receiver_authorizer=sent["receiverAuthorizer"].lower(),
            token=sent["token"].lower(),
            withdraw_delay=sent["withdrawDelay"],
            salt=int(sent["salt"], 16),
        )
        data = selector(INITIATE) + encode_config(config) + word(self.deposited)
        contract = checksum_address(BATCH_SETTLEMENT_ADDRESS)
        send_signed(run.world.rpc_url, "0x" + bytes(run.payer.key).hex(), contract, "0x" + data.hex())


def is_claimed(run: Run) -> bool:
    """Whether nothing is outstanding that the token could express, and the book has looked at the chain since."""
    due = "charged_nano_usd - claimed_nano_usd >= 1000 OR claim_id IS NOT NULL OR marks <> synced_marks"
    return not run.open_settlements() and not run.rows(f"SELECT id FROM channel WHERE {due}")


def credit_is_nothing(run: Run) -> bool:
    """Whether no payer has anything in the ledger."""
    return run.rows("SELECT id FROM ledger_account WHERE kind = 'payer' AND balance <> 0") == []


def _get(run: Run, headers: dict[str, str]) -> _RefundResponse:
    answer = run.http.get("/v1/chat/completions", headers=headers)
    assert answer.status_code in (200, 402), answer.text
    return _RefundResponse(answer.status_code, dict(answer.headers))


CHANNELS: Mapping[str, Callable[[], Operation]] = {
    "opened, EIP-3009": Opened,
    "opened, Permit2": lambda: Opened(USDT),
    "topped up": lambda: Paid(thrifty=True),
    "paid by voucher": Paid,
    "paid by voucher, streamed": lambda: Paid(changes={"stream": True}),
    "two at once": PaidAtOnce,
    "claimed": Claimed,
    "a voucher as a top-up": ToppedUp,
    "refunded": Refunded,
    "withdrawn by its payer": Withdrawn,
}
