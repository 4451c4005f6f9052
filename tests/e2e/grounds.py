"""A stack of its own for tests that mean it harm, and what has to hold afterwards, whatever they did."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import orjson
from typer.testing import CliRunner

from contracts.devnet import DevToken, balance_of
from contracts.jsonrpc import rpc
from gateway.cli import app
from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import GatewayProcess, Stack, running
from tests.e2e.clients import JSON, decoded

ENVIRONMENT = {
    "FAREBOX_LIMITS__QUOTES_PER_MINUTE": "100000",
    "FAREBOX_PAYMENTS__REFUND_THRESHOLD_USD": "0",
    "FAREBOX_PAYMENTS__CHANNEL_CLAIM_AGE_S": "1",
}
WAIT_S = 20.0


class Asked(threading.Thread):
    """A request under way."""

    def __init__(
        self, url: str, headers: dict[str, str], body: dict[str, Any], path: str, method: str = "POST"
    ) -> None:
        super().__init__(daemon=True)
        self._method = method
        self._url, self._headers, self._content = url + path, headers, orjson.dumps(body)
        self.start()

    def run(self) -> None:
        """Send it."""
        with httpx.Client(timeout=60) as http:
            self.got = http.request(self._method, self._url, content=self._content, headers=JSON | self._headers)

    def answer(self) -> httpx.Response:
        """What came of it."""
        self.join(60)
        return self.got


@dataclass(slots=True)
class Ground:
    """A running stack, and the means to look behind it."""

    stack: Stack
    gateway: GatewayProcess
    directory: Path
    simulator: Simulator
    http: httpx.Client
    nonsense_expected: bool = False
    """Whether nodes speak nonsense here, which the log may wonder at."""
    _log_read: int = field(default=0)

    def ask(self, headers: dict[str, str], body: dict[str, Any], path: str = "/v1/chat/completions") -> httpx.Response:
        """Send a request and wait for its answer."""
        return self.http.post(path, content=orjson.dumps(body), headers=JSON | headers)

    def begin(
        self, headers: dict[str, str], body: dict[str, Any], path: str = "/v1/chat/completions", method: str = "POST"
    ) -> Asked:
        """Send a request; its answer is had later."""
        return Asked(self.stack.gateway_url, headers, body, path, method)

    # --- the chain ----------------------------------------------------------------------------------------------------

    def rpc(self, method: str, *params: Any) -> Any:
        """A call of the chain's own node."""
        return rpc(self.stack.rpc_url, method, *params)

    def mine(self, blocks: int = 1) -> None:
        """Make blocks."""
        for _ in range(blocks):
            self.rpc("evm_mine")

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The chain makes no blocks by itself within; afterwards it does, and what waits is mined."""
        self.rpc("evm_setAutomine", False)
        try:
            yield
        finally:
            self.rpc("evm_setAutomine", True)
            self.mine()

    def mine_until_answered(self, asked: Asked) -> httpx.Response:
        """The answer, with a block now and then until it comes: what is sent while a block is made waits for the next."""
        while asked.is_alive():
            self.mine()
            asked.join(0.3)
        return asked.answer()

    def until_broadcast(self, payer: str) -> dict[str, Any]:
        """Wait until the node has the transaction that is to take or give back a payer's money, and return it."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            carriers = self.query(
                "SELECT carrier.broadcasts FROM settlement JOIN chain_transaction AS carrier"
                " ON carrier.id = settlement.transaction_id WHERE ? IN (settlement.payer, settlement.pay_to)"
                " AND settlement.state = 'submitted'",
                payer.lower(),
            )
            hashes = [json.loads(broadcasts)[-1]["hash"] for (broadcasts,) in carriers]
            found[:] = filter(None, (self.rpc("eth_getTransactionByHash", each) for each in hashes))
            return bool(found)

        wait_until(look, "our transaction is broadcast", self.open_things)
        return found[0]

    def balance(self, token: DevToken, address: str) -> int:
        """Atomic units."""
        return balance_of(self.stack.rpc_url, token, address)

    # --- behind the gateway -------------------------------------------------------------------------------------------

    def query(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """What the gateway's database says."""
        with contextlib.closing(sqlite3.connect(self.directory / "farebox.db", timeout=10)) as database:
            return database.execute(sql, parameters).fetchall()

    def write(self, sql: str, *parameters: Any) -> None:
        """Change the gateway's database, to have now what takes minutes otherwise."""
        with contextlib.closing(sqlite3.connect(self.directory / "farebox.db", timeout=10)) as database, database:
            database.execute(sql, parameters)

    def served(self) -> int:
        """How many answers the providers gave since the simulator's log was cleared."""
        return sum(attempt["outcome"] == "ok" for attempt in self.simulator.attempts())

    def new_log(self) -> list[dict[str, Any]]:
        """The log's lines since the last time."""
        with (self.directory / "gateway.log").open("rb") as log:
            log.seek(self._log_read)
            text = log.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._log_read += len(complete)
        return [_line(line) for line in complete.splitlines()]

    def check_log(self) -> None:
        """Nothing was answered with a 500, and nothing surprised the gateway."""
        wrong = [
            line
            for line in self.new_log()
            if line.get("status") == 500
            or line.get("level") in ("critical", "unreadable")
            or (("exception" in line) and not (self.nonsense_expected and line["event"] != "unexpected error"))
        ]
        assert not wrong, wrong

    def check_quiet(self) -> None:
        """Nothing is under way any more: no open receipt, no hold, no settlement that waits."""
        wait_until(lambda: not self.open_things(), "nothing is under way", self.open_things)

    def open_things(self) -> list[tuple[Any, ...]]:
        """Receipts, holds and settlements that have not ended."""
        return [
            *self.query("SELECT 'receipt', id, state FROM receipt WHERE state = 'open'"),
            *self.query("SELECT 'hold', id, amount FROM ledger_transfer WHERE state = 'pending'"),
            *self.open_settlements(),
        ]

    def open_settlements(self) -> list[tuple[Any, ...]]:
        """Settlements that are neither paid nor failed."""
        return self.query("SELECT 'settlement', id, state FROM settlement WHERE state IN ('queued', 'submitted')")

    def check_books(self) -> None:
        """See the function of this name."""
        check_books(self.gateway)

    def check(self) -> None:
        """All of it."""
        self.mine(3)
        self.check_quiet()
        self.check_log()
        self.check_books()


@contextlib.contextmanager
def ground(
    directory: Path, *, nodes: Callable[[str], Sequence[str]] | None = None, **environment: str
) -> Iterator[Ground]:
    """A stack with a gateway, checked at the end.

    Args:
        directory: Where its state is.
        nodes: As for `running`.
        environment: Further `FAREBOX_` variables, without the prefix.
    """
    own = {f"FAREBOX_{name}": value for name, value in environment.items()}
    with running(directory, environment=ENVIRONMENT | own, nodes=nodes) as (stack, gateway):
        simulator = Simulator.attach(stack.simulator_url)
        with httpx.Client(base_url=stack.gateway_url, timeout=60) as http:
            made = Ground(stack, gateway, directory, simulator, http, nonsense_expected=nodes is not None)
            yield made
            made.check()


@contextlib.contextmanager
def turn(ground: Ground) -> Iterator[Ground]:
    """One test's turn on a ground that many share: a clean simulator before, no surprises in the log after."""
    ground.simulator.clear()
    ground.simulator.reset_behaviours()
    yield ground
    ground.rpc("evm_setAutomine", True)
    ground.mine()
    ground.check_quiet()
    ground.check_log()


def check_books(gateway: GatewayProcess) -> None:
    """`farebox ledger check` beside the gateway: the books balance, and agree with the chain."""
    checked = CliRunner().invoke(app, ["ledger", "check", "--json"], env=gateway.environment)
    assert checked.exit_code == 0, (checked.output, checked.exception)


def wait_until(
    condition: Callable[[], object], what: str, details: Callable[[], object] | None = None, seconds: float = WAIT_S
) -> None:
    """Wait until something is so.

    Raises:
        AssertionError: It does not come to that.
    """
    deadline = time.monotonic() + seconds
    pause_s = 0.01
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}: {details and details()}"
        time.sleep(pause_s)
        # What takes long is asked for less often: every question costs the gateway and others' tests processor time.
        pause_s = min(pause_s * 1.2, 0.1)


def amount_of(headers: Mapping[str, str]) -> int:
    """What a payment's offer asked for, in atomic units."""
    return int(decoded(headers["PAYMENT-SIGNATURE"])["accepted"]["amount"])


def error_of(answer: httpx.Response) -> str:
    """The code of what went wrong."""
    if "payment-required" in answer.headers:
        error: str = decoded(answer.headers["payment-required"])["error"]
        return error.partition(":")[0]
    told = answer.json()
    assert "error" in told, f"{answer.status_code}: {answer.text}"
    code: str = told["error"]["code"]
    return code


def _line(line: bytes) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(line)
    except ValueError:
        return {"level": "unreadable", "text": line.decode(errors="replace")}
    return read
