"""`kill -9` of the gateway at the worst moments: afterwards the books balance and the payer has the answer or the credit."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import httpx
import orjson
import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount

from contracts.devnet import USDC, balance_of
from contracts.jsonrpc import rpc
from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import GatewayProcess, Stack, running
from tests.e2e.clients import JSON, ask, ask_and_sign, decoded
from tests.e2e.conftest import QUESTION
from tests.e2e.grounds import check_books, wait_until


@pytest.fixture(scope="module")
def crashing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, GatewayProcess]]:
    with running(tmp_path_factory.mktemp("crashing")) as (stack, gateway):
        yield stack, gateway


def send_in_background(stack: Stack, headers: dict[str, str]) -> threading.Thread:
    """Send the paid request and lose its answer with the gateway."""

    def send() -> None:
        try:
            httpx.post(
                f"{stack.gateway_url}/v1/chat/completions",
                content=orjson.dumps(QUESTION),
                headers=headers | JSON,
                timeout=60,
            )
        except httpx.TransportError:
            return

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def pending_transactions(stack: Stack) -> int:
    return int(rpc(stack.rpc_url, "txpool_status")["pending"], 16)


def test_killed_between_broadcast_and_commit(crashing: tuple[Stack, GatewayProcess]) -> None:
    stack, gateway = crashing
    wallet: LocalAccount = Account.from_key(stack.wallets[0]["private_key"])
    simulator = Simulator.attach(stack.simulator_url)
    simulator.clear()
    before = balance_of(stack.rpc_url, USDC, wallet.address)
    with httpx.Client(base_url=stack.gateway_url, timeout=60) as http:
        headers = ask_and_sign(http, wallet, QUESTION)
        rpc(stack.rpc_url, "evm_setAutomine", False)
        send_in_background(stack, headers)
        wait_until(lambda: pending_transactions(stack) == 1, "the transfer is broadcast")
        gateway.kill()
        rpc(stack.rpc_url, "evm_mine")
        rpc(stack.rpc_url, "evm_setAutomine", True)
        gateway.start()
        answer = ask(http, QUESTION, headers)
    assert answer.status_code == 200, answer.text
    amount = int(decoded(headers["PAYMENT-SIGNATURE"])["accepted"]["amount"])
    assert before - balance_of(stack.rpc_url, USDC, wallet.address) == amount
    check_books(gateway)


def test_killed_before_the_transfer_is_mined_and_mined_after_the_restart(
    crashing: tuple[Stack, GatewayProcess],
) -> None:
    stack, gateway = crashing
    wallet: LocalAccount = Account.from_key(stack.wallets[1]["private_key"])
    before = balance_of(stack.rpc_url, USDC, wallet.address)
    with httpx.Client(base_url=stack.gateway_url, timeout=60) as http:
        headers = ask_and_sign(http, wallet, QUESTION)
        rpc(stack.rpc_url, "evm_setAutomine", False)
        send_in_background(stack, headers)
        wait_until(lambda: pending_transactions(stack) == 1, "the transfer is broadcast")
        gateway.kill()
        rpc(stack.rpc_url, "anvil_dropAllTransactions")
        gateway.start()
        rpc(stack.rpc_url, "evm_setAutomine", True)
        answer = ask(http, QUESTION, headers)
    assert answer.status_code == 200, answer.text
    amount = int(decoded(headers["PAYMENT-SIGNATURE"])["accepted"]["amount"])
    assert before - balance_of(stack.rpc_url, USDC, wallet.address) == amount
    check_books(gateway)


@pytest.mark.parametrize("again", [True, False], ids=["the same request again", "the credit"])
def test_killed_between_payment_and_inference(crashing: tuple[Stack, GatewayProcess], again: bool) -> None:
    from tests.e2e.clients import available, sign_in

    stack, gateway = crashing
    wallet: LocalAccount = Account.from_key(stack.wallets[2 if again else 3]["private_key"])
    simulator = Simulator.attach(stack.simulator_url)
    simulator.clear()
    before = balance_of(stack.rpc_url, USDC, wallet.address)
    with httpx.Client(base_url=stack.gateway_url, timeout=60) as http:
        headers = ask_and_sign(http, wallet, QUESTION)
        amount = int(decoded(headers["PAYMENT-SIGNATURE"])["accepted"]["amount"])
        simulator.configure(QUESTION["model"], first_token_ms=20_000)
        send_in_background(stack, headers)
        wait_until(
            lambda: before - balance_of(stack.rpc_url, USDC, wallet.address) == amount and simulator.under_way(),
            "the transfer is mined and the inference under way",
        )
        time.sleep(0.3)
        gateway.kill()
        simulator.reset_behaviours()
        gateway.start()
        if again:
            answer = ask(http, QUESTION, headers)
            assert answer.status_code == 200, answer.text
        else:
            session = sign_in(http, wallet)
            assert round(float(available(http, session)["USDC"]) * 1e6) == amount
    assert before - balance_of(stack.rpc_url, USDC, wallet.address) == amount
    check_books(gateway)
