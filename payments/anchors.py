"""What a database's books are about, remembered from their first start on: a chain by its first block, a token by its contract.

A development chain that began anew has the same chain id and knows nothing of what the books say; a token whose contract was
exchanged in the configuration would mix two moneys under one name. Neither can be told from its name, and both would make the
books wrong without a word.
"""

from __future__ import annotations

from payments.chain.networks import Network
from payments.chain.rpc import Rpc
from payments.store import Store, Transaction

_REMEMBER = "INSERT INTO anchor (name, value) VALUES (?, ?) ON CONFLICT (name) DO NOTHING"


class AnotherChain(Exception):
    """The database belongs to another chain or token than the configured one. The message says which, and what to do."""


async def hold_fast(store: Store, rpc: Rpc, network: Network) -> None:
    """Remember the network's first block and its tokens' contracts, or compare them with what was remembered; before payments.

    Raises:
        AnotherChain: They are not those that the books are about; nothing was changed.
        RpcError: A node refused a question.
        RpcUnavailable: No node answered.
    """
    wanted = {
        f"token:{token.asset}": (token.address, f"the token {token.symbol} at {token.address}")
        for token in network.tokens
    }
    first_block = await rpc.call("eth_getBlockByNumber", ("0x0", False))
    if first_block is not None:  # a node may have forgotten so old a block
        wanted[f"chain:{network.caip2}"] = first_block["hash"], f"a chain whose first block is {first_block['hash']}"
    found = await store.write(lambda tx: {name: _remembered(tx, name, value) for name, (value, _) in wanted.items()})
    for name, (value, described) in wanted.items():
        if found[name] != value:
            raise AnotherChain(
                f"the database's books on {network.caip2} are not about {described}, but about {found[name]}: a chain that was"
                " begun anew, or another contract under an old name"
            )


def _remembered(tx: Transaction, name: str, value: str) -> str:
    """What the name stands for; `value` from now on, if it stood for nothing."""
    tx.execute(_REMEMBER, (name, value))
    row = tx.execute("SELECT value FROM anchor WHERE name = ?", (name,)).fetchone()
    return str(row[0])
