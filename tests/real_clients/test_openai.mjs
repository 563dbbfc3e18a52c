// Asks a router and a single SGLang server the same with the official `openai` package: the answers must be the
// same. Run by tests/real_clients.rs, which says in the environment where both are.
//
//     ROUTER=http://host:port ALONE=http://host:port API_KEY=key node --test test_openai.mjs

import assert from "node:assert/strict";
import test from "node:test";
import OpenAI from "openai";

const { ROUTER, ALONE, API_KEY } = process.env;
// Retries would hide failures.
const options = { apiKey: API_KEY, maxRetries: 0, timeout: 30_000 };
const router = new OpenAI({ baseURL: `${ROUTER}/v1`, ...options });
const alone = new OpenAI({ baseURL: `${ALONE}/v1`, ...options });

const messages = [{ role: "user", content: "What is the capital of France? 🙂" }];
const chat = { model: "tiny", messages, max_tokens: 12 };
const completion = { model: "tiny", prompt: "The capital of France", max_tokens: 12 };

/** What two answers to the same question have in common: all but random ids and times. */
const own = ["id", "created", "created_at", "item_id", "call_id"];

function shared(value) {
  return JSON.parse(JSON.stringify(value, (key, item) => (own.includes(key) ? undefined : item)));
}

/** What `ask` returns with a client of the router, after a look at what a single server returns. */
async function same(ask) {
  const [ours, theirs] = [await ask(router), await ask(alone)];
  assert.deepEqual(shared(ours), shared(theirs));
  return ours;
}

/** The error that `ask` throws. */
async function errorOf(ask) {
  return ask().then(
    () => assert.fail("there is no error"),
    (error) => error,
  );
}

/** Reads a stream to its end. */
async function all(stream) {
  const chunks = [];
  for await (const chunk of await stream) chunks.push(chunk);
  return chunks;
}

test("models are listed and found by name", async () => {
  const models = await same(async (client) => (await client.models.list()).data);
  assert.deepEqual(models.map((model) => model.id), ["tiny"]);
  assert.equal((await same((client) => client.models.retrieve("tiny"))).id, "tiny");
  const error = await errorOf(() => router.models.retrieve("huge"));
  assert.ok(error instanceof OpenAI.NotFoundError);
  assert.equal(error.code, "model_not_found");
});

test("chat is answered", async () => {
  const answer = await same((client) => client.chat.completions.create(chat));
  assert.equal(answer.usage.completion_tokens, 12);
  assert.ok(answer.choices[0].message.content.length > 12);
});

test("a chat stream has the same text token by token", async () => {
  const asked = { ...chat, stream: true, stream_options: { include_usage: true } };
  const chunks = await same((client) => all(client.chat.completions.create(asked)));
  const tokens = chunks.map((chunk) => chunk.choices[0]?.delta.content).filter(Boolean);
  const whole = await router.chat.completions.create(chat);
  assert.equal(tokens.length, 12);
  assert.equal(tokens.join(""), whole.choices[0].message.content);
  assert.equal(chunks.at(-1).usage.completion_tokens, 12);
});

test("the stream helper puts the answer together", async () => {
  const helped = await router.chat.completions.stream(chat).finalContent();
  const whole = await router.chat.completions.create(chat);
  assert.equal(helped, whole.choices[0].message.content);
});

test("a batch is completed with the prompts' logprobs", async () => {
  const asked = { ...completion, prompt: ["one two three", "four five"], echo: true, logprobs: 1 };
  const answer = await same((client) => client.completions.create(asked));
  assert.deepEqual(answer.choices.map((choice) => choice.logprobs.tokens.length), [3 + 12, 2 + 12]);
  assert.equal(answer.choices[1].logprobs.tokens[0], "four");
});

test("a completion stream with the prompt's logprobs has them in its first chunk", async () => {
  const asked = { ...completion, echo: true, logprobs: 1, stream: true };
  const chunks = await same((client) => all(client.completions.create(asked)));
  assert.deepEqual(chunks[0].choices[0].logprobs.tokens.slice(0, 4), ["The", " capital", " of", " France"]);
  assert.equal(chunks.length, 12);
});

/** The chunks of a stream, sample by sample: samples run at their own pace. Those of none come last. */
function bySample(chunks) {
  const place = (chunk) => chunk.choices[0]?.index ?? 99;
  return chunks.toSorted((one, other) => place(one) - place(other));
}

test("several samples are choices of one answer, with logprobs and usage", async () => {
  const asked = { ...chat, n: 3, logprobs: true, top_logprobs: 2 };
  const answer = await same((client) => client.chat.completions.create(asked));
  assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1, 2]);
  assert.equal(answer.usage.completion_tokens, 36);
  const batch = { ...completion, prompt: ["one two", "three"], n: 2 };
  const completed = await same((client) => client.completions.create(batch));
  assert.deepEqual(completed.choices.map((choice) => choice.index), [0, 1, 2, 3]);
});

test("several samples are streamed with one id and one usage", async () => {
  const asked = { ...chat, n: 3, stream: true, stream_options: { include_usage: true } };
  const chunks = await same(async (client) => bySample(await all(client.chat.completions.create(asked))));
  assert.equal(chunks.at(-1).usage.completion_tokens, 36);
  assert.equal(chunks.filter((chunk) => chunk.usage).length, 1);
  const ours = await all(router.chat.completions.create(asked));
  assert.equal(new Set(ours.map((chunk) => chunk.id)).size, 1);
});

test("each of several samples may call a tool", async () => {
  const tool = { type: "function", function: { name: "weather", parameters: { type: "object" } } };
  const asked = { ...chat, n: 2, tools: [tool], tool_choice: "required" };
  const answer = await same((client) => client.chat.completions.create(asked));
  assert.deepEqual(answer.choices.map((choice) => choice.message.tool_calls.length), [1, 1]);
  const chunks = (client) => all(client.chat.completions.create({ ...asked, stream: true }));
  await same(async (client) => bySample(await chunks(client)));
});

// SGLang keeps two tokens of these for itself.
const response = { model: "tiny", input: messages, max_output_tokens: 14 };

test("a response is given, with logprobs if they are asked for", async () => {
  const asked = { ...response, include: ["message.output_text.logprobs"], top_logprobs: 2 };
  const answer = await same((client) => client.responses.create(asked));
  assert.equal(answer.usage.output_tokens, 12);
  const tokens = answer.output[0].content[0].logprobs;
  assert.equal(tokens.map((token) => token.token).join(""), answer.output_text);
});

test("a stream of events has the response's text token by token", async () => {
  const events = await same((client) => all(client.responses.create({ ...response, stream: true })));
  const deltas = events.filter((event) => event.type === "response.output_text.delta");
  const whole = await router.responses.create(response);
  assert.equal(deltas.length, 12);
  assert.equal(deltas.map((event) => event.delta).join(""), whole.output_text);
  assert.equal(events.at(-1).type, "response.incomplete");
});

test("tools are called in chat and in a response, whole and as a stream", async () => {
  const parameters = { type: "object", properties: { city: { type: "string" } } };
  const named = { name: "weather", parameters };
  const inChat = { ...chat, tools: [{ type: "function", function: named }], tool_choice: "required" };
  const answer = await same((client) => client.chat.completions.create(inChat));
  const call = answer.choices[0].message.tool_calls[0].function;
  assert.deepEqual(Object.keys(JSON.parse(call.arguments)), ["city"]);
  const chunks = await same((client) => all(client.chat.completions.create({ ...inChat, stream: true })));
  const parts = chunks.flatMap((chunk) => chunk.choices[0].delta.tool_calls ?? []);
  assert.equal(parts.map((part) => part.function.arguments ?? "").join(""), call.arguments);

  const tools = { ...response, tools: [{ type: "function", ...named }], tool_choice: "required" };
  const item = (await same((client) => client.responses.create(tools))).output[0];
  assert.deepEqual([item.type, item.name, item.arguments], ["function_call", "weather", call.arguments]);
  const events = await same((client) => all(client.responses.create({ ...tools, stream: true })));
  assert.equal(events.at(-1).response.output[0].arguments, call.arguments);
});

test("a wrong value is the server's 400", async () => {
  const wrong = { ...chat, temperature: -1 };
  const ours = await errorOf(() => router.chat.completions.create(wrong));
  const theirs = await errorOf(() => alone.chat.completions.create(wrong));
  assert.ok(ours instanceof OpenAI.BadRequestError);
  assert.equal(ours.message, theirs.message);
  // The package finds no words in SGLang's errors, which have no `error` around them; they are there.
  const body = JSON.stringify(wrong);
  const headers = { authorization: `Bearer ${API_KEY}`, "content-type": "application/json" };
  const answer = await fetch(`${ROUTER}/v1/chat/completions`, { method: "POST", headers, body });
  const { object, message } = await answer.json();
  assert.equal(object, "error");
  assert.equal(message, "temperature must be a non-negative finite number, got -1.0.");
});

test("too many samples are refused by name", async () => {
  const error = await errorOf(() => router.chat.completions.create({ ...chat, n: 99 }));
  assert.ok(error instanceof OpenAI.BadRequestError);
  assert.equal(error.code, "n_too_large");
});

test("a wrong key is the server's 401", async () => {
  const stranger = router.withOptions({ apiKey: "wrong" });
  const error = await errorOf(() => stranger.chat.completions.create(chat));
  assert.ok(error instanceof OpenAI.AuthenticationError);
});

test("an endpoint that pairs cannot serve is a 501 of its own", async () => {
  const error = await errorOf(() => router.embeddings.create({ model: "tiny", input: "text" }));
  assert.equal(error.status, 501);
  assert.equal(error.code, "not_possible_with_pd");
});

test("headers of an answer are the server's", async () => {
  const headers = async (client) => {
    const { response } = await client.chat.completions.create(chat).withResponse();
    // A server alone may speak of its connection; the router's is another.
    return [...response.headers].filter(([name]) => !["date", "connection", "keep-alive", "x-request-id"].includes(name));
  };
  assert.ok((await same(headers)).some(([name, value]) => name === "server" && value === "uvicorn"));
});

test("parallel streams do not mix", async () => {
  const ask = async (client, number) => {
    const asked = { ...chat, messages: [{ role: "user", content: `question ${number}` }], stream: true };
    const chunks = await all(client.chat.completions.create(asked));
    return chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join("");
  };
  const numbers = [...Array(16).keys()];
  const texts = await same((client) => Promise.all(numbers.map((number) => ask(client, number))));
  assert.equal(new Set(texts).size, 16);
});
