// What the node drivers share; rows.py says what a driver is. The packages are found from the working directory, where
// npm has installed them, because the drivers lie elsewhere.

import { createRequire } from "node:module";
import { join } from "node:path";

export const PROMPT = "The capital of France is";

export const client = createRequire(join(process.cwd(), "package.json"));

export const servers = JSON.parse(process.argv[2]);

// Runs one row and prints its line.
export async function row(name, check) {
  let problem = null;
  try {
    await check();
  } catch (error) {
    problem = error.stack;
  }
  process.stdout.write(JSON.stringify({ row: name, problem }) + "\n");
}

export async function collect(stream) {
  const parts = [];
  for await (const part of stream) parts.push(part);
  return parts;
}

// A number that a server exposes at /metrics.
export async function metric(server, name) {
  const text = await (await fetch(`${server}/metrics`)).text();
  return Number(text.match(new RegExp(`^${name} (.+)$`, "m"))[1]);
}
