"""How much memory KV blocks take where a container may use less than all of it, and tables that hardly anybody uses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shard import control_groups, memory
from shard.known_tokens import KnownTokens
from shard.memory import default_kv_bytes
from tests.test_kv_cache import memory_bytes

GIB = 1 << 30


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 8 * GIB),
        ({"memory.max": "max\n"}, 8 * GIB),
        ({"memory.max": f"{2 * GIB}\n"}, 2 * GIB),
        ({"memory.max": f"{9 * GIB}\n"}, 8 * GIB),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 8 * GIB),
        ({"memory/memory.limit_in_bytes": f"{3 * GIB}\n"}, 3 * GIB),
        ({"own": "0::/a/b\n", "a/b/memory.max": f"{4 * GIB}\n"}, 4 * GIB),
        ({"own": "0::/a/b\n", "a/memory.max": f"{2 * GIB}\n", "a/b/memory.max": "max\n"}, 2 * GIB),
        ({"own": "0::/a\n", "b/memory.max": f"{2 * GIB}\n"}, 8 * GIB),
        ({"own": "4:memory:/a\n2:cpu:/b\n0::/\n", "memory/a/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        ({"own": "4:memory:/a\n2:cpu:/b\n0::/\n", "memory/b/memory.limit_in_bytes": f"{GIB}\n"}, 8 * GIB),
    ],
)
def test_ranks_share_a_quarter_of_what_all_control_groups_around_leave(
    files: dict[str, str], available: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_groups, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(control_groups, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    for name, text in {"meminfo": f"MemFree: 1 kB\nMemAvailable: {8 << 20} kB\n", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert default_kv_bytes(torch.device("cpu"), 2, 0.9) == available // 8


def test_kv_memory_is_bounded_however_much_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_groups, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text(f"MemAvailable: {1 << 30} kB\n")

    assert default_kv_bytes(torch.device("cpu"), 1, 0.9) == 4 * GIB


def test_tables_of_known_tokens_take_memory_for_the_seats_in_use_alone() -> None:
    resident_before, mapped_before = memory_bytes()
    tables = KnownTokens(max_seats=4096, vocab_size=65_536, device=torch.device("cpu"))

    for seat in (9, 4095, 9):
        tables.open(seat, counting=True)
        tables.learn(seat, [5, 65_535, 5], 1, counting=True)
    resident, mapped = memory_bytes()

    assert mapped - mapped_before >= GIB
    assert resident - resident_before < GIB // 32
    assert tables.known is not None
    assert tables.counts is not None
    assert tables.known[9].nonzero().flatten().tolist() == [5, 65_535]
    assert tables.counts[9, [5, 65_535]].tolist() == [1, 1], "none is of the life before"
