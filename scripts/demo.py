"""An autonomous agent pays for answers on a local chain; then everything is checked: receipts, ledger, chain.

Run by `scripts/demo`. Exits 0 only if every step did what it says and all the books add up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from agents_sdk import Agent, SpendingPolicy, Token
from agents_sdk.policy import Scheme
from contracts.devnet import USDC, USDT, DevToken, balance_of
from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import GatewayProcess, Stack, running
from payments.chain.networks import BATCH_SETTLEMENT_ADDRESS
from payments.money import nano_to_usd, usd_to_nano

QUESTION = "Why is the sky blue?"
TABLE_WIDTH = 140


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the table. Amounts are dollar texts."""

    what: str
    paid_with: str
    model: str
    provider: str
    attempts: int
    quoted_usd: str
    charged_usd: str
    credited_usd: str
    transaction: str | None
    receipt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Balances:
    """Where the money is, in whole micro-dollars."""

    wallet_usdc: int
    wallet_usdt: int
    treasury_usdc: int
    treasury_usdt: int
    channels_usdc: int
    channels_usdt: int
    credit_usdc: int
    credit_usdt: int


class DemoFailed(Exception):
    """Something was not as it should be."""


def expect(condition: bool, what: str) -> None:
    """Stop the demo if something does not hold."""
    if not condition:
        raise DemoFailed(what)


class Recorder(httpx.HTTPTransport):
    """What the agent really sends: keeps the last request that carried a payment, to send it again."""

    def __init__(self) -> None:
        super().__init__()
        self.paid: httpx.Request | None = None

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Note the request, then send it."""
        if "payment-signature" in request.headers:
            self.paid = request
        return super().handle_request(request)


class Demo:
    """The steps, one method each."""

    def __init__(self, stack: Stack, simulator: Simulator, log: Path, say: Callable[[str], None]) -> None:
        self._stack = stack
        self._simulator = simulator
        self._say = say
        self._wallet = stack.wallets[0]
        self._recorder = Recorder()
        self._http = httpx.Client(base_url=stack.gateway_url, timeout=30)
        usdt = stack.tokens["USDT"]
        self._tokens = [Token("USDT", stack.network, usdt["address"], usdt["decimals"], "permit2")]
        self._log = log

    def agent(self, token: str, scheme: Scheme = "exact") -> Agent:
        """An agent that pays in one token and never more than five cents a request."""
        return Agent(
            self._wallet["private_key"],
            self._stack.gateway_url,
            policy=SpendingPolicy(
                max_per_request="0.05", max_per_day="1", tokens=[token], schemes=[scheme], channel_deposit="0.50"
            ),
            receipts=self._log,
            rpc_url=self._stack.rpc_url,
            tokens=self._tokens,
            credit="never",
        )

    def balances(self) -> Balances:
        """On chain, and what the ledger says is the agent's."""

        def on_chain(token: DevToken, owner: str) -> int:
            return balance_of(self._stack.rpc_url, token, owner)

        with self.agent("USDC") as agent:
            credit = {balance.asset.rpartition("/")[2]: balance.available_usd for balance in agent.credit()}
        return Balances(
            wallet_usdc=on_chain(USDC, self._wallet["address"]),
            wallet_usdt=on_chain(USDT, self._wallet["address"]),
            treasury_usdc=on_chain(USDC, self._stack.pay_to),
            treasury_usdt=on_chain(USDT, self._stack.pay_to),
            channels_usdc=on_chain(USDC, BATCH_SETTLEMENT_ADDRESS),
            channels_usdt=on_chain(USDT, BATCH_SETTLEMENT_ADDRESS),
            credit_usdc=usd_to_nano(credit.get("USDC", "0")),
            credit_usdt=usd_to_nano(credit.get("USDT", "0")),
        )

    def run(self) -> Iterator[Step]:
        """All steps in order."""
        yield self.stream("USDC", "An answer, streamed", model="deepseek-v4-flash")
        yield self.stream("USDT", "The same in USDT (Permit2)", model="deepseek-v4-flash")
        yield self.failing_provider()
        yield self.same_payment_again()
        yield self.through_a_channel()
        yield self.api_key()

    def stream(self, token: str, what: str, model: str) -> Step:
        """Ask with the stock OpenAI SDK over the agent's transport, streamed."""
        self._say(f"{what}: 402, quote, signature, transfer, answer …")
        with self.agent(token) as agent, agent.http_client(transport=self._recorder) as http:
            client = OpenAI(api_key="unused", base_url=f"{self._stack.gateway_url}/v1", http_client=http)  # type: ignore[arg-type]
            chunks = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=400, stream=True
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            receipt = agent.receipts(limit=1)[0]
        expect("sky" in text, f"the answer does not answer: {text!r}")
        return self._step(what, f"{token} (x402)", receipt.id, text)

    def failing_provider(self) -> Step:
        """The first provider of the model answers 503: the caller notices nothing."""
        self._simulator.configure("gpt-5.4", status=503)
        try:
            step = self.stream("USDC", "A provider fails", model="gpt-5.4")
        finally:
            self._simulator.reset_behaviours()
        expect(step.attempts == 2, f"expected two attempts, not {step.attempts}")
        return step

    def same_payment_again(self) -> Step:
        """The very request that paid before, once more: the same answer, no inference, no transfer."""
        self._say("The same payment sent again: no second inference, no second charge …")
        paid = self._recorder.paid
        assert paid is not None
        attempts = len(self._simulator.attempts())
        treasury = balance_of(self._stack.rpc_url, USDC, self._stack.pay_to)
        with httpx.Client(timeout=30) as http:
            answer = http.send(httpx.Request(paid.method, paid.url, headers=paid.headers, content=paid.read()))
        expect(answer.status_code == 200, f"expected the first answer again, not {answer.status_code}: {answer.text}")
        expect(answer.headers.get("x-farebox-replayed") == "true", "the answer is not marked as the first one again")
        expect(len(self._simulator.attempts()) == attempts, "a provider was asked a second time")
        expect(balance_of(self._stack.rpc_url, USDC, self._stack.pay_to) == treasury, "a second transfer was made")
        step = self._step("The same payment again", "nothing more", answer.headers["x-farebox-receipt"], answer.text)
        return Step(**{**asdict(step), "charged_usd": "0.00", "credited_usd": "0.00"})

    def through_a_channel(self) -> Step:
        """One deposit, three answers at once for a signature each, and the rest back."""
        self._say("Three at once through a payment channel: one deposit, three vouchers, a refund …")
        with self.agent("USDC", "batch-settlement") as agent:
            with agent.openai() as client, ThreadPoolExecutor(3) as pool:
                answers = list(
                    pool.map(
                        lambda number: client.chat.completions.create(
                            model="deepseek-v4-flash",
                            messages=[{"role": "user", "content": QUESTION}],
                            max_tokens=400 + number,
                        ),
                        range(3),
                    )
                )
            receipts = agent.receipts(limit=3)
            [channel] = agent.wallet.channels()
            refund = agent.wallet.refund_channel()
        expect({receipt.paid_with for receipt in receipts} == {"batch-settlement"}, "a channel did not pay")
        steps = [self._step("", "", receipt.id, "") for receipt in receipts]
        charged = sum(usd_to_nano(step.charged_usd) for step in steps)
        expect(channel.charged_usd == nano_to_usd(charged), "the agent and the gateway count differently")
        expect(channel.unspent_usd == refund.refunded_usd, "the channel did not give back what was left")
        [deposit] = {receipt.transaction for receipt in receipts if receipt.transaction}
        return replace(
            steps[0],
            what="Three at once, by a channel",
            paid_with="channel (x402)",
            attempts=sum(step.attempts for step in steps),
            quoted_usd=nano_to_usd(sum(usd_to_nano(step.quoted_usd) for step in steps)),
            charged_usd=nano_to_usd(charged),
            credited_usd="0.00",
            transaction=deposit,
            answer=answers[0].choices[0].message.content or "",
        )

    def api_key(self) -> Step:
        """The stock OpenAI SDK with an API key: the organisation's pool pays."""
        self._say("The same request with an API key …")
        with OpenAI(api_key=self._stack.api_key, base_url=f"{self._stack.gateway_url}/v1") as client:
            raw = client.chat.completions.with_raw_response.create(
                model="deepseek-v4-flash", messages=[{"role": "user", "content": QUESTION}], max_tokens=400
            )
        text = raw.parse().choices[0].message.content or ""
        return self._step("With an API key", "pool", raw.headers["x-farebox-receipt"], text)

    def _step(self, what: str, paid_with: str, receipt_id: str, answer: str) -> Step:
        receipt = self._http.get(f"/v1/receipts/{receipt_id}").json()
        expect(receipt["state"] == "captured", f"{receipt_id} is {receipt['state']}")
        transaction = (receipt.get("transaction") or {}).get("hash")
        if receipt["tender"] == "exact":
            parts = usd_to_nano(receipt["charged_usd"]) + usd_to_nano(receipt["credited_usd"])
            expect(
                parts == usd_to_nano(receipt["paid_usd"]), f"{receipt_id}: charged and credited are not what was paid"
            )
            expect(transaction is not None, f"{receipt_id} names no transaction")
        return Step(
            what=what,
            paid_with=paid_with,
            model=receipt["model"],
            provider=receipt["provider"],
            attempts=len(receipt["attempts"]),
            quoted_usd=receipt["quoted_usd"],
            charged_usd=receipt["charged_usd"],
            credited_usd=receipt["credited_usd"],
            transaction=transaction,
            receipt=receipt_id,
            answer=answer[:200],
        )


def check_sums(steps: list[Step], before: Balances, after: Balances) -> None:
    """What left the wallet arrived in the treasury or waits in a channel to be claimed, and is what was charged plus what is
    credit now. A channel is charged in the token's units, in all."""
    for token in ("usdc", "usdt"):
        left = getattr(before, f"wallet_{token}") - getattr(after, f"wallet_{token}")
        arrived = getattr(after, f"treasury_{token}") - getattr(before, f"treasury_{token}")
        credited = getattr(after, f"credit_{token}") - getattr(before, f"credit_{token}")
        waiting = getattr(after, f"channels_{token}") - getattr(before, f"channels_{token}")
        paid = [step for step in steps if step.paid_with.lower().startswith(token)]
        charged = sum(usd_to_nano(step.charged_usd) for step in paid)
        through_channels = [step for step in steps if token == "usdc" and step.paid_with.startswith("channel")]
        charged += sum(-(-usd_to_nano(step.charged_usd) // 1000) * 1000 for step in through_channels)
        expect(
            left == arrived + waiting and arrived > 0,
            f"{token}: {left} left the wallet, {arrived} arrived in the treasury, {waiting} wait to be claimed",
        )
        expect(
            left * 1000 == charged + credited,
            f"{token}: {left * 1000} nano-USD were paid, {charged} charged and {credited} credited",
        )


def check_ledger(gateway: GatewayProcess) -> dict[str, Any]:
    """`farebox ledger check`: the books balance and match the chain."""
    checked = subprocess.run(
        [sys.executable, "-m", "gateway.cli", "ledger", "check", "--json"],
        env=gateway.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    expect(checked.returncode == 0, f"farebox ledger check: {checked.stdout}{checked.stderr}")
    report: dict[str, Any] = json.loads(checked.stdout)
    return report


def show(console: Console, steps: list[Step], before: Balances, after: Balances) -> None:
    """The tables for people."""
    table = Table(title="What the agent did", title_justify="left", box=box.SIMPLE_HEAD)
    for column in (
        "asked",
        "paid with",
        "model @ provider",
        "attempts",
        "quoted $",
        "charged $",
        "credited $",
        "transaction",
    ):
        table.add_column(column, justify="right" if column.endswith("$") or column == "attempts" else "left")
    for step in steps:
        table.add_row(
            step.what,
            step.paid_with,
            f"{step.model} @ {step.provider}",
            str(step.attempts),
            step.quoted_usd,
            step.charged_usd,
            step.credited_usd,
            "" if step.transaction is None else f"{step.transaction[:10]}…",
        )
    console.print(table)
    money = Table(title="Where the money is ($)", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", "USDC before", "USDC after", "USDT before", "USDT after"):
        money.add_column(column, justify="right" if column else "left")
    for name, label, decimals in (
        ("wallet", "agent's wallet, on chain", 6),
        ("treasury", "treasury, on chain", 6),
        ("channels", "channels, to be claimed", 6),
        ("credit", "agent's credit, in the ledger", 9),
    ):
        cells = [
            f"{getattr(balances, f'{name}_{token}') / 10**decimals:.{decimals}f}"
            for token in ("usdc", "usdt")
            for balances in (before, after)
        ]
        money.add_row(label, *cells)
    console.print(money)
    console.print("[green]✓[/green] Every answer was paid once, the books balance, and they match the chain.")


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str], None]]:
    """A line that says what is going on."""
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task("Starting a chain, providers and a gateway …", total=None)
        yield lambda text: bar.update(task, description=text)


def main() -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description="An agent pays for answers on a local chain.")
    parser.add_argument("--json", action="store_true", help="print the outcome for programs")
    as_json = parser.parse_args().json
    errors = Console(stderr=True)
    began = time.monotonic()
    try:
        with (
            progress(errors) as say,
            tempfile.TemporaryDirectory(prefix="farebox-demo-") as folder,
            running(Path(folder)) as (stack, gateway),
        ):
            simulator = Simulator.attach(stack.simulator_url)
            demo = Demo(stack, simulator, Path(folder) / "agent.sqlite3", say)
            before = demo.balances()
            steps = list(demo.run())
            after = demo.balances()
            say("Comparing wallets, chain and ledger …")
            check_sums(steps, before, after)
            ledger = check_ledger(gateway)
    except DemoFailed as error:
        errors.print(f"[red]The demo failed:[/red] {error}")
        return 1
    seconds = round(time.monotonic() - began, 1)
    if as_json:
        outcome = {
            "ok": True,
            "seconds": seconds,
            "steps": [asdict(step) for step in steps],
            "balances": {"before": asdict(before), "after": asdict(after)},
            "ledger": ledger,
        }
        print(json.dumps(outcome, indent=2))
    else:
        terminal = Console()
        show(terminal if terminal.is_terminal else Console(width=TABLE_WIDTH), steps, before, after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
