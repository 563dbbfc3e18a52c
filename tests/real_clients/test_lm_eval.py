"""Evaluates a task of its own, without a network, with lm-evaluation-harness through a router and through a single
SGLang server: every number must be the same. Its two backends for them are `local-completions`, which reads
log-likelihoods of prompts from `echo` and `logprobs` of `/v1/completions`, and `sglang-generate`, which reads
`input_token_logprobs` and `input_top_logprobs` of `/generate`.

The backends, tasks and metrics are the package's. Only the tokenizer is not: one of a real model would have to be
downloaded.
"""

import logging
import os
import re
import tempfile
import unittest
import zlib
from pathlib import Path

HERE = Path(__file__).parent
CACHE = tempfile.TemporaryDirectory(prefix="lm-eval-")
# Before the packages are imported, which read them.
os.environ |= {"HF_HOME": CACHE.name, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}

import datasets
from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.models.sglang_generate_API import SGLANGGENERATEAPI
from lm_eval.tasks import TaskManager

import same
from same import BEARER

datasets.disable_progress_bars()
logging.getLogger("lm_eval").setLevel(logging.ERROR)

TASKS = ["router_choice", "router_perplexity", "router_answer"]
BACKENDS = {"completions": (LocalCompletionsAPI, "/v1/completions"), "generate": (SGLANGGENERATEAPI, "/generate")}


class WordTokenizer:
    """A token for each word with the space before it, as the interface of `transformers` has it."""

    eos_token, eos_token_id, bos_token_id = "</s>", 2, 1

    def __call__(self, text, **_):
        return type("Encoding", (), {"input_ids": self.ids(text)})

    def ids(self, text):
        if not isinstance(text, str):
            return [self.ids(one) for one in text]
        return [3 + zlib.crc32(word.encode()) % 1000 for word in re.findall(r"\s?\S+|\s", text)]


def model(backend, url, **more):
    kind, path = BACKENDS[backend]
    made = kind(base_url=url + path, model="tiny", tokenizer_backend="None", header=BEARER, max_retries=1, **more)
    made.tokenizer, made.tokenizer_backend, made.tokenized_requests = WordTokenizer(), "huggingface", True
    return made


def numbers(backend, url, **more):
    """Every metric, and for every sample what the server said."""
    # The harness' own tasks are left out: to list them takes seconds.
    tasks = TaskManager(include_path=str(HERE / "lm_eval_tasks"), include_defaults=False)
    evaluated = simple_evaluate(
        model(backend, url, **more), tasks=TASKS, task_manager=tasks, log_samples=True, bootstrap_iters=0
    )
    samples = {task: [sample["resps"] for sample in evaluated["samples"][task]] for task in TASKS}
    return {"results": evaluated["results"], "samples": samples}


class LmEval(unittest.TestCase):
    maxDiff = None

    def check(self, backend, **more):
        ours, theirs = numbers(backend, same.ROUTER, **more), numbers(backend, same.ALONE, **more)
        self.assertEqual(ours, theirs)
        choices = [answer for sample in ours["samples"]["router_choice"] for answer in sample]
        self.assertEqual(len(choices), 15)
        likelihoods = [float(answer[0][0]) for answer in choices]
        # Sums of log-probabilities, none of which is another's.
        self.assertTrue(all(likelihood < 0 for likelihood in likelihoods), likelihoods)
        self.assertEqual(len(set(likelihoods)), 15)
        return ours

    def test_local_completions(self):
        one = self.check("completions")
        self.assertEqual(self.check("completions", batch_size=3)["samples"], one["samples"])
        self.assertEqual(self.check("completions", num_concurrent=4)["samples"], one["samples"])

    def test_sglang_generate(self):
        one = self.check("generate")
        self.assertEqual(self.check("generate", batch_size=3)["samples"], one["samples"])
        self.assertEqual(self.check("generate", num_concurrent=4)["samples"], one["samples"])

    def test_both_read_the_same_likelihoods(self):
        first, second = (numbers(backend, same.ROUTER)["samples"]["router_choice"] for backend in BACKENDS)
        sums = lambda samples: [round(float(answer[0][0]), 6) for sample in samples for answer in sample]
        self.assertEqual(sums(first), sums(second))


if __name__ == "__main__":
    # The tasks name their data by a relative path.
    os.chdir(HERE)
    unittest.main()
