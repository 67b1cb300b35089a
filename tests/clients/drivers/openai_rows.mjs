// openai, OpenAI's own client for node.

import assert from "node:assert/strict";
import { ANSWER, PROMPT, PROMPT_IDS, QUESTION, WEATHER, checkWeather, client, collect, row, servers } from "./rows.mjs";

const { OpenAI } = client("openai");

const connect = (url, apiKey = "x") => new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const openai = connect(servers.plain);
const greedy = { model: "tgi", temperature: 0, max_tokens: 20 };

await row("row_57_completes", async () => {
  const answer = await openai.completions.create({ ...greedy, prompt: PROMPT, stop: "\n" });
  assert.equal(answer.choices[0].text, " Paris.");
  assert.equal(answer.choices[0].finish_reason, "stop");
  const twice = await openai.completions.create({ ...greedy, prompt: [PROMPT_IDS, PROMPT_IDS] });
  assert.deepEqual(twice.choices.map((choice) => choice.index), [0, 1]);
  assert.equal(twice.usage.completion_tokens, 40);
});

await row("row_57_streams_completions", async () => {
  const chunks = await collect(await openai.completions.create({ ...greedy, prompt: PROMPT, stream: true }));
  const whole = await openai.completions.create({ ...greedy, prompt: PROMPT });
  assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), whole.choices[0].text);
});

await row("row_57_chats", async () => {
  const answer = await openai.chat.completions.create({ ...greedy, messages: QUESTION });
  assert.equal(answer.choices[0].message.content, ANSWER);
  assert.equal(answer.choices[0].finish_reason, "stop");
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
});

await row("row_57_streams_chats", async () => {
  const asked = { ...greedy, messages: QUESTION, stream: true, stream_options: { include_usage: true } };
  const chunks = await collect(await openai.chat.completions.create(asked));
  assert.equal(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), ANSWER);
  assert.deepEqual(chunks.at(-1).choices, []);
  assert.ok(chunks.at(-1).usage.completion_tokens > 0);
});

await row("row_57_the_stream_helper_puts_text_together", async () => {
  const stream = openai.chat.completions.stream({ ...greedy, messages: QUESTION });
  const deltas = [];
  stream.on("content", (delta) => deltas.push(delta));
  const final = await stream.finalChatCompletion();
  assert.equal(final.choices[0].message.content, ANSWER);
  assert.equal(deltas.join(""), ANSWER);
});

await row("row_57_the_stream_helper_puts_calls_together", async () => {
  const asked = { ...greedy, max_tokens: 200, messages: QUESTION, tools: [WEATHER], tool_choice: "required" };
  const final = await openai.chat.completions.stream(asked).finalChatCompletion();
  const [choice] = final.choices;
  assert.equal(choice.finish_reason, "tool_calls");
  assert.ok(choice.message.tool_calls.length > 0);
  for (const call of choice.message.tool_calls) {
    assert.match(call.id, /^\S+$/);
    assert.equal(call.function.name, "get_weather");
    checkWeather(call.function.arguments);
  }
});

await row("row_57_refusals_have_classes", async () => {
  const ask = (openai, rest) => openai.chat.completions.create({ ...greedy, messages: QUESTION, ...rest });
  await assert.rejects(ask(openai, { top_p: 2 }), (error) => {
    assert.equal(error.constructor.name, "UnprocessableEntityError");
    assert.match(error.message, /422 "Input validation error: `top_p` must be > 0.0 and < 1.0"/);
    return true;
  });
  await assert.rejects(ask(connect(servers.strict)), { constructor: OpenAI.AuthenticationError });
  await assert.rejects(ask(connect(servers.unready)), { constructor: OpenAI.InternalServerError, status: 503 });
});

await row("row_57_models_are_listed_and_found", async () => {
  const keyed = connect(servers.strict, servers.key);
  assert.deepEqual((await collect(await keyed.models.list())).map((model) => model.id), ["org/m"]);
  assert.equal((await keyed.models.retrieve("org/m")).id, "org/m");
});
