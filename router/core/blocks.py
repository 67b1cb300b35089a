"""KV memory as the router keeps its books: which blocks are held, by how many, and what the free ones still hold.

Every block but block 0 (padding rows write there) is in exactly one of three places:

    held      in the tables of one or more running sequences; `num_refs` says how many
    cached    in no table, but the prefix index still names its content: a hit revives it, else the one unused for
              longest is taken for something new
    blank     in no table and named by nobody; taken first

The pool knows nothing of sequences, tokens or time: keys are made by `prefix`, tables are lists of block ids.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Blocks 1 to `num_blocks - 1` with reference counts, and the index of those whose content can be reused."""

    def __init__(self, num_blocks: int) -> None:
        self._num_refs = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, 0, -1))  # a stack, lowest id on top
        # An ordered dict, because a plain one leaves holes at its front: taking the oldest would slow down with age.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._key_of: list[bytes | None] = [None] * num_blocks

    @property
    def num_usable(self) -> int:
        return len(self._num_refs) - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now; cached ones count."""
        return len(self._blank) + len(self._cached)

    def take(self) -> int:
        """A block of one's own. Its former content leaves the index. There must be a free one."""
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._unname(block)
        self._num_refs[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a holder to blocks that were found in the index."""
        for block in blocks:
            if self._num_refs[block] == 0:
                del self._cached[block]
            self._num_refs[block] += 1

    def release(self, table: list[int]) -> None:
        """Gives back a table. Its tail is freed first, so that the head of a prefix outlives what builds on it."""
        for block in reversed(table):
            self._num_refs[block] -= 1
            if self._num_refs[block] == 0:
                self._set_free(block)

    def is_free(self, block: int) -> bool:
        return self._num_refs[block] == 0

    def find(self, key: bytes) -> int | None:
        """The block whose content has this key. It stays as free as it was: `share` it to keep it."""
        return self._block_of.get(key)

    def register(self, block: int, key: bytes) -> None:
        """Names the content of a held block. The first block of equal content keeps the name."""
        assert self._num_refs[block] > 0, f"block {block} is registered but not held"
        assert self._key_of[block] is None, f"block {block} is registered twice"
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def forget(self, blocks: Iterable[int]) -> None:
        """Takes held blocks out of the index because their content is not to be trusted."""
        for block in blocks:
            assert self._num_refs[block] > 0, f"block {block} is forgotten but not held"
            if self._key_of[block] is not None:
                self._unname(block)

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        """Raises `AssertionError` unless `tables` are all the tables there are and every block is accounted for."""
        num_refs = [0] * len(self._num_refs)
        for table in tables:
            for block in table:
                num_refs[block] += 1
        assert num_refs == self._num_refs, f"blocks are held {num_refs} times, counted {self._num_refs}"
        assert num_refs[0] == 0, "block 0 is in a table"
        free = [block for block, count in enumerate(num_refs) if block and not count]
        assert sorted([*self._blank, *self._cached]) == free, (
            f"free are {self._blank}, {list(self._cached)}, not {free}"
        )
        named = {block: key for block, key in enumerate(self._key_of) if key is not None}
        assert {key: block for block, key in named.items()} == self._block_of, "the index and the names differ"
        assert all(block in named for block in self._cached), "a cached block has no name"
        assert all(block not in named for block in self._blank), "a blank block has a name"

    def _set_free(self, block: int) -> None:
        if self._key_of[block] is None:
            self._blank.append(block)
        else:
            self._cached[block] = None

    def _unname(self, block: int) -> None:
        key = self._key_of[block]
        assert key is not None, f"block {block} has no name"
        del self._block_of[key]
        self._key_of[block] = None
