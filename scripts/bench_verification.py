#!/usr/bin/env python3
"""How fast signatures are verified, against the library underneath and against what is usually taken.

Prints one JSON line. Rates are per second of one core's time: `bare` is libsecp256k1's recovery alone (coincurve, from a ready
digest to a public key), `ours` goes from a decoded authorization to the payer's address, `usual` is eth-account's
`encode_typed_data` and `recover_message`; a voucher is one of a payment channel. Exits 1 if `ours` falls below 85 % of `bare`,
or vouchers below 80 %.

Usage: .venv/bin/python scripts/bench_verification.py
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from coincurve import PrivateKey, PublicKey
from eth_account import Account
from eth_account.messages import encode_typed_data

from payments.chain.networks import EXACT_PERMIT2_PROXY_ADDRESS, KNOWN_NETWORKS
from payments.verification.eip712 import eip3009_digest, permit2_exact_digest
from payments.verification.signatures import keccak256, recover
from payments.verification.vouchers import verify_voucher, voucher_digest
from payments.x402.channels import Voucher
from payments.x402.wire import Eip3009Authorization, Permit2Authorization

PAYMENTS = 400
ROUNDS = 15
USUAL_PAYMENTS = 40
RATIO_MIN = 0.85
VOUCHER_RATIO_MIN = 0.80
CHAIN_ID = 84532
TOKEN = KNOWN_NETWORKS[CHAIN_ID].tokens[0]
DEADLINE = 2_000_000_000


def main() -> int:
    """Measure, print, and say by the exit code whether the target is met."""
    result = measure()
    print(json.dumps(result))
    return 0 if result["ok"] else 1


def measure() -> dict[str, Any]:
    """The figures that are printed, rates per second of one core's time; `ok` says whether the target is met."""
    eip3009, permit2 = _eip3009_payments(), _permit2_payments()
    for authorization, _, signature in eip3009[:20]:
        assert recover(eip3009_digest(authorization, TOKEN), signature) == authorization.payer
        assert _usual_payer(_typed_data(authorization), signature) == authorization.payer

    def bare_eip3009(payments: Sequence[Any]) -> None:
        for _, digest, signature in payments:
            PublicKey.from_signature_and_message(signature, digest, hasher=None)

    def ours_eip3009(payments: Sequence[Any]) -> None:
        for authorization, _, signature in payments:
            recover(eip3009_digest(authorization, TOKEN), signature)

    def ours_permit2(payments: Sequence[Any]) -> None:
        for authorization, _, signature in payments:
            recover(permit2_exact_digest(authorization, CHAIN_ID), signature)

    def ours_vouchers(payments: Sequence[tuple[Voucher, str]]) -> None:
        for voucher, payer in payments:
            verify_voucher(voucher, payer, CHAIN_ID)

    vouchers = _vouchers()
    # coincurve counts the recovery id from 0, Ethereum from 27.
    ready = [(a, digest, signature[:64] + bytes([signature[64] - 27])) for a, digest, signature in eip3009]
    messages = [(_typed_data(authorization), signature) for authorization, _, signature in eip3009[:USUAL_PAYMENTS]]
    best = _best_seconds(
        {
            "bare": lambda: bare_eip3009(ready),
            "eip3009": lambda: ours_eip3009(eip3009),
            "permit2": lambda: ours_permit2(permit2),
            "voucher": lambda: ours_vouchers(vouchers),
        }
    )
    usual = _best_seconds({"usual": lambda: _usual(messages)}, rounds=3)["usual"]
    ratio = best["bare"] / best["eip3009"]
    ratio_permit2 = best["bare"] / best["permit2"]
    ratio_voucher = best["bare"] / best["voucher"]
    return {
        "bare_recoveries_per_s": round(PAYMENTS / best["bare"]),
        "ours_per_s": round(PAYMENTS / best["eip3009"]),
        "ratio": round(ratio, 3),
        "ours_permit2_per_s": round(PAYMENTS / best["permit2"]),
        "ratio_permit2": round(ratio_permit2, 3),
        "vouchers_per_s": round(PAYMENTS / best["voucher"]),
        "ratio_voucher": round(ratio_voucher, 3),
        "usual_per_s": round(USUAL_PAYMENTS / usual),
        "ours_over_usual": round(usual / USUAL_PAYMENTS / (best["eip3009"] / PAYMENTS), 1),
        "ratio_min": RATIO_MIN,
        "ok": min(ratio, ratio_permit2) >= RATIO_MIN and ratio_voucher >= VOUCHER_RATIO_MIN,
    }


def _vouchers() -> list[tuple[Voucher, str]]:
    key = PrivateKey()
    payer = "0x" + keccak256(key.public_key.format(compressed=False)[1:])[-20:].hex()
    vouchers = []
    for amount in range(1, PAYMENTS + 1):
        signature = key.sign_recoverable(voucher_digest(7, amount, CHAIN_ID), hasher=None)
        vouchers.append((Voucher(7, amount, signature[:64] + bytes((27 + signature[64],))), payer))
    return vouchers


def _best_seconds(measured: dict[str, Callable[[], None]], rounds: int = ROUNDS) -> dict[str, float]:
    """The least CPU seconds of each, measured in turns so that a busy machine slows all of them alike."""
    best = dict.fromkeys(measured, float("inf"))
    for _ in range(rounds):
        for name, run in measured.items():
            started = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - started)
    return best


def _eip3009_payments() -> list[tuple[Eip3009Authorization, bytes, bytes]]:
    payments = []
    for _ in range(PAYMENTS):
        key, payer = _new_key()
        to = "0x" + secrets.token_hex(20)
        authorization = Eip3009Authorization(payer, to, secrets.randbits(24), 0, DEADLINE, secrets.randbits(256))
        digest = eip3009_digest(authorization, TOKEN)
        payments.append((authorization, digest, _sign(key, digest)))
    return payments


def _permit2_payments() -> list[tuple[Permit2Authorization, bytes, bytes]]:
    payments = []
    for _ in range(PAYMENTS):
        key, payer = _new_key()
        authorization = Permit2Authorization(
            payer=payer,
            token="0x" + secrets.token_hex(20),
            amount=secrets.randbits(24),
            spender=EXACT_PERMIT2_PROXY_ADDRESS,
            nonce=secrets.randbits(256),
            deadline=DEADLINE,
            to="0x" + secrets.token_hex(20),
            valid_after=0,
        )
        digest = permit2_exact_digest(authorization, CHAIN_ID)
        payments.append((authorization, digest, _sign(key, digest)))
    return payments


def _new_key() -> tuple[PrivateKey, str]:
    key = PrivateKey()
    return key, "0x" + keccak256(key.public_key.format(compressed=False)[1:])[12:].hex()


def _sign(key: PrivateKey, digest: bytes) -> bytes:
    signature: bytes = key.sign_recoverable(digest, hasher=None)
    return signature[:64] + bytes([signature[64] + 27])


def _typed_data(authorization: Eip3009Authorization) -> dict[str, Any]:
    names = ("from", "to", "value", "validAfter", "validBefore", "nonce")
    types = ("address", "address", "uint256", "uint256", "uint256", "bytes32")
    return {
        "domain_data": {
            "name": TOKEN.domain_name,
            "version": TOKEN.domain_version,
            "chainId": CHAIN_ID,
            "verifyingContract": TOKEN.address,
        },
        "message_types": {
            "TransferWithAuthorization": [{"name": name, "type": kind} for name, kind in zip(names, types, strict=True)]
        },
        "message_data": {
            "from": authorization.payer,
            "to": authorization.to,
            "value": authorization.value,
            "validAfter": authorization.valid_after,
            "validBefore": authorization.valid_before,
            "nonce": authorization.nonce.to_bytes(32, "big"),
        },
    }


def _usual(messages: Sequence[tuple[dict[str, Any], bytes]]) -> None:
    for typed_data, signature in messages:
        _usual_payer(typed_data, signature)


def _usual_payer(typed_data: dict[str, Any], signature: bytes) -> str:
    payer: str = Account.recover_message(encode_typed_data(**typed_data), signature=signature)
    return payer.lower()


if __name__ == "__main__":
    sys.exit(main())
