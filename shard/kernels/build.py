"""Compiles the native operations, ahead of serving:

    python -m shard.kernels.build

There is one library per state of the sources, the flags and the compiler; its name is a digest of them, so a change of
any of these makes another file and an old one is never loaded. Serving only looks the file up: a server never waits
for a compiler. The machine must have what the code is compiled for (`FEATURES`), on which see `is_supported`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).with_name("cpu")

FEATURES: Final = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni")
"""What the processor must have, in the words of /proc/cpuinfo."""

_FLAGS: Final = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fno-strict-aliasing"),
    # GCC 12 warns of its own intrinsics.
    *("-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    *(f"-m{feature.replace('_', '')}" for feature in FEATURES),
)
_COMPILE_TIMEOUT_S: Final = 300.0


class BuildError(Exception):
    """The library cannot be built here; the message is one line."""


def is_supported() -> bool:
    """Whether this processor can run the library."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return set(FEATURES) <= set(flags)


def built_library() -> Path | None:
    """The library of the current sources, if it has been built."""
    path = _path()
    return path if path.is_file() else None


def build() -> Path:
    """Compiles the library unless it is there. Raises `BuildError` where that is not possible."""
    path = _path()
    if path.is_file():
        return path
    if not is_supported():
        raise BuildError(f"this processor lacks some of {', '.join(FEATURES)}")
    compiler = shutil.which(_compiler())
    if compiler is None:
        raise BuildError(f"no C++ compiler: {_compiler()} is not on the path")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        unfinished = Path(directory) / path.name
        _compile([compiler, *_FLAGS, str(SOURCES / "library.cpp"), "-o", str(unfinished)])
        unfinished.rename(path)  # in one piece, whoever else builds at the same time
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


def _path() -> Path:
    digest = hashlib.blake2b(" ".join(_FLAGS).encode(), digest_size=8)
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    directory = Path(os.environ.get("SHARDSTREAM_CACHE") or "~/.cache/shardstream").expanduser()
    return directory / f"kernels-{digest.hexdigest()}.so"


def main() -> None:
    """Prints the library's path. Without it everything works, more slowly: that is no reason to fail a set-up."""
    try:
        print(build())
    except BuildError as error:
        print(f"native operations are left out, torch does their work: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
