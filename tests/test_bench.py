"""The load generator measures what it says: arrivals, percentiles, counters, and a whole run against a small server."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.bench import load
from tests.bench.client import BenchError, StreamTimes, token_times
from tests.bench.report import Round, cost_row, parse_counters, percentile, speed_row, table

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def event(index: int) -> bytes:
    return b'data: {"index":%d,"token":{"text":" \\n\\n"}}\n\n' % index


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def test_a_token_arrives_with_the_last_byte_of_its_event() -> None:
    whole = HEAD + chunk(event(1)) + chunk(event(2)[:9]) + chunk(event(2)[9:] + event(3)) + b"0\r\n\r\n"
    ends = [len(HEAD + chunk(event(1))) - 2, len(whole) - len(b"\r\n0\r\n\r\n")]

    for size in (1, 2, 3, 7, 50, 1000):
        arrivals = [(float(start + size), whole[start : start + size]) for start in range(0, len(whole), size)]

        first, second, third = token_times(arrivals)

        assert first == math.ceil(ends[0] / size) * size
        assert second == third == math.ceil(ends[1] / size) * size


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (b"HTTP/1.1 429 X\r\ncontent-length: 9\r\n\r\nno room!!", "HTTP 429: no room"),
        (HEAD + chunk(event(1)) + chunk(b'data: {"error":"gone"}\n\n') + b"0\r\n\r\n", "gone"),
        (HEAD + b"0\r\n\r\n", "without a token"),
        (HEAD + chunk(event(1)), "broke off"),
        (HEAD + chunk(event(1))[:20], "broke off"),
        (b"HTTP/1.1 200", "before an answer"),
    ],
)
def test_anything_but_a_whole_stream_of_tokens_is_an_error(answer: bytes, cause: str) -> None:
    with pytest.raises(BenchError, match=cause):
        token_times([(0.0, answer)])


def test_percentiles_lie_between_the_nearest_ranks() -> None:
    values = [4.0, 1.0, 3.0, 2.0]

    assert [percentile(values, percent) for percent in (0, 50, 75, 100)] == [1.0, 2.5, 3.25, 4.0]
    assert percentile([7.0], 99) == 7.0
    assert math.isnan(percentile([], 50))


def test_counters_are_the_samples_without_labels() -> None:
    page = '# HELP a of b\n# TYPE a counter\na 3.5\nb{method="x"} 4\nc 1e3\n\n'

    assert parse_counters(page) == {"a": 3.5, "c": 1000.0}


def test_a_table_is_aligned_markdown() -> None:
    assert table(["a", "long"], [["100", "2"]]).splitlines() == ["|   a | long |", "| --: | ---: |", "| 100 |    2 |"]


def test_speed_is_the_median_round_and_times_are_of_all_rounds() -> None:
    fast = Round([StreamTimes(0.0, [1.0, 1.1, 1.2]), StreamTimes(0.5, [1.5, 1.6, 2.0])], {}, 0.0)
    slow = Round([StreamTimes(0.0, [2.0, 2.5, 3.0])], {}, 0.0)

    row = speed_row("2", [slow, fast, slow])

    assert row == ["2", "1", "1-3", "1500.0", "2000.0", "450.0", "500.0"]


def test_costs_are_divided_by_the_servers_own_counts() -> None:
    counted = {
        "step_count": 10.0,
        "generated_tokens_count": 40.0,
        "router_cpu_seconds_sum": 0.003,
        "router_publish_seconds_sum": 0.001,
        "shard_wait_seconds_sum": 0.01,
        "shard_inputs_seconds_sum": 0.02,
        "shard_forward_seconds_sum": 0.03,
    }
    counters = {f"shardstream_{name}": value for name, value in counted.items()}
    round_ = Round([StreamTimes(0.0, [1.0, 2.0])], counters, 0.0001)

    row = cost_row("4", [round_, round_])

    assert row == ["4", "10", "4.0", "300", "75.0", "25.0", "1.00", "2.00", "3.00", "-", "50.0"]


class SmallServer(BaseHTTPRequestHandler):
    """Speaks just enough of the native routes; a token per letter, two for an `a` that ends a text."""

    protocol_version = "HTTP/1.1"
    prompts: list[str] = []
    grammars: list[bool] = []

    def do_GET(self) -> None:
        body = b'{"model_id":"letters"}' if self.path == "/info" else b"shardstream_step_count 5\n"
        self._answer(body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize":
            text = body["inputs"]
            stops = [*range(1, len(text) + 1), *([len(text)] if text.endswith("a") else [])]
            self._answer(json.dumps([{"stop": stop} for stop in stops]).encode())
            return
        self.prompts.append(body["inputs"])
        self.grammars.append("grammar" in body["parameters"])
        events = b"".join(chunk(event(i)) for i in range(body["parameters"]["max_new_tokens"]))
        self.wfile.write(HEAD + events + b"0\r\n\r\n")
        self.close_connection = True

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def small_server() -> Iterator[str]:
    SmallServer.prompts, SmallServer.grammars = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), SmallServer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_run_asks_with_distinct_prompts_of_the_wanted_length(
    small_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--streams=1,3",
        "--prompt-tokens=20",
        "--new-tokens=4",
        "--shared-prefix=8",
        "--repeats=2",
        "--seed=1",
    ]

    code = load.main(["--url", small_server, *arguments])

    assert code == 0
    prompts = SmallServer.prompts
    assert len(prompts) == 3 + 2 * (1 + 3) * 2
    assert {len(prompt) for prompt in prompts} == {20}
    assert not any(prompt.endswith("a") for prompt in prompts)
    assert len({prompt[:8] for prompt in prompts}) == 1
    assert len(set(prompts)) == len(prompts)
    assert "letters" in capsys.readouterr().out


def test_structured_rounds_alternate_with_free_ones(small_server: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--streams=1", "--requests=1", "--prompt-tokens=20", "--new-tokens=4", "--repeats=2", "--grammar"]

    assert load.main(["--url", small_server, *arguments]) == 0

    warm_up, *rounds = (SmallServer.grammars[:2], *SmallServer.grammars[2:])
    assert warm_up == [False, True]
    assert rounds == [False, True, False, True]
    assert "1 json" in capsys.readouterr().out


def test_a_server_that_is_not_there_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code = load.main(["--url", "http://127.0.0.1:9"])

    assert code == 1
    assert capsys.readouterr().err.count("\n") == 1
