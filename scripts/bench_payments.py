#!/usr/bin/env python3
"""How many paid requests and quotes a second, against the reference stack on the same chain and machine, in one run.

The reference is the official `x402` package: its middleware before a canned answer, and its facilitator. Both stacks get the
same number of requests, 16 at once, with payments that were signed beforehand, in turns, and medians over the turns count.
Then, on a chain with 2 s blocks, how much later the first token of a paid stream comes than with an API key. Prints one JSON
line; exits 1 if a target is missed or an answer was not what it should be.

Usage: .venv/bin/python scripts/bench_payments.py [--requests N] [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import bench_verification
import httpx
from benchmarks import constant, reference
from benchmarks.load import Answer, Batch, LoadGenerator, Outcome
from benchmarks.payers import JSON, Payers, transaction_of, transfers_to, with_ether
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gateway.dev.stack import NETWORK, running

CONCURRENCY = 16
ROUNDS = 4
REQUESTS = 480
QUICK_REQUESTS = 160
QUOTES_PER_REQUEST = 5
WARM_UP = 32
WALLETS = 50
BLOCK_TIME_S = 2.0
STREAMS = 8
PAID_RATIO_MIN = 10.0
QUOTES_RATIO_MIN = 5.0
POLLING_ALLOWANCE_S = 0.15
"""On top of one block: handing in the transfer before the block, and seeing it after."""
ENVIRONMENT = {"FAREBOX_LIMITS__QUOTES_PER_MINUTE": "100000000"}
QUESTION = {
    "model": "deepseek-v4-flash",
    "messages": [{"role": "user", "content": "Why is the sky blue?"}],
    "max_tokens": 64,
}
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class BenchFailed(Exception):
    """An answer was not what it should be, so that its speed means nothing."""


@dataclass(frozen=True, slots=True)
class Side:
    """A stack under load: where it is asked, its processes, and whom it has paid to."""

    name: str
    url: str
    pids: tuple[int, ...]
    pay_to: str
    round_trips: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Turn:
    """One measurement of one stack: per second, CPU microseconds and RPC round trips a request, and the generator's share."""

    per_s: float
    cpu_us: float
    round_trips: float
    load_share: float
    answers: list[Answer]


def main() -> int:
    """Measure, print, and say by the exit code whether all targets are met."""
    parser = argparse.ArgumentParser(description="Paid requests and quotes a second, against the reference stack.")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="paid requests to each stack")
    parser.add_argument("--quick", action="store_true", help="fewer requests: a look, not a measurement")
    parser.add_argument(
        "--threads", action="store_true", help="the reference's synchronous facilitator in a thread pool"
    )
    arguments = parser.parse_args()
    requests = min(arguments.requests, QUICK_REQUESTS) if arguments.quick else arguments.requests
    rounds = 2 if arguments.quick else ROUNDS
    try:
        with _progress() as step, LoadGenerator() as load:
            throughput = measure_throughput(load, step, requests, rounds, threads=arguments.threads)
            step("first token at 2 s blocks", 0, 1)
            first_token = measure_first_token(load, 4 if arguments.quick else STREAMS)
            step("signatures", 0, 1)
            verification = bench_verification.measure()
    except BenchFailed as error:
        print(error, file=sys.stderr)
        return 1
    result = throughput | {
        "recovery_share_of_bare": {
            "eip3009": verification["ratio"],
            "permit2": verification["ratio_permit2"],
            "target": bench_verification.RATIO_MIN,
        },
        "first_token_at_2s_blocks": first_token,
    }
    missed = [
        name
        for name, met in (
            ("paid requests", result["paid_per_s"]["ratio"] >= PAID_RATIO_MIN),
            ("quotes", result["quotes_per_s"]["ratio"] >= QUOTES_RATIO_MIN),
            ("recovery", verification["ok"]),
            ("first token", first_token["added_max_s"] <= BLOCK_TIME_S + POLLING_ALLOWANCE_S),
        )
        if not met
    ]
    print(json.dumps(result | {"missed": missed, "ok": not missed}))
    return 1 if missed else 0


# ---------------------------------------------------------------------- requests a second


def measure_throughput(
    load: LoadGenerator, step: Callable[[str, int, int], None], requests: int, rounds: int, *, threads: bool
) -> dict[str, Any]:
    """Both stacks in turns on one chain that mines at once.

    Args:
        load: Sends the requests.
        step: Told what is going on, how far it is, and of how much.
        requests: Paid requests to each stack, in all.
        rounds: Turns of each.
        threads: Run the reference facilitator in a thread pool.

    Raises:
        BenchFailed: If an answer was no paid answer, or the transfers on the chain are not those that the answers name.
    """
    body = json.dumps(QUESTION)
    each = max(CONCURRENCY, requests // rounds)
    with contextlib.ExitStack() as cleanup:
        folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="farebox-bench-"))
        step("starting both stacks", 0, 1)
        stack, gateway = cleanup.enter_context(running(Path(folder), environment=ENVIRONMENT))
        payers = Payers.fund(stack.rpc_url, WALLETS)
        ours_url = f"{stack.gateway_url}/v1/chat/completions"
        canned = httpx.post(ours_url, content=body, headers=JSON | {"authorization": f"Bearer {stack.api_key}"}).content
        pay_to, _ = with_ether(stack.rpc_url)
        _, gas_key = with_ether(stack.rpc_url)
        other = cleanup.enter_context(
            reference.running(stack.rpc_url, gas_key, pay_to, NETWORK, canned, threads=threads)
        )
        ours = Side("ours", ours_url, (gateway.pid,), stack.pay_to, lambda: _round_trips(stack.gateway_url))
        theirs = Side("reference", other.url, (other.resource_pid, other.facilitator_pid), pay_to, lambda: 0.0)
        sides = (ours, theirs)
        asked = httpx.post(ours_url, content=body, headers=JSON)
        kept = {name: asked.headers[name] for name in ("payment-required", "content-type", "content-length")}
        same = cleanup.enter_context(constant.running(asked.status_code, kept, asked.content))
        limit = Side("limit", same.url, (same.pid,), "", lambda: 0.0)

        paid: dict[str, list[Turn]] = {side.name: [] for side in sides}
        quoted: dict[str, list[Turn]] = {side.name: [] for side in (*sides, limit)}
        transactions: dict[str, list[str]] = {side.name: [] for side in sides}
        for side in sides:
            step(f"warming up {side.name}", 0, 1)
            transactions[side.name] += _paid_turn(load, side, payers.sign(side.url, body, WARM_UP), body)[1]
            _quote_turn(load, side, body, WARM_UP * QUOTES_PER_REQUEST)
        done = 0
        for _ in range(rounds):
            for side in sides:
                step(f"{side.name}: signing", done, 2 * rounds)
                headers = payers.sign(side.url, body, each)
                step(f"{side.name}: paid requests", done, 2 * rounds)
                turn, found = _paid_turn(load, side, headers, body)
                paid[side.name].append(turn)
                transactions[side.name] += found
                step(f"{side.name}: quotes", done, 2 * rounds)
                quoted[side.name].append(_quote_turn(load, side, body, each * QUOTES_PER_REQUEST))
                done += 1
            quoted[limit.name].append(_quote_turn(load, limit, body, each * QUOTES_PER_REQUEST))
        step("comparing with the chain", done, 2 * rounds)
        for side in sides:
            _compare_with_chain(stack.rpc_url, side, transactions[side.name])

    return {
        "requests": each * rounds,
        "concurrency": CONCURRENCY,
        "reference_facilitator": "thread pool" if threads else "asynchronous",
        "paid_per_s": _comparison(paid, PAID_RATIO_MIN),
        "quotes_per_s": _comparison(quoted, QUOTES_RATIO_MIN),
        "cpu_us_per_paid_request": _cpu_us(paid),
        "cpu_us_per_quote": _cpu_us(quoted),
        "latency_ms_paid": {
            name: round(1000 * median(answer.seconds for turn in turns for answer in turn.answers), 1)
            for name, turns in paid.items()
        },
        "rpc_round_trips_per_paid_request": round(median(turn.round_trips for turn in paid["ours"]), 2),
        "load_generator_share_of_a_core": {
            "paid": round(max(turn.load_share for turn in paid["ours"]), 2),
            "quotes": round(max(turn.load_share for turn in quoted["ours"]), 2),
        },
        "transfers": {name: len(found) for name, found in transactions.items()},
    }


def _paid_turn(load: LoadGenerator, side: Side, headers: list[dict[str, str]], body: str) -> tuple[Turn, list[str]]:
    """Pay for every request; returns the figures and the transactions that the answers name."""
    turn = _turn(load, side, Batch(side.url, body, headers, CONCURRENCY))
    _all(turn.answers, 200, side.name)
    transactions = [transaction_of(answer.headers.get("payment-response", "")) for answer in turn.answers]
    named = [transaction for transaction in transactions if transaction is not None]
    if len(named) < len(headers) or (
        side.name == "ours" and any("x-farebox-receipt" not in a.headers for a in turn.answers)
    ):
        raise BenchFailed(f"{side.name}: an answer of 200 came without a receipt")
    return turn, named


def _quote_turn(load: LoadGenerator, side: Side, body: str, count: int) -> Turn:
    turn = _turn(load, side, Batch(side.url, body, [{}] * count, CONCURRENCY))
    _all(turn.answers, 402, side.name)
    return turn


def _turn(load: LoadGenerator, side: Side, batch: Batch) -> Turn:
    cpu_s, round_trips = _cpu_s(side.pids), side.round_trips()
    outcome: Outcome = load.send(batch)
    count = len(batch.headers)
    return Turn(
        per_s=count / outcome.seconds,
        cpu_us=(_cpu_s(side.pids) - cpu_s) / count * 1e6,
        round_trips=(side.round_trips() - round_trips) / count,
        load_share=outcome.cpu_s / outcome.seconds,
        answers=outcome.answers,
    )


def _all(answers: Sequence[Answer], status: int, name: str) -> None:
    for answer in answers:
        if answer.status != status:
            raise BenchFailed(f"{name}: expected {status}, got {answer.status}: {answer.error}")


def _compare_with_chain(rpc_url: str, side: Side, named: list[str]) -> None:
    """Every answer names a transfer of its own, and there are no others."""
    transfers = transfers_to(rpc_url, side.pay_to)
    if sorted(named) != sorted(transfers):
        raise BenchFailed(f"{side.name}: {len(named)} paid answers, but {len(transfers)} transfers on the chain")


def _comparison(turns: dict[str, list[Turn]], target: float) -> dict[str, float]:
    """Medians over the turns; the ratio is the median of each pair's, which stood next to each other in time."""
    ratios = [ours.per_s / theirs.per_s for ours, theirs in zip(turns["ours"], turns["reference"], strict=True)]
    return {name: round(median(turn.per_s for turn in own), 1) for name, own in turns.items()} | {
        "ratio": round(median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "target": target,
    }


def _cpu_us(turns: dict[str, list[Turn]]) -> dict[str, int]:
    """The mean: the kernel counts in hundredths of a second, of which a turn has only some twenty."""
    return {name: round(fmean(turn.cpu_us for turn in own)) for name, own in turns.items()}


def _cpu_s(pids: Sequence[int]) -> float:
    """CPU time of processes since their start, all threads, in user and kernel mode."""
    total = 0
    for pid in pids:
        # The name in parentheses may hold spaces; utime and stime are the 14th and 15th field of the line.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS_PER_S


def _round_trips(gateway_url: str) -> float:
    found = re.search(r"^farebox_rpc_round_trips\{.*\} (\S+)$", httpx.get(f"{gateway_url}/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


# ---------------------------------------------------------------------- the first token on a chain with blocks


def measure_first_token(load: LoadGenerator, streams: int) -> dict[str, float]:
    """How much later than with an API key the first token of a paid stream comes, on a chain with 2 s blocks.

    The providers begin at once, so that nothing hides the wait. Requests come one by one, spread over the time between blocks.

    Raises:
        BenchFailed: If an answer was no paid answer, or the transfers on the chain are not those that the answers name.
    """
    body = json.dumps(QUESTION | {"stream": True})
    with (
        tempfile.TemporaryDirectory(prefix="farebox-bench-") as folder,
        running(Path(folder), block_time_s=BLOCK_TIME_S, environment=ENVIRONMENT) as (stack, gateway),
    ):
        url = f"{stack.gateway_url}/v1/chat/completions"
        side = Side("ours", url, (gateway.pid,), stack.pay_to, lambda: 0.0)
        payers = Payers([wallet["private_key"] for wallet in stack.wallets])
        # The request before ended just after a block.
        delays = [(index % streams) * BLOCK_TIME_S / streams for index in range(streams)]
        _, warm = _paid_turn(load, side, payers.sign(url, body, 1), body)
        paid = load.send(Batch(url, body, payers.sign(url, body, streams), 1, delays)).answers
        with_key = load.send(Batch(url, body, [{"authorization": f"Bearer {stack.api_key}"}] * streams, 1)).answers
        _all([*paid, *with_key], 200, side.name)
        named = [transaction_of(answer.headers.get("payment-response", "")) or "none" for answer in paid]
        _compare_with_chain(stack.rpc_url, side, warm + named)
    key_s = median(_first_words(with_key))
    added = [first_word_s - key_s for first_word_s in _first_words(paid)]
    return {
        "with_key_median_s": round(key_s, 4),
        "added_median_s": round(median(added), 3),
        "added_max_s": round(max(added), 3),
        "target_s": BLOCK_TIME_S,
        "polling_allowance_s": POLLING_ALLOWANCE_S,
        "streams": streams,
    }


def _first_words(answers: Sequence[Answer]) -> list[float]:
    times = [answer.first_word_s for answer in answers if answer.first_word_s is not None]
    if len(times) < len(answers):
        raise BenchFailed("a stream came without content")
    return times


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error; call it with what is going on, how many parts are done, and of how many."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1)
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
