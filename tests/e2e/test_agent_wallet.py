"""`agent.wallet` and the commands around it, against a real gateway and chain."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from eth_account.signers.local import LocalAccount
from rich.console import Console
from typer.testing import CliRunner

from agents_sdk import Agent, LimitExceeded, OutcomeUnknown, RequestRefused, SpendingPolicy, TokenNotAllowed
from contracts.devnet import USDC, USDT, balance_of, call_data, send_signed
from contracts.jsonrpc import rpc
from gateway.cli import app
from gateway.dev.stack import Stack
from payments.money import usd_to_nano
from tests.e2e.agents import FUNDS, deposits_of, new_wallet, rows
from tests.e2e.conftest import QUESTION
from tests.e2e.faults import Fault, FaultyProxy
from tests.e2e.grounds import wait_until

ASSET = "eip155:84532/USDC"
POLICY = SpendingPolicy(max_per_request="5", max_per_day=None)
MakeAgent = Callable[..., Agent]


@pytest.fixture
def owner(stack: Stack) -> LocalAccount:
    return new_wallet(stack)


@pytest.fixture
def make_agent(stack: Stack, owner: LocalAccount, tmp_path: Path) -> Iterator[MakeAgent]:
    """Agents of the test's wallet, with one log."""
    agents: list[Agent] = []

    def make(base_url: str = stack.gateway_url, **options: Any) -> Agent:
        given: dict[str, Any] = {"policy": POLICY, "receipts": tmp_path / "agent.sqlite3", "backoff_s": 0.05} | options
        agents.append(Agent(owner, base_url, **given))
        return agents[-1]

    yield make
    for agent in agents:
        agent.close()


def available(agent: Agent) -> dict[str, str]:
    return {each.asset.rpartition("/")[2]: each.available_usd for each in agent.wallet.balance()}


def test_a_balance_is_topped_up_spent_and_taken_out(stack: Stack, make_agent: MakeAgent, owner: LocalAccount) -> None:
    agent = make_agent()
    made = agent.wallet.topup("3")
    assert (made.credited_usd, made.asset) == ("3.00", ASSET)
    assert made.transaction is not None
    assert balance_of(stack.rpc_url, USDC, owner.address) == FUNDS - 3_000_000

    # From here on it is spent before anything is signed.
    with agent.http_client() as http:
        assert http.post("/v1/chat/completions", json=QUESTION).status_code == 200
    [receipt] = agent.receipts(limit=1)
    assert receipt.paid_with == "credit"

    page = agent.wallet.history(limit=1)
    assert [(each.type, each.state) for each in page.entries] == [("charge", "posted")]
    assert page.next is not None
    older = agent.wallet.history(before=page.next)
    assert [(each.type, each.amount_usd, each.transaction) for each in older.entries] == [
        ("topup", "3.00", made.transaction)
    ]
    assert older.next is None

    out = agent.wallet.withdraw("1.5")
    assert (out.state, out.amount_usd, out.asset) == ("paid", "1.50", ASSET)
    assert balance_of(stack.rpc_url, USDC, owner.address) == FUNDS - 1_500_000
    assert agent.wallet.withdrawal(out.id) == out
    assert agent.wallet.withdrawals() == [out]
    rest = agent.wallet.withdraw("all", asset="USDC")
    assert rest.state == "paid"
    assert usd_to_nano(available(agent)["USDC"]) < 1000, "what is left is less than the token's unit"


def test_the_same_topup_asked_again_is_the_same_payment(
    stack: Stack, make_agent: MakeAgent, owner: LocalAccount
) -> None:
    with FaultyProxy(stack.gateway_url) as proxy:
        proxy.plan([Fault("reset", True), Fault(503, False)])
        assert make_agent(proxy.url).wallet.topup("1").credited_usd == "1.00"
        [payment] = set(proxy.payments)
        assert len(proxy.payments) == 3
        # Nothing came back at all: the next process goes on with it.
        proxy.plan([Fault(503, True)] * 2)
        with pytest.raises(OutcomeUnknown, match="ask for the same again"):
            make_agent(proxy.url, tries_max=2).wallet.topup("1")
        assert make_agent(proxy.url).wallet.topup("1.00").credited_usd == "1.00"
        assert len(set(proxy.payments)) == 1
        assert set(proxy.payments) != {payment}
    assert balance_of(stack.rpc_url, USDC, owner.address) == FUNDS - 2_000_000
    assert available(make_agent())["USDC"] == "2.00"


def test_a_topup_keeps_to_the_policy_and_the_gateways_limits(
    stack: Stack, make_agent: MakeAgent, owner: LocalAccount
) -> None:
    with pytest.raises(LimitExceeded):
        make_agent().wallet.topup("6")
    with pytest.raises(TokenNotAllowed):
        make_agent(policy=SpendingPolicy(tokens=["USDC"])).wallet.topup("1", asset="USDT")
    with pytest.raises(RequestRefused, match="`amount_usd` must be a text such as") as refused:
        make_agent().wallet.topup("0.01")
    assert (refused.value.status, refused.value.code) == (400, "invalid_field")
    for odd in ("-1", 1, 1.5):
        with pytest.raises(ValueError, match="not a dollar amount"):
            make_agent().wallet.topup(odd)  # type: ignore[arg-type]
    assert balance_of(stack.rpc_url, USDC, owner.address) == FUNDS
    agent = make_agent(rpc_url=stack.rpc_url)
    assert agent.wallet.topup("1", asset="USDT").asset == "eip155:84532/USDT"
    assert balance_of(stack.rpc_url, USDT, owner.address) == FUNDS - 1_000_000


@pytest.mark.parametrize("forwarded", [True, False], ids=["after", "instead"])
def test_a_withdrawal_whose_answer_is_lost_is_made_once(
    stack: Stack, make_agent: MakeAgent, owner: LocalAccount, monkeypatch: pytest.MonkeyPatch, forwarded: bool
) -> None:
    make_agent().wallet.topup("3")
    faults: list[str] = []
    send = httpx.HTTPTransport.handle_request

    def lossy(transport: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        if not faults or (request.method, request.url.path) != ("POST", "/v1/wallet/withdrawals"):
            return send(transport, request)
        faults.pop()
        if forwarded:
            send(transport, request).close()
        raise httpx.ReadError("reset", request=request)

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lossy)
    faults.append("heard by the second try")
    assert make_agent().wallet.withdraw("1", asset=ASSET).state == "paid"
    # A process that never heard the answer: the next one finds the same withdrawal.
    faults.append("never heard")
    with pytest.raises(httpx.ReadError):
        make_agent(tries_max=1).wallet.withdraw("1", asset=ASSET)
    assert make_agent().wallet.withdraw("1", asset=ASSET).state == "paid"
    assert len(make_agent().wallet.withdrawals()) == 2
    assert balance_of(stack.rpc_url, USDC, owner.address) == FUNDS - 1_000_000


def test_what_cannot_be_withdrawn_is_told(make_agent: MakeAgent) -> None:
    agent = make_agent()
    with pytest.raises(RequestRefused, match="name the asset to withdraw; the wallet's balance is nothing"):
        agent.wallet.withdraw("1")
    with pytest.raises(RequestRefused) as refused:
        agent.wallet.withdraw("1", asset=ASSET)
    assert refused.value.status in (402, 409)


def test_keys_spend_the_balance_until_they_are_revoked(stack: Stack, make_agent: MakeAgent) -> None:
    agent = make_agent()
    agent.wallet.topup("1")
    made = agent.wallet.keys.create("laptop")
    assert made.key not in repr(made)
    headers = {"authorization": f"Bearer {made.key}"}
    with httpx.Client(base_url=stack.gateway_url, headers=headers, timeout=30) as http:
        assert http.post("/v1/chat/completions", json=QUESTION).status_code == 200
        [listed] = agent.wallet.keys.list()
        assert (listed.id, listed.name, listed.revoked) == (made.id, "laptop", None)
        assert agent.wallet.keys.revoke(made.id).revoked is not None
        assert http.post("/v1/chat/completions", json=QUESTION).status_code == 401
    with pytest.raises(RequestRefused, match="no key with this id"):
        agent.wallet.keys.revoke("key_nobody")


async def test_everything_can_be_awaited(stack: Stack, make_agent: MakeAgent, owner: LocalAccount) -> None:
    agent = make_agent()
    wallet = agent.async_wallet
    assert (await wallet.topup("2")).credited_usd == "2.00"
    assert [each.available_usd for each in await wallet.balance() if each.asset == ASSET] == ["2.00"]
    assert [each.type for each in (await wallet.history()).entries] == ["topup"]
    assert (await wallet.withdraw("1")).state == "paid"
    assert len(await wallet.withdrawals()) == 1
    made = await wallet.keys.create("server")
    assert [each.id for each in await wallet.keys.list()] == [made.id]
    await wallet.keys.revoke(made.id)
    assert wallet.channels() == []
    with pytest.raises(RequestRefused, match="there is no channel"):
        await wallet.refund_channel()


def test_what_is_sent_to_the_deposit_address_becomes_balance(
    stack: Stack, make_agent: MakeAgent, owner: LocalAccount
) -> None:
    agent = make_agent()
    found = agent.wallet.deposit_address()
    assert (found.network, set(found.tokens)) == ("eip155:84532", {"USDC", "USDT"})
    assert agent.wallet.deposit_address("eip155:84532") == found
    with pytest.raises(RequestRefused, match="name one of the networks"):
        agent.wallet.deposit_address("eip155:1")
    data = call_data("transfer(address,uint256)", found.address, 2_000_000)
    send_signed(stack.rpc_url, owner.key.hex(), USDC.address, data)
    rpc(stack.rpc_url, "anvil_mine", hex(4))
    wait_until(lambda: available(agent)["USDC"] == "2.00", "the deposit is credited")


# ---------------------------------------------------------------------- the commands


@pytest.fixture
def farebox(stack: Stack, owner: LocalAccount, tmp_path: Path) -> Callable[..., Any]:
    """Runs the command with `--json`; returns what it printed. It fails unless the exit status is as said."""
    environment = {
        "FAREBOX_WALLET_KEY": "0x" + owner.key.hex().removeprefix("0x"),
        "FAREBOX_GATEWAY": stack.gateway_url,
        "FAREBOX_RPC_URL": stack.rpc_url,
        "XDG_DATA_HOME": str(tmp_path),
    }

    def run(*arguments: str, status: int = 0, text: bool = False, **variables: str) -> Any:
        given = list(arguments) if text else [*arguments, "--json"]
        done = CliRunner().invoke(app, given, env=environment | variables)
        assert done.exit_code == status, done.output
        return done.output if text else json.loads(done.stdout)

    return run


def test_the_wallet_commands(stack: Stack, farebox: Callable[..., Any], owner: LocalAccount) -> None:
    assert farebox("wallet", "topup", "2")["credited_usd"] == "2.00"
    found = farebox("wallet", "balance")
    assert found["address"] == owner.address
    assert {"asset": ASSET, "available_usd": "2.00", "held_usd": "0.00"} in found["balances"]
    assert ASSET in farebox("wallet", "balance", text=True)
    [entry] = farebox("wallet", "history")["history"]
    assert (entry["type"], entry["amount_usd"]) == ("topup", "2.00")
    assert "topup" in farebox("wallet", "history", text=True)
    [out] = farebox("wallet", "withdraw", "1", "--asset", "USDC")["withdrawals"]
    assert out["state"] == "paid"
    assert out["id"] in farebox("wallet", "withdrawals", text=True)
    made = farebox("wallet", "keys", "create", "laptop")
    assert made["key"].startswith("fb")
    assert farebox("wallet", "keys", "revoke", made["id"])["revoked"] is not None
    assert "revoked" in farebox("wallet", "keys", "list", text=True)
    assert farebox("wallet", "deposit-address")["network"] == "eip155:84532"
    assert balance_of(stack.rpc_url, USDC, owner.address) == FUNDS - 1_000_000


def test_the_channel_commands_and_a_question_paid_through_a_channel(
    stack: Stack, farebox: Callable[..., Any], owner: LocalAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "farebox channel open" in farebox("channel", "list", text=True)
    [opened] = farebox("channel", "open", "0.5")["channels"]
    assert (opened["deposited_usd"], opened["asset"]) == ("0.50", ASSET)
    answer = farebox("ask", "Why is the sky blue?", "--scheme", "batch-settlement", "--max-usd", "0.2")
    assert answer["receipt"]["paid_with"] == "batch-settlement"
    assert answer["receipt"]["transaction"] is None
    assert len(deposits_of(stack, owner)) == 1
    shown = farebox("channel", "list", text=True)
    assert opened["id"] in shown
    monkeypatch.setattr("gateway.commands.channel.out", Console(width=80, soft_wrap=True))
    head, *_ = farebox("channel", "list", text=True).splitlines()
    assert head == opened["id"], "whole, to be copied"
    back = farebox("channel", "refund")
    assert back["transaction"] is not None
    charged = farebox("channel", "list")["channels"][0]["charged_usd"]
    assert balance_of(stack.rpc_url, USDC, owner.address) == FUNDS - -(-usd_to_nano(charged) // 1000)
    assert rows(stack, "SELECT 1 FROM settlement WHERE kind = 'channel_refund' AND pay_to = ?", owner.address.lower())


def test_a_wallet_with_credit_opens_a_channel_all_the_same(farebox: Callable[..., Any]) -> None:
    farebox("wallet", "topup", "1")
    [opened] = farebox("channel", "open", "0.5")["channels"]
    assert opened["deposited_usd"] == "0.50"
    assert "enough" in farebox("channel", "open", "0.5", text=True)


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["wallet", "topup", "0.01"], "`amount_usd` must be", "as it says"),
        (["wallet", "topup", "2000"], "does not hold 2000.00 USD of any token", "Ask for less"),
        (["wallet", "keys", "revoke", ""], "no key without an id", "farebox wallet keys list"),
        (["wallet", "topup", "1", "--asset", "DAI"], "DAI is wanted", "--asset"),
        (["wallet", "withdraw", "1", "--asset", "USDC"], "", "farebox wallet topup"),
        (["wallet", "keys", "revoke", "key_nobody"], "no key with this id", "farebox wallet keys list"),
        (["wallet", "deposit-address", "--network", "eip155:1"], "name one of the networks", "as it says"),
        (["channel", "refund"], "there is no channel", "farebox channel list"),
        (["channel", "open", "0.000001"], "allowed per request", "Raise the limit"),
        (["wallet", "balance", "--gateway", "http://127.0.0.1:9"], "does not answer", "--gateway"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_goes_wrong_is_said_with_what_to_do(
    farebox: Callable[..., Any], arguments: list[str], what: str, fix: str
) -> None:
    error = farebox(*arguments, status=1)["error"]
    assert what in error["message"]
    assert fix in error["fix"]


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["wallet", "topup", "nothing"], "is not a dollar amount", "such as 12.50"),
        (["wallet", "withdraw", "abc"], "is not a dollar amount", "such as 12.50"),
        (["channel", "open", "abc"], "is not a dollar amount", "such as 12.50"),
        (["channel", "refund", "--usd", "abc"], "is not a dollar amount", "such as 12.50"),
        (["wallet", "withdraw", "1", "--asset", "USDC", "--idempotency-key", "é"], "idempotency key", "Correct it"),
        (["wallet", "balance", "--gateway", "gateway.example"], "is not a URL", "Correct it"),
        (["wallet", "balance", "--gateway", "http://localhost:abc"], "is not a URL", "Correct it"),
        (["wallet", "balance", "--gateway", "http://localhost:1/foo"], "has a path", "Correct it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_read_is_wrong_usage(
    farebox: Callable[..., Any], arguments: list[str], what: str, fix: str
) -> None:
    error = farebox(*arguments, status=2)["error"]
    assert what in error["message"]
    assert fix in error["fix"]


def test_without_a_key_the_variable_is_named(farebox: Callable[..., Any]) -> None:
    assert "FAREBOX_WALLET_KEY" in farebox("wallet", "balance", status=1, FAREBOX_WALLET_KEY="")["error"]["fix"]
