"""Compiling under a budget: what is too costly is refused, and hurts nobody."""

from __future__ import annotations

import asyncio
import errno
import gc
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import anyio
import pytest

from router.config import Config
from router.errors import Overloaded, ValidationError
from router.text import grammar_compiler
from router.text.grammar import Grammar, GrammarKind, InvalidGrammar, UnsupportedGrammar
from router.text.grammar_compiler import GrammarCompiler
from router.text.tokenizer import Tokenizer
from router.validate import Capacity, Limits, Parameters, Validator
from tests.server import PATIENCE_S, is_alive
from tests.tiny_tokenizers import byte_level, tokenizer_of, wordpiece

TOKENIZER = tokenizer_of(byte_level())
EOS = byte_level().token_to_id("<|end|>")
WORD = Grammar(GrammarKind.REGEX, "[a-z]+")


def lark(*rules: str) -> Grammar:
    return Grammar(GrammarKind.LARK, "\n".join(rules))


def schema(value: object) -> Grammar:
    return Grammar(GrammarKind.JSON, value)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER.describe, TOKENIZER.vocab_size, [EOS])


def compile_(compiler: GrammarCompiler, grammar: Grammar) -> str:
    return anyio.run(compiler.compile, grammar)


def process_of(compiler: GrammarCompiler) -> int:
    assert compiler._process is not None
    return compiler._process.pid


@pytest.mark.parametrize(
    "grammar",
    [
        WORD,
        lark('start: "yes" | "no" DETAIL', 'DETAIL: /, because [a-z ]{3,20}/ "."'),
        lark('start: "it is " %json {"type": "integer", "title": "%json"} // %json not here', 'unused: "%json"'),
        schema({"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"type": "integer"}}}),
        schema('{"type": "array", "items": {"enum": ["\\"", "é"]}}'),
        schema(True),
    ],
    ids=str,
)
def test_what_can_be_compiled_has_a_source(compiler: GrammarCompiler, grammar: Grammar) -> None:
    source = json.loads(compile_(compiler, grammar))

    assert list(source) == ["grammars"]


@pytest.mark.parametrize(
    ("grammar", "problem"),
    [
        (Grammar(GrammarKind.REGEX, "(a"), "invalid regex"),
        (Grammar(GrammarKind.REGEX, "a{1000000000}"), "too m"),
        (Grammar(GrammarKind.REGEX, "x" * 70_000), "it is longer than 65536 bytes"),
        (lark('start: "x"', "unused: " + " | ".join(["%json {}"] * 2_000)), "it is longer than 131072 bytes in the"),
        (lark("start: missing"), "missing"),
        (lark('start: %json {"type": 5}'), "is not valid under any of the schemas"),
        (lark('start: %json {"not": {}}'), "the keyword `not` at # cannot be enforced"),
        (lark("start: %json x"), "%json is followed by something else than a schema"),
        (lark('start: %json {"const": NaN}'), "%json is followed by something else than a schema"),
        (lark(f'start: %json {{"const": {"1" * 5_000}}}'), "%json is followed by something else than a schema"),
        (schema({"type": "array", "uniqueItems": True}), "the keyword `uniqueItems` at #"),
        (schema({"$ref": "https://example.com/schema"}), "the keyword `$ref` at #"),
        (schema({"$ref": "#"}), "no text conforms to it"),
        (schema(False), "unsatisfiable"),
    ],
    ids=str,
)
def test_what_cannot_be_compiled_is_explained(compiler: GrammarCompiler, grammar: Grammar, problem: str) -> None:
    with pytest.raises(InvalidGrammar) as refusal:
        compile_(compiler, grammar)

    assert problem.lower() in str(refusal.value).lower()


def chain(num_rules: int) -> Grammar:
    """Deep enough for a stack of megabytes."""
    return lark("start: a0", *(f"a{i}: a{i + 1}" for i in range(num_rules)), f'a{num_rules}: "x"')


def alternatives(num_rules: int) -> Grammar:
    """Each is a whole grammar of JSON."""
    names = [f"a{i}" for i in range(num_rules)]
    return lark("start: " + " | ".join(names), *(f'{name}: %json {{"type": "object"}}' for name in names))


@pytest.mark.parametrize(
    ("grammar", "cause"),
    [
        (chain(4_500), "it takes too much (time|memory) to compile"),
        (alternatives(800), "it takes too much (time|memory) to compile"),
        (schema({"const": "x" * 60_000}), "it takes too much (time|memory)"),
    ],
    ids=["deep", "large", "slow"],
)
def test_what_ends_a_process_is_refused_and_the_next_is_served(
    compiler: GrammarCompiler, grammar: Grammar, cause: str
) -> None:
    with pytest.raises(InvalidGrammar, match=cause):
        compile_(compiler, grammar)

    assert compile_(compiler, Grammar(GrammarKind.REGEX, f"behind {cause}"))


@pytest.mark.parametrize(
    ("deed", "wall_s", "end"),
    [
        ("bytearray(200 * 2**20)", PATIENCE_S, 1),
        ("while True: pass", PATIENCE_S, -signal.SIGPROF),
        ("time.sleep(600)", 0.5, -signal.SIGALRM),
    ],
    ids=["memory", "work", "time"],
)
def test_each_limit_ends_a_fork(deed: str, wall_s: float, end: int) -> None:
    code = f"import time\nfrom router.text import grammar_process\ngrammar_process._limit_resources({wall_s})\n{deed}"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=PATIENCE_S, check=False)

    assert done.returncode == end
    assert end != 1 or b"MemoryError" in done.stderr


def test_an_answer_is_remembered_good_or_bad() -> None:
    compiler = GrammarCompiler(TOKENIZER.describe, TOKENIZER.vocab_size, [EOS])
    source = compile_(compiler, WORD)
    with pytest.raises(InvalidGrammar) as first:
        compile_(compiler, schema({"not": {}}))
    os.kill(process_of(compiler), signal.SIGSTOP)

    assert compile_(compiler, WORD) == source
    with pytest.raises(InvalidGrammar) as second:
        compile_(compiler, schema({"not": {}}))
    assert str(first.value) == str(second.value)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_KEPT_BYTES", 2_000)
    compiler = GrammarCompiler(TOKENIZER.describe, TOKENIZER.vocab_size, [EOS])
    for index in range(10):
        compile_(compiler, Grammar(GrammarKind.REGEX, f"a{index}"))

    assert 2 <= len(compiler._kept) <= 4
    assert compiler._num_kept_bytes <= 2_000


def test_a_process_that_is_gone_is_replaced() -> None:
    compiler = GrammarCompiler(TOKENIZER.describe, TOKENIZER.vocab_size, [EOS])
    compile_(compiler, WORD)
    before = process_of(compiler)
    os.kill(before, signal.SIGKILL)
    process = compiler._process
    assert process is not None
    assert process.stdin is not None
    process.wait()
    process.stdin.write(b"what could not be sent any more")

    assert compile_(compiler, Grammar(GrammarKind.REGEX, "another"))
    assert process_of(compiler) != before
    assert process.stdin.closed, "its pipes stay open"


def test_a_grammar_that_a_busy_machine_holds_up_is_not_said_to_be_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(TOKENIZER.describe, TOKENIZER.vocab_size, [EOS])
    with monkeypatch.context() as impatient:
        impatient.setattr(grammar_compiler, "WALL_PART", 1e-6 / grammar_compiler.MAX_WAIT_S)
        with pytest.raises(Overloaded):
            compile_(compiler, WORD)
    assert compiler._process is not None
    lose_process(compiler._process, b"")

    assert "[a-z]+" in compile_(compiler, WORD), "what was held up is remembered as bad"


def break_pipe(process: subprocess.Popen[bytes], line: bytes) -> None:
    raise BrokenPipeError


def reset_connection(process: subprocess.Popen[bytes], line: bytes) -> None:
    raise ConnectionResetError


def lose_process(process: subprocess.Popen[bytes], line: bytes) -> None:
    process.kill()
    process.wait()


def cut_answer(process: subprocess.Popen[bytes], line: bytes) -> None:
    lose_process(process, line)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = io.BytesIO(b'{"source": "half an ans')


@pytest.mark.parametrize("fail", [break_pipe, reset_connection, lose_process, cut_answer])
def test_whatever_becomes_of_the_process_its_client_is_told_to_come_back(
    monkeypatch: pytest.MonkeyPatch, fail: Callable[[subprocess.Popen[bytes], bytes], None]
) -> None:
    compiler = GrammarCompiler(TOKENIZER.describe, TOKENIZER.vocab_size, [EOS])
    compile_(compiler, WORD)
    another = Grammar(GrammarKind.REGEX, "another")
    with monkeypatch.context() as broken:
        broken.setattr(grammar_compiler, "_write_line", fail)
        with pytest.raises(Overloaded):
            compile_(compiler, another)

    assert "another" in compile_(compiler, another)


def test_a_process_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "no memory for another process")

    compiler = GrammarCompiler(TOKENIZER.describe, TOKENIZER.vocab_size, [EOS])
    with monkeypatch.context() as full:
        full.setattr(subprocess, "Popen", refuse)
        with pytest.raises(Overloaded):
            compile_(compiler, WORD)

    assert "[a-z]+" in compile_(compiler, WORD)


def test_who_waits_too_long_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(TOKENIZER.describe, TOKENIZER.vocab_size, [EOS])
    compile_(compiler, WORD)
    monkeypatch.setattr(grammar_compiler, "MAX_WAIT_S", 0.1)
    pid = process_of(compiler)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(Overloaded):
            compile_(compiler, Grammar(GrammarKind.REGEX, "later"))
    finally:
        os.kill(pid, signal.SIGCONT)


def test_grammars_at_once_get_their_own_answers(compiler: GrammarCompiler) -> None:
    async def run() -> list[str]:
        expressions = [Grammar(GrammarKind.REGEX, f"at once {index}") for index in range(8)]
        return list(await asyncio.gather(*map(compiler.compile, expressions)))

    for index, source in enumerate(anyio.run(run)):
        assert f"at once {index}" in source


class Counting(GrammarCompiler):
    """Counts what it asks its process, which answers when it is told to."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER.describe, TOKENIZER.vocab_size, [EOS])
        self.num_asked = 0
        self.may_answer = threading.Event()

    def _converse(self, request: bytes) -> bytes:
        self.num_asked += 1
        assert self.may_answer.wait(PATIENCE_S)
        return super()._converse(request)


async def begin(compiler: GrammarCompiler, grammar: Grammar) -> asyncio.Task[str]:
    task = asyncio.create_task(compiler.compile(grammar))
    await asyncio.sleep(0)
    return task


@pytest.mark.parametrize("grammar", [WORD, Grammar(GrammarKind.REGEX, "(a")], ids=["good", "bad"])
def test_equal_grammars_at_once_are_compiled_once(grammar: Grammar) -> None:
    compiler = Counting()

    async def run() -> list[str | BaseException]:
        tasks = [await begin(compiler, grammar) for _ in range(5)]
        compiler.may_answer.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = [str(answer) for answer in anyio.run(run)]
    assert compiler.num_asked == 1
    assert answers == [answers[0]] * 5
    assert ("[a-z]+" in answers[0]) is (grammar is WORD)
    assert compiler._running == {}


@pytest.mark.parametrize("leaver", [0, 1], ids=["who asked first", "who joined"])
def test_a_client_that_leaves_takes_no_grammar_from_the_others(leaver: int) -> None:
    compiler = Counting()

    async def run() -> str:
        tasks = [await begin(compiler, WORD) for _ in range(2)]
        tasks[leaver].cancel()
        await asyncio.wait([tasks[leaver]])
        compiler.may_answer.set()
        return await tasks[1 - leaver]

    assert "[a-z]+" in anyio.run(run)
    assert compiler.num_asked == 1


def test_what_nobody_waits_for_any_more_is_not_compiled() -> None:
    compiler = Counting()

    async def run() -> str:
        first = await begin(compiler, Grammar(GrammarKind.REGEX, "first"))
        left = [await begin(compiler, WORD) for _ in range(2)]
        for task in left:
            task.cancel()
        await asyncio.wait(left)
        compiler.may_answer.set()
        return await first

    assert "first" in anyio.run(run)
    assert compile_(compiler, Grammar(GrammarKind.REGEX, "last"))
    assert compiler.num_asked == 2


def test_a_tokenizer_that_llguidance_cannot_use_supports_no_grammar() -> None:
    tokenizer = tokenizer_of(wordpiece())
    compiler = GrammarCompiler(tokenizer.describe, tokenizer.vocab_size, [1])

    with pytest.raises(UnsupportedGrammar):
        compile_(compiler, WORD)


def test_no_process_outlives_its_compiler() -> None:
    compiler = GrammarCompiler(TOKENIZER.describe, TOKENIZER.vocab_size, [EOS])
    compile_(compiler, WORD)
    pid = process_of(compiler)
    del compiler
    gc.collect()

    assert_it_ends(pid)


def test_no_process_outlives_a_router_that_is_killed() -> None:
    code = """
import anyio, time
from tests.test_grammar_compiler import EOS, TOKENIZER, WORD, GrammarCompiler, compile_, process_of
compiler = GrammarCompiler(TOKENIZER.describe, TOKENIZER.vocab_size, [EOS])
compile_(compiler, WORD)
print(process_of(compiler), flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as router:
        assert router.stdout is not None
        pid = next(int(line) for line in router.stdout if line.strip())
        router.kill()

    assert_it_ends(pid)


def assert_it_ends(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(pid)


def validator_of(tokenizer: Tokenizer, **settings: object) -> Validator:
    config = Config(max_total_tokens=64, max_input_tokens=40, **settings)  # type: ignore[arg-type]
    capacity = Capacity(tokenizer.vocab_size, (EOS,), kv_tokens=8192)
    return Validator(Limits.derive(config, capacity, tokenizer), tokenizer)


def test_a_request_carries_its_grammars_source() -> None:
    demand = anyio.run(validator_of(TOKENIZER).validate, "a", Parameters(grammar=WORD), "id")

    (request,) = demand.requests
    assert "[a-z]+" in request.grammar


def test_grammars_may_be_switched_off() -> None:
    validator = validator_of(TOKENIZER, disable_grammar_support=True)

    with pytest.raises(ValidationError, match="grammar is not supported"):
        anyio.run(validator.validate, "a", Parameters(grammar=WORD), "id")
    assert validator.grammars._process is None


@pytest.fixture(autouse=True)
def _nothing_is_left_to_the_collector() -> Iterator[None]:
    """Compilers end their processes when they are collected; not in the middle of another test."""
    yield
    gc.collect()
