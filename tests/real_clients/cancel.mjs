// Gives a request up in the middle. Run by tests/clients.rs, which watches the servers meanwhile.
//
//     ROUTER=http://host:port API_KEY=key node cancel.mjs stream|wait
//
// Each step is told on stdout; the next one begins with a line on stdin. The process, and with it its other
// connections, stays alive until the end of stdin.

import readline from "node:readline";
import OpenAI from "openai";

const { ROUTER, API_KEY } = process.env;
const client = new OpenAI({ baseURL: `${ROUTER}/v1`, apiKey: API_KEY, maxRetries: 0, timeout: 60_000 });
const chat = { model: "tiny", messages: [{ role: "user", content: "Count for ever." }], max_tokens: 100_000 };

const lines = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]();

async function step(name) {
  console.log(name);
  await lines.next();
}

/** Aborts a stream that has begun. */
async function stream() {
  const answer = await client.chat.completions.create({ ...chat, stream: true });
  const chunks = answer[Symbol.asyncIterator]();
  for (let count = 0; count < 3; count += 1) await chunks.next();
  await step("begun");
  answer.controller.abort();
  await step("given up");
}

/** Aborts a request that has no answer yet. */
async function wait() {
  const abort = new AbortController();
  const asking = client.chat.completions.create(chat, { signal: abort.signal });
  const failure = asking.then(() => undefined, (error) => error);
  await step("begun");
  abort.abort();
  if ((await failure) instanceof OpenAI.APIUserAbortError) await step("given up");
}

await { stream, wait }[process.argv[2]]();
process.exit();
