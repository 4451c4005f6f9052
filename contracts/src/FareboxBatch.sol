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
    error NotTransfers();

    /// What this contract itself needs after a call, for the event and the next turn of the loop.
    uint256 private constant OWN_GAS = 10_000;

    bytes4 private constant TRANSFER_WITH_AUTHORIZATION = 0xe3ee160e;
    /// Of one packed transfer: payer 20, value 12, validAfter 6, validBefore 6, nonce 32, v 1, r 32, s 32 bytes.
    uint256 private constant TRANSFER_LENGTH = 141;

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
            _requireGas(i, entry.gasLimit);
            emit Executed(i, _call(entry.target, entry.gasLimit, entry.data));
        }
    }

    /// `execute` for EIP-3009 authorizations over one token to one recipient, without what they have in common and without
    /// padding: less than a third of the calldata.
    function executeTransfers(address token, address to, uint256 gasLimit, bytes calldata transfers) external {
        if (!isSigner[msg.sender]) revert NotSigner();
        if (transfers.length % TRANSFER_LENGTH != 0) revert NotTransfers();
        for (uint256 i = 0; i * TRANSFER_LENGTH < transfers.length; ++i) {
            _requireGas(i, gasLimit);
            emit Executed(i, _transfer(token, to, gasLimit, transfers[i * TRANSFER_LENGTH:]));
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

    /// A call gets at most 63/64 of what is left (EIP-150). One that would get less than its limit could fail for that alone,
    /// and be taken for a payment that cannot be made: then nothing happens at all.
    function _requireGas(uint256 index, uint256 gasLimit) private view {
        if (gasleft() < gasLimit + gasLimit / 63 + OWN_GAS) revert NotEnoughGas(index);
    }

    /// What the target returns is not looked at and not copied: it could be made large enough to use up the gas.
    function _call(address target, uint256 gasLimit, bytes calldata data) private returns (bool success) {
        assembly ("memory-safe") {
            let input := mload(0x40)
            calldatacopy(input, data.offset, data.length)
            success := call(gasLimit, target, 0, input, data.length, 0, 0)
        }
    }

    /// The first of the packed transfers, as the token's own function takes it.
    function _transfer(address token, address to, uint256 gasLimit, bytes calldata packed) private returns (bool success) {
        assembly ("memory-safe") {
            let input := mload(0x40)
            let at := packed.offset
            mstore(input, TRANSFER_WITH_AUTHORIZATION)
            mstore(add(input, 0x04), shr(96, calldataload(at)))
            mstore(add(input, 0x24), to)
            mstore(add(input, 0x44), shr(160, calldataload(add(at, 20))))
            mstore(add(input, 0x64), shr(208, calldataload(add(at, 32))))
            mstore(add(input, 0x84), shr(208, calldataload(add(at, 38))))
            mstore(add(input, 0xa4), calldataload(add(at, 44)))
            mstore(add(input, 0xc4), byte(0, calldataload(add(at, 76))))
            calldatacopy(add(input, 0xe4), add(at, 77), 64)
            success := call(gasLimit, token, 0, input, 0x124, 0, 0)
        }
    }

    function _setSigner(address signer, bool allowed) private {
        isSigner[signer] = allowed;
        emit SignerChanged(signer, allowed);
    }
}
