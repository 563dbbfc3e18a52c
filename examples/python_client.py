"""Talks to a router with the official `openai` package and with plain `requests`.

    pip install openai requests
    python examples/python_client.py [BASE_URL]      (default: http://127.0.0.1:30000)
"""

import json
import sys

import requests
from openai import OpenAI

BASE_URL = sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://127.0.0.1:30000"

# The router forwards the key to the servers; without --api-key they accept any.
client = OpenAI(base_url=f"{BASE_URL}/v1", api_key="EMPTY")

# The model that the servers serve.
model = client.models.list().data[0].id
print(f"model: {model}")

messages = [{"role": "user", "content": "What is the capital of France?"}]
response = client.chat.completions.create(model=model, messages=messages, max_tokens=16)
print(f"chat: {response.choices[0].message.content!r}")
print(f"usage: {response.usage.prompt_tokens} + {response.usage.completion_tokens} tokens")

print("stream: ", end="")
for chunk in client.chat.completions.create(model=model, messages=messages, max_tokens=16, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

# Several prompts at once.
prompts = ["The capital of France", "The capital of Italy"]
for choice in client.completions.create(model=model, prompt=prompts, max_tokens=8).choices:
    print(f"completion of {prompts[choice.index]!r}: {choice.text!r}")

# SGLang's own API. The prompt's logprobs come from the prefill server, the text from the decode server.
request = {
    "text": "The capital of France",
    "sampling_params": {"max_new_tokens": 8, "temperature": 0},
    "return_logprob": True,
    "logprob_start_len": 0,
}
response = requests.post(f"{BASE_URL}/generate", json=request, timeout=60)
response.raise_for_status()
generated = response.json()
print(f"generated: {generated['text']!r}")
print(f"prompt logprobs: {[entry[0] for entry in generated['meta_info']['input_token_logprobs']]}")

with requests.post(f"{BASE_URL}/generate", json={**request, "stream": True}, timeout=60, stream=True) as response:
    response.raise_for_status()
    events = [line.removeprefix(b"data: ") for line in response.iter_lines() if line]
# Each event contains the whole text so far; the last line is [DONE].
print(f"generated in {len(events) - 1} events: {json.loads(events[-2])['text']!r}")

info = requests.get(f"{BASE_URL}/server_info", timeout=60).json()
print(f"servers: {len(info['prefill'])} prefill, {len(info['decode'])} decode")

response = requests.post(f"{BASE_URL}/flush_cache", params={"timeout": 5}, timeout=60)
print(f"flush_cache: {response.status_code} {response.json()}")
