"""Proves that the books and the chain agree: what `farebox ledger check` does, and the gateway now and then.

It reads every Transfer into and out of the treasury since the last time, finds each one's settlement, and books the rest: what
came in unasked is *unattributed*, what went out without us the *owner* moved. Then the treasury's balance on chain must be
what custody says. The chain is read at one block, below which nothing changes; the books are read and written in one unit, in
which what settled above that block, or is being settled, is told apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from payments import forwarders
from payments.chain.logs import Log, get_logs
from payments.chain.networks import Network, Token
from payments.chain.rpc import Request, Rpc
from payments.chain.transactions import TRANSFER_TOPIC, address_topic, encode_balance_of
from payments.deposits import ADDRESSES_MAX, Deposits
from payments.ledger import books, transfers
from payments.ledger.accounts import account_id
from payments.ledger.books import Finding
from payments.money import NANO_DECIMALS, atomic_to_nano_down
from payments.store import Store, Transaction

_PAID = "('mined', 'superseded', 'final')"
_SETTLED_LOG = (
    f"SELECT 1 FROM settlement WHERE chain_id=? AND token=? AND transaction_hash=? AND state IN {_PAID}"  # noqa: S608
    " AND kind<>'sweep' AND (transfer_log_index=? OR kind IN ('refund', 'withdrawal'))"
)
# A payment is under way from its submission on; its transfer is in the log before its row says so.
_OPEN = "SELECT 1 FROM settlement WHERE chain_id=? AND token=? AND payer=? AND pay_to=? AND state IN ('queued', 'submitted')"
_ANY_OPEN = "SELECT 1 FROM settlement WHERE chain_id=? AND token=? AND state IN ('queued', 'submitted')"
_SETTLED_ABOVE = (
    f"SELECT kind, value, received_value FROM settlement WHERE chain_id=? AND token=? AND state IN {_PAID}"  # noqa: S608
    " AND kind IN ('payment', 'upto', 'upto_topup', 'refund', 'withdrawal', 'channel_claim') AND block_number>?"
)


@dataclass(frozen=True, slots=True)
class Movement:
    """A Transfer into (+) or out of (-) the treasury that belongs to no settlement."""

    log_id: str
    counterparty: str
    amount_nano_usd: int


@dataclass(frozen=True, slots=True)
class TokenReport:
    """How one token's books compare with the chain at `block_number`. Amounts in nano-USD."""

    asset: str
    block_number: int
    on_chain: int
    books: int
    """What the treasury should have at that block."""
    in_flight: int
    """Transfers that are in the chain up to that block and being settled; part of `books`."""
    booked: tuple[Movement, ...] = ()
    """What this run found and booked."""


@dataclass(frozen=True, slots=True)
class Report:
    """The result; the books are right if there are no findings."""

    tokens: list[TokenReport] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything agrees."""
        return not self.findings


@dataclass(frozen=True, slots=True)
class _Chain:
    """What the chain said about one token, up to one block."""

    token: Token
    treasury: str
    block_number: int
    balance: int
    """Atomic units."""
    logs: list[Log]


async def reconcile(
    store: Store,
    rpc: Rpc,
    network: Network,
    pay_to: str,
    *,
    confirmations: int = 2,
    deposits: Deposits | None = None,
) -> Report:
    """Bring the books of one network up to the chain, and compare.

    Args:
        store: The database; the gateway may be running on it.
        rpc: The chain.
        network: Its tokens.
        pay_to: The treasury.
        confirmations: How far below the head the chain is read.
        deposits: Of the network, if it has deposit addresses; need not be started.

    Raises:
        RpcError: A node refused a question.
        RpcUnavailable: No node answered.
    """
    report = Report()
    if deposits is not None:
        # What lies at deposit addresses is read first: the treasury's own logs say less about a sweep.
        await deposits.catch_up()
    head = int(await rpc.call("eth_blockNumber"), 16)
    for token in network.tokens:
        cursor = await store.read(lambda tx, asset=token.asset: _cursor(tx, asset))  # type: ignore[misc]
        if cursor is not None and cursor > head:
            message = (
                f"the books were read up to block {cursor}, the chain is at {head}: another chain, or a lagging node"
            )
            report.findings.append(Finding("chain_behind", token.asset, message))
            continue
        # Never behind what was read before: just after the books were opened, that is the head of then.
        block_number = max(head - confirmations, cursor or 0)
        chain = await _read_chain(rpc, token, pay_to.lower(), cursor, block_number)
        compared = await store.write(lambda tx, chain=chain, cursor=cursor: _compare(tx, chain, cursor))  # type: ignore[misc]
        if isinstance(compared, Finding):
            report.findings.append(compared)
            continue
        report.tokens.append(compared)
        if abs(compared.on_chain - compared.books) > await store.read(lambda tx, token=token: _tolerance(tx, token)):  # type: ignore[misc]
            message = (
                f"at block {block_number} the treasury has {compared.on_chain} nano-USD on chain, the books say"
                f" {compared.books}"
            )
            report.findings.append(Finding("chain_differs", token.asset, message))
        if deposits is not None:
            report.findings.extend(await _compare_forwarders(store, rpc, token))
    report.findings.extend(await store.read(books.check))
    return report


async def _compare_forwarders(store: Store, rpc: Rpc, token: Token) -> list[Finding]:
    """What the deposit addresses have on chain, against the books, at the block that deposits were read to."""
    cursor, known = await store.read(
        lambda tx: (forwarders.cursor(tx, token.chain_id), sorted(forwarders.addresses(tx, token.chain_id)))
    )
    if cursor is None or not known:
        return []
    block_number, held = cursor.block_number, 0
    for start in range(0, len(known), ADDRESSES_MAX):
        requests: list[Request] = [
            ("eth_call", ({"to": token.address, "data": "0x" + encode_balance_of(each).hex()}, hex(block_number)))
            for each in known[start : start + ADDRESSES_MAX]
        ]
        held += sum(int(answer, 16) for answer in await rpc.ask(requests))

    def by_the_books(tx: Transaction) -> int:
        balance = transfers.balance(tx, account_id("forwarders", token.asset)).balance
        came, left = forwarders.booked_above(tx, token.chain_id, token.asset, block_number)
        return -balance - came + left

    on_chain, expected = atomic_to_nano_down(held, token.decimals), await store.read(by_the_books)
    if abs(on_chain - expected) <= await store.read(lambda tx: _tolerance(tx, token)):
        return []
    message = (
        f"at block {block_number} the deposit addresses have {on_chain} nano-USD on chain, the books say {expected}"
    )
    return [Finding("forwarders_differ", token.asset, message)]


async def open_books(store: Store, rpc: Rpc, network: Network, pay_to: str) -> None:
    """Book what the treasury has before the first payment as the owner's. Once opened, this does nothing.

    The gateway does so before it takes payments: later nobody could tell the owner's money from a mistake in the books.

    Raises:
        RpcError: A node refused a question.
        RpcUnavailable: No node answered.
    """
    for token in network.tokens:
        if await store.read(lambda tx, asset=token.asset: _cursor(tx, asset)) is None:  # type: ignore[misc]
            head = int(await rpc.call("eth_blockNumber"), 16)
            chain = await _read_chain(rpc, token, pay_to.lower(), None, head)
            await store.write(lambda tx, chain=chain: _compare(tx, chain, None))  # type: ignore[misc]


async def _read_chain(rpc: Rpc, token: Token, treasury: str, cursor: int | None, block_number: int) -> _Chain:
    call = {"to": token.address, "data": "0x" + encode_balance_of(treasury).hex()}
    balance = int(await rpc.call("eth_call", [call, hex(block_number)]), 16)
    logs: list[Log] = []
    if cursor is not None:
        account = address_topic(treasury)
        incoming = await get_logs(rpc, token.address, [TRANSFER_TOPIC, None, account], cursor + 1, block_number)
        outgoing = await get_logs(rpc, token.address, [TRANSFER_TOPIC, account], cursor + 1, block_number)
        # A transfer to itself moves nothing and would appear twice.
        logs = [each for each in (*incoming, *outgoing) if each["topics"][1] != each["topics"][2]]
    return _Chain(token, treasury, block_number, balance, logs)


def _compare(tx: Transaction, chain: _Chain, cursor: int | None) -> TokenReport | Finding:
    token, asset = chain.token, chain.token.asset
    if _cursor(tx, asset) != cursor:
        return Finding("read_meanwhile", asset, "another check ran at the same time; run it again")
    booked, in_flight, first_open = [], 0, None
    known = forwarders.addresses(tx, token.chain_id)
    for log in chain.logs:
        amount = _amount(log, chain)
        if amount > 0 and (swept_from := known.get("0x" + log["topics"][1][-40:].lower())) is not None:
            forwarders.book(tx, _sweep(log, chain, swept_from.address), swept_from.wallet, chain.treasury)
            continue
        if _is_settled(tx, log, token):
            continue
        if _is_open(tx, log, token):
            in_flight += amount
            block = int(log["blockNumber"], 16)
            first_open = block if first_open is None else min(first_open, block)
        elif amount:
            booked.append(_book(tx, log, amount, asset))
    if cursor is None and tx.execute(_ANY_OPEN, (token.chain_id, token.address)).fetchone() is not None:
        message = "payments are under way, so that the treasury's opening balance cannot be told; run it again later"
        return Finding("not_opened", asset, message)
    above = sum(_settled_above(tx, chain))
    above += forwarders.swept_above(tx, token.chain_id, asset, chain.treasury, chain.block_number)
    custody = transfers.balance(tx, account_id("custody", asset)).balance
    on_chain = atomic_to_nano_down(chain.balance, token.decimals)
    if cursor is None:
        _open_books(tx, asset, on_chain - (-custody - above))
        custody = transfers.balance(tx, account_id("custody", asset)).balance
    # What is still being settled is read again next time, when its row says what it was.
    read_up_to = chain.block_number if first_open is None else first_open - 1
    tx.execute(
        "INSERT INTO chain_cursor (asset, block_number) VALUES (?, ?)"
        " ON CONFLICT (asset) DO UPDATE SET block_number=excluded.block_number",
        (asset, read_up_to),
    )
    return TokenReport(
        asset=asset,
        block_number=chain.block_number,
        on_chain=on_chain,
        books=-custody - above + in_flight,
        in_flight=in_flight,
        booked=tuple(movement for movement, new in booked if new),
    )


def _open_books(tx: Transaction, asset: str, surplus: int) -> None:
    """What the treasury had before anything was booked is the owner's."""
    custody, owner = account_id("custody", asset), account_id("owner", asset)
    transfers.ensure_account(tx, custody)
    if surplus:
        debit, credit = (custody, owner) if surplus > 0 else (owner, custody)
        transfers.post(tx, id=f"opening:{asset}", debit=debit, credit=credit, amount=abs(surplus), reference="opening")


def _book(tx: Transaction, log: Log, amount: int, asset: str) -> tuple[Movement, bool]:
    custody = account_id("custody", asset)
    log_id = f"log:{log['transactionHash']}:{int(log['logIndex'], 16)}"
    seen = transfers.find(tx, log_id)
    if seen is not None and custody not in (seen.debit, seen.credit):
        log_id += ":treasury"  # the owner has sent it to a deposit address, for which it is booked already
    debit, credit = (
        (custody, account_id("unattributed", asset)) if amount > 0 else (account_id("owner", asset), custody)
    )
    new = transfers.post(
        tx, id=log_id, debit=debit, credit=credit, amount=abs(amount), reference=log["transactionHash"]
    )
    counterparty = log["topics"][1 if amount > 0 else 2]
    return Movement(log_id, "0x" + counterparty[-40:], amount), new


def _sweep(log: Log, chain: _Chain, address: str) -> forwarders.Movement:
    return forwarders.Movement(
        direction="out",
        token=chain.token,
        address=address,
        other=chain.treasury,
        value=int(log["data"], 16),
        transaction_hash=log["transactionHash"],
        log_index=int(log["logIndex"], 16),
        block_number=int(log["blockNumber"], 16),
    )


def _amount(log: Log, chain: _Chain) -> int:
    """Nano-USD, positive into the treasury."""
    incoming = log["topics"][2][-40:].lower() == chain.treasury[2:]
    amount = atomic_to_nano_down(int(log["data"], 16), chain.token.decimals)
    return amount if incoming else -amount


def _is_settled(tx: Transaction, log: Log, token: Token) -> bool:
    parameters = (token.chain_id, token.address, log["transactionHash"], int(log["logIndex"], 16))
    return tx.execute(_SETTLED_LOG, parameters).fetchone() is not None


def _is_open(tx: Transaction, log: Log, token: Token) -> bool:
    sender, recipient = ("0x" + topic[-40:].lower() for topic in log["topics"][1:3])
    return tx.execute(_OPEN, (token.chain_id, token.address, sender, recipient)).fetchone() is not None


def _settled_above(tx: Transaction, chain: _Chain) -> Iterable[int]:
    """What custody has booked that the chain had not yet seen at the block that was read."""
    token = chain.token
    rows: list[Any] = tx.execute(_SETTLED_ABOVE, (token.chain_id, token.address, chain.block_number)).fetchall()
    for kind, value, received in rows:
        yield (
            -atomic_to_nano_down(int(value), token.decimals)
            if kind in ("refund", "withdrawal")
            else atomic_to_nano_down(int(received), token.decimals)
        )


def _tolerance(tx: Transaction, token: Token) -> int:
    """A token finer than a nano-USD loses less than one with each transfer; all others are exact."""
    if token.decimals <= NANO_DECIMALS:
        return 0
    custody, deposited = account_id("custody", token.asset), account_id("forwarders", token.asset)
    count = tx.execute(
        "SELECT COUNT(*) FROM ledger_transfer WHERE debit_account IN (?, ?) OR credit_account IN (?, ?)",
        (custody, deposited, custody, deposited),
    ).fetchone()
    return int(count[0])


def _cursor(tx: Transaction, asset: str) -> int | None:
    row = tx.execute("SELECT block_number FROM chain_cursor WHERE asset=?", (asset,)).fetchone()
    return None if row is None else int(row[0])
