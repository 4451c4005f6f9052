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


def every_kind(store: Store, network: Network) -> dict[str, Kind]:
    """By name.

    Args:
        store: The database.
        network: Its tokens.
    """
    return {
        "payment": PAYMENT,
        "refund": refunds.kind(network.tokens),
        "withdrawal": withdrawer.kind(network.tokens),
        "sweep": sweeps.kind(),
        funding.KIND: funding.kind(),
        **facilitated.kinds(),
        **channels.kinds(store, network),
        upto_settlement.KIND: upto_settlement.kind(network),
        upto_topup.KIND: upto_topup.TOP_UP,
    }


def names(store: Store) -> tuple[str, ...]:
    """The kinds' names, which are the same on every network."""
    return tuple(every_kind(store, Network(0, None, ())))


def register(settlements: Settlements, store: Store) -> None:
    """Teach an engine all of them; before it starts."""
    for name, kind in every_kind(store, settlements.network).items():
        settlements.handle(name, kind)
