"""Asks a router and a single SGLang server the same with `langchain-openai`: the answers must be the same."""

import unittest

import openai
from langchain_openai import ChatOpenAI, OpenAI

import same
from same import API_KEY, MESSAGES, PROMPT, TOOL

TURNS = [(message["role"], message["content"]) for message in MESSAGES]


def options(url, **more):
    return {"base_url": f"{url}/v1", "api_key": API_KEY, "model": "tiny", **same.NO_RETRIES, **more}


def chat(url, **more):
    return ChatOpenAI(**options(url, **{"max_tokens": 12, **more}))


class LangChain(same.Same):
    def test_chat_is_answered(self):
        answer = self.same(lambda url: chat(url).invoke(TURNS))
        self.assertEqual(answer.usage_metadata["output_tokens"], 12)
        self.assertEqual(answer.response_metadata["finish_reason"], "length")

    def test_a_stream_has_the_same_text(self):
        chunks = self.same(lambda url: list(chat(url, stream_usage=True).stream(TURNS)))
        self.assertEqual("".join(chunk.content for chunk in chunks), chat(same.ROUTER).invoke(TURNS).content)
        self.assertEqual(sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata), 12)

    def test_logprobs_are_those_of_every_token_also_in_a_stream(self):
        more = {"logprobs": True, "top_logprobs": 2}
        answer = self.same(lambda url: chat(url, **more).invoke(TURNS))
        tokens = answer.response_metadata["logprobs"]["content"]
        self.assertEqual(len(tokens), 12)
        chunks = self.same(lambda url: list(chat(url, **more).stream(TURNS)))
        parts = [chunk.response_metadata.get("logprobs") for chunk in chunks]
        self.assertEqual([token for part in parts if part for token in part["content"]], tokens)

    def test_a_tool_is_called_also_in_a_stream(self):
        bound = lambda url: chat(url).bind_tools([TOOL], tool_choice="required")
        answer = self.same(lambda url: bound(url).invoke(TURNS))
        call = answer.tool_calls[0]
        self.assertEqual((call["name"], sorted(call["args"])), ("weather", ["city", "days"]))
        chunks = self.same(lambda url: list(bound(url).stream(TURNS)))
        whole = sum(chunks[1:], chunks[0])
        self.assertEqual(whole.tool_calls[0]["args"], call["args"])

    def test_a_batch_is_answered_in_order(self):
        batches = [[("user", f"question {number}")] for number in range(8)]
        answers = self.same(lambda url: chat(url).batch(batches))
        self.assertEqual(len({answer.content for answer in answers}), 8)

    def test_the_responses_api_is_answered_also_in_a_stream(self):
        more = {"use_responses_api": True, "max_tokens": 14}
        answer = self.same(lambda url: chat(url, **more).invoke(TURNS))
        self.assertEqual(answer.usage_metadata["output_tokens"], 12)
        chunks = self.same(lambda url: list(chat(url, **more).stream(TURNS)))
        self.assertEqual("".join(chunk.text for chunk in chunks), answer.text)

    def test_a_text_is_completed_also_in_a_stream(self):
        text = self.same(lambda url: OpenAI(**options(url, max_tokens=12)).invoke(PROMPT))
        parts = self.same(lambda url: list(OpenAI(**options(url, max_tokens=12)).stream(PROMPT)))
        self.assertEqual("".join(parts), text)

    def test_a_wrong_value_is_the_servers_400(self):
        error = self.same_error(openai.BadRequestError, lambda url: chat(url, temperature=-1).invoke(TURNS))
        self.assertIn("temperature", error.message)


if __name__ == "__main__":
    unittest.main()
