"""The memory for answers: what is kept, what leaves first, and that it never takes more than it may."""

from __future__ import annotations

import random

import pytest

from router.cache import PART_OVERHEAD_BYTES, ResponseCache, StoredAnswer


def answer(num_bytes: int) -> StoredAnswer:
    """Of this size in all."""
    return StoredAnswer((), (bytes(num_bytes - PART_OVERHEAD_BYTES),))


def kept(cache: ResponseCache, *keys: bytes) -> list[bytes]:
    """Those of `keys` that are there; looking does not make them recent for longer than the test looks."""
    return [key for key in keys if cache.get(key) is not None]


def test_an_answer_comes_back_as_it_was_put() -> None:
    cache, stored = ResponseCache(1_000), StoredAnswer(((b"a", b"b"),), (b"c", b""))

    cache.put(b"k", stored)

    assert cache.get(b"k") is stored
    assert cache.get(b"other") is None


def test_every_piece_is_counted() -> None:
    stored = StoredAnswer(((b"name", b"value"),), (b"12345", b"", b"6"))

    assert stored.num_bytes == 4 + 5 + 5 + 1 + 5 * PART_OVERHEAD_BYTES


def test_the_least_recently_used_one_leaves() -> None:
    cache = ResponseCache(300)
    for key in (b"a", b"b", b"c"):
        cache.put(key, answer(100))
    cache.get(b"a")

    cache.put(b"d", answer(100))

    assert kept(cache, b"a", b"b", b"c", b"d") == [b"a", b"c", b"d"]
    assert (cache.num_bytes, len(cache)) == (300, 3)


def test_as_many_leave_as_a_large_one_needs() -> None:
    cache = ResponseCache(300)
    for key in (b"a", b"b", b"c"):
        cache.put(key, answer(100))

    cache.put(b"d", answer(150))

    assert kept(cache, b"a", b"b", b"c", b"d") == [b"c", b"d"]


def test_what_is_larger_than_the_cache_drives_nothing_out() -> None:
    cache = ResponseCache(300)
    cache.put(b"a", answer(100))

    cache.put(b"b", answer(301))

    assert kept(cache, b"a", b"b") == [b"a"]


@pytest.mark.parametrize(("num_bytes", "left"), [(200, [b"a"]), (301, [])])
def test_a_new_answer_replaces_the_old_one(num_bytes: int, left: list[bytes]) -> None:
    cache = ResponseCache(300)
    cache.put(b"a", answer(100))

    cache.put(b"a", answer(num_bytes))

    assert kept(cache, b"a") == left
    assert cache.num_bytes == (num_bytes if left else 0)


def test_the_count_of_bytes_is_that_of_the_answers_after_any_history() -> None:
    rng, cache, sizes = random.Random(1), ResponseCache(2_000), {}
    for _ in range(2_000):
        key = bytes([rng.randrange(40)])
        if rng.random() < 0.5:
            cache.get(key)
        else:
            sizes[key] = rng.randrange(PART_OVERHEAD_BYTES, 2_200)
            cache.put(key, answer(sizes[key]))

        assert cache.num_bytes <= 2_000

    assert cache.num_bytes == sum(sizes[key] for key in kept(cache, *sizes)) > 0
