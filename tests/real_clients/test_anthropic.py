"""Asks a router and a single SGLang server the same with the official `anthropic` package: the answers must be the
same. SGLang knows a key as a bearer token only, which the package calls `auth_token`.
"""

import unittest

import anthropic

import same
from same import ALONE, API_KEY, MESSAGES, ROUTER, SCHEMA

router, alone = (
    anthropic.Anthropic(base_url=url, api_key=None, auth_token=API_KEY, **same.NO_RETRIES)
    for url in (ROUTER, ALONE)
)
SYSTEM, USER = (message["content"] for message in MESSAGES)
MESSAGE = {"model": "tiny", "system": SYSTEM, "messages": [{"role": "user", "content": USER}], "max_tokens": 12}
# The package has no argument for it.
COLD = {"extra_body": {"temperature": -1}}
TOOLS = {"tools": [{"name": "weather", "input_schema": SCHEMA}], "tool_choice": {"type": "any"}}


class Messages(same.Same):
    pair = (router, alone)

    def test_a_message_is_answered(self):
        answer = self.same(lambda client: client.messages.create(**MESSAGE))
        self.assertEqual((answer.role, answer.stop_reason), ("assistant", "max_tokens"))
        self.assertEqual(answer.usage.output_tokens, 12)
        self.assertGreater(len(answer.content[0].text), 12)

    def test_blocks_are_the_text_they_have(self):
        blocks = [{"role": "user", "content": [{"type": "text", "text": USER}]}]
        answer = self.same(lambda client: client.messages.create(**MESSAGE | {"messages": blocks}))
        self.assertEqual(answer.usage.output_tokens, 12)

    def test_a_message_ends_at_a_stop_sequence(self):
        answer = self.same(lambda client: client.messages.create(**MESSAGE, stop_sequences=["e"]))
        self.assertEqual(answer.stop_reason, "end_turn")
        self.assertLess(answer.usage.output_tokens, 12)

    def test_a_stream_has_the_same_text_token_by_token(self):
        events = self.same(lambda client: list(client.messages.create(**MESSAGE, stream=True)))
        texts = [event.delta.text for event in events if event.type == "content_block_delta"]
        whole = router.messages.create(**MESSAGE).content[0].text
        self.assertEqual((len(texts), "".join(texts)), (12, whole))
        self.assertEqual((events[0].type, events[-1].type), ("message_start", "message_stop"))

    def test_the_stream_helper_puts_the_message_together(self):
        def ask(client):
            with client.messages.stream(**MESSAGE) as stream:
                return "".join(stream.text_stream), stream.get_final_message()

        text, message = self.same(lambda client: list(ask(client)))
        self.assertEqual((message.content[0].text, message.usage.output_tokens), (text, 12))
        self.assertEqual(message.stop_reason, "max_tokens")

    def test_a_tool_is_used(self):
        answer = self.same(lambda client: client.messages.create(**MESSAGE, **TOOLS))
        block = answer.content[0]
        self.assertEqual((answer.stop_reason, block.type, block.name), ("tool_use", "tool_use", "weather"))
        self.assertEqual(sorted(block.input), ["city", "days"])

    def test_a_tools_use_is_streamed(self):
        def ask(client):
            with client.messages.stream(**MESSAGE, **TOOLS) as stream:
                return stream.get_final_message()

        message = self.same(ask)
        self.assertEqual((message.stop_reason, message.content[0].name), ("tool_use", "weather"))
        self.assertEqual(sorted(message.content[0].input), ["city", "days"])

    def test_a_wrong_value_is_the_servers_400(self):
        error = self.same_error(
            anthropic.BadRequestError, lambda client: client.messages.create(**MESSAGE, **COLD)
        )
        self.assertEqual(error.body["error"]["type"], "BadRequestError")
        self.assertIn("temperature", error.message)

    def test_a_missing_field_is_the_servers_400(self):
        error = self.same_error(
            anthropic.BadRequestError, lambda client: client.post("/v1/messages", body={}, cast_to=object)
        )
        self.assertEqual(error.body["error"]["message"], "messages: Field required")

    def test_a_wrong_value_of_a_stream_is_an_error_of_the_package(self):
        # A server tells it inside of a stream. The router makes a 400 of it where it hears prefill first.
        for client in self.pair:
            with self.assertRaises(anthropic.APIStatusError) as caught:
                list(client.messages.create(**MESSAGE, **COLD, stream=True))
            self.assertIn("temperature must be a non-negative finite number", str(caught.exception))

    def test_a_wrong_key_is_an_authentication_error(self):
        for client in self.pair:
            with self.assertRaises(anthropic.AuthenticationError):
                client.with_options(auth_token="wrong").messages.create(**MESSAGE)


if __name__ == "__main__":
    unittest.main()
