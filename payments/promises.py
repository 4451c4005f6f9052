"""What payers have under way: money that their balance on a chain still shows and that is promised already.

Nothing is counted apart. One statement reads it from the rows that payments leave anyway: transfers of the scheme exact that
are not in a block, pledges of upto until they are settled, deposits into channels, and what the facilitator settles. So it is
the same for every process on the database, and after a crash.

All writers of a database take turns: what is promised in the unit that reserves a payment came before that payment, whatever
anybody's clock says. Of two payments that one balance covers only once, the first goes on. What is reserved only after the
chain was asked (`Cover`) is compared once more in the unit that reserves it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from payments.chain.networks import PERMIT2_ADDRESS, Token
from payments.money import nano_to_atomic_up
from payments.store import Store, Transaction

# What has arrived, and was taken out of the chain again by a reorganisation.
_REOPENED = """
    FROM settlement JOIN payment_authorization AS authorized ON authorized.receipt_id = settlement.reference
    JOIN receipt ON receipt.id = authorized.receipt_id
    WHERE settlement.payer = ? AND settlement.state IN ('queued', 'submitted') AND settlement.received_value IS NOT NULL
    AND authorized.state = 'paid'
"""
# A reservation for which nothing was written, and on which nobody works any more, is looked at anew when it is taken up.
_UNDER_WAY = f"""
    SELECT receipt.id, receipt.asset, authorized.identity,
           CAST(CASE WHEN authorized.state = 'pledged' AND receipt.charged_nano_usd IS NOT NULL
                THEN receipt.charged_nano_usd ELSE authorized.value_nano_usd END AS TEXT),
           CASE WHEN authorized.state = 'pledged' AND receipt.charged_nano_usd IS NOT NULL
                THEN receipt.charged_nano_usd ELSE authorized.exposed_nano_usd END, 1
    FROM payment_authorization AS authorized JOIN receipt ON receipt.id = authorized.receipt_id
    WHERE authorized.payer = ? AND authorized.state IN ('reserved', 'pledged')
    AND (receipt.state <> 'interrupted'
         OR EXISTS (SELECT 1 FROM settlement WHERE settlement.reference = receipt.id))
    UNION ALL
    SELECT settlement.id, 'eip155:' || settlement.chain_id || '|' || settlement.token,
           settlement.id || '|' || settlement.reference || COALESCE('|' || (
               SELECT identity FROM facilitated_payment AS facilitated WHERE facilitated.settlement_id = settlement.id), ''),
           settlement.value,
           (SELECT CAST(COALESCE(SUM(request.exposed_nano_usd), 0) AS BIGINT) FROM channel_request AS request
            WHERE request.deposit_id = settlement.id), 0
    FROM settlement
    WHERE settlement.payer = ? AND settlement.state IN ('queued', 'submitted') AND settlement.kind NOT IN ('payment', 'upto')
    AND settlement.kind IN ('channel_deposit', 'facilitated', 'facilitated_upto', 'facilitated_deposit')
    UNION ALL
    SELECT settlement.id, receipt.asset, authorized.identity, settlement.value, receipt.paid_nano_usd, 0
    {_REOPENED}
"""  # noqa: S608 - a condition of this module's
_REOPENED_NANO_USD = f"SELECT COALESCE(SUM(receipt.paid_nano_usd), 0) {_REOPENED} AND receipt.asset = ?"


@dataclass(frozen=True, slots=True)
class InUse:
    """What of a payer's balance of a token, and of Permit2's allowance to move it, is promised; in atomic units."""

    balance: int = 0
    allowance: int = 0


@dataclass(frozen=True, slots=True)
class Needed(InUse):
    """The same of what a payment needs; no allowance if it is not made by Permit2."""

    permit: bool = False
    """Whether its very call gives the allowance, as its simulation shows: if nothing else draws on that."""


@dataclass(frozen=True, slots=True)
class Funds(InUse):
    """The same of what the chain says that a payer has."""

    def cover(self, needed: Needed, promised: InUse) -> bool:
        """Whether there is enough for a payment beside what is promised."""
        return self.balance - promised.balance >= needed.balance and self.allow(needed, promised)

    def allow(self, needed: Needed, promised: InUse) -> bool:
        """Whether Permit2 may move as much, where it has to."""
        return (
            not needed.allowance
            or self.allowance - promised.allowance >= needed.allowance
            or (needed.permit and not promised.allowance)
        )


@dataclass(frozen=True, slots=True)
class Promise:
    """One payment of a payer's that is under way."""

    id: str
    """A receipt's, or a settlement's."""
    in_token: str
    """The ledger's name of the token, or its chain and address."""
    value: int
    in_nano_usd: bool
    """What `value` is in; else in atomic units."""
    by_permit2: bool
    exposed_nano_usd: int
    """What we may lose if it does not arrive: inference that is, or may be, under way for it."""


def under_way(tx: Transaction, payer: str) -> list[Promise]:
    """Everything of a payer's (lower-case hex), in all tokens."""
    return [
        Promise(row[0], row[1], int(row[3]), bool(row[5]), _by_permit2(row[2]), int(row[4]))
        for row in tx.execute(_UNDER_WAY, (payer, payer, payer)).fetchall()
    ]


def reopened_nano_usd(tx: Transaction, payer: str, asset: str) -> int:
    """What of a payer's money (lower-case hex) a reorganisation took out of the chain: it is to come back, and in the payer's
    balance meanwhile, but must not be paid out."""
    return int(tx.execute(_REOPENED_NANO_USD, (payer, asset)).fetchone()[0])


def exposure(promises: Iterable[Promise]) -> int:
    """Nano-USD of inference for which a payer's money has not arrived, whatever it pays by."""
    return sum(promise.exposed_nano_usd for promise in promises)


def in_use(promises: Iterable[Promise], token: Token) -> InUse:
    """What is promised of a payer's balance of `token`."""
    names = (token.asset, f"eip155:{token.chain_id}|{token.address}")
    balance = allowance = 0
    for promise in promises:
        if promise.in_token in names:
            value = nano_to_atomic_up(promise.value, token.decimals) if promise.in_nano_usd else promise.value
            balance += value
            allowance += value if promise.by_permit2 else 0
    return InUse(balance, allowance)


class Earlier:
    """What was promised before one payment.

    Args:
        store: The database.
        payer: Whose, lower-case hex.
        token: What the payment is in.
        promises: Those that were under way when it was reserved, without itself.
    """

    def __init__(self, store: Store, payer: str, token: Token, promises: Collection[Promise]) -> None:
        self._store, self._payer, self._token = store, payer, token
        self._promises = {promise.id: promise for promise in promises}
        self.in_use = in_use(promises, token)

    async def again(self) -> Earlier:
        """Those of them that are still under way: what has arrived has left the balance, and is promised no more.

        Raises:
            StoreBusy: The database cannot be asked.
        """
        now = await self._store.read(lambda tx: under_way(tx, self._payer))
        still = [promise for promise in now if promise.id in self._promises]
        return Earlier(self._store, self._payer, self._token, still)

    def or_since(self, tx: Transaction) -> InUse:
        """What was promised then or is now, in the unit that reserves: some of it may have left the balance meanwhile, and is
        counted all the same."""
        now = {promise.id: promise for promise in under_way(tx, self._payer)}
        return in_use((self._promises | now).values(), self._token)


@dataclass(frozen=True, slots=True)
class Cover:
    """What the chain said that a payment needs and its payer has."""

    funds: Funds
    needed: Needed
    earlier: Earlier

    def holds(self, tx: Transaction) -> bool:
        """Whether it still is enough in the unit that reserves the payment, beside what was promised meanwhile."""
        return self.funds.cover(self.needed, self.earlier.or_since(tx))


async def before(store: Store, payer: str, token: Token) -> Earlier:
    """Everything that a payer has under way now, for a payment that nothing reserves."""
    return Earlier(store, payer, token, await store.read(lambda tx: under_way(tx, payer)))


def _by_permit2(name: str) -> bool:
    return PERMIT2_ADDRESS in name or ":permit2:" in name
