// Compiles contracts/src with the pinned npm solc and writes contracts/artifacts/*.json; with --check, writes nothing and
// compares them byte for byte. The runtime code of Permit2 and Multicall3 is public, deployed bytecode: it is taken out of
// the npm packages named below, so that nothing but this script needs those packages (200 MB).
//
//   node contracts/build.mjs [--check]
import { existsSync, mkdirSync, readFileSync, readdirSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const SOLC_VERSION = "0.8.37";
const EVM_VERSION = "cancun"; // transient storage; every chain that we settle on has it
const OPTIMIZER_RUNS = 200;

// Placed at an address without running their constructors.
const PLACED = [
  "UsdcLike",
  "UsdtLike",
  "X402BatchSettlement",
  "X402Erc3009DepositCollector",
  "X402ExactPermit2Proxy",
  "X402Permit2DepositCollector",
  "X402UptoPermit2Proxy",
];
// Contracts that share a file with others.
const FILES = {
  X402Erc3009DepositCollector: "X402DepositCollectors",
  X402Permit2DepositCollector: "X402DepositCollectors",
};
// Every operator's own, created with constructor arguments.
const CREATED = ["DepositForwarder", "DepositForwarders", "FareboxBatch"];

const DEPLOYED = [
  {
    contract: "Permit2",
    package: "@uniswap/v4-periphery",
    path: "lib/permit2/test/utils/DeployPermit2.sol",
    code: /bytecode\s*=\s*hex"([0-9a-f]+)"/,
    // Where the two immutables stand that Permit2's constructor computes. The package's values are those of another
    // address on chain 31337, so whoever places the code writes the right ones.
    immutables: { chainId: 6945, domainSeparator: 6983 },
  },
  {
    contract: "Multicall3",
    package: "@eth-optimism/contracts-bedrock",
    path: "src/libraries/Preinstalls.sol",
    code: /MultiCall3Code\s*=\s*hex"([0-9a-f]+)"/,
    immutables: {},
  },
];

const here = dirname(fileURLToPath(import.meta.url));
const artifactsDir = join(here, "artifacts");
const modulesDir = join(here, "..", "node_modules");
const require = createRequire(import.meta.url);

function fail(message) {
  console.error(`contracts/build.mjs: ${message}`);
  process.exit(1);
}

function compile() {
  const solc = require("solc");
  if (!solc.version().startsWith(`${SOLC_VERSION}+`)) fail(`solc ${SOLC_VERSION} is needed, found ${solc.version()}; run npm ci`);
  const sourceDir = join(here, "src");
  const sources = Object.fromEntries(
    readdirSync(sourceDir)
      .filter((name) => name.endsWith(".sol"))
      .sort()
      .map((name) => [`contracts/src/${name}`, { content: readFileSync(join(sourceDir, name), "utf8") }]),
  );
  const settings = {
    optimizer: { enabled: true, runs: OPTIMIZER_RUNS },
    evmVersion: EVM_VERSION,
    // No hash of sources and no version at the end of the code: it depends on nothing but what it does.
    metadata: { bytecodeHash: "none", appendCBOR: false },
    outputSelection: { "*": { "*": ["abi", "evm.bytecode.object", "evm.deployedBytecode", "storageLayout"] } },
  };
  const output = JSON.parse(solc.compile(JSON.stringify({ language: "Solidity", sources, settings })));
  const messages = output.errors ?? [];
  for (const message of messages) console.error(message.formattedMessage);
  if (messages.length > 0) fail("compiler errors or warnings, see above");

  return [...CREATED, ...PLACED].map((contract) => {
    const source = `contracts/src/${FILES[contract] ?? contract}.sol`;
    const { abi, evm, storageLayout } = output.contracts[source][contract];
    // Without its constructor, a contract with immutables would be wrong.
    const immutables = Object.keys(evm.deployedBytecode.immutableReferences ?? {}).length > 0;
    if (immutables && PLACED.includes(contract)) fail(`${contract} has immutables`);
    return {
      contract,
      source,
      compiler: { name: "solc", version: solc.version(), evmVersion: EVM_VERSION, optimizerRuns: OPTIMIZER_RUNS },
      storage: Object.fromEntries(
        storageLayout.storage.map(({ label, slot, offset }) => [label, { slot: Number(slot), offset }]),
      ),
      abi,
      bytecode: `0x${evm.bytecode.object}`,
      deployedBytecode: `0x${evm.deployedBytecode.object}`,
    };
  });
}

function extract({ contract, package: packageName, path, code, immutables }) {
  const packageDir = join(modulesDir, packageName);
  if (!existsSync(packageDir)) fail(`npm package ${packageName} is missing; run npm ci`);
  const { version, license } = JSON.parse(readFileSync(join(packageDir, "package.json"), "utf8"));
  const found = readFileSync(join(packageDir, path), "utf8").match(code);
  if (found === null) fail(`no ${contract} bytecode in ${packageName}@${version}/${path}`);
  const provenance = { package: packageName, version, path, license, what: "deployed bytecode of a public contract" };
  return { contract, provenance, immutables, deployedBytecode: `0x${found[1]}` };
}

const checking = process.argv.includes("--check");
const artifacts = [...compile(), ...DEPLOYED.map(extract)];
const wanted = new Map(artifacts.map((artifact) => [`${artifact.contract}.json`, `${JSON.stringify(artifact, null, 2)}\n`]));

mkdirSync(artifactsDir, { recursive: true });
const present = readdirSync(artifactsDir).filter((name) => name.endsWith(".json"));
const stray = present.filter((name) => !wanted.has(name));
if (stray.length > 0) fail(`artifacts without a source: ${stray.join(", ")}`);

const differing = [];
for (const [name, text] of wanted) {
  const file = join(artifactsDir, name);
  if (existsSync(file) && readFileSync(file, "utf8") === text) continue;
  differing.push(name);
  if (!checking) writeFileSync(file, text);
}
if (checking && differing.length > 0) fail(`differ from what the sources compile to: ${differing.join(", ")}; run node contracts/build.mjs`);
console.log(checking ? `${wanted.size} artifacts are what the sources compile to` : `wrote ${differing.length} of ${wanted.size} artifacts`);
