"""The books' accounts: how they are named, and which of them may go below zero.

A balance above zero is what we owe the account's owner. `custody` is the counter side of everything on chain, so its balance
is minus what the treasury should hold, and that of `forwarders` minus what the deposit addresses hold; `variance` is what the
operator lost on overruns and on answers that were never paid; `receivable` is minus what was earned from a payer and is not on
chain yet. What settlements cost is kept in the chain's own coin (`native_asset`, in gwei): `signer` is minus what each has
paid, `gas` the sum.
"""

from __future__ import annotations

from payments.store import Transaction

OVERDRAFT_KINDS = frozenset({"custody", "forwarders", "variance", "owner", "grants", "signer", "receivable"})
OWNERLESS_KINDS = frozenset(
    {"custody", "forwarders", "revenue", "variance", "dust", "unattributed", "owner", "grants", "gas"}
)
OWNED_KINDS = frozenset({"payer", "pool", "key", "signer", "receivable"})

_INSERT = (
    "INSERT INTO ledger_account (id, kind, owner, asset, balance, pending_out, overdraft) VALUES (?, ?, ?, ?, 0, 0, ?)"
    " ON CONFLICT (id) DO NOTHING"
)


def account_id(kind: str, asset: str, owner: str | None = None) -> str:
    """The id of an account: ``<kind>:<owner>@<asset>``, or ``<kind>@<asset>`` for the books' own."""
    return f"{kind}@{asset}" if owner is None else f"{kind}:{owner}@{asset}"


def native_asset(chain_id: int) -> str:
    """The ledger's name of a chain's own coin, whose amounts are in gwei."""
    return f"eip155:{chain_id}/native"


def unit_of(account: str) -> str:
    """What an account's amounts are in, thousandths of a millionth of it: ``usd``, or a chain's own coin, ``native``."""
    return "native" if account.endswith("/native") else "usd"


def payer_account(address: str, asset: str) -> str:
    """What is owed to a wallet, whose address is in lower-case hex."""
    return f"payer:{address}@{asset}"


def may_overdraw(account: str) -> bool:
    """Whether an account with this id may go below zero."""
    return account.partition("@")[0].partition(":")[0] in OVERDRAFT_KINDS


def ensure_account(tx: Transaction, account: str) -> None:
    """Open an account, at zero, if it is not there yet.

    Raises:
        ValueError: If `account` is not spelled like an account of a known kind.
    """
    name, _, asset = account.rpartition("@")
    kind, _, owner = name.partition(":")
    if not asset or kind not in (OWNED_KINDS if owner else OWNERLESS_KINDS):
        raise ValueError(f"{account!r} is not <kind>:<owner>@<asset> or <kind>@<asset> of a known kind")
    tx.execute(_INSERT, (account, kind, owner, asset, kind in OVERDRAFT_KINDS))
