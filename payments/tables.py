"""The schema, as SQLModel tables. Alembic migrations (`payments/migrations`) are made from it.

Hot paths write these tables with prepared SQL inside store units; the models are the schema's one description and serve
the command line. Times are integers of milliseconds since 1970 UTC, amounts integers of nano-USD, chain values decimal text
(a uint256 does not fit in a column).
"""

from __future__ import annotations

from sqlalchemy import CheckConstraint, Column, Index, LargeBinary, UniqueConstraint, text
from sqlmodel import Field, SQLModel

from payments.channels.tables import Channel, ChannelClaim, ChannelRequest
from payments.columns import big as _big
from payments.facilitator.tables import DiscoveredResource, FacilitatedPayment, FacilitatorFailure
from payments.sponsoring.tables import SponsoredApproval
from payments.wallet_tables import DepositAddress, DepositCursor, ForwarderMovement, WalletAccount, Withdrawal

__all__ = [
    "Channel",
    "ChannelClaim",
    "ChannelRequest",
    "DepositAddress",
    "DepositCursor",
    "DiscoveredResource",
    "FacilitatedPayment",
    "FacilitatorFailure",
    "ForwarderMovement",
    "SponsoredApproval",
    "WalletAccount",
    "Withdrawal",
]


class LedgerAccount(SQLModel, table=True):
    """One side of transfers. `balance` is posted; `pending_out` is held and not spendable."""

    __tablename__ = "ledger_account"
    __table_args__ = (CheckConstraint("pending_out >= 0"), CheckConstraint("overdraft OR balance >= pending_out"))

    id: str = Field(primary_key=True)
    """`<kind>:<owner>@<asset>`, e.g. `payer:0xabc…@eip155:84532/USDC`, `pool:default@USD`, `custody@eip155:84532/USDC`."""
    kind: str = Field(index=True)
    owner: str = Field(index=True)
    asset: str
    balance: int = Field(sa_column=_big(default=0))
    pending_out: int = Field(sa_column=_big(default=0))
    overdraft: bool = False
    """True for the books' own accounts (custody, grants, variance), which may go below zero."""


class LedgerTransfer(SQLModel, table=True):
    """A movement from `debit_account` to `credit_account`; its states are `payments.ledger.transfers`' matter."""

    __tablename__ = "ledger_transfer"
    __table_args__ = (
        CheckConstraint("amount > 0"),
        CheckConstraint("debit_account <> credit_account"),
        CheckConstraint("(state = 'posted') = (posted_amount IS NOT NULL)"),
        CheckConstraint("posted_amount IS NULL OR posted_amount BETWEEN 0 AND amount"),
        # Few transfers are pending at a time, and a start looks for them all.
        Index(
            "ledger_transfer_pending",
            "id",
            sqlite_where=text("state = 'pending'"),
            postgresql_where=text("state = 'pending'"),
        ),
    )

    id: str = Field(primary_key=True)
    """The idempotency key, e.g. `settle:<settlement id>`, `hold:<receipt id>`, `log:<tx hash>:<index>`."""
    debit_account: str = Field(index=True, foreign_key="ledger_account.id")
    credit_account: str = Field(index=True, foreign_key="ledger_account.id")
    amount: int = Field(sa_column=_big())
    """What was held, or for a transfer posted at once what moved."""
    posted_amount: int | None = Field(default=None, sa_column=_big(nullable=True))
    state: str
    """pending | posted | voided"""
    reference: str = Field(index=True)
    created_ms: int = Field(sa_column=_big())
    updated_ms: int = Field(sa_column=_big())


class Authorization(SQLModel, table=True):
    """A payer's signed authorization, reserved under its canonical identity before any work."""

    __tablename__ = "payment_authorization"
    __table_args__ = (
        # Few are reserved and not settled at a time, and a start looks for them all.
        Index(
            "payment_authorization_reserved",
            "receipt_id",
            sqlite_where=text("state = 'reserved'"),
            postgresql_where=text("state = 'reserved'"),
        ),
        # What a payer has under way is asked for with each of its payments, see `payments.promises`.
        Index(
            "payment_authorization_under_way",
            "payer",
            sqlite_where=text("state IN ('reserved', 'pledged')"),
            postgresql_where=text("state IN ('reserved', 'pledged')"),
        ),
    )

    identity: str = Field(primary_key=True)
    """`<chain id>|<verifying contract>|<payer>|<nonce as decimal>`"""
    digest: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    """SHA-256 over payload and request: anything else under the same identity is a conflict."""
    receipt_id: str = Field(unique=True, foreign_key="receipt.id")
    payer: str
    """Who signed, lower-case hex."""
    state: str
    """reserved | paid | failed | …; the transitions stand in `payments.tenders.authorizations`. How far the transfer has come
    is in the settlement's state alone, so that the two cannot disagree."""
    value_nano_usd: int = Field(sa_column=_big())
    """What the signed value is worth."""
    exposed_nano_usd: int = Field(default=0, sa_column=_big(default=0))
    """Inference that may begin before the money has arrived; counts until it has, or cannot any more."""
    created_ms: int = Field(sa_column=_big())


class Receipt(SQLModel, table=True):
    """What became of one request. Holds no content."""

    __tablename__ = "receipt"
    __table_args__ = (
        # Few receipts are open at a time, and a start looks for them all.
        Index("receipt_open", "id", sqlite_where=text("state = 'open'"), postgresql_where=text("state = 'open'")),
    )

    id: str = Field(primary_key=True)
    """`rcpt_` and 160 random bits: whoever knows it may read it."""
    state: str
    """open | captured | released | interrupted; see `payments.receipts`."""
    uses: int = 1
    """1, and one more each time the same payment resumes an interrupted request; part of the id of its hold."""
    tender: str
    """exact | channel | prepaid | account"""
    payer: str = Field(index=True)
    """A wallet address in lower case, or `key:<key id>`."""
    asset: str
    quoted_nano_usd: int = Field(sa_column=_big())
    paid_nano_usd: int = Field(default=0, sa_column=_big(default=0))
    """What an on-chain payment brought in; 0 for the other tenders."""
    charged_nano_usd: int | None = Field(default=None, sa_column=_big(nullable=True))
    spent_nano_usd: int = Field(default=0, sa_column=_big(default=0))
    """What uses have cost that the caller hung up on before their answer; part of what is charged in the end."""
    details: str = "{}"
    """JSON: itemised quote, model, provider, strategy, attempts, usage."""
    instance: str | None = None
    """The process that works on it, or did last; while that one's lease `instance:<id>` lives, nobody else ends it."""
    reason: str | None = None
    """Why it was released or interrupted, as a stable word."""
    created_ms: int = Field(sa_column=_big())
    closed_ms: int | None = Field(default=None, sa_column=_big(nullable=True))


class Settlement(SQLModel, table=True):
    """The outbox: what is to be paid on a chain, written before it happens."""

    __tablename__ = "settlement"
    __table_args__ = (
        # One Transfer log is the evidence of at most one settlement, or one transfer could be credited twice.
        UniqueConstraint("chain_id", "transaction_hash", "transfer_log_index"),
        Index("settlement_open", "state"),
        # Few are asked for at a time, and the engine looks for them all the time.
        Index(
            "settlement_look_again",
            "chain_id",
            sqlite_where=text("look_again_ms IS NOT NULL"),
            postgresql_where=text("look_again_ms IS NOT NULL"),
        ),
        Index(
            "settlement_watched",
            "chain_id",
            "watch_again_ms",
            sqlite_where=text("watch_again_ms IS NOT NULL"),
            postgresql_where=text("watch_again_ms IS NOT NULL"),
        ),
        # What a payer has under way is asked for with every payment, see `payments.promises`: of payments and pledges the
        # authorizations tell more.
        Index(
            "settlement_under_way",
            "payer",
            sqlite_where=text("state IN ('queued', 'submitted') AND kind NOT IN ('payment', 'upto')"),
            postgresql_where=text("state IN ('queued', 'submitted') AND kind NOT IN ('payment', 'upto')"),
        ),
        # Likewise what a reorganisation took out of the chain: it had arrived before.
        Index(
            "settlement_reopened",
            "payer",
            sqlite_where=text("state IN ('queued', 'submitted') AND received_value IS NOT NULL"),
            postgresql_where=text("state IN ('queued', 'submitted') AND received_value IS NOT NULL"),
        ),
    )

    id: str = Field(primary_key=True)
    kind: str
    """payment | refund | …; see `payments.settlement.orders.Kind`"""
    reference: str = Field(index=True)
    """A payment's receipt id, or a refund's ledger transfer id."""
    chain_id: int = Field(sa_column=_big())
    state: str
    """queued | submitted | mined | final | failed | superseded; the transitions stand in `payments.settlement.states`."""
    token: str
    payer: str
    pay_to: str
    value: str
    authorization_nonce: str | None = None
    """The nonce whose use is the evidence: decimal text; None for what needs no authorization."""
    call_to: str
    call_data: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    valid_before: int = Field(default=0, sa_column=_big(default=0))
    """Unix seconds after which the call cannot succeed any more; 0 if never."""
    transaction_id: str | None = Field(default=None, index=True)
    """The `chain_transaction` that carries it, written in the same commit; None while it is queued."""
    position: int = 0
    """Its place in that transaction's batch."""
    attempts: int = 0
    """Batches that carried it and reverted as a whole."""
    transaction_hash: str | None = Field(default=None, index=True)
    """Of the transaction that is the evidence (somebody else's where they submitted the authorization); while there is none, of
    the newest one that carries it."""
    transfer_log_index: int | None = Field(default=None, sa_column=_big(nullable=True))
    """The index in its block of the token's Transfer log that is the evidence."""
    received_value: str | None = None
    """What that Transfer brought, in atomic units: less than `value` for a token that takes a fee."""
    from_block: int = Field(default=0, sa_column=_big(default=0))
    """The head when the row was first carried: evidence is searched from here on."""
    block_number: int | None = Field(default=None, sa_column=_big(nullable=True))
    reason: str | None = None
    created_ms: int = Field(sa_column=_big())
    updated_ms: int = Field(sa_column=_big())
    look_again_ms: int | None = Field(default=None, sa_column=_big(nullable=True))
    """When somebody asked the engine to look at it again; None once it has."""
    waits_for: str | None = None
    """What has to happen before it is carried, such as ``approval:…``; None once it has."""
    watch_again_ms: int | None = Field(default=None, sa_column=_big(nullable=True))
    """When a failed one is looked at next, since somebody may execute its authorization all the same; None once nobody can."""


class ChainTransaction(SQLModel, table=True):
    """A transaction of ours: signed and written before anybody sees it."""

    __tablename__ = "chain_transaction"
    __table_args__ = (
        UniqueConstraint("chain_id", "signer", "signer_nonce"),
        # Few are not in a block at a time, and a start looks for them all.
        Index(
            "chain_transaction_signed",
            "chain_id",
            sqlite_where=text("state = 'signed'"),
            postgresql_where=text("state = 'signed'"),
        ),
    )

    id: str = Field(primary_key=True)
    chain_id: int = Field(sa_column=_big())
    kind: str
    """single | batch | filler (an empty one that closes a gap in a signer's nonces)"""
    state: str
    """signed | included | lost; the transitions stand in `payments.settlement.states`."""
    signer: str
    signer_nonce: int = Field(sa_column=_big())
    raw_transaction: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    broadcasts: str
    """JSON list of every form of it that was signed, oldest first: {hash, max_fee, priority_fee}; all share the nonce, unless a
    stranger used it up."""
    inclusions: int = 0
    """How often it was seen in a block: more than once only after reorganisations."""
    block_number: int | None = Field(default=None, sa_column=_big(nullable=True))
    gas_used: int | None = Field(default=None, sa_column=_big(nullable=True))
    fee_wei: str | None = None
    """What it cost in all, decimal text."""
    created_ms: int = Field(sa_column=_big())
    updated_ms: int = Field(sa_column=_big())


class PaymentIdentifier(SQLModel, table=True):
    """A payer's own name for what it pays for: at most one of its payments bears it."""

    __tablename__ = "payment_identifier"

    payer: str = Field(primary_key=True)
    identifier: str = Field(primary_key=True)
    receipt_id: str
    """Gone if the payment was forgotten: then the name is free again."""


class ApiKey(SQLModel, table=True):
    """An API key, hashed at rest, drawing on a pool or spending a wallet's balance."""

    __tablename__ = "api_key"
    __table_args__ = (CheckConstraint("(pool IS NULL) <> (wallet IS NULL)", name="api_key_draws_on_one"),)

    id: str = Field(primary_key=True)
    name: str
    pool: str | None = None
    wallet: str | None = Field(default=None, index=True)
    """The wallet (lower-case hex) that made it and whose balance it spends."""
    pay_to: str | None = None
    """The one recipient that a facilitator settles for at its request."""
    key_hash: str = Field(unique=True)
    """SHA-256 of the whole key, which has 256 random bits (so a slow hash would protect nothing)."""
    prefix: str
    """The first characters, so that people can recognise a key."""
    admin: bool = False
    created_ms: int = Field(sa_column=_big())
    revoked_ms: int | None = Field(default=None, sa_column=_big(nullable=True))


class SignInNonce(SQLModel, table=True):
    """A sign-in message's nonce that was used; kept until the message would have expired."""

    __tablename__ = "sign_in_nonce"

    nonce: str = Field(primary_key=True)
    expires_ms: int = Field(sa_column=_big())


class Replay(SQLModel, table=True):
    """An answer kept for minutes for the same payment sent again: a ciphertext whose key only the payer can form."""

    __tablename__ = "replay"

    receipt_id: str = Field(primary_key=True)
    ciphertext: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    expires_ms: int = Field(sa_column=_big())


class ChainCursor(SQLModel, table=True):
    """How far a token's Transfer logs of the treasury were read into the ledger."""

    __tablename__ = "chain_cursor"

    asset: str = Field(primary_key=True)
    block_number: int = Field(sa_column=_big())


class Lease(SQLModel, table=True):
    """Who does what only one process may do at a time."""

    __tablename__ = "lease"

    name: str = Field(primary_key=True)
    """`instance:<id>`, `signer:<chain>:<address>`, `watcher:<chain>`, …"""
    owner: str
    expires_ms: int = Field(sa_column=_big())


class CommitMark(SQLModel, table=True):
    """The last group of units that a writer committed: how a writer whose connection died in a commit learns its fate."""

    __tablename__ = "commit_mark"

    writer: str = Field(primary_key=True)
    number: int = Field(sa_column=_big())
    written_ms: int = Field(sa_column=_big())


class Anchor(SQLModel, table=True):
    """Which chain and which contracts the books are about, see `payments.anchors`."""

    __tablename__ = "anchor"

    name: str = Field(primary_key=True)
    """`chain:eip155:<id>`, `token:<asset>`."""
    value: str
    """The hash of the first block, the contract's address."""
