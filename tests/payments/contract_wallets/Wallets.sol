// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// An ERC-1271 wallet of one key, which changes its mind when told so: `mood` 0 is honest.
/// It takes a plain key's signature, and the same one with anything behind it (as wallets' own formats are).
contract Wallet {
    address public owner;
    uint256 public mood;
    /// The last block in which mood 7 signs.
    uint256 public until;

    constructor(address owner_) {
        owner = owner_;
    }

    function setMood(uint256 mood_) external {
        mood = mood_;
    }

    function isValidSignature(bytes32 digest, bytes calldata signature) external view returns (bytes4) {
        if (mood == 1) return 0xffffffff;
        if (mood == 2) while (true) {}
        if (mood == 3) assembly { return(0, 100000) }
        // Honest to whoever only asks: gas costs nothing in a simulation.
        if (mood == 4 && tx.gasprice > 0) return 0xffffffff;
        if (mood == 5 && tx.gasprice > 0) while (true) {}
        if (mood == 6 && tx.gasprice > 0) revert();
        if (mood == 7 && block.number > until) return 0xffffffff;
        if (mood == 8) revert();
        bytes32 r = bytes32(signature[0:32]);
        bytes32 s = bytes32(signature[32:64]);
        // An account that delegates to this (EIP-7702) has no owner of its own in storage: it is its own.
        address signer = owner == address(0) ? address(this) : owner;
        return ecrecover(digest, uint8(signature[64]), r, s) == signer ? bytes4(0x1626ba7e) : bytes4(0xffffffff);
    }
}

contract WalletFactory {
    function create(address owner) external returns (address) {
        return address(new Wallet{salt: bytes32(0)}(owner));
    }
}
