"""A process that settles orders until it is killed: what a gateway does, without the HTTP.

Run with a database, a node's URL and a file of signed payments; prints a line for each order that it knows to be paid.
"""

from __future__ import annotations

import asyncio
import pickle
import sys
from pathlib import Path

from contracts.wallets import Wallet
from payments.chain.networks import Network
from payments.chain.rpc import Rpc
from payments.settlement.engine import Settlements
from payments.settlement.orders import SettlementOrder
from payments.store import Store
from tests.payments.settling import Books


async def main(
    database: Path, url: str, network: Network, signers: list[Wallet], orders: list[SettlementOrder]
) -> None:
    store, books = Store(database), Books(network)
    async with Rpc([url]) as rpc:
        settlements = Settlements(
            store,
            rpc,
            network,
            [signer.private_key for signer in signers],
            housekeeping_s=0.1,
        )
        settlements.handle("payment", books.kind)
        await settlements.start()

        async def settle(order: SettlementOrder) -> None:
            await settlements.submit(order)
            outcome = await settlements.outcome(order.id, 60)
            print(order.id, outcome.state, flush=True)

        gate = asyncio.Semaphore(8)

        async def in_turn(order: SettlementOrder) -> None:
            async with gate:
                await settle(order)

        await asyncio.gather(*(in_turn(order) for order in orders))
        await settlements.stop()
    store.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], *pickle.loads(Path(sys.argv[3]).read_bytes())))  # noqa: S301
