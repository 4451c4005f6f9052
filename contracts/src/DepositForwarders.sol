// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// Deposit addresses: one for every account, known before there is anything at it (CREATE2), each a minimal clone (EIP-1167)
/// of one forwarder that pays the treasury alone. So a deposit needs no key of ours, and a sweep can be anybody's: whoever
/// calls it pays the gas and moves the money where it belongs.
contract DepositForwarders {
    address public immutable FORWARDER;

    /// `amount` left the account's address for the treasury.
    event Swept(bytes32 indexed account, address indexed token, uint256 amount);
    event SweepFailed(bytes32 indexed account, address indexed token);

    error NotEnoughGas(bytes32 account);

    bytes10 private constant CLONE_HEAD = 0x3d602d80600a3d3981f3;
    bytes10 private constant CLONE_BEFORE_ADDRESS = 0x363d3d373d3d3d363d73;
    bytes15 private constant CLONE_AFTER_ADDRESS = 0x5af43d82803e903d91602b57fd5bf3;
    /// A transfer of the heaviest token in use and the creation of a clone, amply.
    uint256 private constant FLUSH_GAS = 300_000;

    constructor(address forwarder) {
        FORWARDER = forwarder;
    }

    function addressOf(bytes32 account) public view returns (address) {
        bytes32 codeHash = keccak256(_cloneCode());
        return address(uint160(uint256(keccak256(abi.encodePacked(bytes1(0xff), address(this), account, codeHash)))));
    }

    /// Sweeps `token` from every account's address. One that fails (the token is paused, or has blocked the address) is
    /// passed over and said so.
    function sweep(address token, bytes32[] calldata accounts) external {
        for (uint256 i = 0; i < accounts.length; ++i) {
            bytes32 account = accounts[i];
            if (gasleft() < FLUSH_GAS + FLUSH_GAS / 63 + 50_000) revert NotEnoughGas(account);
            address forwarder = addressOf(account);
            if (forwarder.code.length == 0) _create(account);
            (bool success, uint256 amount) = _flush(forwarder, token);
            if (!success) emit SweepFailed(account, token);
            else if (amount != 0) emit Swept(account, token, amount);
        }
    }

    function _flush(address forwarder, address token) private returns (bool success, uint256 amount) {
        bytes memory input = abi.encodeWithSignature("flush(address)", token);
        assembly ("memory-safe") {
            success := call(FLUSH_GAS, forwarder, 0, add(input, 0x20), mload(input), 0, 0x20)
            amount := mload(0)
            // A forwarder answers with one word; anything else is none.
            if lt(returndatasize(), 0x20) { success := 0 }
        }
    }

    function _create(bytes32 account) private {
        bytes memory code = _cloneCode();
        assembly ("memory-safe") {
            pop(create2(0, add(code, 0x20), mload(code), account))
        }
    }

    function _cloneCode() private view returns (bytes memory) {
        return abi.encodePacked(CLONE_HEAD, CLONE_BEFORE_ADDRESS, FORWARDER, CLONE_AFTER_ADDRESS);
    }
}
