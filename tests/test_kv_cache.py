from __future__ import annotations

import os
from pathlib import Path

import torch

from shard.kv_cache import KVCache, LayerShape, bytes_per_block

CPU = torch.device("cpu")
LAYERS = [LayerShape(kv_heads=2, key_dim=6, value_dim=4), LayerShape(kv_heads=1, key_dim=8, value_dim=8)]


def make_cache(dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(LAYERS, num_blocks=5, block_size=4, dtype=dtype, device=CPU)


def test_what_is_written_to_slots_is_read_by_blocks_in_the_order_asked() -> None:
    cache = make_cache()
    key, value = torch.randn(3, 2, 6), torch.randn(3, 2, 4)

    cache.write(0, torch.tensor([3 * 4 + 1, 1 * 4, 1 * 4 + 3]), key, value)
    keys, values = cache.read(0, torch.tensor([1, 3]), num_rows=1)

    assert keys.shape == (1, 8, 2, 6)
    assert values.shape == (1, 8, 2, 4)
    torch.testing.assert_close(keys[0, [4 + 1, 0, 3]], key)
    torch.testing.assert_close(values[0, [4 + 1, 0, 3]], value)
    assert not keys[0, [1, 2, 4, 6, 7]].any()


def test_rows_are_read_side_by_side() -> None:
    cache = make_cache()
    cache.write(1, torch.tensor([4, 8, 12]), torch.arange(3.0).view(3, 1, 1).expand(3, 1, 8), torch.zeros(3, 1, 8))

    keys, _ = cache.read(1, torch.tensor([3, 1, 2, 2]), num_rows=2)

    assert keys.shape == (2, 8, 1, 8)
    assert keys[:, [0, 4], 0, 0].tolist() == [[2.0, 0.0], [1.0, 1.0]]


def test_layers_do_not_share_memory() -> None:
    cache = KVCache([LAYERS[1]] * 2, num_blocks=2, block_size=4, dtype=torch.float32, device=CPU)

    cache.write(0, torch.tensor([5]), torch.ones(1, 1, 8), torch.ones(1, 1, 8))

    assert not cache.read(1, torch.tensor([1]), num_rows=1)[0].any()


def test_bytes_per_block_is_what_a_block_takes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        cache = make_cache(dtype)

        held = sum(tensor.nbytes for tensor in (*cache._keys, *cache._values))

        assert bytes_per_block(LAYERS, 4, dtype) * cache.num_blocks == held


def test_what_is_not_finite_is_stored_as_zero() -> None:
    cache = make_cache()
    bad = torch.tensor([float("nan"), float("inf"), float("-inf"), 7.0]).repeat(2, 1)[None]

    cache.write(0, torch.tensor([4]), torch.ones(1, 2, 6), bad)

    assert cache.read(0, torch.tensor([1]), num_rows=1)[1][0, 0].tolist() == [[0.0, 0.0, 0.0, 7.0]] * 2


def test_memory_is_taken_when_it_is_written_and_given_back_with_the_cache() -> None:
    quarter = 1 << 28
    resident_before, mapped_before = memory_bytes()

    cache = KVCache([LAYERS[1]], num_blocks=quarter // 64, block_size=4, dtype=torch.float32, device=CPU)
    cache.write(0, torch.tensor([8]), torch.ones(1, 1, 8), torch.ones(1, 1, 8))
    resident, mapped = memory_bytes()

    assert mapped - mapped_before >= 4 * quarter
    assert resident - resident_before < quarter // 8
    del cache
    assert memory_bytes()[1] < mapped - 3 * quarter


def memory_bytes() -> tuple[int, int]:
    """What this process holds and what it has mapped."""
    mapped, resident, *_ = Path("/proc/self/statm").read_text().split()
    page = os.sysconf("SC_PAGE_SIZE")
    return int(resident) * page, int(mapped) * page
