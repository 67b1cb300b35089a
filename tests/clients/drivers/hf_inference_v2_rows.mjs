// @huggingface/inference of the days of the hosted Inference API, when it could ask for an answer of its own.

import assert from "node:assert/strict";
import { PROMPT, client, collect, row, servers } from "./rows.mjs";

const { HfInference } = client("@huggingface/inference-2.8.1");

// Without a model this client would ask huggingface.co which there are.
const ask = { model: "org/m", inputs: PROMPT, parameters: { max_new_tokens: 20, do_sample: false } };
const endpoint = new HfInference("hf_something").endpoint(servers.caching);

// Notes how the server came to its answer, which the client does not tell.
const computed = [];
const noted = async (url, options) => {
  const response = await fetch(url, options);
  computed.push(response.headers.get("x-compute-type") !== "cache");
  return response;
};

await row("row_46_use_cache_false_is_honoured", async () => {
  computed.length = 0;
  const answers = [];
  for (const options of [{}, {}, { use_cache: false }, {}]) {
    answers.push(await endpoint.textGeneration(ask, { ...options, fetch: noted }));
  }
  assert.deepEqual(computed, [true, false, true, false]);
  for (const answer of answers) assert.deepEqual(answer, answers[0]);
});

await row("row_46_use_cache_false_is_honoured_by_streams", async () => {
  computed.length = 0;
  const streams = [];
  for (const options of [{}, {}, { use_cache: false }]) {
    streams.push(await collect(endpoint.textGenerationStream(ask, { ...options, fetch: noted })));
  }
  assert.deepEqual(computed, [true, false, true]);
  assert.ok(streams[0].length > 1);
  for (const events of streams) assert.deepEqual(events, streams[0]);
});
