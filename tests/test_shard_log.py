"""What a shard logs: whose sequences begin, fail and are lost, so that an operator finds the request behind them."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from proto import shard_pb2 as pb
from router.core.request import Request
from router.core.scheduler import Limits, Scheduler
from router.group.codec import encode_plan
from shard.config import ShardConfig
from shard.distributed import RankGroup
from shard.grammar import GrammarCompiler
from shard.logs import JsonFormatter
from shard.model import Model, load_model
from shard.server import ShardServicer
from shard.worker import PreparedStep, Worker
from tests.http_app import Client
from tests.tiny_models import save_tiny
from tests.tiny_tokenizers import byte_level

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACE_PARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"
PROMPT = [5, 6, 7]
NEUTRAL = pb.Sampling(temperature=1.0, top_p=1.0, typical_p=1.0, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny(directory, "llama")
    torch.set_num_threads(1)
    return load_model(
        directory,
        dtype=torch.float32,
        device=torch.device("cpu"),
        group=RankGroup(),
        on_progress=lambda done, total: None,
        use_native=False,
    )


@pytest.fixture
def worker(model: Model, tmp_path: Path) -> Worker:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    grammars = GrammarCompiler(tmp_path / "tokenizer.json", vocab_size=model.vocab_size, eos_token_ids=())
    worker = Worker(ShardConfig(), model, RankGroup(), "", grammars)
    block_size = model.block_size
    worker.configure(pb.ConfigureRequest(epoch=1, num_blocks=8, block_size=block_size, max_seats=4, max_step_tokens=64))
    return worker


def step(worker: Worker, number: int, *opens: pb.Open, closes: tuple[int, ...] = ()) -> pb.FromShard:
    """Every seat that begins is fed the prompt and emits."""
    num = len(opens)
    plan = pb.StepPlan(
        step=number,
        closes=closes,
        opens=opens,
        row_seat=[open_.seat for open_ in opens],
        row_num_tokens=[len(PROMPT)] * num,
        row_num_literals=[len(PROMPT)] * num,
        row_num_new_blocks=[1] * num,
        row_emit=[True] * num,
        row_num_targets=[0] * num,
        literals=PROMPT * num,
        new_blocks=range(1, 1 + num),
    )
    return worker.run(worker.prepare(plan, time.perf_counter()))


def begin(seat: int, request_id: str, trace_id: str = "") -> pb.Open:
    return pb.Open(seat=seat, num_prompt_tokens=len(PROMPT), sampling=NEUTRAL, request_id=request_id, trace_id=trace_id)


def test_a_rank_knows_whose_sequences_it_holds(worker: Worker) -> None:
    step(worker, 1, begin(0, "one"), begin(2, "two", TRACE_ID))
    both = worker.owners
    step(worker, 2, begin(0, "three"), closes=(0,))

    assert both == ["request one", f"request two of trace {TRACE_ID}"]
    assert worker.owners == [f"request two of trace {TRACE_ID}", "request three"]


def test_a_new_epoch_forgets_them(worker: Worker, model: Model) -> None:
    step(worker, 1, begin(0, "one"))

    worker.configure(
        pb.ConfigureRequest(epoch=2, num_blocks=8, block_size=model.block_size, max_seats=4, max_step_tokens=64)
    )

    assert worker.owners == []


def test_the_beginning_of_a_sequence_is_logged_for_who_looks_closely(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="shard"):
        step(worker, 1, begin(2, "one", TRACE_ID))

    [record] = caplog.records
    assert record.getMessage() == f"step 1: seat 2 begins for request one of trace {TRACE_ID}"
    assert record.levelno == logging.DEBUG


def test_a_sequence_that_fails_is_named(
    worker: Worker, model: Model, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "logits", lambda hidden: torch.full((len(hidden), model.vocab_size), float("nan")))

    answer = step(worker, 1, begin(0, "one"), begin(1, "two", TRACE_ID))

    assert [fault.row for fault in answer.output.row_faults] == [0, 1]
    cause = "the model's logits are not finite"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"step 1: request one: {cause}"),
        ("WARNING", f"step 1: request two of trace {TRACE_ID}: {cause}"),
    ]


def test_the_sequences_that_an_epoch_ends_with_are_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying:
        owners = ("request one", "request two")
        starts_ahead = False

        def prepare(self, plan: pb.StepPlan, arrived_at: float) -> PreparedStep:
            raise RuntimeError("out of memory")

    class Stream:
        incoming = [pb.ToShard(hello=pb.Hello(epoch=1)), pb.ToShard(plan=pb.StepPlan(step=1))]
        answers: list[pb.FromShard] = []

        async def read(self) -> pb.ToShard:
            return self.incoming.pop(0) if self.incoming else await asyncio.Event().wait()

        async def write(self, answer: pb.FromShard) -> None:
            self.answers.append(answer)

    async def serve() -> None:
        servicer = ShardServicer(thread, step_timeout_s=30.0)
        servicer.serve(Dying())
        servicer._epoch = 1
        await servicer.Execute(None, Stream())

    monkeypatch.setattr("shard.server.os._exit", lambda code: None)
    with ThreadPoolExecutor(1) as thread:
        asyncio.run(serve())

    assert Stream.answers[-1].fault.message == "RuntimeError: out of memory"
    assert "the epoch ends; its sequences: request one, request two" in caplog.text


# From the client to the shard


def test_a_clients_trace_goes_with_each_of_its_sequences() -> None:
    client = Client()
    body = {"inputs": "a", "parameters": {"best_of": 2, "do_sample": True}}

    client.post("/generate", body, headers={"x-request-id": "one", "traceparent": TRACE_PARENT})
    client.post("/generate", {"inputs": "a", "parameters": {}})

    requests = client.engine.requests
    assert [request.trace_id for request in requests] == [TRACE_ID, TRACE_ID, ""]
    assert [request.request_id for request in requests[:2]] == ["one", "one"]


def test_a_sequence_is_opened_under_its_names() -> None:
    scheduler = Scheduler(Limits(num_blocks=8, block_size=4, max_seats=2, max_step_tokens=8))
    scheduler.add(Request("one", (1, 2, 3), 2, trace_id=TRACE_ID))

    plan = scheduler.plan()

    assert plan is not None
    [opened] = encode_plan(plan).opens
    assert (opened.request_id, opened.trace_id) == ("one", TRACE_ID)


# Its form


def test_records_can_be_json() -> None:
    record = logging.makeLogRecord({"name": "shard.x", "levelname": "INFO", "msg": "a\nb %d", "args": (1,)})

    entry = json.loads(JsonFormatter(3).format(record))

    assert entry.pop("timestamp")
    assert entry == {"level": "INFO", "target": "shard.x", "rank": 3, "message": "a\nb 1"}


@pytest.mark.parametrize(("flags", "is_json"), [(("--json-output",), True), ((), False)])
def test_a_process_logs_in_the_form_it_is_told(flags: tuple[str, ...], is_json: bool, tmp_path: Path) -> None:
    script = (
        "import logging, sys; from shard.config import parse; from shard.logs import configure_logging\n"
        "config = parse(sys.argv[1:]); configure_logging(config.rank, as_json=config.json_output)\n"
        "logging.getLogger('shard.x').warning('hello')"
    )

    done = subprocess.run([sys.executable, "-c", script, *flags], capture_output=True, text=True, check=True)

    assert done.stderr.startswith("{") is is_json
    assert "hello" in done.stderr
