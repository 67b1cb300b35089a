"""OpenVINO GenAI's continuous batching as a process that is asked through a pipe, a line of JSON each way.

    {"prompts": ["...", ...], "num_new_tokens": 128}
    {"sent_at": 1.5, "token_at": [[1.6, 1.7, ...], ...], "num_prompt_tokens": [64, ...]}

Times are `time.perf_counter`'s, which all processes of a machine share on Linux. Runs in an environment of its own and
knows nothing of the bench. As a library it spends nothing on HTTP and events, unlike everybody it is compared with.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import TextIO, TypedDict

import openvino_genai

KV_BLOCK_TOKENS = 32
"""The size of its blocks on CPUs."""
MAX_STEP_TOKENS = 2048


class Timed(TypedDict):
    sent_at: float
    token_at: list[list[float]]
    num_prompt_tokens: list[int]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("weights")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--kv-tokens", type=int, required=True)
    arguments = parser.parse_args()
    answers = _keep_for_answers()
    pipeline = load(arguments.weights, arguments.threads, arguments.kv_tokens)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(generate(pipeline, asked["prompts"], asked["num_new_tokens"])), file=answers, flush=True)


def load(weights: str, num_threads: int, num_kv_tokens: int) -> openvino_genai.ContinuousBatchingPipeline:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks = num_kv_tokens // KV_BLOCK_TOKENS
    scheduler.max_num_batched_tokens = MAX_STEP_TOKENS
    scheduler.enable_prefix_caching = True
    return openvino_genai.ContinuousBatchingPipeline(weights, scheduler, "CPU", {"INFERENCE_NUM_THREADS": num_threads})


def generate(pipeline: openvino_genai.ContinuousBatchingPipeline, prompts: Sequence[str], num_new_tokens: int) -> Timed:
    """Greedy texts of all prompts at once, to the full length."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = num_new_tokens
    config.ignore_eos = True
    config.do_sample = False
    sent_at = time.perf_counter()
    handles = [pipeline.add_request(index, prompt, config) for index, prompt in enumerate(prompts)]
    token_at: list[list[float]] = [[] for _ in handles]
    while pipeline.has_non_finished_requests():
        pipeline.step()
        now = time.perf_counter()
        for handle, times in zip(handles, token_at, strict=True):
            while handle.can_read():
                times.extend(now for output in handle.read().values() for _ in output.generated_ids)
    tokenizer = pipeline.get_tokenizer()
    num_prompt_tokens = [tokenizer.encode(prompt).input_ids.shape[1] for prompt in prompts]
    return {"sent_at": sent_at, "token_at": token_at, "num_prompt_tokens": num_prompt_tokens}


def _keep_for_answers() -> TextIO:
    """The real standard output; from now on, what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


if __name__ == "__main__":
    main()
