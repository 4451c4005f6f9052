"""Circle's own USDC (FiatTokenV2_2 behind its proxy) on the test chain, from the npm package that the lock file names.

The rest of the chain stays as it is: same address, same domain, same wallets and balances, and `contracts.devnet` mints, pauses
and blocks as before. So whatever is tested against our USDC can be tested against the real one: take the fixture
`circle_chain` instead of `chain`.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from sha3 import keccak_256

from contracts.devnet import OWNER_ADDRESS, USDC_ADDRESS, Devnet, initial_storage, mint, rpc, send_as
from contracts.jsonrpc import Call, batch
from tests.contracts.calls import encoded

PACKAGE = Path(__file__).resolve().parents[2] / "node_modules" / "@offchainlabs" / "stablecoin-evm"
IMPLEMENTATION_ADDRESS = "0xC12C1E0000000000000000000000000000000002"
SIGNATURE_CHECKER_ADDRESS = "0xC12C1E0000000000000000000000000000000003"
PROXY_ADMIN_ADDRESS = "0xC12C1E000000000000000000000000000000000A"
LOST_AND_FOUND_ADDRESS = "0xC12C1E000000000000000000000000000000000F"

# Where the proxy keeps its two addresses.
IMPLEMENTATION_SLOT = "0x" + keccak_256(b"org.zeppelinos.proxy.implementation").hexdigest()
ADMIN_SLOT = "0x" + keccak_256(b"org.zeppelinos.proxy.admin").hexdigest()


@functools.cache
def build(path: str) -> dict[str, Any]:
    """The package's build of a contract, such as ``"v2/FiatTokenV2_2"``."""
    name = path.rpartition("/")[2]
    file = PACKAGE / "artifacts" / "hardhat" / "contracts" / f"{path}.sol" / f"{name}.json"
    assert file.exists(), f"{PACKAGE.name} is missing: run npm ci"
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def linked(path: str) -> str:
    """A contract's runtime code with the library's address where it belongs."""
    found = build(path)
    code: str = found["deployedBytecode"]
    for libraries in found["deployedLinkReferences"].values():
        assert list(libraries) == ["SignatureChecker"]
        for reference in libraries["SignatureChecker"]:
            start = 2 + 2 * reference["start"]
            code = code[:start] + SIGNATURE_CHECKER_ADDRESS[2:].lower() + code[start + 2 * reference["length"] :]
    return code


def place(chain: Devnet, usd_each: str = "1000") -> None:
    """Put Circle's USDC in the place of ours, on a chain as `contracts.devnet.load` leaves it, and fund the wallets."""
    words = {IMPLEMENTATION_SLOT: IMPLEMENTATION_ADDRESS, ADMIN_SLOT: PROXY_ADMIN_ADDRESS}
    calls: list[Call] = [
        # What our token wrote would be read as something else.
        *(
            (method, [address, slot, "0x" + "00" * 32])
            for method, (address, slot, _) in initial_storage(USDC_ADDRESS, chain.wallets, usd_each)
        ),
        ("anvil_setCode", [SIGNATURE_CHECKER_ADDRESS, build("util/SignatureChecker")["deployedBytecode"]]),
        ("anvil_setCode", [IMPLEMENTATION_ADDRESS, linked("v2/FiatTokenV2_2")]),
        ("anvil_setCode", [USDC_ADDRESS, build("v1/FiatTokenProxy")["deployedBytecode"]]),
        *(("anvil_setStorageAt", [USDC_ADDRESS, slot, "0x" + at[2:].rjust(64, "0")]) for slot, at in words.items()),
    ]
    batch(chain.rpc_url, calls)
    own = [OWNER_ADDRESS] * 4  # master minter, pauser, blacklister, owner
    token = chain.usdc
    for data in (
        encoded(
            "initialize(string,string,string,uint8,address,address,address,address)",
            token.name,
            token.symbol,
            "USD",
            token.decimals,
            *own,
        ),
        encoded("initializeV2(string)", token.name),
        encoded("initializeV2_1(address)", LOST_AND_FOUND_ADDRESS),
        encoded("initializeV2_2(address[],string)", [], token.symbol),
        encoded("configureMinter(address,uint256)", OWNER_ADDRESS, 2**255),
    ):
        send_as(chain.rpc_url, OWNER_ADDRESS, token.address, data)
    for wallet in chain.wallets:
        mint(chain.rpc_url, token, wallet.address, int(usd_each) * 10**token.decimals)
    assert rpc(chain.rpc_url, "eth_getStorageAt", token.address, IMPLEMENTATION_SLOT, "latest")[-40:] == (
        IMPLEMENTATION_ADDRESS[2:].lower()
    )
