"""Nodes that fail, lie or hang, one of two or both: nobody is served for nothing or pays twice, and all ends by itself."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from gateway.dev.stack import StackFailed
from tests.e2e.conftest import QUESTION
from tests.e2e.grounds import Ground, amount_of, error_of, turn, wait_until
from tests.e2e.grounds import ground as new_ground
from tests.e2e.nodes import FaultyNode
from tests.e2e.payers import DEV_TOKENS, RICH, Payer, Way

FAULTS = ("status", "reset", "garbage", "not a list", "errors", "hang", "drip", "huge")
PROMPT: tuple[Way, ...] = ("exact USDC", "exact USDT", "channel USDC")
FIRST: tuple[Way, ...] = ("exact USDC", "upto USDT", "channel USDC")
RECEIPT, SEND, HEAD = "eth_getTransactionReceipt", "eth_sendRawTransaction", "eth_blockNumber"


@dataclass(frozen=True, slots=True)
class Nodes:
    ground: Ground
    first: FaultyNode
    second: FaultyNode

    @property
    def both(self) -> tuple[FaultyNode, FaultyNode]:
        return self.first, self.second


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with FaultyNode() as first, FaultyNode() as second:

        def between(chain: str) -> list[str]:
            first.target = second.target = chain
            return [first.url, second.url]

        directory = tmp_path_factory.mktemp("nodes")
        # Everything that is worth a cent is heard from both.
        with new_ground(directory, nodes=between, PAYMENTS__CROSS_CHECK_USD="0.01") as made:
            yield Nodes(made, first, second)


@pytest.fixture
def nodes(shared: Nodes) -> Iterator[Nodes]:
    for node in shared.both:
        node.heal()
    wait_until(lambda: first_leads(shared), "the first node is asked first again", seconds=40)
    try:
        with turn(shared.ground):
            yield shared
            for node in shared.both:
                node.heal()
    finally:
        for node in shared.both:
            node.heal()


def first_leads(nodes: Nodes) -> bool:
    text = nodes.ground.http.get("/metrics").text
    return all(f'farebox_rpc_node_healthy{{network="eip155:84532",node="{place}"}} 1.0' in text for place in (0, 1))


def paid(nodes: Nodes, payer: Payer, way: Way) -> int:
    return RICH - nodes.ground.balance(DEV_TOKENS[way.split()[1]], payer.address)


def price(way: Way, headers: dict[str, str]) -> int:
    return 10 * amount_of(headers) if way.startswith("channel") else amount_of(headers)


@pytest.mark.parametrize("fault", FAULTS)
def test_while_one_of_two_nodes_fails_everything_goes_on(nodes: Nodes, fault: str) -> None:
    nodes.first.fault = fault
    for way in FIRST:
        payer = Payer(nodes.ground.stack)
        answer = nodes.ground.ask(payer.pay(nodes.ground.http, way, QUESTION), QUESTION)
        assert answer.status_code == 200, (way, answer.text)
    wait_until(lambda: bool(nodes.first.met), "the first node was asked")
    assert nodes.ground.served() == len(FIRST)


@pytest.mark.parametrize("fault", ["garbage", "hang"])
def test_while_no_node_answers_nothing_is_taken_and_the_same_payment_pays_when_one_does(
    nodes: Nodes, fault: str
) -> None:
    ground = nodes.ground
    payers: dict[Way, Payer] = {way: Payer(ground.stack) for way in FIRST}
    sent = {way: payers[way].pay(ground.http, way, QUESTION) for way in FIRST}
    for node in nodes.both:
        node.fault = fault
    asked = [ground.begin(sent[way], QUESTION) for way in FIRST]
    for each in asked:
        answer = each.answer()
        assert answer.status_code == 503, answer.text
        assert error_of(answer) == "chain_unavailable"
        assert int(answer.headers["retry-after"]) >= 1
        assert "same payment" in answer.json()["error"]["message"]
    assert ground.served() == 0
    # Who needs no chain is served all the same, and so are questions of price.
    key = {"authorization": f"Bearer {ground.stack.api_key}"}
    assert ground.ask(key, QUESTION).status_code == 200
    assert ground.ask({}, QUESTION).status_code == 402
    for node in nodes.both:
        node.heal()
    for way in FIRST:
        wait_until(lambda way=way: ground.ask(sent[way], QUESTION).status_code == 200, f"{way} is served", seconds=40)  # type: ignore[misc]
    assert ground.served() == 1 + len(FIRST)
    ground.check_quiet()
    for way in FIRST:
        assert 0 < paid(nodes, payers[way], way) <= price(way, sent[way])


@pytest.mark.parametrize("method", [SEND, RECEIPT])
@pytest.mark.parametrize("fault", ["reset", "hang"])
def test_what_fails_while_we_settle_delays_the_answer_and_nothing_else(nodes: Nodes, fault: str, method: str) -> None:
    ground = nodes.ground
    payers: dict[Way, Payer] = {way: Payer(ground.stack) for way in PROMPT}
    sent = {way: payers[way].pay(ground.http, way, QUESTION) for way in PROMPT}
    for node in nodes.both:
        node.only, node.fault = {method}, fault
    asked = [ground.begin(sent[way], QUESTION) for way in PROMPT]
    wait_until(lambda: method in nodes.first.met | nodes.second.met, "it happened")
    for node in nodes.both:
        node.heal()
    for each in asked:
        assert each.answer().status_code == 200, each.got.text
    assert ground.served() == len(PROMPT)
    ground.check_quiet()
    for way in PROMPT:
        assert paid(nodes, payers[way], way) == price(way, sent[way])


def failed(call: dict[str, Any], receipt: Any) -> Any:
    """It reverted, says the node."""
    return receipt and receipt | {"status": "0x0", "logs": []}


def bare(call: dict[str, Any], receipt: Any) -> Any:
    """It was mined, but there are no logs."""
    return receipt and receipt | {"logs": []}


def elsewhere(call: dict[str, Any], receipt: Any) -> Any:
    """What was paid went to somebody else."""
    if not receipt:
        return receipt
    logs = [log | {"topics": [*log["topics"][:2], "0x" + "ee" * 32]} for log in receipt["logs"]]
    return receipt | {"logs": logs}


def another(call: dict[str, Any], receipt: Any) -> Any:
    """The receipt of another transaction."""
    return receipt and receipt | {"transactionHash": "0x" + "ab" * 32}


def forgotten(call: dict[str, Any], receipt: Any) -> Any:
    """There is none."""
    return None


def absurd(call: dict[str, Any], receipt: Any) -> Any:
    """Numbers of any size."""
    return receipt and receipt | {"blockNumber": hex(2**200), "gasUsed": hex(2**255), "effectiveGasPrice": "-0x1"}


def untyped(call: dict[str, Any], receipt: Any) -> Any:
    """Everything is of another type."""
    return receipt and {name: [value] for name, value in receipt.items()}


LIES = [failed, bare, elsewhere, another, forgotten, absurd, untyped]


@pytest.mark.parametrize("lie", LIES)
def test_no_lie_about_a_receipt_makes_a_payer_pay_twice_or_us_serve_for_nothing(nodes: Nodes, lie: Any) -> None:
    """Both nodes lie until the payment was looked at; the logs, which are asked for otherwise, tell the truth."""
    ground, payer = nodes.ground, Payer(nodes.ground.stack)
    headers = payer.pay(ground.http, "exact USDC", QUESTION)
    for node in nodes.both:
        node.lies = {RECEIPT: lie}
    asked = ground.begin(headers, QUESTION)
    wait_until(lambda: RECEIPT in nodes.first.met | nodes.second.met, "it was told")
    for node in nodes.both:
        node.heal()
    answer = asked.answer()
    assert answer.status_code == 200, answer.text
    assert ground.ask(headers, QUESTION).content == answer.content
    assert ground.served() == 1
    ground.check_quiet()
    assert paid(nodes, payer, "exact USDC") == amount_of(headers)


DEAR = QUESTION | {"model": "gpt-5.4", "max_tokens": 2_000}


def test_a_receipt_that_one_node_invents_serves_nobody(nodes: Nodes) -> None:
    """The first node keeps the transaction for itself, and has the receipt of a payment that never was."""
    ground, payer = nodes.ground, Payer(nodes.ground.stack)
    headers = payer.pay(ground.http, "exact USDC", DEAR)
    treasury, value = ground.stack.pay_to, amount_of(headers)
    invented = invented_receipt(ground, payer, headers, treasury, value)
    nodes.first.lies = {RECEIPT: lambda call, _: invented | {"transactionHash": call["params"][0]}}
    with ground.stopped():
        asked = ground.begin(headers, DEAR)
        wait_until(lambda: RECEIPT in nodes.first.met, "the lie was told")
        asked.join(1.0)
        assert asked.is_alive(), "it was believed"
        assert paid(nodes, payer, "exact USDC") == 0
        nodes.first.heal()
        answer = ground.mine_until_answered(asked)
    assert answer.status_code == 200, answer.text
    assert paid(nodes, payer, "exact USDC") == value


def invented_receipt(ground: Ground, payer: Payer, headers: dict[str, str], to: str, value: int) -> dict[str, Any]:
    from payments.chain.transactions import AUTHORIZATION_USED_TOPIC, TRANSFER_TOPIC, address_topic
    from tests.e2e.clients import decoded

    nonce = decoded(headers["PAYMENT-SIGNATURE"])["payload"]["authorization"]["nonce"]
    block = ground.rpc("eth_getBlockByNumber", "latest", False)
    token = DEV_TOKENS["USDC"].address.lower()
    topics = [[AUTHORIZATION_USED_TOPIC, address_topic(payer.address), nonce]]
    topics.append([TRANSFER_TOPIC, address_topic(payer.address), address_topic(to)])
    logs = [
        {"address": token, "topics": each, "data": hex(value), "logIndex": hex(index), "transactionHash": "0x"}
        for index, each in enumerate(topics)
    ]
    return {
        "status": "0x1",
        "blockNumber": block["number"],
        "blockHash": block["hash"],
        "gasUsed": "0x1",
        "effectiveGasPrice": "0x1",
        "logs": logs,
    }


NONSENSE: dict[str, list[Any]] = {
    "eth_chainId": ["0x1"],
    "eth_feeHistory": [
        {"baseFeePerGas": ["0x0", "0x0"], "reward": [["0x0"]]},
        {"baseFeePerGas": [hex(2**255)] * 2, "reward": [[hex(2**255)]]},
        {},
    ],
    HEAD: ["0x0", hex(2**60), None, ["0x1"]],
    "eth_getCode": ["0x6001", None],
    "eth_call": ["0x", "0x" + "00" * 32, "0x" + "ff" * 3_200, 7],
    "eth_getTransactionCount": ["0x0", hex(2**70)],
    SEND: [None],
    "eth_getBlockByNumber": [None, {"hash": "0x" + "00" * 32, "number": "0x0", "timestamp": hex(2**200)}],
}


@pytest.mark.parametrize("method", NONSENSE)
def test_a_node_that_tells_nonsense_of_anything_takes_nothing_and_gives_nothing(nodes: Nodes, method: str) -> None:
    """From both, for a while. Then the same payment is served, if it was not, and everything is settled once."""
    ground, payer = nodes.ground, Payer(nodes.ground.stack)
    headers = payer.pay(ground.http, "exact USDC", QUESTION)
    results = itertools.cycle(NONSENSE[method])
    for node in nodes.both:
        node.lies = {method: lambda _call, _result: next(results)}
    asked = ground.begin(headers, QUESTION)
    asked.join(1.0)
    for node in nodes.both:
        node.heal()
    assert asked.answer().status_code in (200, 202, 402, 503), asked.got.text
    wait_until(lambda: ground.ask(headers, QUESTION).status_code == 200, "it is served", seconds=40)
    assert ground.served() <= 2
    ground.check_quiet()
    assert paid(nodes, payer, "exact USDC") == amount_of(headers)


def test_a_gateway_starts_beside_a_broken_node_and_says_what_is_wrong_where_both_are(nodes: Nodes) -> None:
    ground = nodes.ground
    ground.gateway.stop()
    nodes.first.fault = "reset"
    ground.gateway.start()
    payer = Payer(ground.stack)
    assert ground.ask(payer.pay(ground.http, "exact USDC", QUESTION), QUESTION).status_code == 200
    ground.gateway.stop()
    nodes.second.fault = "status"
    with pytest.raises(StackFailed) as failed_to_start:
        ground.gateway.start()
    said = str(failed_to_start.value)
    assert "Traceback" not in said
    assert "rpc_urls" in said or "node" in said
    for node in nodes.both:
        node.heal()
    ground.new_log()
    ground.gateway.start()
    with contextlib.suppress(Exception):
        ground.http.get("/healthz")  # the connection of before is gone
    assert ground.ask(Payer(ground.stack).pay(ground.http, "exact USDC", QUESTION), QUESTION).status_code == 200
