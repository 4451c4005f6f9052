"""`farebox dev`: a whole world on one machine. A local chain with the tokens, wallets with money, simulated model providers,
and the gateway, which is the same as in production and knows nothing of this.

State lives in the data directory: the chain, the database, and `dev.json` with keys that are worth something only there.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from contracts.anvil import Anvil, AnvilFailed, AnvilMissing, end_with_parent, free_port
from contracts.devnet import Devnet, load, place_operator_contracts
from contracts.jsonrpc import rpc
from gateway import config
from gateway.dev.models import KEY_VARIABLE, dev_models, dev_providers
from gateway.dev.simulator.process import Simulator
from payments import accounts
from payments.chain.signers import Signer
from payments.migrate import upgrade
from payments.money import NANO_PER_USD
from payments.store import Store, Transaction

CHAIN_ID = 84532
NETWORK = f"eip155:{CHAIN_ID}"
OPERATOR_ETHER = 1_000
POOL = "default"
POOL_USD = 1_000
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 40.0


class StackFailed(Exception):
    """A part of the development stack did not start, or ended by itself."""


@dataclass(frozen=True, slots=True)
class Secrets:
    """Made once per data directory. They are written there in the clear: they open nothing but this stack."""

    secret: str
    signer_key: str
    treasury_key: str
    api_key: str
    admin_key: str


@dataclass(frozen=True, slots=True)
class Stack:
    """A running stack: what `farebox dev --json` prints."""

    gateway_url: str
    rpc_url: str
    chain_id: int
    network: str
    tokens: dict[str, dict[str, Any]]
    pay_to: str
    batch_contract: str
    deposit_factory: str
    wallets: list[dict[str, str]]
    api_key: str
    admin_key: str
    simulator_url: str
    database_url: str

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        return asdict(self)


class GatewayProcess:
    """The gateway as a process of its own, which can be stopped, killed and started again on the same port."""

    def __init__(self, url: str, config_file: Path | None, environment: Mapping[str, str], log: Path) -> None:
        self.url = url
        self._command = [sys.executable, "-m", "gateway.cli", "serve"]
        if config_file is not None:
            self._command += ["--config", str(config_file)]
        self.environment = {**os.environ, **environment}
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None
        return self._process.pid

    def exit_status(self) -> int | None:
        """None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            StackFailed: If it ends or does not answer in time.
        """
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=log,
                preexec_fn=end_with_parent(),
            )
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                tail = self._log.read_text(errors="replace").splitlines()[-10:]
                raise StackFailed("the gateway did not start:\n" + "\n".join(tail))
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{self.url}/healthz", timeout=1)
                return
            time.sleep(0.05)
        raise StackFailed(f"the gateway did not answer within {READY_TIMEOUT_S:.0f} s; see {self._log}")

    def stop(self) -> None:
        """Ask it to finish what is under way and end; insist after a while."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def running(
    data_dir: Path,
    *,
    config_file: Path | None = None,
    port: int = 0,
    rpc_port: int = 0,
    simulator_port: int = 0,
    block_time_s: float | None = None,
    environment: Mapping[str, str] | None = None,
    nodes: Callable[[str], Sequence[str]] | None = None,
    confirmations: int | None = None,
) -> Iterator[tuple[Stack, GatewayProcess]]:
    """Start everything, and stop it at the end.

    Args:
        data_dir: Where state is kept; made if it is not there. A second start continues from it.
        config_file: A configuration whose providers, models and other settings replace the built-in development ones.
        port: The gateway's port; 0 takes a free one. Likewise `rpc_port` and `simulator_port`.
        block_time_s: Seconds between blocks; None mines each transaction at once.
        environment: Further `FAREBOX_*` variables for the gateway.
        nodes: Given the chain's URL, by which URLs the gateway reaches it; by default that one.
        confirmations: How many blocks make a transfer final; None leaves the default.

    Yields:
        What runs, and the gateway's process.

    Raises:
        StackFailed: If a part does not start.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(_alone_in(data_dir))
        if port:
            # Whoever listens there would answer for the gateway that could not start.
            _require_free(port)
        state_file = data_dir / "chain.json"
        anvil = cleanup.enter_context(
            Anvil(chain_id=CHAIN_ID, port=rpc_port, block_time_s=block_time_s, state_file=state_file)
        )
        devnet = load(anvil.rpc_url)
        simulator = Simulator.start(port=simulator_port)
        cleanup.callback(simulator.stop)
        keys = _secrets(data_dir)
        for key in (keys.signer_key, keys.treasury_key):
            rpc(anvil.rpc_url, "anvil_setBalance", _address(key), hex(OPERATOR_ETHER * 10**18))
        gateway_port = port or free_port()
        treasury, signer = _address(keys.treasury_key), _address(keys.signer_key)
        batch_contract, deposit_factory = place_operator_contracts(anvil.rpc_url, treasury, treasury, [signer])
        network = _network(anvil.rpc_url, devnet) | {
            "batch_contract": batch_contract,
            "deposit_factory": deposit_factory,
            "sponsor_hourly_native": "1",
            "sponsor_payer_native": "0.001",
        }
        if confirmations is not None:
            network["confirmations"] = confirmations
        if nodes is not None:
            network["rpc_urls"] = list(nodes(anvil.rpc_url))
        variables = _environment(data_dir, config_file, gateway_port, network, simulator.url, keys)
        url = f"http://127.0.0.1:{gateway_port}"
        gateway = GatewayProcess(url, config_file, {**variables, **(environment or {})}, data_dir / "gateway.log")
        _write_environment(data_dir / "dev.env", variables)
        gateway.start()
        cleanup.callback(gateway.stop)
        yield (
            Stack(
                gateway_url=url,
                rpc_url=anvil.rpc_url,
                chain_id=CHAIN_ID,
                network=NETWORK,
                tokens={
                    token.symbol: {
                        "address": token.address,
                        "decimals": token.decimals,
                        "name": token.name,
                        "version": token.version,
                        "transfer_method": token.transfer_method,
                    }
                    for token in (devnet.usdc, devnet.usdt)
                },
                pay_to=treasury,
                batch_contract=batch_contract,
                deposit_factory=deposit_factory,
                wallets=[{"address": wallet.address, "private_key": wallet.private_key} for wallet in devnet.wallets],
                api_key=keys.api_key,
                admin_key=keys.admin_key,
                simulator_url=simulator.url,
                database_url=f"sqlite:///{(data_dir / 'farebox.db').resolve()}",
            ),
            gateway,
        )


def run(
    *,
    as_json: bool,
    config_file: Path | None,
    data_dir: Path,
    port: int,
    rpc_port: int,
    simulator_port: int,
    block_time_s: float | None,
) -> int:
    """Run the stack until SIGTERM or Ctrl-C, or until a part of it ends. Returns the exit status."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    try:
        with running(
            data_dir,
            config_file=config_file,
            port=port,
            rpc_port=rpc_port,
            simulator_port=simulator_port,
            block_time_s=block_time_s,
            # Where nothing happens there are no blocks, and a deposit would never be deep enough.
            confirmations=0 if block_time_s is None else None,
        ) as (stack, gateway):
            if as_json:
                print(json.dumps(stack.as_json()), flush=True)
            else:
                _introduce(stack)
            while not stopping.wait(0.2):
                if gateway.exit_status() is not None:
                    print(
                        f"the gateway ended with status {gateway.exit_status()}; see {data_dir / 'gateway.log'}",
                        file=sys.stderr,
                    )
                    return 1
    except (StackFailed, AnvilMissing, AnvilFailed) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _introduce(stack: Stack) -> None:
    from rich.console import Console

    console = Console()
    for name, value in (
        ("gateway", stack.gateway_url),
        ("chain", f"{stack.rpc_url} ({stack.network})"),
        ("providers", f"{stack.simulator_url} (simulated)"),
        ("treasury", stack.pay_to),
        ("agent wallet key", stack.wallets[0]["private_key"]),
        ("API key", stack.api_key),
    ):
        # Whole, however narrow the terminal: these are there to be copied.
        console.print(f"[bold]{name:<16}[/bold]  {value}", soft_wrap=True, highlight=False)
    console.print(
        f"\nTry:  FAREBOX_WALLET_KEY={stack.wallets[0]['private_key']} farebox ask 'Why is the sky blue?'"
        f" --gateway {stack.gateway_url} --max-usd 0.05\nCtrl-C stops everything; the data directory keeps it.",
        soft_wrap=True,
        highlight=False,
    )


@contextlib.contextmanager
def _alone_in(data_dir: Path) -> Iterator[None]:
    with (data_dir / "dev.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackFailed(
                f"another farebox dev runs in {data_dir}: stop it, or give this one another --data-dir"
            ) from None
        yield


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise StackFailed(f"the gateway cannot listen on port {port}: {error.strerror}") from None


def _secrets(data_dir: Path) -> Secrets:
    """Read the data directory's keys, or make them; the API keys are made in its database."""
    path = data_dir / "dev.json"
    if path.exists():
        return Secrets(**json.loads(path.read_text()))
    upgrade(data_dir / "farebox.db")
    api_key, admin_key = asyncio.run(_make_api_keys(data_dir / "farebox.db"))
    made = Secrets(
        secret=secrets.token_hex(32),
        signer_key="0x" + secrets.token_hex(32),
        treasury_key="0x" + secrets.token_hex(32),
        api_key=api_key,
        admin_key=admin_key,
    )
    path.touch(mode=0o600)
    path.write_text(json.dumps(asdict(made)))
    return made


async def _make_api_keys(database: Path) -> tuple[str, str]:
    def unit(tx: Transaction) -> tuple[str, str]:
        accounts.fund_pool(tx, POOL, POOL_USD * NANO_PER_USD, "development")
        _, api_key = accounts.create_key(tx, "development", POOL)
        _, admin_key = accounts.create_key(tx, "development admin", POOL, admin=True)
        return api_key, admin_key

    store = Store(database)
    try:
        return await store.write(unit)
    finally:
        store.close()


def _address(private_key: str) -> str:
    return Signer.from_hex(private_key).address


def _environment(
    data_dir: Path, config_file: Path | None, port: int, network: dict[str, Any], simulator_url: str, keys: Secrets
) -> dict[str, str]:
    """The gateway's configuration, all in variables, so that a configuration file keeps what it says about the rest."""
    own = {} if config_file is None else config.read_file(config_file)
    variables = {
        "FAREBOX_HOST": "127.0.0.1",
        "FAREBOX_PORT": str(port),
        "FAREBOX_DATA_DIR": str(data_dir),
        "FAREBOX_SECRET": keys.secret,
        "FAREBOX_SIGNER_KEYS": json.dumps([keys.signer_key]),
        "FAREBOX_TREASURY_KEY": keys.treasury_key,
        "FAREBOX_PAY_TO": _address(keys.treasury_key),
        "FAREBOX_NETWORKS": json.dumps([network]),
        KEY_VARIABLE: "simulated",
    }
    if "models" not in own:
        variables["FAREBOX_PROVIDERS"] = json.dumps(dev_providers(simulator_url))
        variables["FAREBOX_MODELS"] = json.dumps(dev_models())
    return variables


def _write_environment(path: Path, variables: Mapping[str, str]) -> None:
    """The gateway's variables for a shell, so that `farebox ledger check` and the like can be run beside it."""
    path.touch(mode=0o600)
    path.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()))


def _network(rpc_url: str, devnet: Devnet) -> dict[str, Any]:
    return {
        "chain_id": CHAIN_ID,
        "rpc_urls": [rpc_url],
        "tokens": [
            {
                "symbol": token.symbol,
                "address": token.address,
                "decimals": token.decimals,
                "transfer_method": token.transfer_method,
                "domain_name": token.name,
                "domain_version": token.version,
            }
            for token in (devnet.usdc, devnet.usdt)
        ],
    }
