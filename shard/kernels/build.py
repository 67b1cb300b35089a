"""Compiles the native operations, ahead of serving:

    python -m shard.kernels.build

The same sources make a library for each `Variant` of processors. There is one per state of the sources, the flags and
the compiler; its name is a digest of them, so a change of any of these makes another file and an old one is never
loaded. Serving only looks the file up: a server never waits for a compiler.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).with_name("cpu")

PROCESSORS: Final = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Variant:
    """Processors that run one library; `features` are what they have, in the words of /proc/cpuinfo."""

    name: str
    features: tuple[str, ...]


AVX512: Final = Variant(
    "avx512", ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni")
)
AVX2: Final = Variant("avx2", ("avx2", "fma"))

VARIANTS: Final = (AVX512, AVX2)
"""The best first."""

_FLAGS: Final = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fno-strict-aliasing"),
    # Two variants may be loaded into one process: neither must find the other's functions.
    *("-fvisibility=hidden", "-fno-gnu-unique"),
    # GCC 12 warns of its own intrinsics.
    *("-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
_COMPILE_TIMEOUT_S: Final = 300.0

_UNUSED_S: Final = 7 * 86400.0
"""After this long without a use a library is removed. Other checkouts may share the cache, so not at once."""


class BuildError(Exception):
    """The library cannot be built here; the message is one line."""


def best_variant() -> Variant | None:
    """The first variant that this processor runs."""
    try:
        lines = PROCESSORS.read_text().splitlines()
    except OSError:
        return None
    flags = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set[str]())
    return next((variant for variant in VARIANTS if flags.issuperset(variant.features)), None)


def built_library(variant: Variant) -> Path | None:
    """The library of the current sources, if it has been built."""
    path = _path(variant)
    if not path.is_file():
        return None
    _mark_used(path)
    return path


def build(variant: Variant) -> Path:
    """Compiles the library unless it is there. Raises `BuildError` where that is not possible."""
    built = built_library(variant)
    if built is not None:
        return built
    compiler = shutil.which(_compiler())
    if compiler is None:
        raise BuildError(f"no C++ compiler: {_compiler()} is not on the path")
    path = _path(variant)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        unfinished = Path(directory) / path.name
        _compile([compiler, *_flags(variant), str(SOURCES / "library.cpp"), "-o", str(unfinished)])
        unfinished.rename(path)  # in one piece, whoever else builds at the same time
    _remove_unused(path)
    return path


def _compile(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        cause = next((line for line in error.stderr.splitlines() if "error" in line), f"exit code {error.returncode}")
        raise BuildError(f"{command[0]} failed: {cause}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took more than {_COMPILE_TIMEOUT_S:.0f} s") from error


def _compiler() -> str:
    return os.environ.get("CXX") or "g++"


def _flags(variant: Variant) -> list[str]:
    return [*_FLAGS, *(f"-m{feature.replace('_', '')}" for feature in variant.features)]


def _path(variant: Variant) -> Path:
    digest = hashlib.blake2b(" ".join([_compiler(), *_flags(variant)]).encode(), digest_size=8)
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    directory = Path(os.environ.get("SHARDSTREAM_CACHE") or "~/.cache/shardstream").expanduser()
    return directory / f"kernels-{variant.name}-{digest.hexdigest()}.so"


def _mark_used(path: Path) -> None:
    try:
        os.utime(path)
    except OSError:  # somebody else's cache: whoever may write there keeps it in order
        return


def _remove_unused(newest: Path) -> None:
    now = newest.stat().st_mtime
    for library in newest.parent.glob("kernels-*.so"):
        if now - library.stat().st_mtime > _UNUSED_S:
            library.unlink(missing_ok=True)


def main() -> None:
    """Prints the library's path. Without it everything works, more slowly: that is no reason to fail a set-up."""
    variant = best_variant()
    if variant is None:
        print("native operations are left out, torch does their work: this processor lacks AVX2", file=sys.stderr)
        return
    try:
        print(build(variant))
    except BuildError as error:
        print(f"native operations are left out, torch does their work: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
