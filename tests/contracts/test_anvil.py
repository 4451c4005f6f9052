"""Anvil as a child process: what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contracts.anvil import Anvil
from contracts.jsonrpc import rpc


def test_a_long_chain_leaves_nothing_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    for each in (home, temporary):
        each.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with Anvil() as anvil:
        for _ in range(20):
            rpc(anvil.rpc_url, "anvil_mine", hex(50))
        assert int(rpc(anvil.rpc_url, "eth_blockNumber"), 16) == 1_000
        assert len([path for path in temporary.rglob("*") if path.is_file()]) <= 501
        assert [path for path in home.rglob("*") if path.is_file()] == []
    assert [*home.iterdir(), *temporary.iterdir()] == []


@pytest.mark.parametrize("place", [0, 2], ids=["before", "behind"])
def test_a_kept_chain_has_one_beginning(tmp_path: Path, place: int) -> None:
    state_file = tmp_path / "chain.json"
    with Anvil(state_file=state_file) as anvil:
        rpc(anvil.rpc_url, "evm_mine")
        first = rpc(anvil.rpc_url, "eth_getBlockByNumber", "0x0", False)["hash"]
    # What another start leaves behind, sooner or later.
    state = json.loads(state_file.read_text())
    (own,) = [block for block in state["blocks"] if block["header"]["number"] == "0x0"]
    header = own["header"] | {"timestamp": hex(int(own["header"]["timestamp"], 16) + 7)}
    state["blocks"].insert(place, own | {"header": header})
    state_file.write_text(json.dumps(state))
    for _ in range(2):
        with Anvil(state_file=state_file) as anvil:
            assert rpc(anvil.rpc_url, "eth_getBlockByNumber", "0x0", False)["hash"] == first
            assert int(rpc(anvil.rpc_url, "eth_blockNumber"), 16) == 1
