// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// What stands behind every account's deposit address. It can do one thing, for anybody: pay all that it has of a token to
/// the treasury.
contract DepositForwarder {
    address public immutable TREASURY;

    error TransferFailed();

    constructor(address treasury) {
        TREASURY = treasury;
    }

    /// Returns what was sent. Tokens that return nothing (USDT) and tokens that return false are both understood.
    function flush(address token) external returns (uint256 amount) {
        (bool read, bytes memory balance) =
            token.staticcall(abi.encodeWithSignature("balanceOf(address)", address(this)));
        if (!read || balance.length < 32) revert TransferFailed();
        amount = abi.decode(balance, (uint256));
        if (amount == 0) return 0;
        (bool sent, bytes memory answer) =
            token.call(abi.encodeWithSignature("transfer(address,uint256)", TREASURY, amount));
        if (!sent || (answer.length != 0 && (answer.length < 32 || !abi.decode(answer, (bool))))) revert TransferFailed();
    }
}
