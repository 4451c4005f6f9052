"""The contracts that every operator has of its own: the batch contract, and the deposit addresses of its customers.

They are created through the deterministic deployer (CREATE2), so their addresses follow from what they are made with: who
creates them, and in what order, does not matter, and creating them again is refused by the chain.

Source: EIP-1014, EIP-1167, and the deployer at `CREATE2_DEPLOYER`, which takes a salt followed by creation code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sha3 import keccak_256

from contracts.builds import artifact

CREATE2_DEPLOYER = "0x4e59b44847b379578588920ca78fbf26c0b4956c"
_SALT = bytes(32)
_CLONE = bytes.fromhex("3d602d80600a3d3981f3363d3d373d3d3d363d73"), bytes.fromhex("5af43d82803e903d91602b57fd5bf3")


@dataclass(frozen=True, slots=True)
class Creation:
    """A contract to be created: its name, the code that creates it (arguments included), and the address (lower-case hex) that
    it has once it is."""

    contract: str
    code: bytes
    address: str

    @property
    def deployer_data(self) -> bytes:
        """What a transaction to `CREATE2_DEPLOYER` carries."""
        return _SALT + self.code


def batch(owner: str, signers: Sequence[str]) -> Creation:
    """The batch contract of an operator.

    Args:
        owner: May add and remove signers; an address in any letter case.
        signers: May send batches from the beginning. Sorted here, so that their order makes no second contract.
    """
    listed = sorted(int(signer, 16) for signer in signers)
    # The dynamic array's offset follows the owner: two words.
    words = [int(owner, 16), 64, len(listed), *listed]
    return _creation("FareboxBatch", words)


def forwarder(treasury: str) -> Creation:
    """What stands behind all deposit addresses of a treasury."""
    return _creation("DepositForwarder", [int(treasury, 16)])


def deposit_factory(treasury: str) -> Creation:
    """The factory of the deposit addresses of a treasury; needs `forwarder(treasury)` to be there."""
    return _creation("DepositForwarders", [int(forwarder(treasury).address, 16)])


def deposit_address(factory: str, implementation: str, account: bytes) -> str:
    """The deposit address that a factory has for an account.

    Args:
        factory: Of `deposit_factory`.
        implementation: The factory's `FORWARDER`.
        account: 32 bytes.
    """
    clone = _CLONE[0] + bytes.fromhex(implementation[2:]) + _CLONE[1]
    return create2_address(factory, account, clone)


def create2_address(creator: str, salt: bytes, code: bytes) -> str:
    """The address, lower-case hex, of what `creator` makes of `code` (arguments included) with a 32-byte `salt` (EIP-1014)."""
    assert len(salt) == 32
    preimage = b"\xff" + bytes.fromhex(creator[2:]) + salt + keccak_256(code).digest()
    digest: str = keccak_256(preimage).hexdigest()
    return "0x" + digest[-40:]


def _creation(contract: str, words: Sequence[int]) -> Creation:
    arguments = b"".join(word.to_bytes(32, "big") for word in words)
    code = bytes.fromhex(artifact(contract)["bytecode"][2:]) + arguments
    return Creation(contract, code, create2_address(CREATE2_DEPLOYER, _SALT, code))
