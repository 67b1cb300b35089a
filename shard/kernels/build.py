"""Compiles the native operations, ahead of serving:

    python -m shard.kernels.build            for this machine's processor
    python -m shard.kernels.build --all      for whatever machine an image will run on

The same sources make a library for each `Variant` of processors. There is one per state of the sources, the flags and
the compiler; its name is a digest of them, so a change of any of these makes another file and an old one is never
loaded. Serving only looks the file up: a server never waits for a compiler.

`torch.utils.cpp_extension` compiles, in a directory of its own for every attempt: its lock, which a killed build would
leave behind, then stops nobody, and what it would not notice, a changed header, is in the name already.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
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

_COMPILE_FLAGS: Final = (
    *("-std=c++17", "-O3", "-pthread", "-fno-strict-aliasing"),
    # Two variants may be loaded into one process: neither must find the other's functions.
    *("-fvisibility=hidden", "-fno-gnu-unique"),
    # GCC 12 warns of its own intrinsics.
    *("-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
_LINK_FLAGS: Final = ("-shared", "-pthread", "-Wl,--as-needed")  # torch's libraries are offered, and not needed

_UNUSED_S: Final = 7 * 86400.0
"""After this long without a use a library is removed, and what a killed build left. Not at once: other checkouts may
share the cache."""


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
    """The library of the current sources, if it has been built and is still whole."""
    path = _path(variant)
    try:
        if not _is_whole(path):
            return None
    except OSError:  # not there, or in a folder that may not be looked into
        return None
    _mark_used(path)
    return path


def _is_whole(path: Path) -> bool:
    """Linkers write the section headers last. To load a library that was cut may end the process."""
    with path.open("rb") as library:
        head = library.read(64)
        num_bytes = library.seek(0, os.SEEK_END)
    if len(head) < 64 or not head.startswith(b"\x7fELF"):
        return False
    [first], [size, count] = struct.unpack_from("<Q", head, 0x28), struct.unpack_from("<HH", head, 0x3A)
    return bool(first + size * count <= num_bytes)


def build(variant: Variant) -> Path:
    """Compiles the library unless it is there. Raises `BuildError` where that is not possible."""
    built = built_library(variant)
    if built is not None:
        return built
    if shutil.which(_compiler()) is None:
        raise BuildError(f"no C++ compiler: {_compiler()} is not on the path")
    path = _path(variant)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="kernels-unfinished-", dir=path.parent) as directory:
            _compile(variant, directory).rename(path)  # in one piece, whoever else builds at the same time
    except OSError as error:
        raise BuildError(str(error)) from error
    _remove_unused(path)
    return path


def _compile(variant: Variant, directory: str) -> Path:
    from torch.utils import cpp_extension  # a second, which nobody spends whose library is there

    sources = Path(directory, "sources")
    sources.symlink_to(SOURCES)  # ninja takes some letters of a path for its own
    try:
        with _ways_of_torch():
            library: str = cpp_extension.load(
                name=f"kernels-{variant.name}",
                sources=[str(sources / "library.cpp")],
                extra_cflags=_flags(variant),
                extra_ldflags=[*_LINK_FLAGS],
                build_directory=directory,
                is_python_module=False,
                is_standalone=True,  # or it would be loaded, and be it for another processor than this one
            )
    except (RuntimeError, UnicodeDecodeError, subprocess.CalledProcessError) as error:  # the last two of odd compilers
        raise BuildError(f"the build failed: {_cause(str(error))}") from error
    return Path(library)


@contextlib.contextmanager
def _ways_of_torch() -> Iterator[None]:
    """Our compiler, for torch has another default; ninja, which is installed beside the interpreter, where the shell
    need not look; and the folder of torch's libraries, which it hands to ninja and the shell as it is, whatever its
    name."""
    from torch.utils import cpp_extension

    folder, before = cpp_extension.TORCH_LIB_PATH, {name: os.environ.get(name) for name in ("CXX", "PATH")}
    os.environ["CXX"] = _compiler()
    os.environ["PATH"] = os.pathsep.join((sysconfig.get_path("scripts"), before["PATH"] or os.defpath))
    cpp_extension.TORCH_LIB_PATH = shlex.quote(folder).replace("$", "$$")
    try:
        yield
    finally:
        cpp_extension.TORCH_LIB_PATH = folder
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def _cause(output: str) -> str:
    """The line that matters in what torch, ninja and the compiler say."""
    lines = output.splitlines()
    return next((line for line in lines if "error: " in line), lines[0])


def _compiler() -> str:
    return os.environ.get("CXX") or "g++"  # c++ may be another one, which does not know all of the flags


def _flags(variant: Variant) -> list[str]:
    return [*_COMPILE_FLAGS, *(f"-m{feature.replace('_', '')}" for feature in variant.features)]


def _path(variant: Variant) -> Path:
    digest = hashlib.blake2b(" ".join([_compiler(), *_flags(variant), *_LINK_FLAGS]).encode(), digest_size=8)
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
    for path in newest.parent.glob("kernels-*"):
        with contextlib.suppress(OSError):  # whoever else builds removes them too; or they are somebody else's
            if now - path.stat().st_mtime > _UNUSED_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    """Prints the libraries' paths. Without them everything works, more slowly: that is no reason to fail a set-up, but
    nobody would notice an image that lacks them."""
    parser = argparse.ArgumentParser(
        prog="python -m shard.kernels.build", description="Compiles the native operations."
    )
    parser.add_argument("--all", action="store_true", help="for every x86-64 processor; fail if one cannot be built")
    if parser.parse_args().all:
        _build_all()
    else:
        _build_best()


def _build_all() -> None:
    if platform.machine() != "x86_64":
        print("native operations are left out, torch does their work: they are for x86-64", file=sys.stderr)
        return
    try:
        for variant in VARIANTS:
            print(build(variant))
    except BuildError as error:
        sys.exit(f"error: {error}")


def _build_best() -> None:
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
