"""Texts of many scripts, cut into tokens: the pieces add up, no character is torn, and stop strings end them exactly.

Arabic and Hebrew, families joined by U+200D, flags, skin tones, combining marks and Hangul are where one visible
character is several code points, several tokens, or both.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from tokenizers import Tokenizer as FastTokenizer

from router.text.output import OutputText
from router.text.tokenizer import Tokenizer
from tests.test_detokenize import real
from tests.tiny_tokenizers import byte_level, sentencepiece, tokenizer_of, wordpiece

KINDS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "wordpiece": wordpiece, "smollm2": real}
NUM_TEXTS = 150

CLUSTERS = (
    *("the", " capital", " of", " a", " ", "  ", "\n\n", "\t", "'s", "!", "…", "—"),
    *("مرحبا", " بالعالم", "؟", "לָשׁוֹן", " עִבְרִית", "\u200f", "\u202b"),
    *("👨‍👩‍👧‍👦", "🏳️‍🌈", "🇪🇺", "👍🏽", "☃️", "😀"),
    *("é", "e\u0301", "ß", "ﬁ", "İ", "한국어", "ᄒ", "東京", "ไทย", "नमस्ते"),
)
SIMPLE_CLUSTERS = ("the", " capital", " of", " a", " s", ".", "n", "don't", ", ")
"""For WordPiece, which has no bytes to fall back on and shows a special token for what it does not know."""


class Case(NamedTuple):
    prompt: list[int]
    token_ids: list[int]
    whole: str
    """What the tokenizers package decodes behind the prompt."""


def cases(kind: str) -> Iterator[tuple[Tokenizer, Case, random.Random]]:
    fast: FastTokenizer = KINDS[kind]()
    tokenizer = tokenizer_of(fast)
    rng = random.Random(3)
    prompt = tokenizer.encode("the capital")
    clusters = SIMPLE_CLUSTERS if kind == "wordpiece" else CLUSTERS
    before = fast.decode(prompt)
    for _ in range(NUM_TEXTS):
        text = "".join(rng.choices(clusters, k=rng.randint(1, 12)))
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        whole = fast.decode(prompt + token_ids)
        assert whole.startswith(before)
        if len(whole) > len(before):
            yield tokenizer, Case(prompt, token_ids, whole[len(before) :]), rng


def play(tokenizer: Tokenizer, case: Case, stop: tuple[str, ...], *, keep_stop: bool) -> tuple[list[str], str]:
    """The pieces until the text ends, and the text."""
    output = OutputText(tokenizer, case.prompt, stop, keep_stop=keep_stop)
    pieces: list[str] = []
    for index, token_id in enumerate(case.token_ids):
        piece = output.push(token_id, last=index == len(case.token_ids) - 1)
        pieces.append(piece.text)
        if piece.stopped:
            break
    return pieces, output.text


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_add_up_to_the_decoded_whole(kind: str) -> None:
    for tokenizer, case, _ in cases(kind):
        pieces, text = play(tokenizer, case, (), keep_stop=True)

        assert text == "".join(pieces) == case.whole


@pytest.mark.parametrize("kind", KINDS)
def test_no_piece_tears_a_character(kind: str) -> None:
    num_waited = 0
    for tokenizer, case, _ in cases(kind):
        pieces, _ = play(tokenizer, case, (), keep_stop=True)

        assert not any("\ufffd" in piece for piece in pieces), case
        num_waited += pieces.count("")
    assert (num_waited > 0) is (kind != "wordpiece"), "the texts should hold characters of several tokens"


@pytest.mark.parametrize("keep_stop", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_anywhere_ends_the_text_exactly(kind: str, keep_stop: bool) -> None:
    """Any run of characters of the text may be one, wherever the tokens were cut and whatever it joins or parts."""
    num_inside = 0
    for tokenizer, case, rng in cases(kind):
        start = rng.randrange(len(case.whole))
        stop = case.whole[start : start + rng.randint(1, 6)]

        pieces, text = play(tokenizer, case, (stop, "never\0"), keep_stop=keep_stop)

        at = case.whole.index(stop)
        assert text == "".join(pieces) == case.whole[: at + len(stop) * keep_stop], (case, stop)
        full, _ = play(tokenizer, case, (), keep_stop=True)
        num_inside += len("".join(full[: len(pieces)])) > at + len(stop)
    assert num_inside > 10, "some stop strings should end inside a token"


@pytest.mark.parametrize("kind", KINDS)
def test_of_several_stop_strings_the_first_complete_one_counts(kind: str) -> None:
    for tokenizer, case, rng in cases(kind):
        starts = [rng.randrange(len(case.whole)) for _ in range(3)]
        stops = tuple(case.whole[start : start + rng.randint(1, 4)] for start in starts)

        _, text = play(tokenizer, case, stops, keep_stop=True)

        assert text == case.whole[: min(case.whole.index(stop) + len(stop) for stop in stops)]
