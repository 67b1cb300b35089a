// @huggingface/inference, in a version that calls /v1/completions for text generation too.

import assert from "node:assert/strict";
import { ANSWER, CITY, PROMPT, QUESTION, WEATHER, checkCity, checkWeather, client, collect, row, servers } from "./rows.mjs";

const { InferenceClient } = client("@huggingface/inference-4.13.30");

const ask = {
  inputs: PROMPT,
  parameters: { max_new_tokens: 20, return_full_text: false, do_sample: false, details: true, top_k: 10, stop: ["\n"] },
};
const question = { messages: QUESTION, temperature: 0, max_tokens: 20 };
const endpoint = new InferenceClient("hf_something").endpoint(servers.plain);

await row("row_48_generates", async () => {
  assert.deepEqual(await endpoint.textGeneration(ask), { generated_text: " Paris." });
});

await row("row_48_streams", async () => {
  const chunks = await collect(endpoint.textGenerationStream(ask));
  assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), " Paris.");
  assert.equal(chunks.at(-1).choices[0].finish_reason, "stop");
});

await row("row_48_tells_of_refusals", async () => {
  const bad = { ...ask, parameters: { temperature: -1 } };
  for (const call of [() => endpoint.textGeneration(bad), () => collect(endpoint.textGenerationStream(bad))]) {
    await assert.rejects(call, (error) => {
      assert.equal(error.httpResponse.status, 422);
      assert.match(error.message, /`temperature` must be strictly positive/);
      return true;
    });
  }
});

// Without a model it sends the URL in its place.
await row("row_49_chats_whatever_the_model_is_called", async () => {
  for (const rest of [{}, { model: "org/m" }, { endpointUrl: `${servers.plain}/v1/chat/completions` }]) {
    const answer = await endpoint.chatCompletion({ ...question, ...rest });
    assert.equal(answer.choices[0].message.content, ANSWER);
    assert.equal(answer.choices[0].finish_reason, "stop");
  }
});

await row("row_49_streams_chats", async () => {
  const chunks = await collect(endpoint.chatCompletionStream(question));
  assert.equal(chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join(""), ANSWER);
});

await row("row_49_tells_of_a_failure_within_a_stream", async () => {
  const failing = new InferenceClient("hf_something").endpoint(servers.failing);
  await assert.rejects(collect(failing.chatCompletionStream(question)), /out of luck/);
});

await row("row_49_calls_tools", async () => {
  const answer = await endpoint.chatCompletion({ ...question, max_tokens: 200, tools: [WEATHER], tool_choice: "required" });
  const [choice] = answer.choices;
  assert.equal(choice.finish_reason, "tool_calls");
  assert.ok(choice.message.tool_calls.length > 0);
  for (const call of choice.message.tool_calls) checkWeather(call.function.arguments);
});

await row("row_49_follows_a_schema", async () => {
  const format = { type: "json_schema", json_schema: { name: "city", schema: CITY, strict: true } };
  const answer = await endpoint.chatCompletion({ ...question, max_tokens: 200, response_format: format });
  assert.equal(answer.choices[0].finish_reason, "stop");
  checkCity(answer.choices[0].message.content);
});

await row("row_50_waits_for_a_model_without_flooding_its_server", async () => {
  let count = 0;
  const counted = (...request) => (count++, fetch(...request));
  const loading = new InferenceClient("hf_something", { endpointUrl: servers.loading, fetch: counted });
  const answer = await loading.chatCompletion(question);
  assert.equal(answer.choices[0].message.content, " Paris");
  assert.ok(count > 1 && count < 50, `${count} requests`);
});
