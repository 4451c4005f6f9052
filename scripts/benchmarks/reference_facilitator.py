"""The official `x402` package's facilitator in this process, settling as it is shipped, and as fast as it can be made to.

As shipped it looks for a transaction's receipt once and then every tenth of a second: on a chain that mines at once its speed
is that of a coin toss, 10 ms a payment where the first look finds the receipt and 110 ms where it comes a moment too early.
Which of the two happens depends on what else the machine does, so its figure swings tenfold from run to run. `eager` looks
every 2 ms instead; and several threads may share it, as its signer hands out nonces under a lock.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median

from eth_utils.address import to_checksum_address
from x402 import PaymentPayload, PaymentRequirements, x402FacilitatorSync
from x402.mechanisms.evm.exact import register_exact_evm_facilitator
from x402.mechanisms.evm.signers import FacilitatorWeb3Signer
from x402.mechanisms.evm.types import TransactionReceipt

from payments.chain.networks import Token
from payments.x402.wire import Eip3009Authorization, Payment

EAGER_POLL_S = 0.002
SHIPPED_POLL_S = 0.1


class ReferenceFailed(Exception):
    """It did not settle a payment."""


@dataclass(frozen=True, slots=True)
class Settled:
    """What a number of settlements took: seconds by the clock and of this process, and how many waited for a second look."""

    seconds: float
    cpu_s: float
    latency_ms: float
    late: float
    """The share of them that took longer than the shipped pause between two looks."""


class _EagerSigner(FacilitatorWeb3Signer):
    def wait_for_transaction_receipt(self, tx_hash: str) -> TransactionReceipt:
        """See the package; only the pause between two looks is another one."""
        self._w3.eth.wait_for_transaction_receipt(tx_hash, timeout=60, poll_latency=EAGER_POLL_S)  # type: ignore[arg-type]
        return super().wait_for_transaction_receipt(tx_hash)


def settle(
    rpc_url: str, private_key: str, token: Token, payments: Sequence[Payment], *, eager: bool, threads: int = 1
) -> Settled:
    """Settle payments one after the other, or by several threads.

    Args:
        rpc_url: The chain.
        private_key: Pays the gas.
        token: What the payments are in.
        payments: By EIP-3009.
        eager: Look for receipts every 2 ms.
        threads: How many settle at once.

    Raises:
        ReferenceFailed: A payment was not settled.
    """
    signer = (_EagerSigner if eager else FacilitatorWeb3Signer)(private_key, rpc_url)
    facilitator = register_exact_evm_facilitator(x402FacilitatorSync(), signer, networks=f"eip155:{token.chain_id}")
    calls = [_call(payment, token) for payment in payments]

    def one(call: tuple[PaymentPayload, PaymentRequirements]) -> float:
        started = time.perf_counter()
        answer = facilitator.settle(*call)
        if not answer.success:
            raise ReferenceFailed(f"the reference did not settle: {answer.error_reason}")
        return time.perf_counter() - started

    started, cpu_started = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(threads) as workers:
        took = list(workers.map(one, calls))
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    late = sum(each > SHIPPED_POLL_S for each in took) / len(took)
    return Settled(seconds, cpu_s, 1000 * median(took), late)


def _call(payment: Payment, token: Token) -> tuple[PaymentPayload, PaymentRequirements]:
    authorization = payment.authorization
    assert isinstance(authorization, Eip3009Authorization)
    accepted = {
        "scheme": "exact",
        "network": f"eip155:{token.chain_id}",
        "asset": to_checksum_address(token.address),
        "amount": str(authorization.value),
        "payTo": to_checksum_address(authorization.to),
        "maxTimeoutSeconds": 900,
        "extra": {"name": token.domain_name, "version": token.domain_version},
    }
    signed = {
        "from": to_checksum_address(authorization.payer),
        "to": to_checksum_address(authorization.to),
        "value": str(authorization.value),
        "validAfter": str(authorization.valid_after),
        "validBefore": str(authorization.valid_before),
        "nonce": f"0x{authorization.nonce:064x}",
    }
    payload = {"authorization": signed, "signature": "0x" + payment.signature.hex()}
    return (
        PaymentPayload.model_validate({"x402Version": 2, "accepted": accepted, "payload": payload}),
        PaymentRequirements.model_validate(accepted),
    )
