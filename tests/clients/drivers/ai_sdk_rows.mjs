// Vercel's AI SDK over its provider for servers that speak OpenAI's API.

import assert from "node:assert/strict";
import { ANSWER, CITY, QUESTION, WEATHER, checkCity, checkWeather, client, collect, row, servers } from "./rows.mjs";

const { generateObject, generateText, jsonSchema, stepCountIs, streamObject, streamText, tool } = client("ai");
const { createOpenAICompatible } = client("@ai-sdk/openai-compatible");

const settings = { name: "tgi", baseURL: `${servers.plain}/v1`, includeUsage: true, supportsStructuredOutputs: true };
const greedy = {
  model: createOpenAICompatible(settings)("tgi"),
  messages: QUESTION,
  temperature: 0,
  maxOutputTokens: 200,
  maxRetries: 0,
};
const tools = {
  get_weather: tool({
    description: WEATHER.function.description,
    inputSchema: jsonSchema(WEATHER.function.parameters),
    execute: async () => "21 degrees, sunny",
  }),
};

await row("row_66_generates_text", async () => {
  const answer = await generateText(greedy);
  assert.equal(answer.text, ANSWER);
  assert.equal(answer.finishReason, "stop");
  assert.equal(answer.usage.totalTokens, answer.usage.inputTokens + answer.usage.outputTokens);
});

await row("row_66_streams_text", async () => {
  const answer = streamText(greedy);
  assert.equal((await collect(answer.textStream)).join(""), ANSWER);
  assert.equal(await answer.finishReason, "stop");
  assert.ok((await answer.usage).outputTokens > 0);
});

await row("row_66_generates_and_streams_objects", async () => {
  const asked = { ...greedy, schema: jsonSchema(CITY) };
  const { object } = await generateObject(asked);
  checkCity(JSON.stringify(object));
  const parts = await collect(streamObject(asked).partialObjectStream);
  assert.deepEqual(parts.at(-1), object);
});

await row("row_66_calls_a_tool_once_and_goes_on", async () => {
  const turns = [{ toolChoice: "required" }, { toolChoice: "none" }];
  const prepareStep = ({ stepNumber }) => turns[stepNumber];
  const answer = await generateText({ ...greedy, tools, stopWhen: stepCountIs(2), prepareStep });
  const [called, told] = answer.steps;
  assert.equal(called.finishReason, "tool-calls");
  assert.equal(called.toolCalls.length, 1);
  checkWeather(JSON.stringify(called.toolCalls[0].input));
  assert.equal(called.toolResults[0].output, "21 degrees, sunny");
  assert.ok(told.text);
});

await row("row_66_streams_a_call", async () => {
  const answer = streamText({ ...greedy, tools, toolChoice: { type: "tool", toolName: "get_weather" } });
  const events = (await collect(answer.fullStream)).map((event) => event.type);
  for (const type of ["tool-input-start", "tool-input-end", "tool-call", "tool-result"]) {
    assert.equal(events.filter((event) => event === type).length, 1, type);
  }
  assert.ok(!events.includes("error"));
  assert.equal(await answer.finishReason, "tool-calls");
});
