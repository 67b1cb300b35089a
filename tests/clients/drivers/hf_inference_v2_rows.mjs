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

const waits = [];
const watched = async (url, options) => {
  const response = await fetch(url, options);
  waits.push([response.status, new Headers(options.headers).get("x-wait-for-model")]);
  return response;
};

await row("row_46_a_model_that_loads_is_asked_once_more_and_waited_for", async () => {
  waits.length = 0;
  const model = "smollm2-135m-instruct";
  const hosted = new HfInference().endpoint(`${servers.restarting}/models/${model}`);
  const { generated_text: text } = await hosted.textGeneration({ model, inputs: PROMPT }, { fetch: watched });
  assert.deepEqual(waits, [[503, null], [200, "true"]]);
  assert.ok(text.endsWith(" Paris"));
});

await row("row_46_whoever_waits_at_once_is_asked_nothing", async () => {
  waits.length = 0;
  const model = "smollm2-135m-instruct";
  const hosted = new HfInference().endpoint(`${servers.restarting}/models/${model}`);
  const stream = hosted.textGenerationStream({ model, inputs: PROMPT }, { fetch: watched, wait_for_model: true });
  assert.ok((await collect(stream)).at(-1).generated_text.endsWith(" Paris"));
  assert.deepEqual(waits, [[200, "true"]]);
});

await row("row_46_generates_and_chats_by_the_models_name", async () => {
  const model = "smollm2-135m-instruct";
  const asked = [];
  const here = (url, options) => {
    asked.push(url);
    return fetch(url.replace(/^https:\/\/[^/]*huggingface.co/, servers.plain), options);
  };
  const hf = new HfInference("hf_something");
  const parameters = { max_new_tokens: 20 };
  const answer = await hf.textGeneration({ model, inputs: PROMPT, parameters }, { fetch: here });
  const chat = { model, messages: [{ role: "user", content: "Hi" }], max_tokens: 5 };
  const { choices } = await hf.chatCompletion(chat, { fetch: here });
  assert.ok(answer.generated_text.startsWith(`${PROMPT} Paris`));
  assert.equal(choices.length, 1);
  const url = `https://api-inference.huggingface.co/models/${model}`;
  assert.deepEqual(asked, [url, `${url}/v1/chat/completions`]);
});
