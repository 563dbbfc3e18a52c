// Gives a request up in the middle. Run by tests/real_clients.rs, which watches the servers meanwhile.
//
//     ROUTER=http://host:port API_KEY=key node cancel.mjs stream|wait chat|samples|responses
//
// Each step is told on stdout; the next one begins with a line on stdin. The process, and with it its other
// connections, stays alive until the end of stdin.

import readline from "node:readline";
import OpenAI from "openai";

const { ROUTER, API_KEY } = process.env;
const client = new OpenAI({ baseURL: `${ROUTER}/v1`, apiKey: API_KEY, maxRetries: 0, timeout: 60_000 });
const messages = [{ role: "user", content: "Count for ever." }];
const apis = {
  chat: (more, options) =>
    client.chat.completions.create({ model: "tiny", messages, max_tokens: 100_000, ...more }, options),
  samples: (more, options) => apis.chat({ n: 3, ...more }, options),
  responses: (more, options) =>
    client.responses.create({ model: "tiny", input: messages, max_output_tokens: 100_000, ...more }, options),
};
const [, , action, api] = process.argv;
const ask = apis[api];

const lines = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]();

async function step(name) {
  console.log(name);
  await lines.next();
}

/** Aborts a stream that has begun. */
async function stream() {
  const answer = await ask({ stream: true });
  const chunks = answer[Symbol.asyncIterator]();
  // More than the events that come before the first token.
  for (let count = 0; count < 8; count += 1) await chunks.next();
  await step("begun");
  answer.controller.abort();
  await step("given up");
}

/** Aborts a request that has no answer yet. */
async function wait() {
  const abort = new AbortController();
  const asking = ask({}, { signal: abort.signal });
  const failure = asking.then(() => undefined, (error) => error);
  await step("begun");
  abort.abort();
  if ((await failure) instanceof OpenAI.APIUserAbortError) await step("given up");
}

await { stream, wait }[action]();
process.exit();
