"""Gives a request up in the middle. Run by tests/real_clients.rs, which watches the servers meanwhile.

    ROUTER=http://host:port API_KEY=key python cancel.py stream|wait CLIENT

CLIENT is one of the names in CLIENTS. Each step is told on stdout; the next one begins with a line on stdin. The
process, and with it its other connections, stays alive until the end of stdin.
"""

import asyncio
import os
import sys

ROUTER, API_KEY = os.environ["ROUTER"], os.environ["API_KEY"]
MESSAGES = [{"role": "user", "content": "Count for ever."}]
LONG = 100_000
NO_RETRIES = {"max_retries": 0, "timeout": 60}


def openai_client():
    import openai

    return openai.AsyncOpenAI(base_url=ROUTER + "/v1", api_key=API_KEY, **NO_RETRIES)


def chat(**more):
    return openai_client().chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=LONG, **more)


def samples(**more):
    return chat(n=3, **more)


def responses(**more):
    return openai_client().responses.create(model="tiny", input=MESSAGES, max_output_tokens=LONG, **more)


def messages(**more):
    import anthropic

    client = anthropic.AsyncAnthropic(base_url=ROUTER, api_key=None, auth_token=API_KEY, **NO_RETRIES)
    # A long request that is not streamed needs a timeout of its own.
    return client.messages.create(model="tiny", messages=MESSAGES, max_tokens=LONG, timeout=60, **more)


def litellm(**more):
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    options = {"api_base": ROUTER + "/v1", "api_key": API_KEY, **NO_RETRIES, **more}
    return litellm.acompletion(model="openai/tiny", messages=MESSAGES, max_tokens=LONG, **options)


async def langchain(stream=False):
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=ROUTER + "/v1", api_key=API_KEY, model="tiny", max_tokens=LONG, **NO_RETRIES)
    return model.astream(MESSAGES) if stream else await model.ainvoke(MESSAGES)


CLIENTS = {
    "openai-chat": chat,
    "openai-samples": samples,
    "openai-responses": responses,
    "anthropic": messages,
    "litellm": litellm,
    "langchain": langchain,
}
# Streams that can be closed by another task than the one that reads them.
CLOSE = ["openai-chat", "openai-samples", "openai-responses", "anthropic"]


async def step(name):
    print(name, flush=True)
    # The event loop goes on: it sends requests, and closes what nobody refers to any more.
    await asyncio.to_thread(sys.stdin.readline)


async def stream(ask):
    """Gives a stream up that has begun: closes it, where the package can, else ends the task that reads it."""
    answer, begun = await ask(stream=True), asyncio.Event()

    async def read():
        count = 0
        async for _ in answer:
            count += 1
            # More than the events that come before the first token.
            if count == 8:
                begun.set()

    reading = asyncio.create_task(read())
    await begun.wait()
    await step("begun")
    if sys.argv[2] in CLOSE:
        await answer.close()
    reading.cancel()
    await asyncio.wait([reading])
    await step("given up")


async def wait(ask):
    """Cancels a request that has no answer yet."""
    asking = asyncio.create_task(ask())
    await step("begun")
    asking.cancel()
    try:
        await asking
    except asyncio.CancelledError:
        await step("given up")


asyncio.run({"stream": stream, "wait": wait}[sys.argv[1]](CLIENTS[sys.argv[2]]))
