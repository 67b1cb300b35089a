"""Grammars are compiled for the first time here, in a process that may die of them: `python -m` this module.

    stdin    the vocabulary, then a grammar per line
    stdout   for each, its source text for the shards, or what is wrong with it, or that the machine was too busy

llguidance keeps within limits of its own in all but a few cases; in those it takes seconds, hundreds of megabytes, or
more stack than there is, which ends a process. So each grammar is given to a fork with limits on its time, memory and
stack. There it is also tried, because what is slow may only be met on the way. Nothing else runs in these processes,
and there are no threads when they fork.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final, cast

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from router.text.grammar import Grammar, GrammarKind, InvalidGrammar, UnsupportedGrammar, to_source

LIMITS: Final = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,
    step_max_items=10_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
"""The shards', so that what passes here passes there."""

MAX_CPU_S: Final = 0.3
MAX_MEMORY_BYTES: Final = 32 * 2**20
STACK_BYTES: Final = 2**20
"""Half of what the shards' threads have at least."""

MAX_MASK_S: Final = 0.05
"""Others wait for a step with a mask that takes longer than the model."""

NUM_WALKS: Final = 3
MAX_WALK_TOKENS: Final = 24
EXCERPT: Final = re.compile(r"<state>|\n *1 \| ")
OF_AN_EXPRESSION: Final = re.compile("^regex parse error|in regex /")
NONZERO: Final = re.compile(rb"[^\0]")

Json = Mapping[str, object]


def main() -> None:
    setup = json.loads(sys.stdin.buffer.readline())
    try:
        tokenizer = _load_tokenizer(setup["tokenizer"], setup["vocab_size"], setup["eos_token_ids"])
    except ValueError:
        tokenizer = None
    for line in sys.stdin.buffer:
        answer: Json = {"unsupported": True}
        if tokenizer is not None:
            answer = _examine_in_fork(tokenizer, json.loads(line), setup["max_wall_s"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _load_tokenizer(text: str, vocab_size: int, eos_token_ids: list[int]) -> LLTokenizer:
    """As the shards do. Raises `ValueError` for a kind of tokenizer that llguidance cannot use."""
    try:
        return LLTokenizer(text, n_vocab=vocab_size, eos_token=eos_token_ids)
    except ValueError:  # the tokenizer has more tokens than the model, or not all of the end tokens
        num_tokens = LLTokenizer(text).vocab_size
    ends = [token for token in eos_token_ids if token < num_tokens]
    return LLTokenizer(text, n_vocab=max(vocab_size, num_tokens), eos_token=ends)


def _examine_in_fork(tokenizer: LLTokenizer, request: Json, max_wall_s: float) -> Json:
    """What `_examine` says, if it lives to say it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _limit_resources(max_wall_s)
        answer = _on_small_stack(lambda: _examine(tokenizer, request))
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer_bytes = pipe.read()
    _, status = os.waitpid(child, 0)
    if status == 0:
        return cast(Json, json.loads(answer_bytes))
    end = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    if end == signal.SIGALRM:
        return {"late": True}
    return {"invalid": f"it takes too much {'time' if end == signal.SIGPROF else 'memory'} to compile"}


def _limit_resources(max_wall_s: float) -> None:
    """Each limit ends the process."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        size_bytes = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes + MAX_MEMORY_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
    signal.setitimer(signal.ITIMER_REAL, max_wall_s)


def _on_small_stack(work: Callable[[], Json]) -> Json:
    answers: list[Json] = []
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=lambda: answers.append(work()))
    thread.start()
    thread.join()
    return answers[0]


def _examine(tokenizer: LLTokenizer, request: Json) -> Json:
    kind, value = GrammarKind(request["kind"]), request["value"]
    try:
        source = to_source(Grammar(kind, value, bool(request["needs_properties"])))
    except UnsupportedGrammar:
        return {"unsupported": True}
    except InvalidGrammar as error:
        return {"invalid": str(error)}
    problem = _find_problem(tokenizer, source)
    if problem is None:
        return {"source": source}
    is_pattern = kind is GrammarKind.JSON and OF_AN_EXPRESSION.search(problem)
    return {"invalid": f"the keyword `pattern` cannot be enforced: {problem}" if is_pattern else problem}


def _find_problem(tokenizer: LLTokenizer, source: str) -> str | None:
    """Compiles a grammar and takes some walks through it."""
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=LIMITS)
    for seed in range(NUM_WALKS):
        if matcher.is_error():
            break
        problem = _walk(matcher.deep_copy(), random.Random(seed))
        if problem is not None:
            return problem
    return _error_of(matcher)


def _walk(matcher: LLMatcher, chance: random.Random) -> str | None:
    """Emits tokens that the grammar allows, as a model would that has no preferences."""
    for num_tokens in range(MAX_WALK_TOKENS):
        begun_at = time.thread_time()
        mask = matcher.compute_bitmask()
        if time.thread_time() - begun_at > MAX_MASK_S:
            return "it takes too much time to follow"
        if matcher.is_error():
            return _error_of(matcher) if num_tokens else "no text conforms to it"
        if matcher.is_stopped():
            return None
        matcher.consume_token(_draw(mask, chance))
        matcher.consume_tokens(matcher.compute_ff_tokens())
    return _error_of(matcher)


def _draw(mask: bytes, chance: random.Random) -> int:
    """Some token of a mask."""
    found = NONZERO.search(mask, chance.randrange(len(mask))) or NONZERO.search(mask)
    assert found is not None, "a mask allows nothing"
    bits = mask[found.start()]
    return 8 * found.start() + chance.choice([bit for bit in range(8) if bits >> bit & 1])


def _error_of(matcher: LLMatcher) -> str | None:
    """What a matcher complains of, without the excerpt of the grammar that follows."""
    return " ".join(EXCERPT.split(matcher.get_error())[0].split())[:300] if matcher.is_error() else None


if __name__ == "__main__":
    main()
