// One question, paid by the official TypeScript client exactly as its documentation has it: nothing here knows Farebox.
//
// Environment: WALLET_KEY (hexadecimal private key), URL, BODY (JSON), ACCEPT_PAYMENT (schemes to ask for; registers upto). Prints one JSON object a line: for a stream
// {"event": "answer"} when the status and headers are there, {"event": "chunk", "text"} for each piece as it arrives, and
// always {"event": "end"} with everything.

import { ExactEvmScheme } from "@x402/evm/exact/client";
import { UptoEvmScheme } from "@x402/evm/upto/client";
import { decodePaymentResponseHeader, wrapFetchWithPayment, x402Client } from "@x402/fetch";
import { privateKeyToAccount } from "viem/accounts";

const { WALLET_KEY, URL: url, BODY: body, ACCEPT_PAYMENT: accepted } = process.env;
const print = (event, fields) => process.stdout.write(`${JSON.stringify({ event, ...fields })}\n`);

const statuses = [];
const watchedFetch = async (...request) => {
  const response = await fetch(...request);
  statuses.push(response.status);
  return response;
};

const wallet = privateKeyToAccount(WALLET_KEY);
const client = new x402Client().register("eip155:*", new ExactEvmScheme(wallet));
if (accepted) client.register("eip155:*", new UptoEvmScheme(wallet));
const fetchWithPayment = wrapFetchWithPayment(watchedFetch, client);
const response = await fetchWithPayment(url, {
  method: "POST",
  headers: { "content-type": "application/json", ...(accepted && { "accept-payment": accepted }) },
  body,
});

const streamed = JSON.parse(body).stream === true;
if (streamed) print("answer", { status: response.status });
let text = "";
let chunks = 0;
const decoder = new TextDecoder();
for await (const bytes of response.body) {
  const piece = decoder.decode(bytes, { stream: true });
  text += piece;
  chunks += 1;
  if (streamed) print("chunk", { text: piece });
}

const paid = response.headers.get("payment-response");
print("end", {
  status: response.status,
  statuses,
  headers: Object.fromEntries(response.headers),
  paymentResponse: paid === null ? null : decodePaymentResponseHeader(paid),
  text,
  chunks,
});
