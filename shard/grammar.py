"""Structured output on rank 0: which tokens a grammar leaves to each seat, and which it forces.

    open ──► compiled in a thread of its own, once per grammar, while the prompt is worked on
    feed ──► generated tokens of an earlier life, after a replay or a preemption
    prepare, promised, allowed ──► what the next token may be
    advance ◄── what was chosen; the masks of the next tokens are computed while the model works on this one

Where a grammar leaves a single way to go on, the tokens on that way are promised: the seat's next rows emit them one by
one, unless the router sends them as literals before that.

Compiling and masks release the GIL; what is done on the model thread takes microseconds. A grammar was compiled under
the same limits, on a smaller stack, before it came here: in a process that may die of it. The module knows neither
logits nor plans.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

LIMITS: Final = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,
    step_max_items=10_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
"""A mask of a common grammar takes 0.01 to 1 ms. One that runs into these takes some tens, and its sequence fails."""

MAX_KEPT_BYTES: Final = 2 * 2**20
"""Source text of compiled grammars that are kept for the next request. A typical one has a kilobyte of it, and about a
megabyte of its own that all its seats share."""

MAX_KEPT: Final = 32


class GrammarCompiler:
    """The vocabulary and the compiled grammars of a process; they outlive its epochs."""

    def __init__(self, tokenizer_path: Path, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammar")
        # Read at once, beside what else is done at start-up, so that no request waits for it.
        self._tokenizer = self._threads.submit(_load_tokenizer, tokenizer_path, vocab_size, list(eos_token_ids))
        self._kept: OrderedDict[str, Future[LLMatcher]] = OrderedDict()

    def tokenizer(self) -> LLTokenizer:
        """Waits for it. Raises `OSError` or `ValueError` if it cannot be used."""
        return self._tokenizer.result()

    def compile(self, source: str) -> Future[LLMatcher]:
        """A matcher that stands at the beginning, to be copied. Whatever is wrong with the grammar, the matcher says;
        the future raises what `tokenizer` does."""
        compiled = self._kept.get(source)
        if compiled is None:
            compiled = self._kept[source] = self._threads.submit(self._compile, source)
            self._forget_oldest()
        self._kept.move_to_end(source)
        return compiled

    def _compile(self, source: str) -> LLMatcher:
        matcher = LLMatcher(self.tokenizer(), source, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # what a first mask builds is shared by all copies
        return matcher

    def _forget_oldest(self) -> None:
        num_bytes = sum(map(len, self._kept))
        while len(self._kept) > 1 and (len(self._kept) > MAX_KEPT or num_bytes > MAX_KEPT_BYTES):
            source, _ = self._kept.popitem(last=False)
            num_bytes -= len(source)


def _load_tokenizer(path: Path, vocab_size: int, eos_token_ids: list[int]) -> LLTokenizer:
    """Of the model's vocabulary or the tokenizer's, whichever is larger."""
    text = path.read_text(encoding="utf-8")
    try:
        return LLTokenizer(text, n_vocab=vocab_size, eos_token=eos_token_ids)
    except ValueError:  # the tokenizer has more tokens than the model, or not all of the end tokens
        num_tokens = LLTokenizer(text).vocab_size
    ends = [token for token in eos_token_ids if token < num_tokens]
    if not ends:
        raise ValueError("the tokenizer has no end token")
    return LLTokenizer(text, n_vocab=max(vocab_size, num_tokens), eos_token=ends)


@dataclass(slots=True, eq=False)
class _Seat:
    """One sequence under a grammar.

    tokens   [ prompt ............. | generated ....... | promised ]
             [ num_fed ......................... ]                   given to the model, as far as is known here
             [ num_known ......................................... ] the matcher stands behind the last of them
    """

    index: int
    compiled: Future[LLMatcher]
    num_prompt_tokens: int
    num_fed: int = 0
    num_known: int = 0
    early: list[int] = field(default_factory=list)
    """Generated tokens that came before the matcher was there."""
    matcher: LLMatcher | None = None
    promised: deque[int] = field(default_factory=deque)
    fault: str | None = None

    def begin(self) -> None:
        """Takes a matcher of its own to where the sequence stands. Waits until the grammar is compiled."""
        try:
            self.matcher = self.compiled.result().deep_copy()
        except (OSError, ValueError) as error:
            self.fault = f"a grammar needs the model's tokenizer: {error}"
            return
        self.take(self.early)

    def learn(self, tokens: Sequence[int]) -> Sequence[int]:
        """Counts tokens as fed. Returns those that the matcher has not seen."""
        start, self.num_fed = self.num_fed, self.num_fed + len(tokens)
        while self.promised and self.num_known - len(self.promised) < self.num_fed:
            self.promised.popleft()
        new = tokens[max(self.num_known, self.num_prompt_tokens) - start :]
        self.num_known = max(self.num_known, self.num_fed)
        return new

    def take(self, tokens: Sequence[int]) -> None:
        """The matcher goes on by some tokens."""
        assert self.matcher is not None, f"seat {self.index} has no matcher"
        for token in tokens:
            self.matcher.consume_token(token)
        self.check()

    def check(self) -> None:
        """Notes an error of the matcher, which it never leaves again."""
        if self.fault is None and self.matcher is not None and self.matcher.is_error():
            self.fault = f"the grammar cannot be followed: {self.matcher.get_error().splitlines()[0][:200]}"

    def look_ahead(self, eos_token_ids: Sequence[int]) -> Sequence[int]:
        """Promises the tokens that alone can follow, the end of the text among them; the matcher goes on by them."""
        assert self.matcher is not None, f"seat {self.index} has no matcher"
        forced = self.matcher.compute_ff_tokens()
        self.take(forced)
        if self.fault is None and self.matcher.is_stopped() and len(eos_token_ids) == 1:
            forced += eos_token_ids
        self.promised.extend(forced)
        self.num_known += len(forced)
        return forced


class Grammars:
    """The seats of one epoch that have a grammar. Used by the model thread only."""

    def __init__(self, compiler: GrammarCompiler, *, max_seats: int) -> None:
        self._compiler = compiler
        self._max_seats = max_seats
        self._seats: dict[int, _Seat] = {}
        self._masks: _Masks | None = None  # made when first needed: many deployments never see a grammar

    def __contains__(self, seat: int) -> bool:
        return seat in self._seats

    def open(self, seat: int, source: str, history: Sequence[int], num_prompt_tokens: int) -> None:
        """Begins a seat behind `history`, all tokens before its first row. Nothing waits for the grammar here."""
        assert seat not in self._seats, f"seat {seat} is open"
        state = self._seats[seat] = _Seat(seat, self._compiler.compile(source), num_prompt_tokens)
        state.early.extend(state.learn(history))

    def feed(self, seat: int, tokens: Sequence[int]) -> None:
        """Takes the literals of a row, in sequence order. They may have been chosen or promised here before."""
        state = self._seats[seat]
        new = state.learn(tokens)
        assert not new or state.matcher is None, f"seat {seat} is fed generated tokens that are not from here"
        state.early.extend(new)

    def close(self, seat: int) -> None:
        self._settle()
        del self._seats[seat]

    def prepare(self, seats: Sequence[int], positions: Sequence[int]) -> dict[int, str]:
        """Waits until it is known what may stand at some positions. Returns why some of the seats cannot go on."""
        self._settle()
        states = [self._seats[seat] for seat in seats]
        begun = [state for state in states if state.matcher is None and state.fault is None]
        for state in begun:
            state.begin()
        self._begin_masks(begun)
        self._settle()
        for state, position in zip(states, positions, strict=True):
            state.num_fed = position
            state.check()
        return {state.index: state.fault for state in states if state.fault is not None}

    def promised(self, seat: int) -> int | None:
        """The token that the seat has to emit; None: the mask says what it may."""
        promised = self._seats[seat].promised
        return promised[0] if promised else None

    def allowed(self, seat: int) -> npt.NDArray[np.uint32]:
        """A bit per token that the seat may emit: where one is promised, that alone. Holds until `advance`."""
        assert self._masks is not None, "no mask was ever computed"
        promised = self.promised(seat)
        return self._masks.of(seat) if promised is None else self._masks.of_one(promised)

    def advance(self, seats: Sequence[int], tokens: Sequence[int]) -> list[Sequence[int]]:
        """Takes what was chosen, and begins with the next masks. Returns for each seat the tokens that alone can
        follow, if that is news."""
        forced: list[Sequence[int]] = []
        moved: list[_Seat] = []
        for seat, token in zip(seats, tokens, strict=True):
            state = self._seats[seat]
            if state.promised:
                state.promised.popleft()
                forced.append(())
                continue
            state.num_known += 1
            matcher = state.matcher
            if matcher is None or matcher.is_stopped():  # behind the end its mask leaves end tokens only
                forced.append(())
                continue
            state.take([token])
            forced.append(state.look_ahead(self._compiler.tokenizer().eos_tokens) if state.fault is None else ())
            moved.append(state)
        self._begin_masks(moved)
        return forced

    def _begin_masks(self, states: Sequence[_Seat]) -> None:
        """Computes the masks of some seats beside what follows; no mask may be under way."""
        matchers = [(state.matcher, state.index) for state in states if state.matcher is not None]
        if not matchers:
            return
        if self._masks is None:
            self._masks = _Masks(self._max_seats, self._compiler.tokenizer().vocab_size)
        self._masks.begin(matchers)

    def _settle(self) -> None:
        """Waits for masks under way. Until then nothing else may touch their matchers."""
        if self._masks is not None:
            self._masks.settle()


class _Masks:
    """A bit per token and seat, written by a thread beside the model's."""

    def __init__(self, max_seats: int, vocab_size: int) -> None:
        self._bits = np.zeros((max_seats, -(-vocab_size // 32)), dtype=np.uint32)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._under_way: Future[None] | None = None

    def begin(self, matchers: list[tuple[LLMatcher, int]]) -> None:
        assert self._under_way is None, "other masks are under way"
        self._under_way = self._thread.submit(self._write, matchers)

    def _write(self, matchers: list[tuple[LLMatcher, int]]) -> None:
        """One after the other: a pool of threads costs more in waking than most masks do in computing."""
        for matcher, seat in matchers:
            row = self._bits[seat]
            matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)

    def settle(self) -> None:
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def of(self, seat: int) -> npt.NDArray[np.uint32]:
        row: npt.NDArray[np.uint32] = self._bits[seat]
        return row

    def of_one(self, token: int) -> npt.NDArray[np.uint32]:
        """A mask that leaves one token."""
        row = np.zeros(self._bits.shape[1], dtype=np.uint32)
        row[token >> 5] = 1 << (token & 31)
        return row
