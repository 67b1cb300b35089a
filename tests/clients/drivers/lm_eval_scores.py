"""lm-eval: how likely models find the choices of a task, as this process runs them and as servers say.

Runs in the environment of lm-eval with the project's torch and transformers behind it. The command line brings the task
and the models, as lm-eval's own command line would; one JSON line per model comes out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lm_eval
import torch
from lm_eval.tasks import TaskManager


def main(task_folder: Path, task: str, models: list[tuple[str, dict[str, object]]]) -> None:
    torch.set_num_threads(1)
    tasks = TaskManager(include_path=str(task_folder), include_defaults=False)
    for model, arguments in models:
        results = lm_eval.simple_evaluate(
            model=model, model_args=arguments, tasks=[task], task_manager=tasks, bootstrap_iters=0, device="cpu"
        )
        scores = {key.removesuffix(",none"): value for key, value in results["results"][task].items()}
        samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
        report = {
            "accuracy": scores["acc"],
            "normalized_accuracy": scores["acc_norm"],
            "logprobs": [[logprob for logprob, _ in sample["filtered_resps"]] for sample in samples],
            "greedy": [[is_greedy for _, is_greedy in sample["filtered_resps"]] for sample in samples],
        }
        sys.stdout.write(json.dumps(report) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
