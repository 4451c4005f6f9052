// A shop by the official TypeScript resource server, which its Express and Hono middleware wrap: nothing here knows Farebox.
//
// Standard input: JSON with facilitator, pay_to, network, port, price. Sells GET /thing; GET /open answers for nothing.

import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { HTTPFacilitatorClient, x402HTTPResourceServer, x402ResourceServer } from "@x402/core/server";
import { ExactEvmScheme } from "@x402/evm/exact/server";

const parts = JSON.parse(readFileSync(0, "utf8"));
const facilitator = new HTTPFacilitatorClient({ url: parts.facilitator });
const resources = new x402ResourceServer(facilitator).register(parts.network, new ExactEvmScheme());
const accepts = { scheme: "exact", payTo: parts.pay_to, price: parts.price, network: parts.network, maxTimeoutSeconds: 300 };
const shop = new x402HTTPResourceServer(resources, { "GET /thing": { accepts, description: "a thing", mimeType: "application/json" } });
await shop.initialize();

let sold = 0;
createServer(async (request, response) => {
  const url = `http://127.0.0.1:${parts.port}${request.url}`;
  const send = (status, headers, body) => {
    response.writeHead(status, { "content-type": "application/json", ...headers });
    response.end(typeof body === "string" ? body : JSON.stringify(body ?? {}));
  };
  if (request.url === "/open") return send(200, {}, { sold });
  const adapter = {
    getHeader: (name) => request.headers[name.toLowerCase()],
    getMethod: () => request.method,
    getPath: () => request.url,
    getUrl: () => url,
    getAcceptHeader: () => "application/json",
    getUserAgent: () => "",
  };
  const paymentHeader = request.headers["payment-signature"] ?? request.headers["x-payment"];
  const context = { adapter, path: request.url, method: request.method, paymentHeader };
  const result = await shop.processHTTPRequest(context);
  if (result.type !== "payment-verified") return send(result.response.status, result.response.headers, result.response.body);
  sold += 1;
  const body = { sold };
  const settled = await shop.processSettlement(result.paymentPayload, result.paymentRequirements, result.declaredExtensions);
  if (!settled.success) return send(settled.response?.status ?? 402, settled.response?.headers ?? {}, settled.response?.body);
  return send(200, settled.headers, body);
}).listen(parts.port, "127.0.0.1");
