// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// Who signed a digest: a key (65 bytes r, s, v) or a contract wallet (ERC-1271).
library Signatures {
    bytes4 private constant ERC1271_MAGIC = 0x1626ba7e;

    /// Half of secp256k1's order. A signature with s above it is the twin of a canonical one: refusing it (EIP-2) leaves
    /// one signature per key and digest.
    uint256 private constant S_MAX = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0;

    /// An account with code is judged by its code only, as in the real USDC: a valid signature by the key behind an
    /// EIP-7702 delegation does not count.
    function isValidNow(address signer, bytes32 digest, bytes memory signature) internal view returns (bool) {
        if (signer.code.length == 0) return recover(digest, signature) == signer;
        (bool answered, bytes memory answer) =
            signer.staticcall(abi.encodeWithSelector(ERC1271_MAGIC, digest, signature));
        return answered && answer.length >= 32 && abi.decode(answer, (bytes32)) == bytes32(ERC1271_MAGIC);
    }

    /// Like `isValidNow`, but a malformed signature is one that does not count.
    function signed(address signer, bytes32 digest, bytes memory signature) internal view returns (bool) {
        return signer.code.length == 0 ? signedByKey(signer, digest, signature) : isValidNow(signer, digest, signature);
    }

    /// Whether the key behind an address made a canonical signature, whatever code the address has.
    function signedByKey(address signer, bytes32 digest, bytes memory signature) internal pure returns (bool) {
        if (signature.length != 65) return false;
        (bytes32 r, bytes32 s, uint8 v) = _split(signature);
        return signer != address(0) && uint256(s) <= S_MAX && ecrecover(digest, v, r, s) == signer;
    }

    /// The address of the key that made a canonical signature; reverts for every other one.
    function recover(bytes32 digest, bytes memory signature) internal pure returns (address signer) {
        require(signature.length == 65, "ECRecover: invalid signature length");
        (bytes32 r, bytes32 s, uint8 v) = _split(signature);
        require(uint256(s) <= S_MAX, "ECRecover: invalid signature 's' value");
        require(v == 27 || v == 28, "ECRecover: invalid signature 'v' value");
        signer = ecrecover(digest, v, r, s);
        require(signer != address(0), "ECRecover: invalid signature");
    }

    function _split(bytes memory signature) private pure returns (bytes32 r, bytes32 s, uint8 v) {
        assembly ("memory-safe") {
            r := mload(add(signature, 0x20))
            s := mload(add(signature, 0x40))
            v := byte(0, mload(add(signature, 0x60)))
        }
    }
}
