"""The development chain: everything that a payment needs, at its canonical address, on an empty Anvil.

`load` places USDC-like and USDT-like tokens, Permit2, Multicall3, the two x402 proxies and x402's channel contracts from the
checked-in artifacts, and gives wallets a balance. It writes code and storage directly, so it sends no transaction, works
whatever the mining mode is, and takes well under a second. The rest of the module acts on the tokens for tests and
demonstrations. None of it works on a real network: it needs Anvil's own methods.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from sha3 import keccak_256

from contracts import operators
from contracts.anvil import Anvil, AnvilFailed, AnvilMissing
from contracts.builds import artifact
from contracts.jsonrpc import Call, NodeUnreachable, RpcRefused, batch, rpc
from contracts.wallets import Wallet, development_wallets

__all__ = [
    "Anvil",
    "AnvilFailed",
    "AnvilMissing",
    "DevToken",
    "Devnet",
    "NodeUnreachable",
    "RpcRefused",
    "Wallet",
    "allowance",
    "approve_permit2",
    "artifact",
    "as_owner",
    "balance_of",
    "call_data",
    "load",
    "mint",
    "outbidding",
    "place_operator_contracts",
    "receipt",
    "rpc",
    "send_as",
    "send_signed",
]

GWEI = 10**9
PERMIT2_ADDRESS = "0x000000000022D473030F116dDEE9F6B43aC78BA3"
MULTICALL3_ADDRESS = "0xcA11bde05977b3631167028862bE2a173976CA11"
EXACT_PROXY_ADDRESS = "0x402085c248EeA27D92E8b30b2C58ed07f9E20001"
UPTO_PROXY_ADDRESS = "0x4020A4f3b7b90ccA423B9fabCc0CE57C6C240002"
BATCH_SETTLEMENT_ADDRESS = "0x4020074e9dF2ce1deE5A9C1b5c3f541D02a10003"
ERC3009_DEPOSIT_COLLECTOR_ADDRESS = "0x4020806089470a89826cB9fB1f4059150b550004"
PERMIT2_DEPOSIT_COLLECTOR_ADDRESS = "0x4020425FAf3B746C082C2f942b4E5159887B0005"

# Circle's own on Base Sepolia, whose chain id the development chain has: stock x402 clients have it on their list.
USDC_ADDRESS = "0x036CbD53842c5426634e7929541eC2318f3dCF7e"
# There is no USDT on Base Sepolia. Ours: the letters USDT, nearly, and the chain id.
USDT_ADDRESS = "0x05D7000000000000000000000000000000084532"
# Owns both tokens. Nobody has its key; Anvil lets us act as it.
OWNER_ADDRESS = "0xFa4eB0C00000000000000000000000000000000F"

TransferMethod = Literal["eip3009", "permit2"]

_WEI_EACH = 10_000 * 10**18  # what Anvil gives each of its own accounts
_POLL_S = 0.002
_POLLS_BEFORE_MINING = 50
_MINING_PAUSE_S = 0.1
_MININGS_MAX = 50
_UINT256_MAX = 2**256 - 1


@dataclass(frozen=True, slots=True)
class DevToken:
    """A token on the development chain. `name` and `version` are those of its EIP-712 domain; `address` is checksummed."""

    symbol: str
    address: str
    decimals: int
    name: str
    version: str
    transfer_method: TransferMethod


USDC = DevToken("USDC", USDC_ADDRESS, 6, "USDC", "2", "eip3009")
USDT = DevToken("USDT", USDT_ADDRESS, 6, "Tether USD", "1", "permit2")


@dataclass(frozen=True, slots=True)
class Devnet:
    """A loaded development chain. Addresses are checksummed; `wallets` hold ETH, USDC and USDT."""

    chain_id: int
    rpc_url: str
    usdc: DevToken
    usdt: DevToken
    wallets: tuple[Wallet, ...]
    permit2: str = PERMIT2_ADDRESS
    multicall3: str = MULTICALL3_ADDRESS
    exact_proxy: str = EXACT_PROXY_ADDRESS
    upto_proxy: str = UPTO_PROXY_ADDRESS


def load(rpc_url: str, *, wallets: int = 10, usd_each: str = "1000") -> Devnet:
    """Put everything on the Anvil at `rpc_url` that is not there yet.

    On a chain that has the tokens already (a restart with its state) balances stay as they are.

    Args:
        wallets: how many accounts of Anvil's well-known mnemonic to fund.
        usd_each: dollars of each token for every wallet, as a decimal number.

    Raises:
        RpcRefused: this is no Anvil.
        NodeUnreachable: nobody answers.
    """
    funded = development_wallets(wallets)
    chain_id = int(rpc(rpc_url, "eth_chainId"), 16)
    wanted = _codes(chain_id)
    present = dict(
        zip(wanted, batch(rpc_url, [("eth_getCode", [address, "latest"]) for address in wanted]), strict=True)
    )
    missing = [address for address, code in wanted.items() if present[address] != code]

    # The tokens' code comes last: a loader killed half-way finds no token the next time, and gives the balances again.
    first: list[Call] = [("anvil_impersonateAccount", [OWNER_ADDRESS])]
    last: list[Call] = []
    for address in missing:
        token = address in (USDC_ADDRESS, USDT_ADDRESS)
        (last if token else first).append(("anvil_setCode", [address, wanted[address]]))
        if token and present[address] == "0x":
            first += initial_storage(address, funded, usd_each)
    if present[USDC_ADDRESS] == "0x":
        first += [
            ("anvil_setBalance", [address, hex(_WEI_EACH)])
            for address in (OWNER_ADDRESS, *(wallet.address for wallet in funded))
        ]
    batch(rpc_url, first)
    if last:
        batch(rpc_url, last)
    if missing:
        # A block of its own, so that a reorganisation or a look at an earlier block does not find an empty chain.
        rpc(rpc_url, "evm_mine")
    return Devnet(chain_id=chain_id, rpc_url=rpc_url, usdc=USDC, usdt=USDT, wallets=funded)


def place_operator_contracts(rpc_url: str, treasury: str, owner: str, signers: Sequence[str]) -> tuple[str, str]:
    """Place the contracts that an operator would create: the batch contract and the factory of deposit addresses.

    Args:
        treasury: Whom deposit addresses pay.
        owner: Of the batch contract.
        signers: Who may send batches.

    Returns:
        The addresses, lower-case hex, of the batch contract and of the factory: the same as when really created.
    """
    batch_contract, factory = operators.batch(owner, signers), operators.deposit_factory(treasury)
    wanted = (batch_contract, operators.forwarder(treasury), factory)
    # A creation that is only simulated returns the code, immutables included.
    codes = batch(rpc_url, [("eth_call", [{"data": "0x" + each.code.hex()}, "latest"]) for each in wanted])
    calls: list[Call] = [("anvil_setCode", [each.address, code]) for each, code in zip(wanted, codes, strict=True)]
    layout = artifact("FareboxBatch")["storage"]
    slots = {layout["owner"]["slot"]: int(owner, 16)}
    for signer in signers:
        entry = keccak_256(_word(signer) + _word(layout["isSigner"]["slot"])).digest()
        slots[int.from_bytes(entry, "big")] = 1
    calls += [
        ("anvil_setStorageAt", [batch_contract.address, f"0x{slot:064x}", f"0x{value:064x}"])
        for slot, value in slots.items()
    ]
    batch(rpc_url, calls)
    return batch_contract.address, factory.address


def balance_of(rpc_url: str, token: DevToken, owner: str) -> int:
    """The balance of `owner` in atomic units."""
    return _read(rpc_url, token.address, "balanceOf(address)", owner)


def allowance(rpc_url: str, token: DevToken, owner: str, spender: str) -> int:
    """What `spender` may take from `owner`, in atomic units."""
    return _read(rpc_url, token.address, "allowance(address,address)", owner, spender)


def mint(rpc_url: str, token: DevToken, to: str, atomic: int) -> None:
    """Create `atomic` units for `to`, with the events of a real issue. Mines a block if the chain does not by itself."""
    if token.symbol == USDT.symbol:
        as_owner(rpc_url, token, "issue(uint256)", atomic)
        as_owner(rpc_url, token, "transfer(address,uint256)", to, atomic)
    else:
        as_owner(rpc_url, token, "mint(address,uint256)", to, atomic)


def as_owner(rpc_url: str, token: DevToken, signature: str, *arguments: str | int) -> str:
    """Call a token's function as its owner, for example ``"blacklist(address)"``; returns the transaction's hash.

    Mines a block if the chain does not by itself.

    Raises:
        RpcRefused: the call reverts.
    """
    return send_as(rpc_url, OWNER_ADDRESS, token.address, call_data(signature, *arguments))


def send_as(rpc_url: str, sender: str, to: str, data: str) -> str:
    """Send a transaction from an account that Anvil signs for (a wallet or the tokens' owner); returns its hash once mined.

    Mines a block if the chain does not by itself; the transaction goes before all others that wait for it.

    Raises:
        RpcRefused: it would revert; the message holds the reason, `data` what the contract returned.
    """
    call = {"from": sender, "to": to, "data": data}
    # Estimated first: Anvil would mine a call that reverts, and a receipt does not say why.
    gas = int(rpc(rpc_url, "eth_estimateGas", call), 16) * 5 // 4
    sent: str = rpc(rpc_url, "eth_sendTransaction", call | {"gas": hex(gas)} | outbidding(rpc_url, sender))
    receipt(rpc_url, sent)
    return sent


def outbidding(rpc_url: str, sender: str, at_least: int = 0) -> dict[str, str]:
    """The fees, in wei a unit of gas, of a transaction that is to go before all others that wait to be mined.

    The gateway pays what others paid in the last blocks: after some of these, more than any fixed fee. Nothing of it, and so
    the node's choice, where nobody waits and there is no minimum.
    """
    pool = rpc(rpc_url, "txpool_content")["pending"]
    others = [waiting for account, own in pool.items() if account.lower() != sender.lower() for waiting in own.values()]
    fee = max([at_least, *(int(waiting.get("maxFeePerGas") or waiting["gasPrice"], 16) + GWEI for waiting in others)])
    return {"maxFeePerGas": hex(fee), "maxPriorityFeePerGas": hex(fee)} if fee else {}


def approve_permit2(rpc_url: str, token: DevToken, private_key: str, atomic: int = _UINT256_MAX) -> str:
    """Let Permit2 take up to `atomic` units from the key's wallet; returns the transaction's hash.

    Raises:
        RpcRefused: the approval reverts, as USDT's does when one allowance is to replace another.
    """
    data = call_data("approve(address,uint256)", PERMIT2_ADDRESS, atomic)
    return send_signed(rpc_url, private_key, token.address, data)


def send_signed(rpc_url: str, private_key: str, to: str, data: str = "0x", value_wei: int = 0) -> str:
    """Sign a transaction with a wallet's key and return its hash once it is mined.

    Mines a block if the chain does not by itself.

    Raises:
        RpcRefused: it would revert.
    """
    from eth_account import Account  # 0.4 s to import, and only signing needs it

    sender = Account.from_key(private_key)
    call = {"from": sender.address, "to": to, "data": data, "value": hex(value_wei)}
    chain_id, nonce, gas = (
        int(each, 16)
        for each in batch(
            rpc_url,
            [
                ("eth_chainId", []),
                ("eth_getTransactionCount", [sender.address, "pending"]),
                ("eth_estimateGas", [call]),
            ],
        )
    )
    signed = sender.sign_transaction(
        {
            "chainId": chain_id,
            "nonce": nonce,
            "to": to,
            "data": data,
            "value": value_wei,
            "gas": gas * 5 // 4,
            "maxFeePerGas": 10 * GWEI,
            "maxPriorityFeePerGas": GWEI,
        }
        | outbidding(rpc_url, sender.address)
    )
    sent: str = rpc(rpc_url, "eth_sendRawTransaction", "0x" + bytes(signed.raw_transaction).hex())
    receipt(rpc_url, sent)
    return sent


def receipt(rpc_url: str, transaction_hash: str) -> dict[str, Any]:
    """A sent transaction's receipt. Waits a moment for the chain to mine it by itself, then mines.

    Raises:
        RpcRefused: it reverted.
        TimeoutError: it cannot be mined, for instance because the transaction before it is missing.
    """
    for pause_s in (*[_POLL_S] * _POLLS_BEFORE_MINING, *[_MINING_PAUSE_S] * _MININGS_MAX):
        found: dict[str, Any] | None = rpc(rpc_url, "eth_getTransactionReceipt", transaction_hash)
        if found is not None:
            if int(found["status"], 16) != 1:
                raise RpcRefused("eth_getTransactionReceipt", 3, f"transaction {transaction_hash} reverted", None)
            return found
        time.sleep(pause_s)
        if pause_s == _MINING_PAUSE_S:
            rpc(rpc_url, "evm_mine")
    raise TimeoutError(f"{transaction_hash} was not mined")


def call_data(signature: str, *arguments: str | int) -> str:
    """Calldata in hex for a function whose parameters are addresses and integers, such as ``"transfer(address,uint256)"``."""
    selector: bytes = keccak_256(signature.encode()).digest()[:4]
    return "0x" + (selector + b"".join(_word(argument) for argument in arguments)).hex()


def _codes(chain_id: int) -> dict[str, str]:
    """The runtime code that belongs at each address."""
    return {
        USDC_ADDRESS: artifact("UsdcLike")["deployedBytecode"],
        USDT_ADDRESS: artifact("UsdtLike")["deployedBytecode"],
        PERMIT2_ADDRESS: permit2_code(chain_id),
        MULTICALL3_ADDRESS: artifact("Multicall3")["deployedBytecode"],
        EXACT_PROXY_ADDRESS: artifact("X402ExactPermit2Proxy")["deployedBytecode"],
        UPTO_PROXY_ADDRESS: artifact("X402UptoPermit2Proxy")["deployedBytecode"],
        BATCH_SETTLEMENT_ADDRESS: artifact("X402BatchSettlement")["deployedBytecode"],
        ERC3009_DEPOSIT_COLLECTOR_ADDRESS: artifact("X402Erc3009DepositCollector")["deployedBytecode"],
        PERMIT2_DEPOSIT_COLLECTOR_ADDRESS: artifact("X402Permit2DepositCollector")["deployedBytecode"],
    }


def permit2_code(chain_id: int) -> str:
    """Permit2 with the immutables that its constructor would compute on this chain, at its canonical address."""
    build = artifact("Permit2")
    type_hash = keccak_256(b"EIP712Domain(string name,uint256 chainId,address verifyingContract)").digest()
    name_hash = keccak_256(b"Permit2").digest()
    separator = keccak_256(type_hash + name_hash + _word(chain_id) + _word(PERMIT2_ADDRESS)).digest()
    code = bytearray.fromhex(build["deployedBytecode"][2:])
    for name, value in (("chainId", _word(chain_id)), ("domainSeparator", separator)):
        start = build["immutables"][name]
        code[start : start + 32] = value
    return "0x" + code.hex()


def initial_storage(token_address: str, wallets: tuple[Wallet, ...], usd_each: str) -> list[Call]:
    """What a token's constructor and first issue would have written."""
    layout = artifact("UsdcLike" if token_address == USDC_ADDRESS else "UsdtLike")["storage"]
    assert layout["owner"]["offset"] == 0
    each = int(Decimal(usd_each) * 10**USDC.decimals)
    words = {layout["owner"]["slot"]: _word(OWNER_ADDRESS), layout["totalSupply"]["slot"]: _word(each * len(wallets))}
    for wallet in wallets:
        # A mapping's entry is at keccak(key, slot of the mapping): Solidity's storage layout.
        entry = keccak_256(_word(wallet.address) + _word(layout["balanceOf"]["slot"])).digest()
        words[int.from_bytes(entry, "big")] = _word(each)
    return [
        ("anvil_setStorageAt", [token_address, "0x" + _word(slot).hex(), "0x" + word.hex()])
        for slot, word in words.items()
    ]


def _read(rpc_url: str, address: str, signature: str, *arguments: str | int) -> int:
    return int(rpc(rpc_url, "eth_call", {"to": address, "data": call_data(signature, *arguments)}, "latest"), 16)


def _word(value: str | int) -> bytes:
    return (int(value, 16) if isinstance(value, str) else value).to_bytes(32, "big")
