"""Grammars compiled under a budget, off the event loop, and remembered: sources for the shards, or what is wrong.

The work is done by a process that may die of it (`grammar_process`); this is its client. Equal grammars that come while
the first of them is being compiled share its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import orjson

from router.errors import Overloaded
from router.text.grammar import Grammar, InvalidGrammar, UnsupportedGrammar

logger = logging.getLogger(__name__)

MAX_WAIT_S: Final = 2.5
"""For a turn and for the answer. Under more grammars than that, later ones are refused."""

WALL_PART: Final = 0.8
"""Of that, what one grammar may take by the clock. Beyond it the machine is at fault, not the grammar."""

MAX_KEPT_BYTES: Final = 16 * 2**20


@dataclass(slots=True)
class _Running:
    """A grammar that is being compiled, and how many wait for it."""

    task: asyncio.Task[str | InvalidGrammar]
    num_waiting: int = 0


class GrammarCompiler:
    """One model's. `describe_tokenizer` gives the text of its tokenizer.json, and is called on another thread."""

    def __init__(self, describe_tokenizer: Callable[[], str], vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._describe_tokenizer = describe_tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._process: subprocess.Popen[bytes] | None = None
        self._end_process: Callable[[], object] | None = None
        self._running: dict[bytes, _Running] = {}
        self._kept: OrderedDict[bytes, str | InvalidGrammar] = OrderedDict()
        self._num_kept_bytes = 0

    def start(self) -> None:
        """Begins to start the process, which else waits for the first grammar."""
        self._thread.submit(self._start_process)

    async def compile(self, grammar: Grammar) -> str:
        """The grammar's source for the shards. Raises `UnsupportedGrammar`, `InvalidGrammar` or `Overloaded`."""
        request = _encode(grammar)
        key = hashlib.blake2b(request, digest_size=16).digest()
        kept = self._kept.get(key)
        if kept is None:
            kept = await self._join(key, request)
            self._keep(key, kept)
        self._kept.move_to_end(key)
        if isinstance(kept, InvalidGrammar):
            raise InvalidGrammar(str(kept))
        return kept

    async def _join(self, key: bytes, request: bytes) -> str | InvalidGrammar:
        """Asks, or waits for whoever asked. What nobody waits for any more is given up."""
        running = self._running.get(key)
        if running is None:
            running = self._running[key] = _Running(asyncio.create_task(self._ask(request)))
        running.num_waiting += 1
        try:
            return await asyncio.shield(running.task)  # whose client leaves must not end it for the others
        finally:
            running.num_waiting -= 1
            if not running.num_waiting:
                del self._running[key]
                running.task.cancel()

    async def _ask(self, request: bytes) -> str | InvalidGrammar:
        answering = asyncio.get_running_loop().run_in_executor(self._thread, self._converse, request)
        try:
            answer = json.loads(await asyncio.wait_for(answering, MAX_WAIT_S))
        except TimeoutError as error:
            raise Overloaded from error
        except OSError:  # the process is gone, or there is no memory for another
            logger.exception("a grammar could not be compiled")
            raise Overloaded from None
        if "late" in answer:
            raise Overloaded
        if "unsupported" in answer:
            raise UnsupportedGrammar
        return answer["source"] if "source" in answer else InvalidGrammar(answer["invalid"])

    def _keep(self, key: bytes, answer: str | InvalidGrammar) -> None:
        if key not in self._kept:
            self._kept[key] = answer
            self._num_kept_bytes += _size(answer)
        while self._num_kept_bytes > MAX_KEPT_BYTES and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._num_kept_bytes -= _size(oldest)

    # On the thread

    def _start_process(self) -> subprocess.Popen[bytes]:
        if self._end_process is not None:  # one that died leaves its pipes
            self._end_process()
        process = subprocess.Popen(
            [sys.executable, "-m", "router.text.grammar_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # forks that die of a grammar write there
            env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # address space is what is limited
        )
        self._end_process = weakref.finalize(self, _stop, process)
        self._process = process
        setup = {
            "tokenizer": self._describe_tokenizer(),
            "vocab_size": self._vocab_size,
            "eos_token_ids": self._eos_token_ids,
            "max_wall_s": WALL_PART * MAX_WAIT_S,
        }
        _write_line(process, orjson.dumps(setup))
        return process

    def _converse(self, request: bytes) -> bytes:
        """Sends a line and waits for one. Raises `OSError` when the process cannot be started or has ended."""
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start_process()
        assert process.stdout is not None
        _write_line(process, request)
        answer = process.stdout.readline()
        if not answer.endswith(b"\n"):
            raise BrokenPipeError("the process that compiles grammars is gone")
        return answer


def _encode(grammar: Grammar) -> bytes:
    """One line."""
    try:
        return orjson.dumps(
            {"kind": grammar.kind.value, "value": grammar.value, "needs_properties": grammar.needs_properties}
        )
    except orjson.JSONEncodeError as error:  # nested too deeply
        raise InvalidGrammar(str(error)) from error


def _size(answer: str | InvalidGrammar) -> int:
    return 500 + len(str(answer))


def _write_line(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(line + b"\n")
    process.stdin.flush()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends it, if it lives, and closes its pipes, whatever was still to be sent."""
    process.kill()
    with contextlib.suppress(BrokenPipeError), process:
        pass
