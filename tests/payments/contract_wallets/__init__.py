"""Contract wallets for tests: compiled from `Wallets.sol` once, placed or created on the test chain, signing with a key."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
from pathlib import Path

from contracts.devnet import Devnet, Wallet, call_data, rpc
from contracts.operators import create2_address
from payments.chain.networks import Token
from payments.chain.transactions import address_word, word
from payments.verification.checks import payment_digest
from payments.verification.wallet_signatures import ERC6492_SUFFIX
from payments.x402.wire import Payment
from tests.payments.settling import pay, sign

ROOT = Path(__file__).parents[3]
SCRIPT = """
const solc = require("solc");
const content = require("fs").readFileSync(process.argv[1], "utf8");
const settings = {evmVersion: "cancun", outputSelection: {"*": {"*": ["evm.bytecode.object", "evm.deployedBytecode.object"]}}};
const input = {language: "Solidity", sources: {wallets: {content}}, settings};
const output = JSON.parse(solc.compile(JSON.stringify(input)));
if (!output.contracts) { console.error(JSON.stringify(output.errors)); process.exit(1); }
const code = ({evm}) => ({created: evm.bytecode.object, deployed: evm.deployedBytecode.object});
console.log(JSON.stringify(Object.fromEntries(Object.entries(output.contracts.wallets).map(([name, c]) => [name, code(c)]))));
"""
FACTORY = "0x" + "fa" * 20
NEVER, BURNING, BOMB, FICKLE, FICKLE_BURNING, FICKLE_REVERTING, LATER, REVERTING = range(1, 9)


@functools.cache
def code(contract: str) -> dict[str, str]:
    done = subprocess.run(
        ["node", "-e", SCRIPT, str(Path(__file__).parent / "Wallets.sol")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    compiled: dict[str, dict[str, str]] = json.loads(done.stdout)
    return compiled[contract]


def place(chain: Devnet, address: str, owner: str) -> None:
    """Put a wallet's code at an address, with its owner."""
    rpc(chain.rpc_url, "anvil_setCode", address, "0x" + code("Wallet")["deployed"])
    rpc(chain.rpc_url, "anvil_setStorageAt", address, "0x" + word(0).hex(), "0x" + address_word(owner).hex())


def set_mood(chain: Devnet, address: str, mood: int) -> None:
    rpc(chain.rpc_url, "anvil_setStorageAt", address, "0x" + word(1).hex(), "0x" + word(mood).hex())


def place_factory(chain: Devnet) -> None:
    rpc(chain.rpc_url, "anvil_setCode", FACTORY, "0x" + code("WalletFactory")["deployed"])


def future_address(owner: str) -> str:
    """Where the factory is going to create the owner's wallet."""
    creation = bytes.fromhex(code("Wallet")["created"]) + address_word(owner)
    return create2_address(FACTORY, bytes(32), creation)


def pay_from(address: str, owner: Wallet, token: Token, value: int, *, behind: bytes = b"") -> Payment:
    """A payment from a contract wallet, signed by its owner's key."""
    payment = pay(Wallet(address, owner.private_key), token, value)
    return dataclasses.replace(payment, signature=sign(owner, payment_digest(payment, token)) + behind)


def wrapped(payment: Payment, owner: str, factory: str = FACTORY) -> Payment:
    """The payment with its signature wrapped (ERC-6492)."""
    deployment = bytes.fromhex(call_data("create(address)", owner)[2:])
    tails = [word(len(each)) + each + bytes(-len(each) % 32) for each in (deployment, payment.signature)]
    heads = address_word(factory) + word(96) + word(96 + len(tails[0]))
    return dataclasses.replace(payment, signature=heads + b"".join(tails) + ERC6492_SUFFIX)
