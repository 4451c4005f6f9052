"""How deposits, claims and refunds of channels are proven on the chain, and what they do to the book.

The proof is the contract's own event for this very channel; what the channel holds afterwards is never computed from it but
read from the chain, since the book marks the channel. So it makes no difference who submitted what.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from payments.chain.channel_contract import (
    DEPOSITED_TOPIC,
    GAS_CLAIM_BASE,
    GAS_CLAIM_EACH,
    GAS_DEPOSIT,
    GAS_REFUND,
    REFUNDED_TOPIC,
    SETTLED_TOPIC,
    decode_states,
    permit2_deposit_terms,
    states_call,
)
from payments.chain.logs import Log, get_logs, receipt_with, transferred
from payments.chain.networks import (
    BATCH_SETTLEMENT_ADDRESS,
    Network,
    Token,
)
from payments.chain.transactions import (
    WORD,
    address_topic,
)
from payments.channels import book
from payments.ledger import transfers
from payments.ledger.accounts import account_id
from payments.money import atomic_to_nano_down
from payments.settlement import permit2_evidence
from payments.settlement.authorization_nonces import end_of, is_used, nonce_read
from payments.settlement.evidence import find_eip3009
from payments.settlement.orders import Evidence, Kind, NoEvidence, NonceRead, Search, SettlementOrder
from payments.settlement.permit2_evidence import Permit2Use
from payments.store import Store, Transaction

CLAIM_RETRY_MS = 60_000
_CLAIMS = "SELECT channel_id, total FROM channel_claim WHERE settlement_id = ?"


class DepositProof:
    """A deposit: the contract's `Deposited` for this channel and amount."""

    def of_call(self, order: SettlementOrder, receipt: dict[str, Any], logs: list[Log]) -> Evidence | None:
        """See `payments.settlement.orders.Proof`."""
        return _pick_deposit(receipt, logs, order)

    async def search(self, order: SettlementOrder, where: Search) -> Evidence | NoEvidence:
        """See `payments.settlement.orders.Proof`. If somebody else submitted the deposit, it is in the channel all the same."""
        nonce = deposit_nonce(order)
        if not await is_used(where.rpc, nonce, where.head):
            return NoEvidence(nonce_consumed=False)
        ended = await end_of(nonce, order.payer, where)
        terms = permit2_deposit_terms(order.call_data)
        if terms is None:
            evidence = await find_eip3009(order, where, _pick_deposit)
        else:
            use = Permit2Use(BATCH_SETTLEMENT_ADDRESS, permit2_deposit_terms, terms, nonce, _pick_deposit)
            topics = [DEPOSITED_TOPIC, order.reference]
            evidence = await permit2_evidence.find(order, use, where, ended, BATCH_SETTLEMENT_ADDRESS, topics)
        return evidence or NoEvidence(nonce_consumed=True, explained=ended is not None)


class RefundProof:
    """A refund: the contract's `Refunded` for this channel."""

    def of_call(self, order: SettlementOrder, receipt: dict[str, Any], logs: list[Log]) -> Evidence | None:
        """See `payments.settlement.orders.Proof`."""
        return _pick(receipt, logs, REFUNDED_TOPIC, order)

    async def search(self, order: SettlementOrder, where: Search) -> Evidence | NoEvidence:
        """See `payments.settlement.orders.Proof`: anybody can submit the refund that we signed."""
        (answer,) = await where.rpc.ask([states_call([int(order.reference, 16)])])
        _, (state,), _ = decode_states(answer, 1)
        assert order.authorization_nonce is not None
        if state.refund_nonce <= order.authorization_nonce:
            return NoEvidence(nonce_consumed=False)
        topics = [REFUNDED_TOPIC, order.reference]
        for log in await get_logs(where.rpc, BATCH_SETTLEMENT_ADDRESS, topics, where.from_block, where.head):
            evidence = _pick(await receipt_with(where.rpc, log), [log], REFUNDED_TOPIC, order)
            if evidence is not None:
                return evidence
        return NoEvidence(nonce_consumed=True)


class ClaimProof:
    """A batch of claims that is settled in the same call: the Transfer from the contract to the treasury.

    Args:
        store: Knows what each claim is of.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def of_call(self, order: SettlementOrder, receipt: dict[str, Any], logs: list[Log]) -> Evidence | None:
        """See `payments.settlement.orders.Proof`."""
        topics = [SETTLED_TOPIC, address_topic(order.pay_to), address_topic(order.token)]
        settled = [
            log for log in logs if log["address"].lower() == BATCH_SETTLEMENT_ADDRESS and log["topics"][:3] == topics
        ]
        if not settled:
            return None
        sent = int(settled[0]["data"][2 : 2 + 2 * WORD], 16)
        for log in logs:
            value = transferred(log, order.token, BATCH_SETTLEMENT_ADDRESS, order.pay_to)
            if value:
                return replace(evidence_of(receipt, log, value), withheld_value=max(sent - value, 0))
        return None

    async def search(self, order: SettlementOrder, where: Search) -> Evidence | NoEvidence:
        """See `payments.settlement.orders.Proof`: anybody can submit the claims that we signed, and settle them."""
        claims = await self._store.read(lambda tx: tx.execute(_CLAIMS, (order.id,)).fetchall())
        (answer,) = await where.rpc.ask([states_call([int(channel, 16) for channel, _ in claims])])
        _, found, _ = decode_states(answer, len(claims))
        if any(state.total_claimed < int(total) for state, (_, total) in zip(found, claims, strict=True)):
            return NoEvidence(nonce_consumed=False)
        topics = [SETTLED_TOPIC, address_topic(order.pay_to), address_topic(order.token)]
        for log in reversed(await get_logs(where.rpc, BATCH_SETTLEMENT_ADDRESS, topics, where.from_block, where.head)):
            receipt = await receipt_with(where.rpc, log)
            evidence = self.of_call(order, receipt, receipt["logs"])
            if evidence is not None:
                return evidence
        return NoEvidence(nonce_consumed=True)


def kinds(store: Store, network: Network) -> dict[str, Kind]:
    """The three kinds by name.

    Args:
        store: The database.
        network: Its tokens.
    """
    books = _Books(network)
    return {
        "channel_deposit": Kind(
            DepositProof(),
            books.deposited,
            books.deposit_failed,
            lambda _: GAS_DEPOSIT,
            batchable=True,
            nonce=deposit_nonce,
            on_reopened=books.deposit_reopened,
        ),
        "channel_claim": Kind(
            ClaimProof(store),
            books.claimed,
            books.claim_failed,
            gas_of_claim,
            batchable=True,
            on_reopened=books.claim_reopened,
        ),
        "channel_refund": Kind(
            RefundProof(),
            books.refunded,
            books.refund_failed,
            lambda _: GAS_REFUND,
            batchable=True,
            on_reopened=books.refund_reopened,
        ),
    }


def gas_of_claim(order: SettlementOrder) -> int:
    """The most gas that a batch of claims uses, by the length of its calldata: an entry is at least 16 words."""
    return GAS_CLAIM_BASE + GAS_CLAIM_EACH * max(1, len(order.call_data) // (16 * WORD))


class _Books:
    def __init__(self, network: Network) -> None:
        self._network = network

    def deposited(self, tx: Transaction, row: dict[str, Any]) -> None:
        self._mark(tx, row)

    def deposit_failed(self, tx: Transaction, row: dict[str, Any]) -> None:
        self._mark(tx, row)

    def deposit_reopened(self, tx: Transaction, row: dict[str, Any]) -> None:
        # It is not there, and nothing is lent on it until it is again.
        self._mark(tx, row)

    def claimed(self, tx: Transaction, row: dict[str, Any]) -> None:
        # Without its token, which was taken out of the configuration, a claim is booked when the chain is asked next.
        token = self._network.token_at(row["token"])
        for channel_id, total in tx.execute(_CLAIMS, (row["id"],)).fetchall():
            channel = book.find(tx, channel_id)
            assert channel is not None
            total_nano_usd = 0 if token is None else atomic_to_nano_down(int(total), token.decimals)
            if token is not None and total_nano_usd > channel.claimed_nano_usd:
                book.book_claimed(tx, channel_id, total_nano_usd, token)
            self._end_claim(tx, channel, row, claim_from_ms=0)
        if token is not None:
            _book_withheld(tx, row, token)

    def claim_failed(self, tx: Transaction, row: dict[str, Any]) -> None:
        for channel_id, _ in tx.execute(_CLAIMS, (row["id"],)).fetchall():
            channel = book.find(tx, channel_id)
            assert channel is not None
            # At once again, it would fail again: the chain is asked first, and gas is not burnt without bound.
            self._end_claim(tx, channel, row, claim_from_ms=book.now_ms() + CLAIM_RETRY_MS)

    def claim_reopened(self, tx: Transaction, row: dict[str, Any]) -> None:
        token = self._network.token_at(row["token"])
        if token is not None:
            _book_withheld(tx, row, token, back=True)
        for channel_id, _ in tx.execute(_CLAIMS, (row["id"],)).fetchall():
            channel = book.find(tx, channel_id)
            assert channel is not None
            if channel.claim_id is None:
                # It is under way again, and nothing else is to claim the same meanwhile.
                book.put(tx, channel_id, claim_id=row["id"])
            book.mark(tx, channel_id, None)

    def refunded(self, tx: Transaction, row: dict[str, Any]) -> None:
        # What is given back stays out of reach until the chain was asked what is left.
        self._end_refund(tx, row)

    def refund_failed(self, tx: Transaction, row: dict[str, Any]) -> None:
        self._end_refund(tx, row)

    def refund_reopened(self, tx: Transaction, row: dict[str, Any]) -> None:
        channel = book.find(tx, row["reference"])
        assert channel is not None
        if channel.refund_id is None:
            book.put(tx, channel.id, refund_id=row["id"])
        self._mark(tx, row)

    def _end_claim(self, tx: Transaction, channel: book.Channel, row: dict[str, Any], claim_from_ms: int) -> None:
        if channel.claim_id == row["id"]:
            book.put(tx, channel.id, claim_id=None, claim_from_ms=claim_from_ms)
        book.mark(tx, channel.id, row.get("block_number"))

    def _end_refund(self, tx: Transaction, row: dict[str, Any]) -> None:
        channel = book.find(tx, row["reference"])
        assert channel is not None
        if channel.refund_id == row["id"]:
            book.put(tx, channel.id, refund_id=None)
        self._mark(tx, row)

    def _mark(self, tx: Transaction, row: dict[str, Any]) -> None:
        book.mark(tx, row["reference"], row.get("block_number"))


def _book_withheld(tx: Transaction, row: dict[str, Any], token: Token, *, back: bool = False) -> None:
    """What was claimed and did not arrive, because the token took a fee, is the operator's loss; or is `back`, for the claim is
    not in the chain any more."""
    name = f"withheld:{row['id']}:"
    variance, custody = account_id("variance", token.asset), account_id("custody", token.asset)
    rounds = transfers.count(tx, row["id"], name)
    if back != bool(rounds % 2):
        return
    if back:
        booked = transfers.find(tx, f"{name}{rounds - 1}")
        assert booked is not None
        debit, credit, amount = custody, variance, booked.amount
    else:
        debit, credit, amount = variance, custody, atomic_to_nano_down(int(row["withheld_value"]), token.decimals)
    if amount:
        transfers.post(tx, id=f"{name}{rounds}", debit=debit, credit=credit, amount=amount, reference=row["id"])


def _pick_deposit(receipt: dict[str, Any], logs: list[Log], order: SettlementOrder) -> Evidence | None:
    return _pick(receipt, logs, DEPOSITED_TOPIC, order)


def _pick(receipt: dict[str, Any], logs: list[Log], event: str, order: SettlementOrder) -> Evidence | None:
    for log in logs:
        if log["address"].lower() != BATCH_SETTLEMENT_ADDRESS or log["topics"][:2] != [event, order.reference]:
            continue
        value = int(log["data"][2 : 2 + 2 * WORD], 16)
        if 0 < value <= order.value:
            return evidence_of(receipt, log, value)
    return None


def evidence_of(receipt: dict[str, Any], log: Log, value: int) -> Evidence:
    """A log of a receipt as evidence that `value` was moved."""
    return Evidence(
        transaction_hash=receipt["transactionHash"],
        block_number=int(receipt["blockNumber"], 16),
        block_hash=receipt["blockHash"],
        transfer_log_index=int(log["logIndex"], 16),
        received_value=value,
    )


def deposit_nonce(order: SettlementOrder) -> NonceRead:
    """Where the chain keeps the nonce of a deposit's authorization."""
    return nonce_read(order, permit2=permit2_deposit_terms(order.call_data) is not None)
