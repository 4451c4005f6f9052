// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IPermit, ISignatureTransfer} from "./X402Permit2Proxy.sol";

interface IReceiveWithAuthorization {
    function receiveWithAuthorization(
        address from,
        address to,
        uint256 value,
        uint256 validAfter,
        uint256 validBefore,
        bytes32 nonce,
        bytes calldata signature
    ) external;

    function transfer(address to, uint256 amount) external returns (bool);
}

/// Brings a payer's deposit to the batch-settlement contract. What a payer signs names the collector and the channel, so only
/// that contract may ask for it: whoever else could would get the tokens.
abstract contract X402DepositCollector {
    address public constant SETTLEMENT = 0x4020074e9dF2ce1deE5A9C1b5c3f541D02a10003;

    error OnlySettlement();

    modifier onlySettlement() {
        if (msg.sender != SETTLEMENT) revert OnlySettlement();
        _;
    }
}

/// Over EIP-3009: the nonce is made of the channel's id and a salt, and so binds the signature to the channel.
contract X402Erc3009DepositCollector is X402DepositCollector {
    error TransferFailed();

    function collect(address payer, address token, uint256 amount, bytes32 channelId, bytes calldata data)
        external
        onlySettlement
    {
        (uint256 validAfter, uint256 validBefore, uint256 salt, bytes memory signature) =
            abi.decode(data, (uint256, uint256, uint256, bytes));
        bytes32 nonce = keccak256(abi.encode(channelId, salt));
        IReceiveWithAuthorization(token).receiveWithAuthorization(
            payer, address(this), amount, validAfter, validBefore, nonce, signature
        );
        if (!IReceiveWithAuthorization(token).transfer(SETTLEMENT, amount)) revert TransferFailed();
    }
}

/// Over Permit2, for any token: the witness names the channel. An EIP-2612 permit may come along, for payers who have not
/// approved Permit2 yet.
contract X402Permit2DepositCollector is X402DepositCollector {
    ISignatureTransfer private constant PERMIT2 = ISignatureTransfer(0x000000000022D473030F116dDEE9F6B43aC78BA3);
    string public constant WITNESS_TYPE_STRING =
        "DepositWitness witness)DepositWitness(bytes32 channelId)TokenPermissions(address token,uint256 amount)";
    bytes32 public constant WITNESS_TYPEHASH = keccak256("DepositWitness(bytes32 channelId)");

    function collect(address payer, address token, uint256 amount, bytes32 channelId, bytes calldata data)
        external
        onlySettlement
    {
        (uint256 nonce, uint256 deadline, bytes memory signature, bytes memory permit) =
            abi.decode(data, (uint256, uint256, bytes, bytes));
        if (permit.length != 0) _allow(payer, token, permit);
        PERMIT2.permitWitnessTransferFrom(
            ISignatureTransfer.PermitTransferFrom({
                permitted: ISignatureTransfer.TokenPermissions({token: token, amount: amount}),
                nonce: nonce,
                deadline: deadline
            }),
            ISignatureTransfer.SignatureTransferDetails({to: SETTLEMENT, requestedAmount: amount}),
            payer,
            keccak256(abi.encode(WITNESS_TYPEHASH, channelId)),
            WITNESS_TYPE_STRING,
            signature
        );
    }

    /// A failure is passed over: somebody may have used the permit already, and the allowance decides.
    function _allow(address payer, address token, bytes memory permit) private {
        (uint256 value, uint256 deadline, uint8 v, bytes32 r, bytes32 s) =
            abi.decode(permit, (uint256, uint256, uint8, bytes32, bytes32));
        try IPermit(token).permit(payer, address(PERMIT2), value, deadline, v, r, s) {} catch {}
    }
}
