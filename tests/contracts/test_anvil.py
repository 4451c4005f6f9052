"""Anvil as a child process: what it leaves behind."""

from __future__ import annotations

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
