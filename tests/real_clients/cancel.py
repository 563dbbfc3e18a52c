"""Gives a request up in the middle. Run by tests/clients.rs, which watches the servers meanwhile.

    ROUTER=http://host:port API_KEY=key python cancel.py stream|wait

Each step is told on stdout; the next one begins with a line on stdin. The process, and with it its other
connections, stays alive until the end of stdin.
"""

import asyncio
import os
import sys

import openai

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Count for ever."}], "max_tokens": 100_000}


def step(name):
    print(name, flush=True)
    sys.stdin.readline()


async def stream(client):
    """Closes a stream that has begun."""
    answer = await client.chat.completions.create(**CHAT, stream=True)
    for _ in range(3):
        await anext(aiter(answer))
    step("begun")
    await answer.close()
    step("given up")


async def wait(client):
    """Cancels a request that has no answer yet."""
    asking = asyncio.create_task(client.chat.completions.create(**CHAT))
    print("begun", flush=True)
    # Not `step`: the event loop must go on for the request to be sent.
    await asyncio.to_thread(sys.stdin.readline)
    asking.cancel()
    try:
        await asking
    except asyncio.CancelledError:
        step("given up")


async def main():
    client = openai.AsyncOpenAI(
        base_url=os.environ["ROUTER"] + "/v1", api_key=os.environ["API_KEY"], max_retries=0, timeout=60
    )
    await {"stream": stream, "wait": wait}[sys.argv[1]](client)


asyncio.run(main())
