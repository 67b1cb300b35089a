// What the node drivers share; rows.py says what a driver is. The packages are found from the working directory, where
// npm has installed them, because the drivers lie elsewhere.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { join } from "node:path";

export const PROMPT = "The capital of France is";
export const PROMPT_IDS = [504, 3575, 282, 4649, 314];
export const QUESTION = [{ role: "user", content: "What is the capital of France?" }];
export const ANSWER = "The capital of France is Paris.";

export const WEATHER = {
  type: "function",
  function: {
    name: "get_weather",
    description: "Get the weather in a city",
    parameters: {
      type: "object",
      properties: { city: { type: "string", maxLength: 20 }, unit: { type: "string", enum: ["celsius", "fahrenheit"] } },
      required: ["city", "unit"],
      additionalProperties: false,
    },
  },
};
export const CITY = {
  type: "object",
  properties: {
    name: { type: "string", maxLength: 20 },
    country: { type: "string", maxLength: 20 },
    inhabitants: { type: "integer", minimum: 1, maximum: 100_000_000 },
  },
  required: ["name", "country", "inhabitants"],
  additionalProperties: false,
};

export const client = createRequire(join(process.cwd(), "package.json"));

export const servers = JSON.parse(process.argv[2]);

// The arguments must follow the schema of WEATHER.
export function checkWeather(written) {
  const { city, unit, ...rest } = JSON.parse(written);
  assert.deepEqual(rest, {});
  assert.ok(typeof city === "string" && [...city].length <= 20);
  assert.ok(["celsius", "fahrenheit"].includes(unit));
}

// The text must follow the schema CITY.
export function checkCity(text) {
  const { name, country, inhabitants, ...rest } = JSON.parse(text);
  assert.deepEqual(rest, {});
  for (const word of [name, country]) assert.ok(typeof word === "string" && [...word].length <= 20);
  assert.ok(Number.isInteger(inhabitants) && inhabitants >= 1 && inhabitants <= 100_000_000);
}

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
