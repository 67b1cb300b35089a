// @huggingface/inference, in the last version that speaks TGI's native routes.

import assert from "node:assert/strict";
import { PROMPT, client, collect, row, servers } from "./rows.mjs";

const { InferenceClient } = client("@huggingface/inference");

const ask = { inputs: PROMPT, parameters: { max_new_tokens: 20, return_full_text: false } };
const endpoint = new InferenceClient("hf_something").endpoint(servers.plain);

await row("row_47_generates", async () => {
  const answer = await endpoint.textGeneration(ask);
  assert.ok(answer.generated_text.startsWith(" Paris."));
});

await row("row_47_streams", async () => {
  const events = await collect(endpoint.textGenerationStream({ ...ask, parameters: { ...ask.parameters, details: true } }));
  const { generated_text: text } = await endpoint.textGeneration(ask);
  assert.equal(events.length, 20);
  assert.equal(events.map((event) => event.token.text).join(""), text);
  assert.equal(events.at(-1).generated_text, text);
  assert.equal(events.at(-1).details.finish_reason, "length");
});

await row("row_47_tells_of_refusals", async () => {
  const bad = { ...ask, parameters: { temperature: -1 } };
  for (const call of [() => endpoint.textGeneration(bad), () => collect(endpoint.textGenerationStream(bad))]) {
    await assert.rejects(call, (error) => {
      assert.equal(error.httpResponse.status, 422);
      assert.match(error.message, /`temperature` must be strictly positive/);
      return true;
    });
  }
});
