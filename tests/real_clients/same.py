"""What the tests of all Python clients share: where the servers are, what is asked, and what two answers to the
same question have in common. Run by tests/real_clients.rs, which says in the environment where the servers are.

    ROUTER=http://host:port ALONE=http://host:port API_KEY=key python test_openai.py [TEST...]
"""

import os
import unittest

ROUTER, ALONE, API_KEY = os.environ["ROUTER"], os.environ["ALONE"], os.environ["API_KEY"]
BEARER = {"Authorization": f"Bearer {API_KEY}"}
MESSAGES = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "What is the capital of France? 🙂"},
]
PROMPT = "The capital of France"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
# Retries would hide failures.
NO_RETRIES = {"max_retries": 0, "timeout": 30}

# What no two answers have in common: random ids and times.
OWN = {"id", "created", "created_at", "completed_at", "item_id", "call_id", "queue_time", "forward_entry_time"}
OWN |= {"e2e_latency", "decode_throughput"}


def shared(value):
    """What two answers to the same question have in common."""
    if isinstance(value, (list, tuple)):
        return [shared(item) for item in value]
    if isinstance(value, dict):
        return {key: shared(item) for key, item in value.items() if key not in OWN}
    if hasattr(value, "model_dump"):
        # Packages warn of what their types do not have, such as a field that only SGLang knows.
        return shared(value.model_dump(warnings=False))
    return value


class Same(unittest.TestCase):
    """Asks a client of the router, and one of a single server; `pair` has them in this order."""

    maxDiff = None
    pair = (ROUTER, ALONE)

    def same(self, ask):
        """What `ask` returns with a client of the router, after a look at what a single server returns."""
        ours, theirs = map(ask, self.pair)
        self.assertEqual(shared(ours), shared(theirs))
        return ours

    def same_error(self, kind, ask):
        """The error that `ask` raises with a client of the router, after a look at a single server's."""
        with self.assertRaises(kind) as theirs:
            ask(self.pair[1])
        with self.assertRaises(kind) as ours:
            ask(self.pair[0])
        self.assertEqual(ours.exception.body, theirs.exception.body)
        self.assertEqual(ours.exception.response.text, theirs.exception.response.text)
        return ours.exception
