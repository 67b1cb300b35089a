// @axflow/models: its decoder splits at LF LF alone, throws on comments and breaks characters that two writes share.

import assert from "node:assert/strict";
import { setTimeout as sleep } from "node:timers/promises";
import { PROMPT, client, collect, metric, row, servers } from "./rows.mjs";

const { HuggingFaceTextGeneration: axflow } = client("@axflow/models/huggingface/text-generation");

const model = "google/gemma-2-2b-it";
const options = { apiUrl: servers.plain };
const ask = { model, inputs: PROMPT, parameters: { max_new_tokens: 20, return_full_text: false } };
const emoji = {
  model,
  inputs: "😀 😎 😀 😎 😀 😎 😀 😎 😀",
  parameters: { max_new_tokens: 20, return_full_text: false, stop: ["😀 😀 😀"] },
};

await row("row_23_runs", async () => {
  const answer = await axflow.run({ ...ask, options: { use_cache: false, wait_for_model: true } }, options);
  assert.equal(answer.length, 1);
  assert.ok(answer[0].generated_text.startsWith(" Paris."));
});

await row("row_24_streams_chunks", async () => {
  const chunks = await collect(await axflow.stream(ask, options));
  const [{ generated_text: text }] = await axflow.run(ask, options);
  assert.equal(chunks.length, 20);
  assert.equal(chunks.at(-1).generated_text, text);
  assert.equal(chunks.map((chunk) => chunk.token.text).join(""), text);
});

await row("row_25_streams_tokens", async () => {
  const tokens = await collect(await axflow.streamTokens(ask, options));
  const [{ generated_text: text }] = await axflow.run(ask, options);
  assert.equal(tokens.join(""), text);
});

await row("row_26_streams_nothing_but_events", async () => {
  assertEvents(Buffer.concat(await collect(await axflow.streamBytes(ask, options))).toString(), 20);
});

await row("row_26_streams_nothing_but_events_even_after_silence", async () => {
  const patient = { ...ask, parameters: { max_new_tokens: 2 } };
  const bytes = await collect(await axflow.streamBytes(patient, { apiUrl: servers.slow }));
  assertEvents(Buffer.concat(bytes).toString(), 2);
});

function assertEvents(text, count) {
  assert.ok(!text.includes("\r"));
  assert.ok(text.endsWith("\n\n"));
  const blocks = text.split("\n\n").slice(0, -1);
  assert.equal(blocks.length, count);
  for (const block of blocks) assert.match(block, /^data: \{.*\}$/);
}

await row("row_27_keeps_characters_whole", async () => {
  const [{ generated_text: text }] = await axflow.run(emoji, options);
  const tokens = await collect(await axflow.streamTokens(emoji, options));
  assert.ok(text.endsWith("😀 😀 😀"));
  assert.equal(tokens.join(""), text);
  assert.ok(tokens.every((token) => !token.includes("\ufffd")));
});

await row("row_28_bad_parameters_are_an_http_error", async () => {
  const bad = { ...ask, parameters: { temperature: -1 } };
  for (const method of ["run", "stream", "streamTokens", "streamBytes"]) {
    await assert.rejects(axflow[method](bad, options), (error) => error.constructor.name === "HttpError" && error.code === 422);
  }
});

await row("row_29_an_abort_ends_the_sequence", async () => {
  const cancelled = await metric(servers.plain, "shardstream_cancelled_count");
  const abort = new AbortController();
  const endless = { ...ask, parameters: { max_new_tokens: 2000 } };
  const chunks = await axflow.stream(endless, { ...options, signal: abort.signal });
  await assert.rejects(async () => {
    for await (const _ of chunks) abort.abort();
  }, { name: "AbortError" });
  while ((await metric(servers.plain, "tgi_batch_current_size")) > 0) await sleep(50);
  assert.equal((await metric(servers.plain, "shardstream_cancelled_count")) - cancelled, 1);
});

// Only where the host is leads to our server; the rest of the address is the client's own.
const here = (server) => (url, init) => fetch(url.replace("https://api-inference.huggingface.co", server), init);

await row("row_30_asks_the_model_it_names_by_default", async () => {
  const hosted = { fetch: here(servers.caching) };
  const [{ generated_text: text }] = await axflow.run(ask, hosted);
  const chunks = await collect(await axflow.stream(ask, hosted));
  assert.equal(text, " Paris");
  assert.equal(chunks.at(-1).generated_text, text);
});

await row("row_30_other_models_do_not_exist", async () => {
  const other = { ...ask, model: "google/flan-t5-xxl" };
  for (const method of ["run", "stream", "streamTokens", "streamBytes"]) {
    await assert.rejects(
      axflow[method](other, { fetch: here(servers.caching) }),
      (error) => error.constructor.name === "HttpError" && error.code === 404,
    );
  }
});
