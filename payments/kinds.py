"""Every kind of settlement order that there is on a network: how it is carried, proven and booked.

Whichever process holds a signer's key settles the orders of all processes of its database, so each of them, gateway or
facilitator, knows them all. A kind's callbacks change nothing but the database: they run in the process that decides, which
need not be the one that wrote the order (that one is told, see `payments.settlement.outcomes.Outcomes.follow`).
"""

from __future__ import annotations

from payments.chain.networks import Network
from payments.channels import kinds as channels
from payments.facilitator import kinds as facilitated
from payments.settlement import refunds, sweeps, withdrawer
from payments.settlement.engine import Settlements
from payments.settlement.orders import Kind
from payments.sponsoring import funding
from payments.store import Store
from payments.tenders import upto_settlement, upto_topup
from payments.tenders.exact import PAYMENT


def every_kind(store: Store, network: Network, *, batches: bool) -> dict[str, Kind]:
    """By name.

    Args:
        store: The database.
        network: Its tokens.
        batches: Whether the operator has a batch contract there: what only that can settle is left to a process that has.
    """
    kinds = {
        "payment": PAYMENT,
        "refund": refunds.kind(network.tokens),
        "withdrawal": withdrawer.kind(network.tokens),
        "sweep": sweeps.kind(),
        funding.KIND: funding.kind(),
        **facilitated.kinds(batches=batches),
        **channels.kinds(store, network),
    }
    if batches:
        kinds[upto_settlement.KIND] = upto_settlement.kind(network)
        kinds[upto_topup.KIND] = upto_topup.TOP_UP
    return kinds


def register(settlements: Settlements, store: Store) -> None:
    """Teach an engine all of them; before it starts."""
    kinds = every_kind(store, settlements.network, batches=settlements.batch_contract is not None)
    for name, kind in kinds.items():
        settlements.handle(name, kind)
