// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// Carries many settlements in one transaction, each isolated: one that reverts undoes only itself, and none can take more
/// gas than its own limit. Only the operator's signers may call it, since it is also the `facilitator` that payers of the
/// `upto` scheme name, and whoever speaks in its name decides what they pay. It holds no tokens and no allowances.
contract FareboxBatch {
    struct Call {
        address target;
        uint256 gasLimit;
        bytes data;
    }

    /// Follows every call: the logs between two of these belong to one entry.
    event Executed(uint256 indexed index, bool success);
    event OwnerChanged(address owner);
    event SignerChanged(address indexed signer, bool allowed);

    error NotOwner();
    error NotSigner();
    error NotEnoughGas(uint256 index);

    /// What this contract itself needs after a call, for the event and the next turn of the loop.
    uint256 private constant OWN_GAS = 10_000;

    address public owner;
    mapping(address account => bool) public isSigner;

    constructor(address owner_, address[] memory signers) {
        owner = owner_;
        emit OwnerChanged(owner_);
        for (uint256 i = 0; i < signers.length; ++i) _setSigner(signers[i], true);
    }

    function execute(Call[] calldata calls) external {
        if (!isSigner[msg.sender]) revert NotSigner();
        for (uint256 i = 0; i < calls.length; ++i) {
            Call calldata entry = calls[i];
            uint256 gasLimit = entry.gasLimit;
            // A call gets at most 63/64 of what is left (EIP-150). One that would get less than its limit could fail for that
            // alone, and be taken for a payment that cannot be made: then nothing happens at all.
            if (gasleft() < gasLimit + gasLimit / 63 + OWN_GAS) revert NotEnoughGas(i);
            emit Executed(i, _call(entry.target, gasLimit, entry.data));
        }
    }

    function setSigner(address signer, bool allowed) external {
        if (msg.sender != owner) revert NotOwner();
        _setSigner(signer, allowed);
    }

    function setOwner(address owner_) external {
        if (msg.sender != owner) revert NotOwner();
        owner = owner_;
        emit OwnerChanged(owner_);
    }

    /// What the target returns is not looked at and not copied: it could be made large enough to use up the gas.
    function _call(address target, uint256 gasLimit, bytes calldata data) private returns (bool success) {
        assembly ("memory-safe") {
            let input := mload(0x40)
            calldatacopy(input, data.offset, data.length)
            success := call(gasLimit, target, 0, input, data.length, 0, 0)
        }
    }

    function _setSigner(address signer, bool allowed) private {
        isSigner[signer] = allowed;
        emit SignerChanged(signer, allowed);
    }
}
