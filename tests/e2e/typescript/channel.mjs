// Eleven questions paid through one channel, then its refund, by the official TypeScript client: nothing here knows Farebox.
//
// Environment: WALLET_KEY (hexadecimal private key), RPC_URL, URL, BODY (JSON). Prints one JSON object: the payment responses of
// the answers, and that of the refund.

import { BatchSettlementEvmScheme } from "@x402/evm/batch-settlement/client";
import { toClientEvmSigner } from "@x402/evm";
import { decodePaymentResponseHeader, wrapFetchWithPayment, x402Client } from "@x402/fetch";
import { createPublicClient, http } from "viem";
import { privateKeyToAccount } from "viem/accounts";
import { baseSepolia } from "viem/chains";

const { WALLET_KEY, RPC_URL, URL: url, BODY: body } = process.env;
const reader = createPublicClient({ chain: baseSepolia, transport: http(RPC_URL) });
const scheme = new BatchSettlementEvmScheme(toClientEvmSigner(privateKeyToAccount(WALLET_KEY), reader));
const client = new x402Client().register("eip155:*", scheme);
const statuses = [];
const watchedFetch = async (...request) => {
  const response = await fetch(...request);
  statuses.push(response.status);
  return response;
};
const pay = wrapFetchWithPayment(watchedFetch, client);
const payments = [];
for (let index = 0; index < 11; index += 1) {
  const response = await pay(url, {
    method: "POST",
    headers: { "content-type": "application/json", "accept-payment": "batch-settlement" },
    body,
  });
  if (response.status !== 200) throw new Error(`${response.status} ${await response.text()}`);
  payments.push(decodePaymentResponseHeader(response.headers.get("payment-response")));
}
const refund = await scheme.refund(url);
process.stdout.write(JSON.stringify({ statuses, payments, refund }));
