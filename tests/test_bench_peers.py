"""The comparison with other servers: what is asked, in which order, and what is told of it."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest

from tests.bench.client import BenchError
from tests.bench.peers import turns as turns_module
from tests.bench.peers.cases import PEAK_RSS, READY, Case, Measure, cases, tokens_per_s
from tests.bench.peers.dialects import Answer, completion_answer, completions
from tests.bench.peers.engines import OURS, Engine, engines
from tests.bench.peers.machine import CpuReading, process_tree, read_cpu
from tests.bench.peers.report import Figure, Reading, Run, Turn, as_json, comparisons, figures, markdown, ratio
from tests.bench.peers.servers import running
from tests.bench.peers.turns import Bench, Plan
from tests.bench.prompts import Prompts

SPEED = Measure("speed", "speed", "tokens/s", more_is_better=True)
DELAY = Measure("delay", "delay", "ms", more_is_better=False)
STEADY = (80.0, 80.0)


def turn(
    engine: str, number: int, *values: float, foreign: float = 0.0, bandwidth: tuple[float, float] = STEADY
) -> Turn:
    return Turn(engine, number, bandwidth, [Reading("speed", value, foreign, 0.0) for value in values])


def engine(name: str, family: str, precision: str, command: Sequence[str] = ()) -> Engine:
    return Engine(name, family, precision, name, tuple(command), None)


# The report


def test_disturbed_readings_are_dropped() -> None:
    turns = [turn("a", 0, 10.0), turn("a", 1, 99.0, foreign=0.5), turn("a", 2, 98.0, bandwidth=(80.0, 60.0))]

    figure = figures(turns)["a"]["speed"]

    assert dict(figure.in_turn) == {0: 10.0}
    assert not figure.disturbed


def test_where_all_are_disturbed_they_are_told_with_a_mark() -> None:
    run = Run([engine("a", OURS, "bf16")], [SPEED], [turn("a", 0, 10.0, foreign=0.5), turn("a", 1, 12.0, foreign=0.5)])

    assert figures(run.turns)["a"]["speed"].disturbed
    assert "~11 (10–12)" in markdown(run, {})


def test_memory_that_drifted_says_nothing_about_memory_that_was_used() -> None:
    drifted = Turn("a", 0, (80.0, 40.0), [Reading(PEAK_RSS.name, 5.0, 0.0, 0.0), Reading(READY.name, 5.0, 0.0, 0.0)])

    known = figures([drifted])["a"]

    assert not known[PEAK_RSS.name].disturbed
    assert known[READY.name].disturbed


def test_a_turn_counts_once_however_often_it_was_read() -> None:
    figure = figures([turn("a", 0, 1.0, 2.0, 9.0), turn("a", 1, 4.0)])["a"]["speed"]

    assert (figure.low, figure.median, figure.high) == (2.0, 3.0, 4.0)


def test_ratios_are_taken_within_turns_and_more_than_one_is_good() -> None:
    ours, theirs = Figure({0: 10.0, 1: 30.0, 2: 100.0}), Figure({0: 5.0, 1: 10.0, 3: 1.0})

    assert dict(ratio(ours, theirs, SPEED).in_turn) == {0: 2.0, 1: 3.0}
    assert dict(ratio(ours, theirs, DELAY).in_turn) == {0: 0.5, 1: pytest.approx(1 / 3)}


def test_a_ratio_of_different_turns_is_marked() -> None:
    found = ratio(Figure({0: 10.0}), Figure({1: 5.0}), SPEED)

    assert (found.median, found.disturbed) == (2.0, True)


def test_like_is_compared_with_like_and_best_with_best() -> None:
    run = Run(
        [engine("o16", OURS, "bf16"), engine("o8", OURS, "int8"), engine("p8", "P", "int8"), engine("p4", "P", "int4")],
        [SPEED],
        [turn("o16", 0, 10.0), turn("o8", 0, 30.0), turn("p8", 0, 20.0), turn("p4", 0, 24.0)],
    )

    found = {comparison.title: comparison.ratios["speed"].median for comparison in comparisons(run)}

    assert found == {"int8 against p8": 1.5, "best against P's best": 1.25}


def test_who_was_left_out_is_told_with_the_reason() -> None:
    run = Run([engine("a", OURS, "bf16"), engine("b", "P", "bf16")], [SPEED], [turn("a", 0, 10.0)], {"b": "no wheel"})

    assert "left out: b: no wheel" in markdown(run, {})
    assert [told["name"] for told in as_json(run, {})["engines"]] == ["a"]
    assert json.dumps(as_json(run, {}))


# What is asked and answered


def completion_events(*events: object) -> list[tuple[float, bytes]]:
    """One arrival a second, the first with the head."""
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    bodies = [f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode() for event in events]
    chunks = [b"%x\r\n%s\r\n" % (len(body), body) for body in bodies]
    return [(float(at), data) for at, data in enumerate((head, *chunks, b"0\r\n\r\n"))]


TEXT = {"choices": [{"text": "a"}]}
USAGE = {"choices": [], "usage": {"completion_tokens": 5, "prompt_tokens": 3}}


def test_tokens_are_counted_by_usage_and_timed_by_events() -> None:
    answer = completion_answer(-1.0, completion_events(TEXT, TEXT, USAGE, "[DONE]"))

    assert answer == Answer(-1.0, [1.0, 2.0], 5, 3)
    assert answer.first_token_s == 2.0


@pytest.mark.parametrize(
    ("events", "cause"),
    [
        ([TEXT, {"error": "gone"}], "gone"),
        ([TEXT, "[DONE]"], "without its usage"),
        ([USAGE], "without a token"),
    ],
)
def test_anything_but_a_whole_completion_is_an_error(events: list[object], cause: str) -> None:
    with pytest.raises(BenchError, match=cause):
        completion_answer(0.0, completion_events(*events))


def test_a_completion_is_asked_for_greedily_with_the_engines_own_fields() -> None:
    body = completions(ignore_eos=True).body("Hi", 7)

    assert body == {"prompt": "Hi", "max_tokens": 7, "temperature": 0, "stream": True, "ignore_eos": True}


def test_speed_is_from_the_first_question_to_the_last_token() -> None:
    assert tokens_per_s([Answer(1.0, [2.0, 3.0], 6, None), Answer(2.0, [5.0], 2, None)]) == 2.0


def case_named(name: str) -> Case:
    return next(case for case in cases([2]) if case.measure.name == name)


def letters() -> Prompts:
    """A letter is a token."""
    return Prompts(lambda text: list(range(1, len(text) + 1)), random.Random(1))


@pytest.mark.parametrize("case", cases([1, 2]), ids=lambda case: case.measure.name)
def test_no_text_is_asked_for_twice(case: Case) -> None:
    texts = [text for group in case.prompts(letters()) for text in group]

    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(("name", "num_shared"), [("ttft_cached", 496), ("shared_2000", 2000), ("ttft_512", 0)])
def test_texts_share_as_many_tokens_as_the_case_says(name: str, num_shared: int) -> None:
    texts = [text for group in case_named(name).prompts(letters()) for text in group]

    assert num_shared <= len(os.path.commonprefix(texts)) < num_shared + 5


def test_the_first_text_of_a_prefix_is_not_measured() -> None:
    slow, fast = Answer(0.0, [9.0], 2, None), Answer(0.0, [1.0], 2, None)

    assert case_named("ttft_cached").value([[slow], [fast]]) == 1000.0
    assert case_named("shared_2000").value([[slow], [fast, fast]]) == 4.0


def test_every_engine_has_a_name_of_its_own_and_a_port_or_a_pipe() -> None:
    table = engines(Path("checkpoint"))

    assert len({one.name for one in table}) == len(table)
    assert {("{port}" in one.command) == (one.dialect is not None) for one in table} == {True}


# The machine


def test_foreign_time_is_everybodys_less_our_own() -> None:
    before, after = CpuReading(10.0, 100.0, 40.0), CpuReading(12.0, 103.5, 42.5)

    assert before.foreign_cores_until(after) == pytest.approx(0.5, abs=0.05)
    assert before.foreign_cores_until(dataclasses.replace(after, own_s=44.0)) == 0.0


def test_a_process_counts_with_all_that_it_started() -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE) as process:
        while len(tree := process_tree(process.pid)) < 2:
            time.sleep(0.01)
        process.communicate(b"\n")

    assert tree[0] == process.pid
    assert process_tree(process.pid) == []
    assert read_cpu(process.pid).own_s > 0


# Turns

ANSWERING = """
import json, sys, time
for line in sys.stdin:
    asked = json.loads(line)
    sent_at = time.perf_counter()
    times = [[sent_at + 0.001 * (i + 1) for i in range(asked["num_new_tokens"])] for _ in asked["prompts"]]
    counts = [len(prompt) for prompt in asked["prompts"]]
    print(json.dumps({"sent_at": sent_at, "token_at": times, "num_prompt_tokens": counts}), flush=True)
"""
DYING = "import sys; sys.exit('no weights here')"
SHORT = ANSWERING.replace('asked["num_new_tokens"]', 'min(99, asked["num_new_tokens"])')
MISCOUNTING = ANSWERING.replace("len(prompt)", "len(prompt) + 1")


def script(name: str, code: str) -> Engine:
    return engine(name, "P", "bf16", [sys.executable, "-c", code])


def test_engines_alternate_and_who_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "read_bandwidth_gb_s", lambda program: 80.0)
    case = case_named("streams_2")
    failing = [script("dying", DYING), script("miscounting", MISCOUNTING)]
    run = Run([script("a", ANSWERING), *failing, script("b", ANSWERING)], [case.measure])
    said: list[str] = []

    anyio.run(Bench(Plan([case], 2, tmp_path), run, letters(), said.append).take_turns)

    assert [(one.engine, one.number) for one in run.turns] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert "ended with code 1" in run.failures["dying"]
    assert "no weights here" in run.failures["dying"]
    assert "counts 17 tokens in a prompt of 16" in run.failures["miscounting"]
    assert len(said) == 4 + 2
    read = {reading.measure: reading.value for reading in run.turns[0].readings}
    assert read.keys() == {"ready", "streams_2", "peak_rss"}
    assert read["streams_2"] == pytest.approx(2 * 128 / 0.128, rel=0.1)
    assert read["peak_rss"] > 1


def test_who_fails_at_one_case_goes_on_with_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "read_bandwidth_gb_s", lambda program: 80.0)
    long, short = case_named("streams_2"), case_named("ttft_512")
    run = Run([script("a", SHORT)], [long.measure, short.measure])

    anyio.run(Bench(Plan([long, short], 2, tmp_path), run, letters(), lambda line: None).take_turns)

    assert run.failures == {"a, 2 streams": "99 tokens came, not 128"}
    measured = [{reading.measure for reading in one.readings} for one in run.turns]
    assert measured == [{"ready", "ttft_512", "peak_rss"}] * 2


def test_what_is_measured_once_is_measured_in_the_first_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "read_bandwidth_gb_s", lambda program: 80.0)
    case = dataclasses.replace(case_named("streams_2"), once=True)
    run = Run([script("a", ANSWERING)], [case.measure])

    anyio.run(Bench(Plan([case], 2, tmp_path), run, letters(), lambda line: None).take_turns)

    measured = [{reading.measure for reading in one.readings} for one in run.turns]
    assert ["streams_2" in measures for measures in measured] == [True, False]


def test_an_engine_is_gone_after_its_turn(tmp_path: Path) -> None:
    with running(script("a", ANSWERING), tmp_path) as server:
        pid = server.pid
        assert process_tree(pid) == [pid]

    assert process_tree(pid) == []
