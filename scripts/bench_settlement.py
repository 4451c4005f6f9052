#!/usr/bin/env python3
"""What settling costs: settlements a second and gas a payment, voucher verifications a second, round trips to a node.

All on one Anvil in one run, with Circle's own USDC: the settlement engine with its database on disk, given as many payments at
once as it takes, in batches and singly, and in turns with it the official `x402` package's facilitator: as shipped, and with
its best settings (see `benchmarks.reference_facilitator` for why these differ tenfold). All check the signature and the chain's
state first and wait for evidence, and all begin on the same chain. The ratio is taken round by round against the reference's
best, and again by this process's CPU time, which a busy machine does not change. Prints one JSON line with medians and, in
`spread`, the least and the most of the rounds; exits 1 if a target is missed, or if the transfers on the chain are not those
that were settled.

Usage: .venv/bin/python scripts/bench_settlement.py [--payments N] [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import coincurve
from bench_verification import measure as measure_signatures
from benchmarks import channel_requests, reference_facilitator, stalls
from benchmarks.payers import transfers_to, with_ether
from benchmarks.reference_facilitator import ReferenceFailed

from contracts.anvil import Anvil
from contracts.devnet import Devnet, approve_permit2, load, mint, place_operator_contracts
from contracts.jsonrpc import batch, rpc
from payments.chain.networks import EXACT_PERMIT2_PROXY_ADDRESS, KNOWN_NETWORKS, Network, Token
from payments.chain.rpc import Rpc
from payments.chain.transactions import address_of, settle_call
from payments.ledger import transfers
from payments.ledger.accounts import account_id, payer_account
from payments.migrate import upgrade
from payments.money import atomic_to_nano_down
from payments.settlement.engine import Settlements
from payments.settlement.evidence import PaymentProof
from payments.settlement.orders import Kind, SettlementOrder
from payments.settlement.outbox import order_gas
from payments.store import Store, Transaction
from payments.verification.chain_state import ChainStates
from payments.verification.checks import payment_digest
from payments.verification.signatures import recover
from payments.x402.wire import Eip3009Authorization, Payment, Permit2Authorization
from tests.contracts import circle

PAYMENTS = 2_000
QUICK_PAYMENTS = 300
ROUNDS = 5
REFERENCE_SHARE = 20
"""The reference settles a twentieth of what ours does in batches; it takes as long."""
REFERENCE_THREADS = 8
SINGLE_SHARE = 4
VOUCHERS = 500
AT_ONCE = 512
WALLETS = 50
SIGNERS = 2
BATCH_SIZE_MIN = 50
"""Transactions with so many payments or more count for the gas of a payment in a batch."""
RATIO_MIN = 20.0
GAS_MAX = 50_000
ROUND_TRIPS_TO_VERIFY_MAX = 1.0
VOUCHER_SHARE_MIN = 0.80
"""Of bare libsecp256k1 recovery."""
DEADLINE = 2_000_000_000
VALUE = 1_000


class BenchFailed(Exception):
    """Something was not settled as it should be, so that its speed means nothing."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One way to settle: payments a second, and of each payment its gas and our POSTs to the node."""

    per_s: float
    cpu_ms: float
    """Of this process, each."""
    gas: float | None
    transactions: int
    round_trips: float
    latency_ms: float
    late: float = 0.0
    """Of the reference: the share that missed its first look for the receipt."""


def main() -> int:
    """Measure, print, and say by the exit code whether all targets are met."""
    parser = argparse.ArgumentParser(description="Settlements a second and gas a payment, against the reference.")
    parser.add_argument("--payments", type=int, default=PAYMENTS, help="payments in batches, in each round")
    parser.add_argument("--quick", action="store_true", help="fewer payments: a look, not a measurement")
    arguments = parser.parse_args()
    count = min(arguments.payments, QUICK_PAYMENTS) if arguments.quick else arguments.payments
    result: dict[str, Any] = {}
    targets: dict[str, bool] = {}
    try:
        with Anvil() as anvil, stalls.ended(anvil.rpc_url) as stalled:
            chain = load(anvil.rpc_url)
            circle.place(chain)
            for part in PARTS:
                result |= part(chain, count, 1 if arguments.quick else ROUNDS)
                targets |= result.pop("targets")
            result["stalls_of_anvil"] = stalled.count
    except (BenchFailed, ReferenceFailed) as error:
        print(error, file=sys.stderr)
        return 1
    missed = [name for name, met in targets.items() if not met]
    print(json.dumps(result | {"missed": missed, "ok": not missed}))
    return 1 if missed else 0


# --- settlements ------------------------------------------------------------------------------------------------------


def measure_settlements(chain: Devnet, count: int, rounds: int) -> dict[str, Any]:
    """All ways to settle, in turns on one chain that mines at once; medians over the rounds."""
    network = KNOWN_NETWORKS[chain.chain_id]
    usdc = network.tokens[0]
    usdt = Token("USDT", chain.chain_id, chain.usdt.address.lower(), chain.usdt.decimals, "permit2", "Tether USD", "1")
    keys = _wallets(chain, WALLETS)
    signers = [with_ether(chain.rpc_url) for _ in range(SIGNERS)]
    contract, _ = place_operator_contracts(
        chain.rpc_url, signers[0][0], signers[0][0], [address for address, _ in signers]
    )
    signer_keys = [key for _, key in signers]
    reference_count, single_count = max(count // REFERENCE_SHARE, 20), max(count // SINGLE_SHARE, 20)

    def ours(token: Token, amount: int, batch_contract: str | None) -> Measured:
        return asyncio.run(_ours(chain, network, keys, signer_keys, token, amount, batch_contract))

    def reference(*, eager: bool, threads: int = 1) -> Measured:
        return _reference(chain, usdc, keys, reference_count, eager=eager, threads=threads)

    ways: dict[str, Callable[[], Measured]] = {
        "reference": lambda: reference(eager=False),
        "reference_eager": lambda: reference(eager=True),
        "reference_threads": lambda: reference(eager=True, threads=REFERENCE_THREADS),
        "single": lambda: ours(usdc, single_count, None),
        "batched": lambda: ours(usdc, count, contract),
        "batched_permit2": lambda: ours(usdt, single_count, contract),
    }
    ours(usdc, 64, contract)  # the first of everything is slow
    found: dict[str, list[Measured]] = {name: [] for name in ways}
    for turn in range(rounds):
        # In another order each time: whoever comes after whom must not matter.
        names = list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]
        for name in names:
            with _taken_back(chain.rpc_url):
                found[name].append(ways[name]())
    ratios = _ratios(found)
    verify = asyncio.run(_round_trips_to_verify(chain, network, keys, usdc, 256))
    gas = {name: _middle([each.gas for each in own if each.gas is not None]) for name, own in found.items()}
    return {
        "payments_in_batches": count,
        "rounds": rounds,
        "settlements_per_s": {name: round(median(each.per_s for each in own), 1) for name, own in found.items()},
        "spread": {
            name: [round(min(each.per_s for each in own), 1), round(max(each.per_s for each in own), 1)]
            for name, own in found.items()
        },
        "cpu_ms_per_payment": {name: round(median(each.cpu_ms for each in own), 2) for name, own in found.items()},
        "reference_late_share": {
            name: round(median(each.late for each in own), 2) for name, own in found.items() if name.startswith("ref")
        },
        "ratio_to_reference": ratios | {"target": RATIO_MIN},
        "token": "Circle's FiatTokenV2_2 (EIP-3009); a USDT-like token for Permit2",
        "gas_per_payment": gas | {"target": GAS_MAX},
        "payments_per_transaction": {
            name: round(amount / median(each.transactions for each in found[name]), 1)
            for name, amount in (("single", single_count), ("batched", count), ("batched_permit2", single_count))
        },
        "round_trips_per_payment": {
            name: round(median(each.round_trips for each in found[name]), 3) for name in ("single", "batched")
        }
        | {"to_verify": round(verify, 3)},
        "latency_ms": {name: round(median(each.latency_ms for each in own), 1) for name, own in found.items()},
        "targets": {
            "settlements a second": ratios["best_settings"] >= RATIO_MIN,
            "gas a payment": gas["batched"] is not None and gas["batched"] <= GAS_MAX,
            "round trips to verify": verify <= ROUND_TRIPS_TO_VERIFY_MAX,
        },
    }


def _ratios(found: dict[str, list[Measured]]) -> dict[str, float]:
    """How many times as many payments a second we settle in batches: against the reference as shipped, and at its best in
    the same round; and how many times less CPU time each takes than the reference's cheapest way."""
    references = [own for name, own in found.items() if name.startswith("reference")]
    best = [max(each.per_s for each in turn) for turn in zip(*references, strict=True)]
    cheapest = [min(each.cpu_ms for each in turn) for turn in zip(*references, strict=True)]
    ours = found["batched"]
    return {
        "best_settings": round(median(own.per_s / each for own, each in zip(ours, best, strict=True)), 1),
        "as_shipped": round(median(o.per_s / r.per_s for o, r in zip(ours, found["reference"], strict=True)), 1),
        "by_cpu_time": round(median(each / own.cpu_ms for own, each in zip(ours, cheapest, strict=True)), 1),
    }


def measure_vouchers(chain: Devnet, count: int, rounds: int) -> dict[str, Any]:
    """Vouchers: their verification against bare recovery by CPU time, and whole requests on a database."""
    signatures = measure_signatures()
    _, signer_key = with_ether(chain.rpc_url)
    network = KNOWN_NETWORKS[chain.chain_id]
    turns = [
        asyncio.run(channel_requests.pay(chain.rpc_url, network, signer_key, min(count, VOUCHERS)))
        for _ in range(rounds)
    ]
    round_trips = max(each.round_trips for each in turns)
    return {
        "vouchers": {
            "verified_per_s": signatures["vouchers_per_s"],
            "bare_recoveries_per_s": signatures["bare_recoveries_per_s"],
            "share_of_bare": signatures["ratio_voucher"],
            "target": VOUCHER_SHARE_MIN,
            "requests_per_s_one_by_one": round(median(each.per_s for each in turns), 1),
            "round_trips": round_trips,
        },
        "targets": {
            "vouchers": signatures["ratio_voucher"] >= VOUCHER_SHARE_MIN,
            "round trips for a voucher": round_trips == 0,
        },
    }


@contextlib.contextmanager
def _taken_back(rpc_url: str) -> Iterator[None]:
    """What happens on the chain within is undone: Anvil hashes the whole state for each block, so that a chain which has grown
    is a slower one, most of all for whoever needs many blocks."""
    snapshot = rpc(rpc_url, "evm_snapshot")
    yield
    assert rpc(rpc_url, "evm_revert", snapshot)
    rpc(rpc_url, "evm_setTime", int(time.time()))


async def _ours(
    chain: Devnet,
    network: Network,
    keys: list[coincurve.PrivateKey],
    signer_keys: list[str],
    token: Token,
    count: int,
    batch_contract: str | None,
) -> Measured:
    pay_to = "0x" + secrets.token_hex(20)
    payments = [_signed(key, token, pay_to) for key in _in_turn(keys, count)]
    with tempfile.TemporaryDirectory(prefix="farebox-bench-") as folder:
        path = Path(folder) / "farebox.db"
        upgrade(path)
        store = Store(path)
        async with Rpc([chain.rpc_url]) as rpc:
            settlements = Settlements(store, rpc, network, signer_keys, batch_contract=batch_contract)
            settlements.handle("payment", Kind(PaymentProof(), _book(token), _nothing, order_gas, batchable=True))
            states = ChainStates(rpc, network)
            await settlements.start()
            gate, latencies = asyncio.Semaphore(AT_ONCE), []

            async def settle(payment: Payment) -> None:
                async with gate:
                    started = time.perf_counter()
                    if recover(payment_digest(payment, token), payment.signature) != payment.payer:
                        raise BenchFailed("a signature is not its payer's")
                    await states.check(payment, token, pay_to)
                    order = _order(payment, token)
                    await settlements.submit(order)
                    if not (await settlements.outcome(order.id, 60)).paid:
                        raise BenchFailed("a payment was not settled within a minute")
                    latencies.append(time.perf_counter() - started)

            before, started, cpu_started = rpc.round_trips, time.perf_counter(), time.process_time()
            await asyncio.gather(*(settle(payment) for payment in payments))
            seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
            round_trips = rpc.round_trips - before
            transactions = settlements.transactions
            await settlements.stop()
        store.close()
    gas = _gas(chain.rpc_url, token, pay_to, count, BATCH_SIZE_MIN if batch_contract else 1)
    return Measured(
        count / seconds, 1000 * cpu_s / count, gas, transactions, round_trips / count, 1000 * median(latencies)
    )


def _reference(
    chain: Devnet, token: Token, keys: list[coincurve.PrivateKey], count: int, *, eager: bool, threads: int
) -> Measured:
    pay_to = "0x" + secrets.token_hex(20)
    _, gas_key = with_ether(chain.rpc_url)
    payments = [_signed(key, token, pay_to) for key in _in_turn(keys, count)]
    settled = reference_facilitator.settle(chain.rpc_url, gas_key, token, payments, eager=eager, threads=threads)
    gas = _gas(chain.rpc_url, token, pay_to, count, 1)
    cpu_ms = 1000 * settled.cpu_s / count
    return Measured(count / settled.seconds, cpu_ms, gas, count, 0.0, settled.latency_ms, settled.late)


async def _round_trips_to_verify(
    chain: Devnet, network: Network, keys: list[coincurve.PrivateKey], token: Token, count: int
) -> float:
    """POSTs a payment for the chain's state, of payments that come one by one."""
    pay_to = "0x" + secrets.token_hex(20)
    async with Rpc([chain.rpc_url]) as rpc:
        states = ChainStates(rpc, network)
        for key in _in_turn(keys, count):
            await states.check(_signed(key, token, pay_to), token, pay_to)
        return rpc.round_trips / count


# --- payments ---------------------------------------------------------------------------------------------------------


def _wallets(chain: Devnet, count: int) -> list[coincurve.PrivateKey]:
    keys = [coincurve.PrivateKey() for _ in range(count)]
    for key in keys:
        address = address_of(key)
        batch(chain.rpc_url, [("anvil_setBalance", [address, hex(10**19)])])
        mint(chain.rpc_url, chain.usdc, address, 10**12)
        mint(chain.rpc_url, chain.usdt, address, 10**12)
        approve_permit2(chain.rpc_url, chain.usdt, "0x" + key.to_hex())
    return keys


def _in_turn(keys: Sequence[coincurve.PrivateKey], count: int) -> Iterator[coincurve.PrivateKey]:
    return (keys[index % len(keys)] for index in range(count))


def _signed(key: coincurve.PrivateKey, token: Token, pay_to: str) -> Payment:
    payer, nonce = address_of(key), secrets.randbits(256)
    authorization: Eip3009Authorization | Permit2Authorization
    if token.transfer_method == "eip3009":
        authorization = Eip3009Authorization(payer, pay_to, VALUE, 0, DEADLINE, nonce)
    else:
        authorization = Permit2Authorization(
            payer, token.address, VALUE, EXACT_PERMIT2_PROXY_ADDRESS, nonce, DEADLINE, pay_to, 0
        )
    unsigned = Payment(2, "exact", f"eip155:{token.chain_id}", None, None, secrets.token_bytes(32), authorization, b"")
    signature = key.sign_recoverable(payment_digest(unsigned, token), hasher=None)
    return replace(unsigned, signature=signature[:64] + bytes([27 + signature[64]]))


def _order(payment: Payment, token: Token) -> SettlementOrder:
    call_to, call_data = settle_call(payment, token)
    authorization, name = payment.authorization, secrets.token_hex(8)
    return SettlementOrder(
        id=f"pay:{name}",
        kind="payment",
        reference=name,
        chain_id=token.chain_id,
        token=token.address,
        payer=authorization.payer,
        pay_to=authorization.recipient,
        value=authorization.value,
        authorization_nonce=authorization.nonce,
        call_to=call_to,
        call_data=call_data,
        valid_before=authorization.expires_at,
    )


def _book(token: Token) -> Callable[[Transaction, dict[str, Any]], None]:
    def post(tx: Transaction, row: dict[str, Any]) -> None:
        transfers.post(
            tx,
            id=f"settle:{row['id']}",
            debit=account_id("custody", token.asset),
            credit=payer_account(row["payer"], token.asset),
            amount=atomic_to_nano_down(int(row["received_value"]), token.decimals),
            reference=row["id"],
        )

    return post


def _nothing(_tx: Transaction, row: dict[str, Any]) -> None:
    raise BenchFailed(f"a payment failed: {row['reason']}")


def _gas(rpc_url: str, token: Token, pay_to: str, count: int, size_min: int) -> float | None:
    """Gas of a payment, over the transactions with at least `size_min` of them; None if there were none.

    Raises:
        BenchFailed: If other than `count` transfers to `pay_to` are on the chain.
    """
    found = Counter(transfers_to(rpc_url, pay_to, token.address))
    if found.total() != count:
        raise BenchFailed(f"{count} payments were settled, and {found.total()} transfers are on the chain")
    counted = {hash: size for hash, size in found.items() if size >= size_min}
    receipts = batch(rpc_url, [("eth_getTransactionReceipt", [hash]) for hash in counted], timeout_s=60)
    if not counted:
        return None
    return sum(int(receipt["gasUsed"], 16) for receipt in receipts) / sum(counted.values())


def _middle(values: list[float]) -> int | None:
    return round(median(values)) if values else None


PARTS: tuple[Callable[[Devnet, int, int], dict[str, Any]], ...] = (measure_settlements, measure_vouchers)
"""What is measured, each part with a chain of the same Anvil, the number of payments, and that of rounds."""


if __name__ == "__main__":
    sys.exit(main())
