"""The local chain: started, loaded, kept between runs, never left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from eth_account import Account
from eth_account.messages import encode_typed_data

from contracts import anvil as anvil_module
from contracts import devnet as devnet_module
from contracts.devnet import (
    OWNER_ADDRESS,
    PERMIT2_ADDRESS,
    USDC,
    Anvil,
    AnvilFailed,
    AnvilMissing,
    Devnet,
    NodeUnreachable,
    RpcRefused,
    allowance,
    approve_permit2,
    artifact,
    as_owner,
    balance_of,
    call_data,
    load,
    mint,
    rpc,
    send_signed,
)
from contracts.wallets import development_wallets
from payments.chain.networks import (
    EXACT_PERMIT2_PROXY_ADDRESS,
    KNOWN_NETWORKS,
    MULTICALL3_ADDRESS,
    UPTO_PERMIT2_PROXY_ADDRESS,
    Network,
)
from payments.chain.networks import PERMIT2_ADDRESS as PERMIT2_IN_PAYMENTS
from tests.contracts.calls import read


def test_everything_stands_where_payments_looks_for_it(devnet: Devnet, network: Network) -> None:
    assert devnet.permit2.lower() == PERMIT2_IN_PAYMENTS
    assert devnet.multicall3.lower() == MULTICALL3_ADDRESS
    assert devnet.exact_proxy.lower() == EXACT_PERMIT2_PROXY_ADDRESS
    assert devnet.upto_proxy.lower() == UPTO_PERMIT2_PROXY_ADDRESS
    (known,) = KNOWN_NETWORKS[devnet.chain_id].tokens
    assert network.token_at(devnet.usdc.address) == known
    for address in (
        devnet.usdc.address,
        devnet.usdt.address,
        devnet.permit2,
        devnet.multicall3,
        devnet.exact_proxy,
        devnet.upto_proxy,
    ):
        assert len(rpc(devnet.rpc_url, "eth_getCode", address, "latest")) > 2_000


def test_every_wallet_can_pay_in_both_tokens_and_for_gas(devnet: Devnet) -> None:
    assert len({wallet.address for wallet in devnet.wallets}) == 10
    for wallet in devnet.wallets:
        assert balance_of(devnet.rpc_url, devnet.usdc, wallet.address) == 1_000_000_000
        assert balance_of(devnet.rpc_url, devnet.usdt, wallet.address) == 1_000_000_000
        assert int(rpc(devnet.rpc_url, "eth_getBalance", wallet.address, "latest"), 16) >= 10**18
    for token in (devnet.usdc, devnet.usdt):
        supply = read(devnet, token.address, "totalSupply()")
        assert int.from_bytes(supply, "big") == 10 * 1_000_000_000
        assert int.from_bytes(read(devnet, token.address, "decimals()"), "big") == token.decimals
        assert token.name.encode() in read(devnet, token.address, "name()")


def test_multicall3_answers_for_several_contracts_at_once(devnet: Devnet) -> None:
    # getChainId() is one of its own functions, and says that the code placed there is really Multicall3's.
    assert int.from_bytes(read(devnet, devnet.multicall3, "getChainId()"), "big") == devnet.chain_id
    calls = [
        (token.address, False, bytes.fromhex(call_data("balanceOf(address)", devnet.wallets[0].address)[2:]))
        for token in (devnet.usdc, devnet.usdt)
    ]
    answer = read(devnet, devnet.multicall3, "aggregate3((address,bool,bytes)[])", calls)
    assert answer.count((1_000_000_000).to_bytes(32, "big")) == 2


@pytest.mark.parametrize("chain_id", [84532, 31337])
def test_permit2_has_the_domain_of_its_chain_and_address(chain_id: int) -> None:
    domain = {"name": "Permit2", "chainId": chain_id, "verifyingContract": PERMIT2_ADDRESS}
    signable = encode_typed_data(domain, {"Anything": [{"name": "nonce", "type": "uint256"}]}, {"nonce": 0})
    with Anvil(chain_id=chain_id) as running:
        devnet = load(running.rpc_url)
        assert devnet.chain_id == chain_id
        assert read(devnet, PERMIT2_ADDRESS, "DOMAIN_SEPARATOR()") == signable.header


def test_a_look_back_before_a_reorganisation_still_finds_the_contracts(chain: Devnet) -> None:
    mint(chain.rpc_url, chain.usdc, chain.wallets[0].address, 1)
    rpc(chain.rpc_url, "anvil_reorg", 1, [])
    assert balance_of(chain.rpc_url, chain.usdc, chain.wallets[0].address) == 1_000_000_000


def test_loading_again_changes_nothing(chain: Devnet) -> None:
    payer = chain.wallets[0]
    mint(chain.rpc_url, chain.usdc, payer.address, 5)
    block = rpc(chain.rpc_url, "eth_blockNumber")
    assert load(chain.rpc_url) == chain
    assert balance_of(chain.rpc_url, chain.usdc, payer.address) == 1_000_000_005
    assert rpc(chain.rpc_url, "eth_blockNumber") == block


def test_a_loader_that_was_killed_half_way_is_finished_by_the_next() -> None:
    with Anvil() as running:
        load(running.rpc_url)
        rpc(running.rpc_url, "anvil_setCode", PERMIT2_ADDRESS, "0x")
        rpc(running.rpc_url, "anvil_setCode", USDC.address, "0x")
        devnet = load(running.rpc_url)
        assert len(read(devnet, PERMIT2_ADDRESS, "DOMAIN_SEPARATOR()")) == 32
        assert balance_of(devnet.rpc_url, devnet.usdc, devnet.wallets[9].address) == 1_000_000_000


def test_a_newer_build_of_a_token_keeps_its_balances(chain: Devnet) -> None:
    mint(chain.rpc_url, chain.usdt, chain.wallets[0].address, 5)
    older = artifact("UsdtLike")["deployedBytecode"] + "00"
    rpc(chain.rpc_url, "anvil_setCode", chain.usdt.address, older)
    load(chain.rpc_url)
    assert rpc(chain.rpc_url, "eth_getCode", chain.usdt.address, "latest") == older[:-2]
    assert balance_of(chain.rpc_url, chain.usdt, chain.wallets[0].address) == 1_000_000_005


def test_a_restart_with_the_state_file_finds_everything(tmp_path: Path) -> None:
    state_file = tmp_path / "data" / "anvil.json"
    with Anvil(state_file=state_file) as running:
        devnet = load(running.rpc_url, wallets=3, usd_each="2.5")
        payer, payee = devnet.wallets[:2]
        transfer = call_data("transfer(address,uint256)", payee.address, 500_000)
        sent = send_signed(running.rpc_url, payer.private_key, devnet.usdc.address, transfer)
        block = rpc(running.rpc_url, "eth_blockNumber")
    with Anvil(state_file=state_file) as running:
        again = load(running.rpc_url, wallets=3, usd_each="2.5")
        assert rpc(running.rpc_url, "eth_blockNumber") == block
        assert balance_of(running.rpc_url, again.usdc, payer.address) == 2_000_000
        assert balance_of(running.rpc_url, again.usdc, payee.address) == 3_000_000
        assert rpc(running.rpc_url, "eth_getTransactionReceipt", sent)["status"] == "0x1"
        assert int(rpc(running.rpc_url, "eth_getTransactionCount", payer.address, "latest"), 16) == 1
        # Minting needs the owner, who is impersonated anew.
        mint(running.rpc_url, again.usdt, payer.address, 1)
        assert balance_of(running.rpc_url, again.usdt, payer.address) == 2_500_001


@pytest.mark.parametrize(("block_time_s", "automine"), [(60.0, None), (None, False), (60.0, True)])
def test_loading_and_minting_work_in_every_mining_mode(block_time_s: float | None, automine: bool | None) -> None:
    with Anvil(block_time_s=block_time_s, automine=automine) as running:
        devnet = load(running.rpc_url)
        wallet = devnet.wallets[0]
        for token in (devnet.usdc, devnet.usdt):
            mint(running.rpc_url, token, wallet.address, 1)
            assert balance_of(running.rpc_url, token, wallet.address) == 1_000_000_001


@pytest.mark.parametrize(
    ("block_time_s", "automine", "mined"),
    [(None, None, True), (60.0, None, False), (None, False, False), (60.0, True, True)],
)
def test_automine_is_on_unless_there_is_a_block_time_or_it_is_switched_off(
    block_time_s: float | None, automine: bool | None, mined: bool
) -> None:
    with Anvil(block_time_s=block_time_s, automine=automine) as running:
        sender = development_wallets(1)[0].address
        sent = rpc(running.rpc_url, "eth_sendTransaction", {"from": sender, "to": sender})
        for _ in range(100):
            if (found := rpc(running.rpc_url, "eth_getTransactionReceipt", sent)) is not None:
                break
            time.sleep(0.01 if mined else 0.002)
        assert (found is not None) is mined


def test_more_wallets_than_anvil_has_are_funded_too() -> None:
    with Anvil() as running:
        devnet = load(running.rpc_url, wallets=12)
        assert len({wallet.address for wallet in devnet.wallets}) == 12
        approve_permit2(running.rpc_url, devnet.usdt, devnet.wallets[11].private_key, 5)
        assert allowance(running.rpc_url, devnet.usdt, devnet.wallets[11].address, devnet.permit2) == 5
        assert balance_of(running.rpc_url, devnet.usdc, devnet.wallets[11].address) == 1_000_000_000


def test_known_keys_belong_to_their_addresses() -> None:
    wallets = development_wallets(11)
    assert wallets[:10] == development_wallets(10)
    for wallet in wallets:
        assert Account.from_key(wallet.private_key).address == wallet.address


def test_a_call_that_reverts_is_refused_with_its_reason(chain: Devnet) -> None:
    with pytest.raises(RpcRefused, match="mint to the zero address") as refusal:
        as_owner(chain.rpc_url, chain.usdc, "mint(address,uint256)", "0x" + "00" * 20, 1)
    assert refusal.value.data.startswith("0x08c379a0")


def test_a_transaction_that_cannot_be_mined_is_said_so(chain: Devnet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devnet_module, "_MININGS_MAX", 1)
    gapped = {"from": OWNER_ADDRESS, "to": OWNER_ADDRESS, "nonce": "0x99"}
    sent = rpc(chain.rpc_url, "eth_sendTransaction", gapped)
    with pytest.raises(TimeoutError, match="was not mined"):
        devnet_module.receipt(chain.rpc_url, sent)


def test_a_missing_anvil_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(anvil_module, "_REPOSITORY", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AnvilMissing, match="npm ci"):
        Anvil().start()


def test_an_anvil_on_path_is_used_when_the_package_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = anvil_module.find_anvil()
    (tmp_path / "anvil").symlink_to(real)
    monkeypatch.setattr(anvil_module, "_REPOSITORY", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert anvil_module.find_anvil() == tmp_path / "anvil"


def test_a_taken_port_is_said_with_anvils_own_words() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(AnvilFailed, match=rf"port {port}.*in use"):
            Anvil(port=port).start()


def test_a_stopped_anvil_is_gone() -> None:
    running = Anvil().start()
    url = running.rpc_url
    running.stop()
    running.stop()
    with pytest.raises(NodeUnreachable):
        rpc(url, "eth_chainId")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a child that its parent died")
def test_anvil_ends_and_keeps_its_state_when_its_parent_is_killed(tmp_path: Path) -> None:
    state_file = tmp_path / "anvil.json"
    program = (
        "import sys; from pathlib import Path; from contracts.devnet import Anvil\n"
        f"running = Anvil(state_file=Path({str(state_file)!r})).start()\n"
        "print(running.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdin is not None
    child = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    for _ in range(500):
        if not Path(f"/proc/{child}/exe").exists():
            break
        time.sleep(0.01)
    assert not Path(f"/proc/{child}/exe").exists()
    assert state_file.exists()
