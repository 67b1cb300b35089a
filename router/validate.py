"""A client's wishes become `Request`s, or a sentence that says which rule they break.

`Parameters` are the wishes in the native API's words, whichever route they came by; None means "not given". The rules
run in a fixed order with fixed sentences, because clients and their tests know them. This module knows limits and
tokens, neither HTTP nor JSON.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, TypeVar

from router.config import Config
from router.core.request import BeamSettings, Request, Sampling
from router.errors import StartupError, ValidationError
from router.text.grammar import Grammar, InvalidGrammar, UnsupportedGrammar
from router.text.grammar_compiler import GrammarCompiler
from router.text.tokenizer import Tokenizer

MAX_STOP_CHARS: Final = 1_000
MAX_LOGIT_BIASES: Final = 1_024
MAX_BAD_WORDS: Final = 128
MAX_BAD_WORD_CHARS: Final = 1_000
MAX_BAD_WORD_TOKENS: Final = 10_000
"""All words together. One plan may open hundreds of sequences, each with its words, in a message of bounded size."""
MAX_NGRAM: Final = 1_000
MAX_LENGTH_PENALTY: Final = 10.0
"""Lengths to a higher power would leave the range of floats."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a client may ask of a generation. None: not given, its default holds."""

    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    min_p: float | None = None
    do_sample: bool = False
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    return_full_text: bool | None = None
    stop: tuple[str, ...] = ()
    truncate: int | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: int | None = None
    top_n_tokens: int | None = None
    grammar: Grammar | None = None
    adapter_id: str | None = None
    logit_bias: Mapping[str, float] = field(default_factory=dict)
    no_repeat_ngram_size: int | None = None
    bad_words: tuple[str | int | tuple[int, ...], ...] = ()
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None


@dataclass(frozen=True, slots=True)
class Manner:
    """How a call is carried out where none of its parameters says so; the defaults are the native routes'."""

    num_sequences: int = 1
    """Sequences that are all answered, unlike those of `best_of`."""
    add_special_tokens: bool = True
    greedy: bool = False
    """Whatever else is given, the likeliest token is taken."""
    keep_stop: bool = True
    ignore_eos: bool = False
    scores_prompt: bool = False
    num_prompt_top: int = 0
    """Likeliest tokens wanted in the place of every scored prompt token."""


NATIVE: Final = Manner()


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a connected group says about its model and its memory."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    kv_tokens: int
    """Tokens all sequences may hold together."""
    max_positions: int | None = None
    """Longest sequence the model was made for."""
    adapters: tuple[str, ...] = ()
    """Their names, in the group's order."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for."""

    max_best_of: int
    max_num_beams: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int
    max_total_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    watermark_gamma: float
    watermark_delta: float
    allows_grammars: bool = True
    adapters: tuple[str, ...] = ()

    @classmethod
    def derive(cls, config: Config, capacity: Capacity, tokenizer: Tokenizer) -> Limits:
        """Fills in what the operator left open. Raises `StartupError` for limits that contradict each other."""
        max_total, max_input = _token_limits(config, capacity, tokenizer.model_max_length)
        return cls(
            max_best_of=config.max_best_of,
            max_num_beams=config.max_num_beams,
            max_stop_sequences=config.max_stop_sequences,
            max_top_n_tokens=config.max_top_n_tokens,
            max_input_tokens=max_input,
            max_total_tokens=max_total,
            vocab_size=capacity.vocab_size,
            eos_token_ids=capacity.eos_token_ids,
            watermark_gamma=config.watermark_gamma,
            watermark_delta=config.watermark_delta,
            allows_grammars=not config.disable_grammar_support,
            adapters=capacity.adapters,
        )


def _token_limits(config: Config, capacity: Capacity, model_max_length: int | None) -> tuple[int, int]:
    possible = min(n for n in (capacity.kv_tokens, capacity.max_positions, model_max_length) if n)
    max_total = config.max_total_tokens or possible
    if capacity.max_positions and max_total > capacity.max_positions:
        raise StartupError(
            f"`max_total_tokens` must be <= {capacity.max_positions}, the model's longest sequence. Given: {max_total}"
        )
    if max_total > capacity.kv_tokens:
        raise StartupError(
            f"Not enough memory to handle `max_total_tokens={max_total}`: KV memory holds {capacity.kv_tokens} tokens"
        )
    max_input = config.max_input_tokens or max_total - 1
    if not 0 < max_input < max_total:
        raise StartupError(f"`max_input_tokens` must be < `max_total_tokens`. Given: {max_input} and {max_total}")
    return max_total, max_input


@dataclass(frozen=True, slots=True)
class Demand:
    """One client call, validated: a request per sequence, alike but for their seeds.

    `decoder_input_details` are asked of the first alone: log-probabilities of the prompt are the same for all, and
    sequences that need them cannot share its blocks.
    """

    requests: tuple[Request, ...]
    input_length: int


class Validator:
    """The rules, for one model's limits."""

    def __init__(self, limits: Limits, tokenizer: Tokenizer) -> None:
        self.limits = limits
        self._tokenizer = tokenizer
        self.grammars = GrammarCompiler(tokenizer.describe, limits.vocab_size, limits.eos_token_ids)

    def num_sequences(self, parameters: Parameters, *, stream: bool, manner: Manner = NATIVE) -> int:
        """How many sequences the call makes, beams among them. These rules come before there is a question of room."""
        best_of, num_beams = parameters.best_of, _or(parameters.num_beams, 1)
        if stream:
            _require(best_of in (None, 1), "`best_of` != 1 is not supported when streaming tokens")
            _require(num_beams <= 1, "`num_beams` > 1 is not supported when streaming tokens")
            _require(
                not parameters.decoder_input_details,
                "`decoder_input_details` == true is not supported when streaming tokens",
            )
        max_beams = self.limits.max_num_beams
        _require(num_beams <= max_beams, f"`num_beams` must be > 0 and <= {max_beams}. Given: {num_beams}")
        if num_beams > 1:
            return num_beams
        if best_of is None or best_of <= 1:
            return manner.num_sequences
        limit = self.limits.max_best_of
        _require(limit > 1, "`best_of` != 1 is not allowed for this endpoint")
        _require(best_of <= limit, f"`best_of` must be > 0 and <= {limit}. Given: {best_of}")
        return best_of

    async def validate(
        self, inputs: str | Sequence[int], parameters: Parameters, request_id: str, manner: Manner = NATIVE
    ) -> Demand:
        """The requests, ready to be submitted. Raises `ValidationError` for the first rule that is broken."""
        self._check_native(parameters)
        self._check_further(parameters)
        _require(inputs != "", "`inputs` cannot be empty")
        self._check_truncate(parameters.truncate)
        if isinstance(inputs, str):
            prompt = await self._tokenizer.encode_async(inputs, add_special_tokens=manner.add_special_tokens)
        else:
            prompt = list(inputs)
        _require(len(prompt) > 0, "`inputs` cannot be empty")
        self._check_token_ids(prompt)
        prompt = prompt[-(parameters.truncate or len(prompt)) :]
        max_new_tokens = self._max_new_tokens(len(prompt), parameters)
        grammar = "" if parameters.grammar is None else await self._compile(parameters.grammar)
        request = Request(
            request_id=request_id,
            prompt=tuple(prompt),
            max_new_tokens=max_new_tokens,
            sampling=self._sampling(parameters, manner),
            eos_token_ids=() if manner.ignore_eos else self.limits.eos_token_ids,
            stop=parameters.stop,
            keep_stop=manner.keep_stop,
            prompt_logprobs=parameters.decoder_input_details or manner.scores_prompt,
            grammar=grammar,
            beams=_beam_settings(parameters),
            adapter=self._adapter(parameters.adapter_id),
        )
        return Demand(_with_seeds(request, parameters, manner), len(prompt))

    async def _compile(self, grammar: Grammar) -> str:
        _require(self.limits.allows_grammars, "grammar is not supported")
        try:
            return await self.grammars.compile(grammar)
        except InvalidGrammar as error:
            raise ValidationError(f"grammar is not valid: {error}") from error
        except UnsupportedGrammar as error:
            raise ValidationError("grammar is not supported") from error

    def _adapter(self, name: str | None) -> int:
        """Its number among the group's. As in TGI a name that none has is no mistake: it means the model itself."""
        names = self.limits.adapters
        return 1 + names.index(name) if name in names else 0

    def _check_token_ids(self, prompt: Sequence[int]) -> None:
        """A tokenizer may know more tokens than the model has embeddings for; fed one, a shard would fail."""
        largest = max(prompt)
        _require(
            largest < self.limits.vocab_size,
            f"tokenizer error: token {largest} is not in the model's vocabulary of {self.limits.vocab_size}",
        )

    def _check_native(self, parameters: Parameters) -> None:
        """TGI's rules, in TGI's order."""
        p, limits = parameters, self.limits
        several = p.best_of is not None and p.best_of > 1
        _require(not several or _asks_for_sampling(p), "you must use sampling when `best_of` is > 1")
        _require(_or(p.temperature, 1.0) > 0, "`temperature` must be strictly positive")
        _require(_or(p.repetition_penalty, 1.0) > 0, "`repetition_penalty` must be strictly positive")
        _require(-2 <= _or(p.frequency_penalty, 0.0) <= 2, "`frequency_penalty` must be >= -2.0 and <= 2.0")
        _require(0 < _or(p.top_p, 1.0) <= 1, "`top_p` must be > 0.0 and < 1.0")
        _require(0 < _or(p.typical_p, 1.0) <= 1, "`typical_p` must be > 0.0 and < 1.0")
        _require(_or(p.top_k, 0) >= 0, "`top_k` must be strictly positive")
        _require(_or(p.max_new_tokens, 1) > 0, "`max_new_tokens` must be strictly positive")
        _require(
            len(p.stop) <= limits.max_stop_sequences,
            f"`stop` supports up to {limits.max_stop_sequences} stop sequences. Given: {len(p.stop)}",
        )
        _require(not several or p.seed is None, "`seed` must not be set when `best_of` > 1")
        _require(
            _or(p.top_n_tokens, 0) <= limits.max_top_n_tokens,
            f"`top_n_tokens` must be >= 0 and <= {limits.max_top_n_tokens}. Given: {p.top_n_tokens}",
        )

    def _check_further(self, parameters: Parameters) -> None:
        """Rules for what TGI does not have, or does not bound."""
        p = parameters
        longest = max(map(len, p.stop), default=0)
        _require(
            longest <= MAX_STOP_CHARS,
            f"`stop` sequences must have at most {MAX_STOP_CHARS} characters. Given: {longest}",
        )
        _require(-2 <= _or(p.presence_penalty, 0.0) <= 2, "`presence_penalty` must be >= -2.0 and <= 2.0")
        _require(0 <= _or(p.min_p, 0.0) <= 1, "`min_p` must be >= 0.0 and <= 1.0")
        _require(
            _or(p.no_repeat_ngram_size, 0) <= MAX_NGRAM,
            f"`no_repeat_ngram_size` must be <= {MAX_NGRAM}. Given: {p.no_repeat_ngram_size}",
        )
        _require(_or(p.num_beams, 1) > 0, "`num_beams` must be strictly positive")
        _require(
            abs(_or(p.length_penalty, 1.0)) <= MAX_LENGTH_PENALTY,
            f"`length_penalty` must be >= -{MAX_LENGTH_PENALTY} and <= {MAX_LENGTH_PENALTY}. Given: {p.length_penalty}",
        )
        if _or(p.num_beams, 1) > 1:
            _check_beams(p)
        self._check_logit_bias(p.logit_bias)
        self._check_bad_words(p.bad_words)

    def _check_logit_bias(self, logit_bias: Mapping[str, float]) -> None:
        num = len(logit_bias)
        _require(num <= MAX_LOGIT_BIASES, f"`logit_bias` supports up to {MAX_LOGIT_BIASES} tokens. Given: {num}")
        for token, bias in logit_bias.items():
            _require(-100 <= bias <= 100, f"`logit_bias` values must be >= -100 and <= 100. Given: {bias}")
            known = token.isascii() and token.isdecimal() and len(token) < 10 and int(token) < self.limits.vocab_size
            _require(known, f"`logit_bias` keys must be token ids below {self.limits.vocab_size}. Given: {token[:20]}")

    def _check_bad_words(self, bad_words: Sequence[str | int | tuple[int, ...]]) -> None:
        num = len(bad_words)
        _require(num <= MAX_BAD_WORDS, f"`bad_words` supports up to {MAX_BAD_WORDS} words. Given: {num}")
        for word in bad_words:
            _require(word not in ("", ()), "`bad_words` must not be empty")
            if isinstance(word, str):
                _require(
                    len(word) <= MAX_BAD_WORD_CHARS,
                    f"`bad_words` must have at most {MAX_BAD_WORD_CHARS} characters. Given: {len(word)}",
                )
                continue
            for token in (word,) if isinstance(word, int) else word:
                _require(
                    token < self.limits.vocab_size,
                    f"`bad_words` must be made of token ids below {self.limits.vocab_size}. Given: {token}",
                )

    def _check_truncate(self, truncate: int | None) -> None:
        limit = self.limits.max_input_tokens
        _require(
            truncate is None or 0 < truncate <= limit,
            f"`truncate` must be strictly positive and less than {limit}. Given: {truncate}",
        )

    def _max_new_tokens(self, input_length: int, parameters: Parameters) -> int:
        """All that fits when the client names no number."""
        max_total, max_input = self.limits.max_total_tokens, self.limits.max_input_tokens
        num_new = _or(parameters.max_new_tokens, max(max_total - input_length, 0))
        _require(
            input_length + num_new <= max_total,
            f"`inputs` tokens + `max_new_tokens` must be <= {max_total}. "
            f"Given: {input_length} `inputs` tokens and {num_new} `max_new_tokens`",
        )
        _require(input_length <= max_input, f"`inputs` must have less than {max_input} tokens. Given: {input_length}")
        num_min = _or(parameters.min_new_tokens, 0)
        _require(num_min <= num_new, f"`min_new_tokens` must be <= {num_new}. Given: {num_min}")
        return num_new

    def _sampling(self, parameters: Parameters, manner: Manner) -> Sampling:
        """All but the seed."""
        p = parameters
        return Sampling(
            do_sample=_switches_sampling_on(p) and not manner.greedy,
            temperature=_or(p.temperature, 1.0),
            top_k=_or(p.top_k, 0),
            top_p=_or(p.top_p, 1.0),
            typical_p=_or(p.typical_p, 1.0),
            min_p=_or(p.min_p, 0.0),
            repetition_penalty=_or(p.repetition_penalty, 1.0),
            frequency_penalty=_or(p.frequency_penalty, 0.0),
            presence_penalty=_or(p.presence_penalty, 0.0),
            logit_bias=tuple((int(token), bias) for token, bias in p.logit_bias.items()),
            watermark_gamma=self.limits.watermark_gamma if p.watermark else 0.0,
            watermark_delta=self.limits.watermark_delta if p.watermark else 0.0,
            top_n_tokens=_or(p.top_n_tokens, 0),
            prompt_top_n_tokens=manner.num_prompt_top,
            no_repeat_ngram_size=_or(p.no_repeat_ngram_size, 0),
            min_new_tokens=_or(p.min_new_tokens, 0),
            bad_words=self._bad_word_runs(p.bad_words),
        )

    def _bad_word_runs(self, bad_words: Sequence[str | int | tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
        """A word given as text is forbidden both at the start of a text and behind a space."""
        runs: dict[tuple[int, ...], None] = {}
        for word in bad_words:
            if isinstance(word, str):
                for text in (word, f" {word}"):
                    runs[tuple(self._tokenizer.encode(text, add_special_tokens=False))] = None
            else:
                runs[(word,) if isinstance(word, int) else word] = None
        num = sum(map(len, runs))
        _require(num <= MAX_BAD_WORD_TOKENS, f"`bad_words` supports up to {MAX_BAD_WORD_TOKENS} tokens. Given: {num}")
        return tuple(run for run in runs if run)


def _check_beams(p: Parameters) -> None:
    """A search compares the model's own log-probabilities, so nothing may change or choose among them."""
    for name, is_asked in (
        ("best_of", _or(p.best_of, 1) > 1),
        ("stop", bool(p.stop)),
        ("repetition_penalty", _or(p.repetition_penalty, 1.0) != 1.0),
        ("frequency_penalty", _or(p.frequency_penalty, 0.0) != 0.0),
        ("presence_penalty", _or(p.presence_penalty, 0.0) != 0.0),
        ("min_p", _or(p.min_p, 0.0) != 0.0),
        ("logit_bias", bool(p.logit_bias)),
        ("bad_words", bool(p.bad_words)),
        ("no_repeat_ngram_size", _or(p.no_repeat_ngram_size, 0) != 0),
        ("min_new_tokens", _or(p.min_new_tokens, 0) != 0),
        ("watermark", p.watermark),
        ("grammar", p.grammar is not None),
    ):
        _require(not is_asked, f"`{name}` is not supported when `num_beams` is > 1")
    _require(not _switches_sampling_on(p), "you must not use sampling when `num_beams` is > 1")


def _beam_settings(p: Parameters) -> BeamSettings | None:
    if p.num_beams is None or p.num_beams == 1:
        return None
    return BeamSettings(p.num_beams, _or(p.length_penalty, 1.0), _or(p.early_stopping, False))


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ValidationError(rule)


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _asks_for_sampling(p: Parameters) -> bool:
    """Being given at all counts here, even as a neutral value."""
    return p.do_sample or any(value is not None for value in (p.temperature, p.top_k, p.top_p, p.typical_p))


def _switches_sampling_on(p: Parameters) -> bool:
    """Neutral values leave a greedy request greedy."""
    return (
        p.do_sample
        or _or(p.temperature, 1.0) != 1.0
        or _or(p.top_k, 0) != 0
        or _or(p.top_p, 1.0) < 1.0
        or _or(p.typical_p, 1.0) < 1.0
    )


def is_repeatable(parameters: Parameters, manner: Manner = NATIVE) -> bool:
    """Whether the same call has the same answer again: tokens are not drawn, or with a seed of the client's."""
    return manner.greedy or parameters.seed is not None or not _switches_sampling_on(parameters)


def _with_seeds(request: Request, parameters: Parameters, manner: Manner) -> tuple[Request, ...]:
    """One request per sequence. Seeds that were not given are drawn here, so that a replay draws the same tokens; of
    several sequences with a given seed, each has the next one, or they would be equal."""
    num, seed = max(parameters.best_of or 1, manner.num_sequences), parameters.seed
    seeds = [secrets.randbits(64) if seed is None else (seed + index) % 2**64 for index in range(num)]
    seeded = [replace(request, sampling=replace(request.sampling, seed=seed)) for seed in seeds]
    return (seeded[0], *(replace(other, prompt_logprobs=False) for other in seeded[1:]))
