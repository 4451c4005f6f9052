"""Anvil's automine now and then leaves transactions pending for good; a block made by hand takes them up."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from contracts.devnet import rpc

LOOK_S = 0.3


class Stalls:
    """How many there were."""

    def __init__(self) -> None:
        self.count = 0


@contextlib.contextmanager
def ended(rpc_url: str) -> Iterator[Stalls]:
    """While this lasts, a chain on which transactions wait and no block comes gets one."""
    stalls, over = Stalls(), threading.Event()

    def watch() -> None:
        seen = -1
        while not over.wait(LOOK_S):
            head, pending = int(rpc(rpc_url, "eth_blockNumber"), 16), int(rpc(rpc_url, "txpool_status")["pending"], 16)
            if pending and head == seen:
                stalls.count += 1
                rpc(rpc_url, "evm_mine")
            seen = head

    watcher = threading.Thread(target=watch, name="stalls", daemon=True)
    watcher.start()
    try:
        yield stalls
    finally:
        over.set()
        watcher.join()
