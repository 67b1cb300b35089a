"""The native operations against torch, on the shapes where they change their ways: odd rows, padding, short blocks."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

from shard.kernels import build, native
from shard.kernels.build import AVX2, AVX512, BuildError, Variant, best_variant
from shard.kernels.native import (
    Library,
    Options,
    StepRows,
    Threads,
    attention,
    block_maxima,
    library,
    linear,
    log_sums,
    threads,
)
from shard.kernels.packing import Arena, Kind, pack, pack_gated, padded, quantize, quantize_in_groups

pytestmark = pytest.mark.skipif(library() is None, reason="the native operations are not built for this machine")

# Of the product of random matrices: rounding of sums, of bfloat16 inputs' products (exact), of what is quantised.
TOLERANCE = {Kind.FLOAT32: 1e-6, Kind.BFLOAT16: 1e-6, Kind.INT8: 1.5e-2, Kind.INT4: 0.12}


@cache
def native_library(variant: Variant) -> Library:
    return Library(build.build(variant))


@pytest.fixture(params=[(AVX512, 1), (AVX512, 2), (AVX512, 5), (AVX2, 2)], ids=lambda p: f"{p[0].name}-{p[1]}")
def team(request: pytest.FixtureRequest) -> Threads:
    variant, count = request.param
    if variant is AVX512 and best_variant() is not AVX512:
        pytest.skip("this processor cannot run it")
    return Threads(native_library(variant), count)


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


needs_bytes = pytest.mark.skipif(best_variant() is not AVX512, reason="a matter of AVX-512")


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize(("outputs", "inputs"), [(960, 576), (131, 72), (16, 64), (48, 1536)])
@pytest.mark.parametrize("num_rows", [1, 6, 7, 33])
def test_a_packed_matrix_multiplies_as_the_matrix(
    team: Threads, kind: Kind, outputs: int, inputs: int, num_rows: int
) -> None:
    if kind not in team.native.kinds:
        pytest.skip("a matter of AVX-512")
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if kind is Kind.BFLOAT16 else torch.float32
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator)
    x = torch.randn(num_rows, inputs, generator=generator).to(dtype)

    actual = linear(x, pack(weight, kind, Arena(), bias), team)

    assert actual.shape == (num_rows, outputs)
    assert distance(actual, x.float() @ weight.float().T + bias) < TOLERANCE[kind]


@pytest.mark.parametrize("kind", Kind)
def test_more_rows_than_a_cache_holds_are_multiplied_chunk_by_chunk(team: Threads, kind: Kind) -> None:
    if kind not in team.native.kinds:
        pytest.skip("a matter of AVX-512")
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if kind is Kind.BFLOAT16 else torch.float32
    weight, x = (
        torch.randn(80, 2048, generator=generator).to(dtype),
        torch.randn(701, 2048, generator=generator).to(dtype),
    )

    actual = linear(x, pack(weight, kind, Arena()), team)

    assert distance(actual, x.float() @ weight.float().T) < TOLERANCE[kind]


@pytest.mark.parametrize("kind", list(Kind))
def test_a_rows_product_does_not_depend_on_how_many_rows_there_are(team: Threads, kind: Kind) -> None:
    """Few rows take columns one by one, more take several at once."""
    if kind not in team.native.kinds:
        pytest.skip("a matter of AVX-512")
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(112, 256, generator=generator), torch.randn(21, 256, generator=generator)
    packed = pack(weight, kind, Arena())

    together = linear(x, packed, team)

    for num_rows in (1, 2, 7, 8, 9, 12, 13, 20):
        assert torch.equal(linear(x[:num_rows], packed, team), together[:num_rows])


def test_a_long_float32_sum_is_about_as_exact_as_torchs() -> None:
    """Numbers of one sign, whose sum outgrows them; added one by one they lose ten times as much."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.rand(64, 4096, generator=generator), torch.rand(8, 4096, generator=generator)
    exact = x.double() @ weight.double().T

    actual = linear(x, pack(weight, Kind.FLOAT32, Arena()), threads(1))

    assert distance(actual, exact) <= 2 * distance(x @ weight.T, exact)


@needs_bytes
def test_int8_takes_bfloat16_rows_too() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(32, 128, generator=generator), torch.randn(3, 128, generator=generator).bfloat16()

    assert (
        distance(linear(x, pack(weight, Kind.INT8, Arena()), threads(1)), x.float() @ weight.T) < TOLERANCE[Kind.INT8]
    )


@needs_bytes
@pytest.mark.parametrize("kind", [Kind.INT8, Kind.INT4])
def test_one_large_input_leaves_other_groups_their_precision(kind: Kind) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(32, 256, generator=generator), torch.randn(1, 256, generator=generator)
    weight[:, :64] = 0
    x[0, 3] = 1000

    assert distance(linear(x, pack(weight, kind, Arena()), threads(1)), x @ weight.T) < TOLERANCE[kind]


@needs_bytes
@pytest.mark.parametrize("num_rows", [1, 5, 17])
def test_int4_multiplies_exactly_what_its_numbers_stand_for(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 160, generator=generator), torch.randint(-127, 128, (num_rows, 160)).float()
    x[:, ::32] = 127  # whole inputs whose scale is one
    numbers, steps, leasts, scales = quantize_in_groups(weight)
    meant = steps.float()[..., None] * numbers.view(48, 5, 32) + leasts.float()[..., None]

    actual = linear(x, pack(weight, Kind.INT4, Arena()), threads(2))

    assert distance(actual, x @ (meant.flatten(1) * scales[:, None]).T) < 1e-6


def test_four_bits_give_back_what_was_made_of_sixteen_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    steps, leasts = torch.rand(8, 2, 1, generator=generator) + 0.1, torch.randn(8, 2, 1, generator=generator)
    weight = leasts + steps * torch.randint(0, 16, (8, 2, 32), generator=generator)
    weight[..., 0], weight[..., 1] = leasts[..., 0], (leasts + 15 * steps)[..., 0]

    numbers, packed_steps, packed_leasts, scales = quantize_in_groups(weight.flatten(1))

    meant = packed_leasts.float()[..., None] + packed_steps.float()[..., None] * numbers.view(8, 2, 32)
    assert distance(meant * scales[:, None, None], weight) < 1e-3


@needs_bytes
def test_a_group_of_equal_weights_survives_four_bits() -> None:
    weight = torch.cat([torch.full((16, 32), 0.25), torch.zeros(16, 32)], dim=1)

    actual = linear(torch.full((1, 64), 2.0), pack(weight, Kind.INT4, Arena()), threads(1))

    assert actual.flatten().tolist() == pytest.approx([16.0] * 16, rel=1e-3)


def test_more_threads_than_processors_lose_and_repeat_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(640, 64, generator=generator), torch.randn(40, 64, generator=generator)
    packed, crowd = pack(weight, Kind.FLOAT32, Arena()), threads(4 * (os.cpu_count() or 1))

    first = linear(x, packed, crowd)

    assert distance(first, x @ weight.T) < TOLERANCE[Kind.FLOAT32]
    assert all(torch.equal(linear(x, packed, crowd), first) for _ in range(150))


@pytest.mark.parametrize("shape", [(1, 49152), (3, 50257), (33, 8193), (2, 70), (1, 5)])
def test_logits_are_looked_through_as_by_torch(team: Threads, shape: tuple[int, int]) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10
    rows[0, 1] = -math.inf
    blocks = torch.nn.functional.pad(rows, (0, -shape[1] % 64), value=-math.inf).view(shape[0], -1, 64)

    peaks, sums = log_sums(rows, team)

    assert torch.equal(block_maxima(rows, team), blocks.amax(-1))
    assert torch.equal(peaks, rows.amax(-1))
    torch.testing.assert_close((peaks + sums).double(), rows.double().logsumexp(-1), atol=4e-6, rtol=0)


def test_logits_that_are_not_finite_show_in_their_block(team: Threads) -> None:
    rows = torch.zeros(3, 200)
    rows[0, 70], rows[0, 71] = math.nan, 5.0
    rows[1, 70] = math.inf
    rows[2] = -math.inf

    maxima = block_maxima(rows, team)

    assert maxima[0].isnan().tolist() == [False, True, False, False]
    assert maxima[1].tolist() == [0.0, math.inf, 0.0, 0.0]
    assert maxima[2].tolist() == [-math.inf] * 4


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
        num_blocks = 1 + sum(-(-length // 16) for length in lengths)
        self.tensors = (
            torch.zeros(num_blocks, 16 * kv_heads * width, dtype=dtype),
            torch.zeros(num_blocks, 16 * kv_heads * width, dtype=dtype),
        )
        self.sequences = [
            tuple(torch.randn(n, count, width, generator=generator) for count in (query_heads, kv_heads, kv_heads))
            for n in lengths
        ]
        blocks = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
        self.tables = torch.zeros(len(lengths), -(-max(lengths) // 16), dtype=torch.int64)
        for table, length in zip(self.tables, lengths, strict=True):
            for index in range(-(-length // 16)):
                table[index] = blocks.pop()
        self.fed = [0] * len(lengths)

    def step(self, counts: Sequence[int], options: Options, team: Threads) -> list[Tensor]:
        """Feeds so many tokens of every sequence, none of some; what each row attended to."""
        rows = [row for row, count in enumerate(counts) if count]
        spans = [torch.arange(self.fed[row], self.fed[row] + counts[row]) for row in rows]
        for row in rows:
            self.fed[row] += counts[row]
        step = StepRows(
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
        dtype = self.tensors[0].dtype
        out = attention(query.to(dtype), key.to(dtype), value.to(dtype), self.tensors, step, options, team).float()
        return list(out.split([len(span) for span in spans]))


def attended(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
    """[T, heads, width] each: every token attends to those before it, all at once."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    places = torch.arange(len(key))
    seen = places[None] <= places[:, None]
    if options.window is not None:
        seen &= places[None] > places[:, None] - options.window
    scores = scores.masked_fill(~seen, -math.inf)
    sinks = torch.full((len(scores),), -math.inf) if options.sinks is None else options.sinks
    weights = torch.cat([scores, sinks[:, None, None].expand(-1, len(query), 1)], dim=-1).softmax(dim=-1)[..., :-1]
    return torch.einsum("hqk,khd->qhd", weights, value)


def options_called(name: str, heads: tuple[int, int, int]) -> Options:
    """`name` is a window, or one of the other ways to attend."""
    scaling, sinks = heads[2] ** -0.5, torch.linspace(-3, 3, heads[0])
    if name == "softcap":
        return Options(2 * scaling, softcap=1.5)
    if name == "sinks":
        return Options(scaling, sinks=sinks)
    if name == "all":
        return Options(2 * scaling, window=40, softcap=1.5, sinks=sinks)
    return Options(scaling, window=int(name) or None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "heads",
    [(9, 3, 64), (4, 4, 80), (7, 1, 96), (8, 2, 128), (2, 1, 256), (6, 3, 16), (32, 1, 32), (520, 1, 16)],
    ids=str,
)
@pytest.mark.parametrize("name", ["0", "7", "40", "softcap", "sinks", "all"])
def test_attention_equals_dense(dtype: torch.dtype, heads: tuple[int, int, int], name: str, team: Threads) -> None:
    memory, options = Memory(heads, [37, 1, 90, 16], dtype), options_called(name, heads)

    steps = [(5, 1, 30, 0), (1, 0, 31, 16), (30, 0, 1, 0), (1, 0, 28, 0)]
    parts = [memory.step(counts, options, team) for counts in steps]

    for row, sequence in enumerate(memory.sequences):
        rows = [[r for r, count in enumerate(counts) if count] for counts in steps]
        actual = torch.cat([part[kept.index(row)] for part, kept in zip(parts, rows, strict=True) if row in kept])
        assert distance(actual, attended(*sequence, options)) < (1e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("name", ["0", "300", "softcap", "sinks", "all"])
def test_long_contexts_are_attended_to_in_segments(name: str, team: Threads) -> None:
    memory, options = Memory((6, 2, 64), [700, 280], torch.float32), options_called(name, (6, 2, 64))

    steps = [(600, 255), (98, 0), (1, 25), (1, 0)]
    parts = [memory.step(counts, options, team) for counts in steps]

    for row, sequence in enumerate(memory.sequences):
        actual = torch.cat([part[row] for part, counts in zip(parts, steps, strict=True) if counts[row]])
        assert distance(actual, attended(*sequence, options)) < 1e-6


@pytest.mark.parametrize("sink", [-1e4, 1e4])
def test_a_sink_far_from_all_scores_takes_nothing_or_all(sink: float, team: Threads) -> None:
    memory = Memory((2, 1, 16), [600], torch.float32)

    (actual,) = memory.step([600], Options(0.25, sinks=torch.full((2,), sink)), team)

    expected = attended(*memory.sequences[0], Options(0.25)) * (sink < 0)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_scores_beyond_any_soft_cap_are_at_it() -> None:
    memory = Memory((1, 1, 16), [2], torch.float32)
    query, key, _ = memory.sequences[0]
    query[:], key[0], key[1] = 1, 1e6, -1e6

    _, actual = memory.step([2], Options(1, softcap=2.0), threads(1))[0]

    assert distance(actual, attended(*memory.sequences[0], Options(1, softcap=2.0))[1]) < 1e-6


@pytest.mark.parametrize("name", ["0", "softcap", "sinks"])
def test_a_row_attends_the_same_whoever_is_beside_it_and_however_it_was_fed(name: str, team: Threads) -> None:
    alone, among, at_once = (Memory((6, 2, 64), [600, 300, 20], torch.bfloat16) for _ in range(3))
    options = options_called(name, (6, 2, 64))
    for memory in (alone, among):
        memory.step((599, 299, 19), options, team)

    (by_itself,) = alone.step((1, 0, 0), options, team)
    in_company = among.step((1, 1, 1), options, Threads(team.native, 1))[0]
    as_prompt = at_once.step((600, 0, 0), options, team)[0][-1:]

    assert torch.equal(by_itself, in_company)
    assert torch.equal(by_itself, as_prompt)


def test_what_is_not_finite_does_not_reach_the_next_owner_of_a_block() -> None:
    memory = Memory((2, 1, 16), [16], torch.bfloat16)
    for part in memory.sequences[0][1:]:
        part[3:] = math.nan
        part[4] = math.inf
    memory.step([16], Options(0.25), threads(1))

    memory.fed[0] = 0
    for part in memory.sequences[0]:
        part.nan_to_num_(0.5, posinf=0.5)
    (actual,) = memory.step([2], Options(0.25), threads(1))

    query, key, value = (part[:2] for part in memory.sequences[0])
    assert distance(actual, attended(query, key, value, Options(0.25))) < 8e-3


def one_function(answer: int) -> str:
    return f'extern "C" __attribute__((visibility("default"))) int answer() {{ return {answer}; }}'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of one function, and an empty cache at `tmp_path / "cache"`."""
    if shutil.which(build._compiler()) is None:
        pytest.skip("needs a compiler, and the operations were built elsewhere")
    folder = tmp_path / "cpu"
    folder.mkdir()
    (folder / "library.cpp").write_text(one_function(42))
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setenv("SHARDSTREAM_CACHE", str(tmp_path / "cache"))
    return folder


def test_a_change_of_the_sources_is_another_library(sources: Path) -> None:
    before = build.built_library(AVX2)
    first = build.build(AVX2)
    (sources / "library.cpp").write_text(one_function(43))

    assert before is None
    assert first.is_file()
    assert build.built_library(AVX2) is None
    second = build.build(AVX2)
    assert second != first
    (sources / "included.h").write_text("")
    assert build.built_library(AVX2) is None
    assert [ctypes.CDLL(str(path)).answer() for path in (first, second)] == [42, 43]


def test_what_is_built_is_not_loaded_because_another_processor_may_be_meant(sources: Path, tmp_path: Path) -> None:
    built = build.build(AVX512)

    assert built.is_file()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_libraries_that_nobody_used_for_long_are_removed_at_a_build(sources: Path, tmp_path: Path) -> None:
    used, unused, recent = build.build(AVX2), tmp_path / "cache/kernels-0.so", tmp_path / "cache/kernels-1.so"
    unused.touch()
    recent.touch()
    killed = tmp_path / "cache/kernels-unfinished-0"  # what a build leaves that is killed
    killed.mkdir()
    (killed / "lock").touch()
    for path in (used, unused, killed):
        os.utime(path, (0, 0))
    build.built_library(AVX2)
    (sources / "library.cpp").write_text(one_function(43))

    newest = build.build(AVX2)

    assert set((tmp_path / "cache").iterdir()) == {used, recent, newest}
    assert time.time() - used.stat().st_mtime < 3600


def test_a_library_of_somebody_else_that_cannot_be_removed_stops_no_build(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(path)

    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/kernels-0.so").touch()
    os.utime(tmp_path / "cache/kernels-0.so", (0, 0))
    monkeypatch.setattr(Path, "unlink", refuse)

    assert build.build(AVX2).is_file()


def test_what_does_not_compile_leaves_nothing_and_one_line(sources: Path, tmp_path: Path) -> None:
    (sources / "library.cpp").write_text("this is not C++")

    with pytest.raises(BuildError, match=r"failed: .*error") as raised:
        build.build(AVX2)

    assert "\n" not in str(raised.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_a_compiler_the_build_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDSTREAM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")

    with pytest.raises(BuildError, match="no-such-compiler is not on the path"):
        build.build(AVX2)


@pytest.fixture
def lonely_compiler(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the path leads to is a compiler that makes an empty file of anything."""
    compiler = tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text('#!/bin/sh\necho 12.2.0\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(compiler.parent))
    monkeypatch.setenv("CXX", "g++")


def test_ninja_is_found_beside_the_interpreter(lonely_compiler: None, tmp_path: Path) -> None:
    assert build.build(AVX2).read_bytes() == b""
    assert os.environ["PATH"] == str(tmp_path / "bin")


def test_without_ninja_the_build_says_so(lonely_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/nowhere")

    with pytest.raises(BuildError, match="Ninja is required"):
        build.build(AVX2)


@pytest.mark.parametrize("name", ["file/cache", "n" * 300], ids=["not a folder", "cannot even be looked up"])
def test_where_the_cache_cannot_be_written_the_build_says_so(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHARDSTREAM_CACHE", str(tmp_path / name))

    assert build.built_library(AVX2) is None
    with pytest.raises(BuildError, match=name):
        build.build(AVX2)


@pytest.mark.parametrize(
    ("name", "script"),
    [("wrapper", "exit 1"), ("g++", r"printf 'f\344llt aus\n'; exit 1")],
    ids=["of no known kind", "speaking Latin-1"],
)
def test_whatever_a_compiler_does_a_build_that_fails_says_so(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str
) -> None:
    compiler = tmp_path / name
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))

    with pytest.raises(BuildError, match="failed"):
        build.build(AVX2)


def test_a_library_is_built_of_sources_below_any_folder(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "my $pro:jects" / "cpu"
    odd.parent.mkdir()
    sources.rename(odd)
    monkeypatch.setattr(build, "SOURCES", odd)

    assert ctypes.CDLL(str(build.build(AVX2))).answer() == 42


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_library_of_which_the_end_is_lost_is_built_anew(sources: Path, share: float) -> None:
    path = build.build(AVX2)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])

    assert build.built_library(AVX2) is None
    assert ctypes.CDLL(str(build.build(AVX2))).answer() == 42


def test_a_library_is_built_with_a_torch_below_any_folder(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my $projects"
    folder.symlink_to(cpp_extension.TORCH_LIB_PATH)
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", str(folder))

    assert ctypes.CDLL(str(build.build(AVX2))).answer() == 42
    assert str(folder) == cpp_extension.TORCH_LIB_PATH


def test_an_empty_name_of_a_compiler_is_none(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "")

    assert build.build(AVX2).is_file()
    assert os.environ["CXX"] == ""


def test_a_library_that_cannot_be_loaded_here_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kernels.so").write_text("of another system")
    monkeypatch.setattr(native, "built_library", lambda variant: tmp_path / "kernels.so")

    with caplog.at_level(logging.WARNING):
        assert library.__wrapped__() is None

    (record,) = caplog.records
    assert "native operations are not used" in record.message
    assert "kernels.so" in record.message


def test_an_image_gets_the_library_of_every_class_of_processors(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["build", "--all"])

    build.main()

    assert list(map(Path, capsys.readouterr().out.split())) == [build.built_library(AVX512), build.built_library(AVX2)]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_an_image_without_the_libraries_is_none(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sources / "library.cpp").write_text("this is not C++")
    monkeypatch.setattr(sys, "argv", ["build", "--all"])

    with pytest.raises(SystemExit, match=r"^error: .*failed"):
        build.main()


@pytest.mark.parametrize(
    ("flags", "variant"),
    [
        (" ".join(AVX512.features), AVX512),
        ("avx2 fma avx512f avx512bw avx512dq avx512vl", AVX2),
        ("sse4_2 avx", None),
    ],
)
def test_the_best_library_a_processor_can_run_is_taken(
    flags: str, variant: Variant | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processors = tmp_path / "cpuinfo"
    processors.write_text(f"processor : 0\nflags\t\t: fpu {flags} sse\n\nprocessor : 1\n")
    monkeypatch.setattr(build, "PROCESSORS", processors)

    assert best_variant() is variant


def test_pieces_of_an_arena_do_not_overlap_and_begin_with_a_cache_line() -> None:
    arena = Arena()

    pieces = [arena.zeros((3, 5), torch.bfloat16), arena.zeros((40 << 20,), torch.uint8)]
    pieces += [arena.zeros((40 << 20,), torch.uint8), arena.zeros((7,), torch.float32)]

    for value, piece in enumerate(pieces, start=1):
        assert piece.data_ptr() % 64 == 0
        piece.fill_(value)
    assert [(int(piece.min()), int(piece.max())) for piece in pieces] == [(1, 1), (2, 2), (3, 3), (4, 4)]
