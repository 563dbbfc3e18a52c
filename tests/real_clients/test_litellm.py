"""Asks a router and a single SGLang server the same with `litellm`, as a proxy of it would: the answers must be the
same."""

import json
import os
import unittest

# Otherwise the package asks the network for prices when it is imported.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm

import same
from same import API_KEY, BEARER, MESSAGES, PROMPT, TOOL

litellm.telemetry = False
litellm.suppress_debug_info = True
CHAT = {"messages": MESSAGES, "max_tokens": 12}


def options(url, **more):
    return {"model": "openai/tiny", "api_base": f"{url}/v1", "api_key": API_KEY, **same.NO_RETRIES, **more}


def anthropic(url, **more):
    return options(url, model="anthropic/tiny", api_base=url, extra_headers=BEARER, **more)


class LiteLlm(same.Same):
    def test_chat_is_answered(self):
        answer = self.same(lambda url: litellm.completion(**CHAT, **options(url)))
        self.assertEqual((answer.choices[0].finish_reason, answer.usage.completion_tokens), ("length", 12))

    def test_a_chat_stream_has_the_same_text(self):
        chunks = self.same(lambda url: list(litellm.completion(**CHAT, **options(url, stream=True))))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        self.assertEqual(text, litellm.completion(**CHAT, **options(same.ROUTER)).choices[0].message.content)

    def test_logprobs_are_those_of_every_token(self):
        more = {"logprobs": True, "top_logprobs": 2}
        answer = self.same(lambda url: litellm.completion(**CHAT, **options(url, **more)))
        self.assertEqual(len(answer.choices[0].logprobs.content), 12)

    def test_a_tool_is_called_also_in_a_stream(self):
        more = {"tools": [TOOL], "tool_choice": "required"}
        answer = self.same(lambda url: litellm.completion(**CHAT, **options(url, **more)))
        call = answer.choices[0].message.tool_calls[0].function
        self.assertEqual((call.name, sorted(json.loads(call.arguments))), ("weather", ["city", "days"]))
        chunks = self.same(lambda url: list(litellm.completion(**CHAT, **options(url, stream=True, **more))))
        calls = [part.function for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
        self.assertEqual("".join(part.arguments or "" for part in calls), call.arguments)

    def test_a_text_is_completed_with_the_prompts_logprobs(self):
        more = {"model": "text-completion-openai/tiny", "max_tokens": 12, "echo": True, "logprobs": 1}
        answer = self.same(lambda url: litellm.text_completion(prompt=PROMPT, **options(url, **more)))
        self.assertEqual(len(answer.choices[0].logprobs.tokens), 4 + 12)

    def test_a_response_is_given_also_in_a_stream(self):
        # The package asks for no fewer, of which SGLang keeps two for itself.
        more = {"input": MESSAGES, "max_output_tokens": 16}
        answer = self.same(lambda url: litellm.responses(**options(url, **more)))
        self.assertEqual(answer.usage.output_tokens, 14)
        events = self.same(lambda url: list(litellm.responses(**options(url, stream=True, **more))))
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        self.assertEqual("".join(deltas), answer.output[0].content[0].text)

    def test_a_message_is_answered_also_in_a_stream(self):
        answer = self.same(lambda url: litellm.completion(**CHAT, **anthropic(url)))
        self.assertEqual((answer.choices[0].finish_reason, answer.usage.completion_tokens), ("length", 12))
        chunks = self.same(lambda url: list(litellm.completion(**CHAT, **anthropic(url, stream=True))))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        self.assertEqual(text, answer.choices[0].message.content)

    def test_a_wrong_value_is_a_bad_request(self):
        for url in self.pair:
            with self.assertRaises(litellm.BadRequestError):
                litellm.completion(**CHAT, **options(url, temperature=-1))


if __name__ == "__main__":
    unittest.main()
