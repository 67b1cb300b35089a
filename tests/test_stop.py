"""Stop strings, found wherever the pieces of a text are cut, and the text held back for them."""

from __future__ import annotations

import random

import pytest

from router.text.stop import Match, StopMatcher


def feed_all(matcher: StopMatcher, pieces: list[str]) -> Match | None:
    for piece in pieces:
        match = matcher.feed(piece)
        if match is not None:
            return match
    return None


def first_stop(text: str, stops: list[str]) -> Match | None:
    """The slow way: of all occurrences the one that ends first, of those the one that begins first."""
    found = [(start + len(stop), start) for stop in stops for start in range(len(text)) if text.startswith(stop, start)]
    if not found:
        return None
    end, start = min(found)
    return Match(start, end)


def test_stop_string_is_found_inside_one_piece() -> None:
    assert StopMatcher(["lo wo"]).feed("hello world") == Match(3, 8)


def test_stop_string_is_found_across_pieces() -> None:
    assert feed_all(StopMatcher(["lo wo"]), ["hel", "l", "o", " ", "world"]) == Match(3, 8)


def test_stop_string_that_overlaps_itself_is_found_behind_a_false_start() -> None:
    assert feed_all(StopMatcher(["aab"]), ["a", "aa", "b"]) == Match(1, 4)


def test_the_stop_string_that_ends_first_wins() -> None:
    assert StopMatcher(["cde", "bc"]).feed("abcde") == Match(1, 3)


def test_of_stop_strings_that_end_together_the_longest_wins() -> None:
    assert StopMatcher(["c", "abc"]).feed("xabc") == Match(1, 4)


def test_no_stop_strings_match_nothing_and_hold_nothing() -> None:
    matcher = StopMatcher([])

    assert matcher.feed("anything") is None
    assert matcher.num_held == 0


@pytest.mark.parametrize(("text", "held"), [("hello", 0), ("hello w", 1), ("wor", 3), ("woxwo", 2), ("worwor", 3)])
def test_possible_beginnings_are_held(text: str, held: int) -> None:
    matcher = StopMatcher(["world"])

    matcher.feed(text)

    assert matcher.num_held == held


def test_random_texts_agree_with_the_slow_search() -> None:
    rng = random.Random(7)
    num_found = 0
    for _ in range(3_000):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 3))]
        pieces = ["".join(rng.choices("abc", k=rng.randint(0, 4))) for _ in range(6)]

        match = feed_all(StopMatcher(stops), pieces)

        assert match == first_stop("".join(pieces), stops), (stops, pieces)
        num_found += match is not None
    assert 500 < num_found < 2_900
