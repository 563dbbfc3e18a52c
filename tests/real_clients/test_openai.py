"""Asks a router and a single SGLang server the same with the official `openai` package and with `requests`: the
answers must be the same. What a router answers by itself is written out here.
"""

import asyncio
import json
import os
import unittest

import openai
import requests

import same
from same import ALONE, API_KEY, MESSAGES, PROMPT, ROUTER, SCHEMA, TOOL

CHAT = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12}
COMPLETION = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12}
# SGLang keeps two tokens of these for itself.
RESPONSE = {"model": "tiny", "input": MESSAGES, "max_output_tokens": 14}
GENERATE = {"text": PROMPT, "sampling_params": {"max_new_tokens": 12, "temperature": 0}}
LOGPROBS = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2, "token_ids_logprob": [1, 2]}

OPTIONS = {"api_key": API_KEY, **same.NO_RETRIES}
router = openai.OpenAI(base_url=f"{ROUTER}/v1", **OPTIONS)
alone = openai.OpenAI(base_url=f"{ALONE}/v1", **OPTIONS)


class Same(same.Same):
    pair = (router, alone)


class Models(Same):
    def test_models_are_listed(self):
        models = self.same(lambda client: client.models.list().data)
        self.assertEqual([model.id for model in models], ["tiny"])

    def test_a_model_is_found_by_its_name(self):
        self.assertEqual(self.same(lambda client: client.models.retrieve("tiny")).id, "tiny")

    def test_an_unknown_model_is_the_servers_404(self):
        error = self.same_error(openai.NotFoundError, lambda client: client.models.retrieve("huge"))
        self.assertEqual((error.code, error.param), ("model_not_found", "model"))


class Chat(Same):
    def test_chat_is_answered(self):
        answer = self.same(lambda client: client.chat.completions.create(**CHAT))
        choice = answer.choices[0]
        self.assertEqual((choice.message.role, choice.finish_reason), ("assistant", "length"))
        self.assertGreater(len(choice.message.content), 12)
        self.assertEqual(answer.usage.completion_tokens, 12)
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + 12)

    def test_chat_ends_at_a_stop_string(self):
        answer = self.same(lambda client: client.chat.completions.create(**CHAT, stop=["e"]))
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        self.assertLess(answer.usage.completion_tokens, 12)

    def test_a_chat_stream_has_the_same_text_token_by_token(self):
        chunks = self.same(lambda client: list(client.chat.completions.create(**CHAT, stream=True)))
        deltas = [chunk.choices[0].delta for chunk in chunks]
        whole = router.chat.completions.create(**CHAT).choices[0].message.content
        self.assertEqual("".join(delta.content or "" for delta in deltas), whole)
        self.assertEqual(len([delta for delta in deltas if delta.content]), 12)
        self.assertEqual(deltas[0].role, "assistant")
        self.assertEqual(chunks[-1].choices[0].finish_reason, "length")
        self.assertEqual(len({chunk.id for chunk in chunks}), 1)

    def test_the_last_chunk_of_a_stream_has_the_usage_that_was_asked_for(self):
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = self.same(lambda client: list(client.chat.completions.create(**CHAT, **options)))
        self.assertEqual((chunks[-1].choices, chunks[-1].usage.completion_tokens), ([], 12))
        self.assertTrue(all(chunk.usage is None for chunk in chunks[:-1]))

    def test_the_stream_helper_puts_the_answer_together(self):
        # The helper takes an answer that was cut off at `max_tokens` for an error.
        whole = router.chat.completions.create(**CHAT).choices[0].message.content
        asked = CHAT | {"stop": [whole[-2:]]}

        def ask(client):
            with client.chat.completions.stream(**asked) as events:
                kinds = [event.type for event in events]
                return kinds, events.get_final_completion().choices[0].message.content

        kinds, content = self.same(lambda client: list(ask(client)))
        self.assertGreater(kinds.count("content.delta"), 1)
        self.assertEqual(content, router.chat.completions.create(**asked).choices[0].message.content)

    def test_chat_logprobs_are_those_of_every_token(self):
        options = {"logprobs": True, "top_logprobs": 3}
        choice = self.same(lambda client: client.chat.completions.create(**CHAT, **options)).choices[0]
        tokens = choice.logprobs.content
        self.assertEqual("".join(token.token for token in tokens), choice.message.content)
        self.assertEqual([len(token.top_logprobs) for token in tokens], [3] * 12)
        self.assertTrue(all(token.logprob < 0 for token in tokens))
        self.assertEqual([bytes(token.bytes).decode() for token in tokens], [token.token for token in tokens])

    def test_streamed_chat_logprobs_are_those_of_every_token(self):
        options = {"logprobs": True, "top_logprobs": 1, "stream": True}
        chunks = self.same(lambda client: list(client.chat.completions.create(**CHAT, **options)))
        tokens = [chunk.choices[0].logprobs.content[0] for chunk in chunks if chunk.choices[0].logprobs]
        self.assertEqual(len(tokens), 12)

    def test_a_tool_is_called(self):
        options = {"tools": [TOOL], "tool_choice": "required"}
        choice = self.same(lambda client: client.chat.completions.create(**CHAT, **options)).choices[0]
        call = choice.message.tool_calls[0]
        self.assertEqual((choice.finish_reason, call.function.name), ("tool_calls", "weather"))
        self.assertEqual(sorted(json.loads(call.function.arguments)), ["city", "days"])

    def test_a_tool_call_is_streamed(self):
        named = {"type": "function", "function": {"name": "weather"}}
        options = {"tools": [TOOL], "tool_choice": named, "stream": True}
        chunks = self.same(lambda client: list(client.chat.completions.create(**CHAT, **options)))
        parts = [part.function for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
        self.assertEqual([part.name for part in parts if part.name], ["weather"])
        self.assertEqual(sorted(json.loads("".join(part.arguments for part in parts))), ["city", "days"])


class Completions(Same):
    def test_a_prompt_is_completed(self):
        answer = self.same(lambda client: client.completions.create(**COMPLETION))
        self.assertEqual((answer.choices[0].finish_reason, answer.usage.completion_tokens), ("length", 12))
        self.assertGreater(len(answer.choices[0].text), 12)

    def test_a_completion_stream_has_the_same_text_token_by_token(self):
        chunks = self.same(lambda client: list(client.completions.create(**COMPLETION, stream=True)))
        texts = [chunk.choices[0].text for chunk in chunks]
        self.assertEqual(len(texts), 12)
        self.assertEqual("".join(texts), router.completions.create(**COMPLETION).choices[0].text)

    def test_each_prompt_of_a_batch_is_completed_as_if_it_were_alone(self):
        prompts = [PROMPT, "Eine Brücke über die Straße", "日本の首都は"]
        batch = self.same(lambda client: client.completions.create(**COMPLETION | {"prompt": prompts}))
        self.assertEqual([choice.index for choice in batch.choices], [0, 1, 2])
        for prompt, choice in zip(prompts, batch.choices):
            single = router.completions.create(**COMPLETION | {"prompt": prompt}).choices[0]
            self.assertEqual(choice.text, single.text)
        self.assertEqual(len({choice.text for choice in batch.choices}), 3)

    def test_prompts_may_be_token_ids(self):
        for prompt in [[1, 2, 3], [[1, 2, 3], [4, 5]]]:
            answer = self.same(lambda client: client.completions.create(**COMPLETION | {"prompt": prompt}))
            self.assertGreater(len(answer.choices[-1].text), 12)

    def test_echo_with_logprobs_has_the_prompts_tokens_before_the_answers(self):
        options = {"echo": True, "logprobs": 2}
        choice = self.same(lambda client: client.completions.create(**COMPLETION, **options)).choices[0]
        logprobs = choice.logprobs
        self.assertTrue(choice.text.startswith(PROMPT))
        self.assertEqual(logprobs.tokens[:4], ["The", " capital", " of", " France"])
        self.assertEqual("".join(logprobs.tokens), choice.text)
        self.assertEqual(len(logprobs.token_logprobs), 4 + 12)
        self.assertIsNone(logprobs.token_logprobs[0])
        self.assertTrue(all(logprob < 0 for logprob in logprobs.token_logprobs[1:]))
        self.assertEqual([len(top or {}) for top in logprobs.top_logprobs], [0] + [2] * 15)

    def test_streamed_echo_with_logprobs_has_the_prompts_tokens_in_its_first_chunk(self):
        options = {"echo": True, "logprobs": 1, "stream": True}
        chunks = self.same(lambda client: list(client.completions.create(**COMPLETION, **options)))
        lists = [chunk.choices[0].logprobs.tokens for chunk in chunks]
        self.assertEqual([len(tokens) for tokens in lists], [4 + 1] + [1] * 11)
        self.assertEqual("".join(token for tokens in lists for token in tokens)[: len(PROMPT)], PROMPT)

    def test_logprobs_of_a_batch_are_each_prompts_own(self):
        options = {"prompt": ["one two three", "four five"], "echo": True, "logprobs": 1}
        batch = self.same(lambda client: client.completions.create(**COMPLETION | options))
        firsts = [choice.logprobs.tokens[0] for choice in batch.choices]
        self.assertEqual(firsts, ["one", "four"])
        self.assertEqual([len(choice.logprobs.tokens) for choice in batch.choices], [3 + 12, 2 + 12])


def by_sample(chunks):
    """The chunks of a stream, sample by sample: samples run at their own pace. Those of none come last."""
    return sorted(chunks, key=lambda chunk: chunk.choices[0].index if chunk.choices else 99)


class Samples(Same):
    def streamed(self, ask):
        """The chunks of a stream for several samples, sample by sample; all have one id."""
        ids = set()

        def asked(client):
            chunks = list(ask(client))
            if client is router:
                ids.update(chunk.id for chunk in chunks)
            return by_sample(chunks)

        chunks = self.same(asked)
        self.assertEqual(len(ids), 1)
        return chunks

    def test_samples_are_choices_of_one_answer(self):
        answer = self.same(lambda client: client.chat.completions.create(**CHAT, n=3))
        self.assertEqual([choice.index for choice in answer.choices], [0, 1, 2])
        self.assertEqual({choice.finish_reason for choice in answer.choices}, {"length"})
        single = router.chat.completions.create(**CHAT)
        self.assertEqual(answer.usage.prompt_tokens, single.usage.prompt_tokens)
        self.assertEqual(answer.usage.completion_tokens, 36)
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + 36)

    def test_samples_of_a_batch_are_prompt_by_prompt(self):
        asked = COMPLETION | {"prompt": [PROMPT, "one two", "three"]}
        answer = self.same(lambda client: client.completions.create(**asked, n=2))
        self.assertEqual([choice.index for choice in answer.choices], list(range(6)))
        singles = [router.completions.create(**COMPLETION | {"prompt": prompt}) for prompt in asked["prompt"]]
        texts = [single.choices[0].text for single in singles for _ in range(2)]
        self.assertEqual([choice.text for choice in answer.choices], texts)

    def test_samples_are_streamed_with_one_usage(self):
        options = {"n": 3, "stream": True, "stream_options": {"include_usage": True}}
        chunks = self.streamed(lambda client: client.chat.completions.create(**CHAT, **options))
        self.assertEqual((chunks[-1].choices, chunks[-1].usage.completion_tokens), ([], 36))
        self.assertTrue(all(chunk.usage is None for chunk in chunks[:-1]))
        whole = router.chat.completions.create(**CHAT).choices[0].message.content
        for sample in range(3):
            choices = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == sample]
            self.assertEqual("".join(choice.delta.content or "" for choice in choices), whole)
            self.assertEqual(choices[-1].finish_reason, "length")

    def test_completions_of_a_batch_are_streamed_as_samples(self):
        asked = COMPLETION | {"prompt": [PROMPT, "one two"], "n": 2, "stream": True, "logprobs": 1}
        chunks = self.streamed(lambda client: client.completions.create(**asked))
        self.assertEqual([chunk.choices[0].index for chunk in chunks], [n for n in range(4) for _ in range(12)])

    def test_samples_have_logprobs_of_their_own(self):
        options = {"n": 3, "logprobs": True, "top_logprobs": 2}
        answer = self.same(lambda client: client.chat.completions.create(**CHAT, **options))
        for choice in answer.choices:
            text = "".join(token.token for token in choice.logprobs.content)
            self.assertEqual(text, choice.message.content)
        echo = {"n": 2, "echo": True, "logprobs": 2}
        answer = self.same(lambda client: client.completions.create(**COMPLETION, **echo))
        self.assertEqual([len(choice.logprobs.tokens) for choice in answer.choices], [4 + 12] * 2)
        self.streamed(lambda client: client.chat.completions.create(**CHAT, **options, stream=True))

    def test_each_sample_may_call_a_tool(self):
        options = {"n": 3, "tools": [TOOL], "tool_choice": "required"}
        answer = self.same(lambda client: client.chat.completions.create(**CHAT, **options))
        calls = [choice.message.tool_calls[0].function.name for choice in answer.choices]
        self.assertEqual(calls, ["weather"] * 3)
        chunks = self.streamed(lambda client: client.chat.completions.create(**CHAT, **options, stream=True))
        parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
        self.assertEqual([part.function.name for part in parts if part.function.name], ["weather"] * 3)

    def test_generated_samples_are_a_list(self):
        def ask(url):
            asked = {"text": PROMPT, "sampling_params": {"max_new_tokens": 5, "n": 3}}
            answers = requests.post(f"{url}/generate", json=asked, headers=same.BEARER, timeout=30).json()
            return [(answer["text"], answer["output_ids"]) for answer in answers]

        ours = ask(ROUTER)
        self.assertEqual((len(ours), ours), (3, ask(ALONE)))

    def test_a_wrong_value_beside_n_is_the_servers_400(self):
        ask = lambda client: client.chat.completions.create(**CHAT, n=2, temperature=-1)
        self.same_error(openai.BadRequestError, ask)


class Responses(Same):
    TOOL = {"type": "function", "name": "weather", "parameters": SCHEMA}

    def test_a_response_is_given(self):
        answer = self.same(lambda client: client.responses.create(**RESPONSE))
        self.assertEqual((answer.status, answer.incomplete_details.reason), ("incomplete", "max_output_tokens"))
        self.assertEqual((answer.usage.output_tokens, answer.output[0].role), (12, "assistant"))
        self.assertGreater(len(answer.output_text), 12)
        self.assertTrue(answer.id.startswith("resp_"))

    def test_a_response_to_a_text_with_instructions_is_that_to_a_list(self):
        system, user = (message["content"] for message in MESSAGES)
        options = {"instructions": system, "input": user, "max_output_tokens": 14, "metadata": {"a": "b"}}
        answer = self.same(lambda client: client.responses.create(model="tiny", **options))
        self.assertEqual(answer.output_text, router.responses.create(**RESPONSE).output_text)
        self.assertEqual((answer.instructions, answer.metadata), (system, {"a": "b"}))

    def test_a_stream_of_events_has_the_same_text_token_by_token(self):
        events = self.same(lambda client: list(client.responses.create(**RESPONSE, stream=True)))
        self.assertEqual([event.sequence_number for event in events], list(range(len(events))))
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        whole = router.responses.create(**RESPONSE)
        self.assertEqual((len(deltas), "".join(deltas)), (12, whole.output_text))
        self.assertEqual((events[0].type, events[-1].type), ("response.created", "response.incomplete"))
        self.assertEqual(shared_output(events[-1].response), shared_output(whole))

    def test_the_stream_helper_puts_the_response_together(self):
        def ask(client):
            with client.responses.stream(**RESPONSE) as events:
                return [event.type for event in events]

        self.assertEqual(self.same(ask).count("response.output_text.delta"), 12)

    def test_logprobs_are_those_of_every_token(self):
        options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
        answer = self.same(lambda client: client.responses.create(**RESPONSE, **options))
        tokens = answer.output[0].content[0].logprobs
        self.assertEqual("".join(token.token for token in tokens), answer.output_text)
        self.assertEqual([len(token.top_logprobs) for token in tokens], [2] * 12)
        # SGLang's streams have none, asked for or not.
        self.same(lambda client: list(client.responses.create(**RESPONSE, **options, stream=True)))

    def test_a_tool_is_called(self):
        options = {"tools": [self.TOOL], "tool_choice": "required"}
        answer = self.same(lambda client: client.responses.create(**RESPONSE, **options))
        call = answer.output[0]
        self.assertEqual((answer.status, call.type, call.name), ("completed", "function_call", "weather"))
        self.assertEqual(sorted(json.loads(call.arguments)), ["city", "days"])

    def test_a_tool_call_is_streamed(self):
        options = {"tools": [self.TOOL], "tool_choice": {"type": "function", "name": "weather"}, "stream": True}
        events = self.same(lambda client: list(client.responses.create(**RESPONSE, **options)))
        deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        self.assertEqual(sorted(json.loads("".join(deltas))), ["city", "days"])
        self.assertEqual(events[-1].type, "response.completed")

    def test_a_wrong_value_and_an_unknown_model_are_the_servers_errors(self):
        ask = lambda client: client.responses.create(**RESPONSE, temperature=-1)
        error = self.same_error(openai.BadRequestError, ask)
        self.assertEqual(error.type, "invalid_request_error")
        ask = lambda client: client.responses.create(**RESPONSE | {"model": "huge"})
        self.assertEqual(self.same_error(openai.NotFoundError, ask).param, "model")

    def test_an_earlier_response_is_refused(self):
        for client in self.pair:
            with self.assertRaises(openai.BadRequestError) as caught:
                client.responses.create(**RESPONSE, previous_response_id="resp_1")
            self.assertEqual(caught.exception.type, "invalid_request_error")


def shared_output(response):
    return same.shared(response.output), same.shared(response.usage)


class Errors(Same):
    def test_a_wrong_value_is_the_servers_400(self):
        for options in [{}, {"stream": True}]:
            error = self.same_error(
                openai.BadRequestError,
                lambda client: client.chat.completions.create(**CHAT, temperature=-1, **options),
            )
            self.assertIn("temperature must be a non-negative finite number, got -1.0.", error.message)

    def test_a_missing_field_is_the_servers_400(self):
        error = self.same_error(
            openai.BadRequestError, lambda client: client.post("/chat/completions", body={}, cast_to=object)
        )
        self.assertIn("messages", error.message)

    def test_too_many_samples_are_refused_by_name(self):
        for ask in [
            lambda: router.chat.completions.create(**CHAT, n=99),
            lambda: router.chat.completions.create(**CHAT, n=99, stream=True),
            lambda: router.completions.create(**COMPLETION, n=99),
        ]:
            with self.assertRaises(openai.BadRequestError) as caught:
                ask()
            self.assertEqual(caught.exception.code, "n_too_large")
            self.assertEqual(caught.exception.type, "invalid_request_error")
            self.assertIn("--max-n", caught.exception.message)

    def test_an_endpoint_that_pairs_cannot_serve_is_a_501_of_its_own(self):
        with self.assertRaises(openai.InternalServerError) as caught:
            router.embeddings.create(model="tiny", input="text")
        self.assertEqual((caught.exception.status_code, caught.exception.code), (501, "not_possible_with_pd"))

    def test_a_wrong_key_is_the_servers_401(self):
        def ask(client):
            return client.with_options(api_key="wrong").chat.completions.create(**CHAT)

        self.assertIn("Unauthorized", self.same_error(openai.AuthenticationError, ask).response.text)
        ask = lambda client: client.with_options(api_key="wrong").models.list()
        self.same_error(openai.AuthenticationError, ask)

    def test_the_client_can_go_on_after_an_error(self):
        # One connection for all of it.
        client = router.with_options(max_retries=0)
        for _ in range(3):
            with self.assertRaises(openai.BadRequestError):
                client.chat.completions.create(**CHAT, temperature=-1)
            with self.assertRaises(openai.BadRequestError):
                client.chat.completions.create(**CHAT, n=99)
            self.assertEqual(client.chat.completions.create(**CHAT).usage.completion_tokens, 12)


class Transport(Same):
    def test_headers_of_an_answer_are_the_servers(self):
        def ask(client, stream):
            answer = client.chat.completions.with_raw_response.create(**CHAT, stream=stream)
            # Ends the stream, if it is one.
            list(answer.parse())
            own = ("date", "connection", "x-request-id")
            return {name: value for name, value in answer.headers.items() if name not in own}

        headers = self.same(lambda client: ask(client, False))
        self.assertEqual((headers["content-type"], headers["server"]), ("application/json", "uvicorn"))
        headers = self.same(lambda client: ask(client, True))
        self.assertEqual(headers["content-type"], "text/event-stream; charset=utf-8")
        self.assertEqual(headers["transfer-encoding"], "chunked")

    def test_lines_of_a_stream_are_the_servers(self):
        def ask(client):
            streaming = client.completions.with_streaming_response
            with streaming.create(**COMPLETION, stream=True) as answer:
                lines = [line for line in answer.iter_lines() if line]
                return lines[-1], [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

        last, events = self.same(lambda client: list(ask(client)))
        self.assertEqual((last, len(events)), ("data: [DONE]", 12))

    def test_what_the_package_does_not_know_reaches_the_servers(self):
        # tests/real_clients.rs looks at both legs.
        router.chat.completions.create(
            **CHAT,
            extra_headers={"x-test": "extra"},
            extra_query={"trace": "1"},
            extra_body={"unknown field ✓": [1.10, "é\u2028🙂", None]},
        )

    def test_parallel_streams_do_not_mix(self):
        async def ask(client, number):
            messages = [{"role": "user", "content": f"question {number}"}]
            stream = await client.chat.completions.create(**CHAT | {"messages": messages}, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        async def ask_all(url):
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", **OPTIONS) as client:
                return await asyncio.gather(*[ask(client, number) for number in range(16)])

        texts = asyncio.run(ask_all(ROUTER))
        self.assertEqual(texts, asyncio.run(ask_all(ALONE)))
        self.assertEqual(len(set(texts)), 16)


class Requests(Same):
    def setUp(self):
        self.session = requests.Session()
        self.addCleanup(self.session.close)
        self.session.headers["Authorization"] = f"Bearer {API_KEY}"

    def post(self, url, path, **options):
        return self.session.post(url + path, timeout=30, **options)

    def generate(self, body):
        """The router's answer, which must be a single server's. What only one role says of itself is left out."""

        def ask(url):
            answer = self.post(url, "/generate", json=body)
            self.assertEqual(answer.status_code, 200, answer.text)
            return self.told(answer.json())

        ours, theirs = ask(ROUTER), ask(ALONE)
        self.assertEqual(ours, theirs)
        return ours

    def events(self, body):
        """The same of a stream: its events, those of each prompt together, as a batch's may mix in any way."""

        def ask(url):
            answer = self.post(url, "/generate", json={**body, "stream": True}, stream=True)
            lines = [line for line in answer.iter_lines() if line]
            self.assertEqual((answer.status_code, lines[-1]), (200, b"data: [DONE]"))
            events = [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]
            return sorted(map(self.told, events), key=lambda event: event.get("index", 0))

        ours, theirs = ask(ROUTER), ask(ALONE)
        self.assertEqual(ours, theirs)
        return ours

    def told(self, answer):
        """What is generated, without what one server says of its own work."""
        if isinstance(answer, list):
            return [self.told(item) for item in answer]
        told = {key: value for key, value in answer.items() if key != "meta_info"}
        for key, value in answer["meta_info"].items():
            if "logprobs" in key or key in ("finish_reason", "prompt_tokens", "completion_tokens"):
                # Between prefill and decode, SGLang loses these of the first token.
                told[key] = value[1:] if key == "output_token_ids_logprobs" else value
        return told

    def test_generate_answers(self):
        answer = self.generate(GENERATE)
        self.assertEqual((len(answer["output_ids"]), answer["completion_tokens"]), (12, 12))

    def test_generate_takes_token_ids_and_put(self):
        ids = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 3}}
        answer = self.generate(ids)
        put = self.session.put(ROUTER + "/generate", json=ids, timeout=30).json()
        self.assertEqual((self.told(put), answer["prompt_tokens"]), (answer, 3))

    def test_generate_streams_what_there_is_so_far(self):
        events = self.events(GENERATE)
        self.assertEqual([len(event["output_ids"]) for event in events], list(range(1, 13)))

    def test_logprobs_of_the_prompt_are_in_the_answer(self):
        answer = self.generate(GENERATE | LOGPROBS)
        self.assertEqual(len(answer["input_token_logprobs"]), answer["prompt_tokens"])
        self.assertEqual(answer["input_token_logprobs"][0][0], None)
        self.assertTrue(all(logprob < 0 for logprob, _, _ in answer["input_token_logprobs"][1:]))
        self.assertEqual([len(top or []) for top in answer["input_top_logprobs"]], [0, 2, 2, 2])
        self.assertEqual([len(listed or []) for listed in answer["input_token_ids_logprobs"]], [0, 2, 2, 2])
        self.assertEqual(len(answer["output_token_logprobs"]), 12)

    def test_logprobs_of_the_prompt_are_in_every_event(self):
        events = self.events(GENERATE | LOGPROBS)
        self.assertEqual(len(events), 12)
        for event in events:
            self.assertEqual(len(event["input_token_logprobs"]), 4)
            self.assertEqual(event["input_token_logprobs"], events[0]["input_token_logprobs"])
            self.assertEqual(len(event["input_top_logprobs"]), 4)

    def test_logprobs_begin_where_they_were_asked_for(self):
        answer = self.generate(GENERATE | LOGPROBS | {"logprob_start_len": 2})
        self.assertEqual(len(answer["input_token_logprobs"]), 2)

    def test_each_text_of_a_batch_has_its_own_answer(self):
        texts = ["one two three", "four five", "日本の 首都は 🙂"]
        answers = self.generate(GENERATE | LOGPROBS | {"text": texts})
        self.assertEqual([len(answer["input_token_logprobs"]) for answer in answers], [3, 2, 3])
        self.assertEqual(len({answer["text"] for answer in answers}), 3)

    def test_each_text_of_a_streamed_batch_has_its_own_events(self):
        events = self.events(GENERATE | LOGPROBS | {"text": ["one two three", "four five"]})
        shape = [(event["index"], len(event["input_token_logprobs"])) for event in events]
        self.assertEqual(shape, [(0, 3)] * 12 + [(1, 2)] * 12)

    def test_a_batch_of_one_is_answered_with_a_list(self):
        answers = self.generate(GENERATE | LOGPROBS | {"text": [PROMPT]})
        self.assertEqual([len(answer["input_token_logprobs"]) for answer in answers], [4])

    def test_bytes_of_a_body_are_not_rewritten(self):
        # tests/real_clients.rs looks at both legs.
        body = os.environ["ODD_BODY"].encode()
        headers = {"x-test": "odd", "Content-Type": "application/json"}
        answer = self.post(ROUTER, "/generate", data=body, headers=headers)
        self.assertEqual((answer.status_code, answer.json()["meta_info"]["completion_tokens"]), (200, 2))

    def test_a_body_in_chunks_is_the_same_as_one_of_known_length(self):
        chunks = iter([b'{"text": "The cap', b'ital of France", "sampling', b'_params": {"max_new_tokens": 12}}'])
        headers = {"Content-Type": "application/json"}
        answer = self.post(ROUTER, "/generate", data=chunks, headers=headers)
        self.assertEqual(answer.json()["text"], self.generate(GENERATE)["text"])

    def test_a_prompt_of_megabytes_is_answered(self):
        answer = self.generate(GENERATE | {"text": "a long prompt of é and 🙂 " * 100_000})
        self.assertEqual(answer["prompt_tokens"], 700_000)

    def test_a_body_that_is_no_json_is_refused(self):
        answer = self.post(ROUTER, "/generate", data=b'{"text": ')
        self.assertEqual((answer.status_code, answer.json()["error"]["code"]), (400, "invalid_json"))

    def test_a_wrong_method_is_refused(self):
        answer = self.session.delete(ROUTER + "/generate", timeout=30)
        self.assertEqual((answer.status_code, answer.headers["Allow"]), (405, "POST, PUT"))

    def test_server_info_has_both_servers(self):
        for path in ["/server_info", "/get_server_info"]:
            info = self.session.get(ROUTER + path, timeout=30).json()
            modes = [server["disaggregation_mode"] for server in info["prefill"] + info["decode"]]
            self.assertEqual(modes, ["prefill", "decode"])
            self.assertEqual(len(info["internal_states"]), 1)

    def test_model_info_names_the_model(self):
        for path in ["/model_info", "/get_model_info"]:
            self.assertIn("tiny", self.session.get(ROUTER + path, timeout=30).json()["model_path"])

    def test_every_cache_is_flushed(self):
        answer = self.post(ROUTER, "/flush_cache?timeout=10")
        self.assertEqual((answer.status_code, len(answer.json()["servers"])), (200, 2))

    def test_health_is_told(self):
        for path in ["/health", "/health_generate"]:
            self.assertEqual(self.session.get(ROUTER + path, timeout=30).status_code, 200)


if __name__ == "__main__":
    unittest.main()
