"""The native operations against torch, on the shapes where they change their ways: odd rows, padding, short blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shard.kernels import build
from shard.kernels.build import BuildError
from shard.kernels.native import StepRows, Threads, attention, library, linear, threads
from shard.kernels.packing import Arena, Kind, pack, pack_gated, padded, quantize

pytestmark = pytest.mark.skipif(library() is None, reason="the native operations are not built for this machine")

# Of the product of random matrices: rounding of sums, of bfloat16 inputs' products (exact), of int8 inputs and weights.
TOLERANCE = {Kind.FLOAT32: 1e-6, Kind.BFLOAT16: 1e-6, Kind.INT8: 1.5e-2}


@pytest.fixture(params=[1, 2, 5])
def team(request: pytest.FixtureRequest) -> Threads:
    return threads(request.param)


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize(("outputs", "inputs"), [(960, 576), (131, 72), (16, 64), (48, 1536)])
@pytest.mark.parametrize("num_rows", [1, 6, 7, 33])
def test_a_packed_matrix_multiplies_as_the_matrix(
    team: Threads, kind: Kind, outputs: int, inputs: int, num_rows: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if kind is Kind.BFLOAT16 else torch.float32
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator)
    x = torch.randn(num_rows, inputs, generator=generator).to(dtype)

    actual = linear(x, pack(weight, kind, Arena(), bias), team)

    assert actual.shape == (num_rows, outputs)
    assert distance(actual, x.float() @ weight.float().T + bias) < TOLERANCE[kind]


def test_int8_takes_bfloat16_rows_too() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(32, 128, generator=generator), torch.randn(3, 128, generator=generator).bfloat16()

    assert (
        distance(linear(x, pack(weight, Kind.INT8, Arena()), threads(1)), x.float() @ weight.T) < TOLERANCE[Kind.INT8]
    )


def test_one_large_int8_input_leaves_other_groups_their_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(32, 256, generator=generator), torch.randn(1, 256, generator=generator)
    weight[:, :64] = 0
    x[0, 3] = 1000

    assert distance(linear(x, pack(weight, Kind.INT8, Arena()), threads(1)), x @ weight.T) < TOLERANCE[Kind.INT8]


def test_quantized_weights_are_off_by_half_a_step_at_most() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))

    whole, scales = quantize(weight)

    assert whole.dtype == torch.int8
    assert whole.abs().amax(dim=1).tolist() == [127] * 8
    assert ((whole * scales[:, None] - weight).abs() <= scales[:, None] * 0.5001).all()


def test_gates_and_ups_take_turns_in_blocks_of_sixteen() -> None:
    gate, up = torch.full((20, 8), 1.0), torch.full((20, 8), 2.0)

    packed = pack_gated(gate, up, Kind.FLOAT32, Arena(), (torch.full((20,), 3.0), torch.full((20,), 4.0)))

    assert packed.lines.shape == (4, padded(8), 16, 1)
    assert packed.lines[:, 0, 0, 0].tolist() == [1.0, 2.0, 1.0, 2.0]
    assert packed.lines[2, 0, :, 0].tolist() == [1.0] * 4 + [0.0] * 12
    assert packed.bias is not None
    assert packed.bias.view(4, 16)[:, 0].tolist() == [3.0, 4.0, 3.0, 4.0]


class Memory:
    """One layer's blocks, and the sequences that are fed into it step by step."""

    def __init__(self, heads: tuple[int, int, int], lengths: Sequence[int], dtype: torch.dtype) -> None:
        query_heads, kv_heads, width = heads
        generator = torch.Generator().manual_seed(1)
        self.tensors = (
            torch.zeros(40, 16 * kv_heads * width, dtype=dtype),
            torch.zeros(40, 16 * kv_heads * width, dtype=dtype),
        )
        self.sequences = [
            tuple(torch.randn(n, count, width, generator=generator) for count in (query_heads, kv_heads, kv_heads))
            for n in lengths
        ]
        blocks = (torch.randperm(39, generator=generator) + 1).tolist()
        self.tables = torch.zeros(len(lengths), 8, dtype=torch.int64)
        for table, length in zip(self.tables, lengths, strict=True):
            for index in range(-(-length // 16)):
                table[index] = blocks.pop()
        self.fed = [0] * len(lengths)

    def step(self, counts: Sequence[int], window: int | None, team: Threads) -> list[Tensor]:
        """Feeds so many tokens of every sequence, none of some; what each row attended to."""
        rows = [row for row, count in enumerate(counts) if count]
        spans = [torch.arange(self.fed[row], self.fed[row] + counts[row]) for row in rows]
        for row in rows:
            self.fed[row] += counts[row]
        step = StepRows(
            positions=torch.cat(spans),
            slots=torch.cat(
                [self.tables[row][span // 16] * 16 + span % 16 for row, span in zip(rows, spans, strict=True)]
            ),
            starts=torch.tensor([0, *torch.tensor([len(span) for span in spans]).cumsum(0).tolist()]),
            contexts=torch.tensor([self.fed[row] for row in rows]),
            tables=self.tables[rows],
        )
        query, key, value = (
            torch.cat([self.sequences[row][part][span] for row, span in zip(rows, spans, strict=True)])
            for part in range(3)
        )
        out = attention(
            query, key, value, self.tensors, step, window=window, scaling=query.shape[2] ** -0.5, threads=team
        )
        return list(out.split([len(span) for span in spans]))


def attended(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """[T, heads, width] each: every token attends to those before it, all at once."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[2] ** -0.5
    places = torch.arange(len(key))
    seen = places[None] <= places[:, None]
    if window is not None:
        seen &= places[None] > places[:, None] - window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(dim=-1), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "heads", [(9, 3, 64), (4, 4, 80), (7, 1, 96), (8, 2, 128), (2, 1, 256), (6, 3, 16), (32, 1, 32)], ids=str
)
@pytest.mark.parametrize("window", [None, 7, 40])
def test_attention_equals_dense(
    dtype: torch.dtype, heads: tuple[int, int, int], window: int | None, team: Threads
) -> None:
    memory = Memory(heads, [37, 1, 90, 16], dtype)

    steps = [(5, 1, 30, 0), (1, 0, 31, 16), (30, 0, 1, 0), (1, 0, 28, 0)]
    parts = [memory.step(counts, window, team) for counts in steps]

    for row, sequence in enumerate(memory.sequences):
        rows = [[r for r, count in enumerate(counts) if count] for counts in steps]
        actual = torch.cat([part[kept.index(row)] for part, kept in zip(parts, rows, strict=True) if row in kept])
        assert distance(actual, attended(*sequence, window)) < (1e-6 if dtype == torch.float32 else 8e-3)


def test_what_is_not_finite_does_not_reach_the_next_owner_of_a_block() -> None:
    memory = Memory((2, 1, 16), [16], torch.bfloat16)
    for part in memory.sequences[0][1:]:
        part[3:] = math.nan
        part[4] = math.inf
    memory.step([16], None, threads(1))

    memory.fed[0] = 0
    for part in memory.sequences[0]:
        part.nan_to_num_(0.5, posinf=0.5)
    (actual,) = memory.step([2], None, threads(1))

    query, key, value = (part[:2] for part in memory.sequences[0])
    assert distance(actual, attended(query, key, value, None)) < 8e-3


def test_a_change_of_the_sources_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "cpu"
    sources.mkdir()
    (sources / "library.cpp").write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("SHARDSTREAM_CACHE", str(tmp_path / "cache"))

    before = build.built_library()
    first = build.build()
    (sources / "library.cpp").write_text('extern "C" int answer() { return 43; }')

    assert before is None
    assert first.is_file()
    assert build.built_library() is None
    assert build.build() != first


def test_what_does_not_compile_leaves_nothing_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "cpu"
    sources.mkdir()
    (sources / "library.cpp").write_text("this is not C++")
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("SHARDSTREAM_CACHE", str(tmp_path / "cache"))

    with pytest.raises(BuildError, match=r"failed: .*error") as raised:
        build.build()

    assert "\n" not in str(raised.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_a_compiler_the_build_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDSTREAM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")

    with pytest.raises(BuildError, match="no-such-compiler is not on the path"):
        build.build()


def test_pieces_of_an_arena_do_not_overlap_and_begin_with_a_cache_line() -> None:
    arena = Arena()

    pieces = [arena.zeros((3, 5), torch.bfloat16), arena.zeros((40 << 20,), torch.uint8)]
    pieces += [arena.zeros((40 << 20,), torch.uint8), arena.zeros((7,), torch.float32)]

    for value, piece in enumerate(pieces, start=1):
        assert piece.data_ptr() % 64 == 0
        piece.fill_(value)
    assert [(int(piece.min()), int(piece.max())) for piece in pieces] == [(1, 1), (2, 2), (3, 3), (4, 4)]
