"""The block pool, the names of blocks and the line, one promise at a time and at random."""

from __future__ import annotations

import random

import pytest

from router.core.blocks import BlockPool
from router.core.line import Line
from router.core.prefix import PrefixHasher
from router.core.request import Request, Sequence


def take(pool: BlockPool, num_blocks: int) -> list[int]:
    return [pool.take() for _ in range(num_blocks)]


def name(pool: BlockPool, table: list[int], keys: str) -> None:
    for block, key in zip(table, keys, strict=True):
        pool.register(block, key.encode())


def test_all_blocks_but_the_padding_block_can_be_taken() -> None:
    pool = BlockPool(5)

    table = take(pool, pool.num_free)

    assert table == [1, 2, 3, 4]
    assert (pool.num_usable, pool.num_free) == (4, 0)
    pool.check_integrity([table])


def test_a_shared_block_is_free_only_after_its_last_holder() -> None:
    pool = BlockPool(4)
    table = take(pool, 1)
    pool.share(table)

    pool.release(table)
    after_first = pool.is_free(1)
    pool.release(table)

    assert (after_first, pool.is_free(1)) == (False, True)
    assert pool.num_free == 3


def test_blank_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(4)
    table = take(pool, 2)
    name(pool, table[:1], "a")
    pool.release(table)

    taken = take(pool, 2)

    assert pool.find(b"a") == table[0]
    assert table[0] not in taken


def test_the_tail_of_a_table_is_evicted_before_its_head() -> None:
    pool = BlockPool(4)
    table = take(pool, 3)
    name(pool, table, "abc")
    pool.release(table)

    found = []
    for _ in range(3):
        pool.take()
        found.append([key for key in "abc" if pool.find(key.encode()) is not None])

    assert found == [["a", "b"], ["a"], []]


def test_the_prefix_unused_for_longest_is_evicted_first() -> None:
    pool = BlockPool(4)
    table = take(pool, 3)
    name(pool, table, "abc")
    for block in table:
        pool.release([block])
    pool.share([table[0]])
    pool.release([table[0]])

    pool.take()

    assert [pool.find(key) for key in (b"a", b"b", b"c")] == [table[0], None, table[2]]


def test_a_hit_revives_a_cached_block() -> None:
    pool = BlockPool(3)
    table = take(pool, 1)
    name(pool, table, "a")
    pool.release(table)

    pool.share(table)

    assert take(pool, 1) != table
    assert pool.find(b"a") == table[0]
    assert pool.num_free == 0


def test_the_first_block_of_equal_content_keeps_the_name() -> None:
    pool = BlockPool(4)
    table = take(pool, 2)

    name(pool, table, "aa")
    pool.release([table[1]])

    assert pool.find(b"a") == table[0]
    pool.check_integrity([table[:1]])


def test_forgotten_blocks_are_not_found_again() -> None:
    pool = BlockPool(4)
    table = take(pool, 3)
    name(pool, table[:2], "ab")

    pool.forget(table)
    pool.release(table)

    assert [pool.find(key) for key in (b"a", b"b")] == [None, None]
    pool.check_integrity([])


def test_integrity_check_finds_a_leaked_block() -> None:
    pool = BlockPool(4)
    table = take(pool, 2)

    with pytest.raises(AssertionError, match="held"):
        pool.check_integrity([table[:1]])


def test_integrity_check_finds_a_block_freed_too_often() -> None:
    pool = BlockPool(4)
    table = take(pool, 2)
    pool.release(table[:1])

    with pytest.raises(AssertionError, match="held"):
        pool.check_integrity([table])


@pytest.mark.parametrize("seed", range(20))
def test_books_balance_after_any_operations(seed: int) -> None:
    """Tables of a tiny alphabet, so that names collide, blocks are shared and evictions come soon."""
    rand = random.Random(seed)
    pool = BlockPool(rand.randint(3, 12))
    tables: list[list[int]] = []

    for _ in range(500):
        action = rand.random()
        if action < 0.5 and pool.num_free:
            tables.append(take(pool, rand.randint(1, pool.num_free)))
            named = tables[-1][: rand.randint(0, len(tables[-1]))]
            name(pool, named, "".join(rand.choice("abcdef") for _ in named))
        elif action < 0.7:
            found = [pool.find(key.encode()) for key in "abcdef"]
            hits = [block for block in found if block is not None and rand.random() < 0.5]
            pool.share(hits)
            tables.append(hits)
        elif tables:
            table = tables.pop(rand.randrange(len(tables)))
            if rand.random() < 0.1:
                pool.forget(table)
            pool.release(table)
        pool.check_integrity(tables)

    for table in tables:
        pool.release(table)
    assert pool.num_free == pool.num_usable


def keys_of(tokens: list[int], *, seed: bytes = b"seed", salt: bytes = b"", block_size: int = 2) -> list[bytes]:
    hasher = PrefixHasher(seed, block_size)
    keys: list[bytes] = []
    for _ in range(len(tokens) // block_size):
        hasher.extend(keys, tokens, salt)
    return keys


def test_equal_prefixes_have_equal_keys_up_to_where_they_part() -> None:
    one, other = keys_of([1, 2, 3, 4, 5, 6]), keys_of([1, 2, 3, 4, 5, 7])

    assert one[:2] == other[:2]
    assert one[2] != other[2]


def test_a_key_covers_the_blocks_before_it() -> None:
    assert keys_of([1, 2, 3, 4])[1] != keys_of([9, 2, 3, 4])[1]


def test_seed_and_salt_keep_prefixes_apart() -> None:
    keys = [keys_of([1, 2]), keys_of([1, 2], seed=b"other"), keys_of([1, 2], salt=b"tenant")]

    assert len({key for chain in keys for key in chain}) == 3


def test_keys_are_128_bits_and_the_same_on_every_machine() -> None:
    assert keys_of([1, 70_000])[0].hex() == "89a3f729346e5616ac5ed16dfee57474"


def test_a_seed_longer_than_the_hash_takes_is_refused() -> None:
    with pytest.raises(ValueError, match="65 bytes"):
        PrefixHasher(bytes(65), 16)


def make_sequence(arrival: int, priority: int = 0) -> Sequence:
    return Sequence(Request("r", (1,), 1, priority=priority), [1], arrival=arrival)


def test_a_line_serves_by_priority_then_arrival_and_a_returning_sequence_regains_its_place() -> None:
    sequences = [make_sequence(arrival, priority) for arrival, priority in enumerate((0, 1, 0, 1, -1))]
    line = Line()
    for sequence in reversed(sequences):
        line.join(sequence)

    line.leave(sequences[3])
    without = [sequence.arrival for sequence in line]
    line.join(sequences[3])

    assert without == [1, 0, 2, 4]
    assert [sequence.arrival for sequence in line] == [1, 3, 0, 2, 4]
    assert [sequence.arrival for sequence in reversed(line)] == [4, 2, 0, 3, 1]


def test_a_sequence_that_is_not_in_the_line_cannot_leave_it() -> None:
    line = Line()
    line.join(make_sequence(0))

    with pytest.raises(AssertionError, match="not in the line"):
        line.leave(make_sequence(0))
