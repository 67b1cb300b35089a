"""Names for what a full block of KV memory holds: a hash chain over the tokens from the start of the sequence.

KV at a position depends on every token up to it, so a block's key covers its own tokens and, through the key of the
block before, all earlier ones. Keys are 128 bits of BLAKE2b: long enough never to meet by chance. The chain starts from
a seed that only this server knows, so that nobody can prepare two prompts that collide, and from the request's salt,
so that tenants cannot probe each other's prompts through response times.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

KEY_BYTES: Final = 16
MAX_SEED_BYTES: Final = 64
"""What BLAKE2b takes as its own key."""


class PrefixHasher:
    """Makes the keys of consecutive blocks of `block_size` tokens."""

    def __init__(self, seed: bytes, block_size: int) -> None:
        if len(seed) > MAX_SEED_BYTES:
            raise ValueError(f"the prefix seed has {len(seed)} bytes, at most {MAX_SEED_BYTES} are used")
        self._seed = seed
        self._block_size = block_size
        self._pack = struct.Struct(f"<{block_size}I").pack  # the same bytes on every machine

    def extend(self, keys: list[bytes], tokens: Sequence[int], salt: bytes) -> None:
        """Appends the key of the next block to `keys`, the keys of the blocks before it."""
        start = len(keys) * self._block_size
        parent = keys[-1] if keys else self._root(salt)
        content = self._pack(*tokens[start : start + self._block_size])
        keys.append(blake2b(parent + content, digest_size=KEY_BYTES).digest())

    def _root(self, salt: bytes) -> bytes:
        return blake2b(salt, digest_size=KEY_BYTES, key=self._seed).digest()
