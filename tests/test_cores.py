"""How many threads compute where a container may use less than all cores."""

from __future__ import annotations

from pathlib import Path

import pytest

from shard import control_groups
from shard.cores import num_allowed_cores


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu.max": "390000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "9900000 100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "50000\n"}, 2),
        ({"own": "0::/\n", "cpu.max": "400000 100000\n"}, 4),
        ({"own": "0::/a/b\n", "a/b/cpu.max": "400000 100000\n"}, 4),
        (
            {
                "own": "0::/a/b\n",
                "cpu.max": "max 100000\n",
                "a/cpu.max": "300000 100000\n",
                "a/b/cpu.max": "max 100000",
            },
            3,
        ),
        ({"own": "0::/a/b\n", "cpu.max": "200000 100000\n", "a/cpu.max": "300000 100000\n"}, 2),
        ({"own": "0::/a\n", "b/cpu.max": "400000 100000\n"}, 64),
        ({"own": "0::/../a\n", "cpu.max": "400000 100000\n"}, 4),
        (
            {
                "own": "5:cpuset:/x\n3:cpu,cpuacct:/a:b\n0::/\n",
                "cpu/a:b/cpu.cfs_quota_us": "300000\n",
                "cpu/a:b/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
    ],
)
def test_the_limits_of_all_control_groups_around_are_kept(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_groups, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(control_groups, "OWN_GROUPS", tmp_path / "own")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert num_allowed_cores(64) == expected
