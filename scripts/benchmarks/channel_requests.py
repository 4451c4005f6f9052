"""Requests paid by vouchers through one channel: all that the gateway does for them but the HTTP, on a database on disk."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import coincurve

from payments.chain.channel_contract import ChannelState
from payments.chain.networks import Network
from payments.chain.rpc import Rpc
from payments.chain.signers import Signer
from payments.chain.transactions import address_of
from payments.channels import book
from payments.channels.book import Seen
from payments.channels.services import ChannelServices
from payments.migrate import upgrade
from payments.quotes import make_quote
from payments.settlement.engine import Settlements
from payments.store import Store
from payments.tenders.base import Outcome
from payments.tenders.channel import ChannelTender
from payments.tenders.exact_services import ExactServices
from payments.verification.chain_state import ChainStates
from payments.verification.vouchers import channel_id, sign_digest, verify_voucher, voucher_digest
from payments.x402.channels import ChannelConfig, ChannelPayment, Voucher, hex32

PRICE = 1_000
"""Atomic units."""
NANO_PER_ATOMIC = 1_000
DELAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Paid:
    """Requests a second, and the POSTs to a node that one needs."""

    per_s: float
    round_trips: float


async def pay(rpc_url: str, network: Network, signer_key: str, count: int) -> Paid:
    """Verify, take and charge `count` vouchers one after the other."""
    token, key, signer = network.tokens[0], coincurve.PrivateKey(), Signer.from_hex(signer_key)
    payer = address_of(key)
    config = ChannelConfig(payer, payer, signer.address, signer.address, token.address, DELAY_S, 0)
    number = channel_id(config, token.chain_id)
    with tempfile.TemporaryDirectory(prefix="farebox-bench-") as folder:
        path = Path(folder) / "farebox.db"
        upgrade(path)
        store = Store(path)
        async with Rpc([rpc_url]) as rpc:
            settlements = Settlements(store, rpc, network, [signer_key])
            payers = ExactServices(
                store=store,
                settlements=settlements,
                chain_states=ChainStates(rpc, network),
                payer_exposure_nano_usd=0,
                settlement_wait_s=5,
            )
            services = ChannelServices(
                store=store,
                settlements=settlements,
                rpc=rpc,
                network=network,
                receiver=signer.address,
                authorizers=[signer],
                withdraw_delay_s=DELAY_S,
                payers=payers,
            )
            await store.write(lambda tx: book.ensure(tx, hex32(number), config, token))
            state = ChannelState(PRICE * count, 0, 0, 0, 0)
            await store.write(lambda tx: book.sync(tx, hex32(number), Seen(state, 1, 0), token))
            payments = [_voucher(config, number, PRICE * turn, key, token.chain_id) for turn in range(1, count + 1)]
            quote = make_quote(
                inference_nano_usd=PRICE * NANO_PER_ATOMIC,
                network_fee_nano_usd=0,
                minimum_nano_usd=0,
                route=("model@provider",),
                request_digest=b"r" * 32,
                expires_at=2_000_000_000,
            )
            before, started = rpc.round_trips, time.perf_counter()
            for payment in payments:
                verify_voucher(payment.voucher, payer, token.chain_id)
                hold = await ChannelTender(services, payment, token, secrets.token_bytes(32)).authorize(quote, {})
                await hold.ready()
                await hold.capture(quote.maximum_nano_usd, Outcome())
            seconds, round_trips = time.perf_counter() - started, rpc.round_trips - before
        await asyncio.to_thread(store.close)
    return Paid(count / seconds, round_trips / count)


def _voucher(
    config: ChannelConfig, number: int, amount: int, key: coincurve.PrivateKey, chain_id: int
) -> ChannelPayment:
    signature = sign_digest(key, voucher_digest(number, amount, chain_id))
    return ChannelPayment(
        version=2,
        scheme="batch-settlement",
        network=f"eip155:{chain_id}",
        accepted=None,
        quote_token=None,
        digest=secrets.token_bytes(32),
        type="voucher",
        config=config,
        voucher=Voucher(number, amount, signature),
        deposit=None,
        refund_amount=None,
    )
