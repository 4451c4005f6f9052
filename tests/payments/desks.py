"""What all desks of these tests stand on: an engine on a real chain and a real database, with every kind of orders."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from contracts.devnet import Devnet
from payments.chain.networks import Network
from payments.chain.rpc import Rpc
from payments.kinds import register
from payments.reconciliation import open_books
from payments.recovery import recover
from payments.settlement.engine import Settlements
from payments.store import Store
from payments.tenders.exact_services import ExactServices
from payments.verification.chain_state import ChainStates
from tests.payments.exact_samples import QUOTED
from tests.payments.settling import PAY_TO

VALUE = QUOTED // 1000
"""Atomic units."""


@contextlib.asynccontextmanager
async def opened(
    database: Path | str, chain: Devnet, network: Network, *, batch_contract: str | None = None
) -> AsyncIterator[tuple[ExactServices, Settlements]]:
    """What a start of the gateway opens for all tenders, and the engine among it."""
    store = Store(database)
    await recover(store)
    async with Rpc([chain.rpc_url], timeout_s=5) as node:
        await open_books(store, node, network, PAY_TO)
        signer = chain.wallets[0].private_key
        settlements = Settlements(store, node, network, [signer], batch_contract=batch_contract, housekeeping_s=0.05)
        register(settlements, store)
        await settlements.start()
        services = ExactServices(
            store=store,
            settlements=settlements,
            chain_states=ChainStates(node, network),
            payer_exposure_nano_usd=QUOTED,
            settlement_wait_s=20,
        )
        try:
            yield services, settlements
        finally:
            await settlements.stop()
            store.close()
