"""From the name of a model to a directory that holds it: `config.json`, safetensors, tokenizer files.

    an existing directory        itself
    smollm2-135m-instruct        the default model, converted once into our own cache (see `shard.smollm2`)
    anything like a hub id       downloaded by huggingface_hub into its own cache; HF_TOKEN and HF_HUB_OFFLINE count

Weights in pickle's formats are never fetched and never accepted. This module knows nothing of what is inside the
files, and imports neither torch nor transformers, so that whoever only needs the directory gets it at once:

    python -m shard.checkpoint MODEL_ID [--revision REVISION]     prints the directory

With `--report` it prints one JSON line, {"directory"} or {"failed"}, for a launcher; stderr is for progress bars.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shard.config import DEFAULT_MODEL_ID
from shard.errors import LoadError
from shard.parent import end_with

# A name that is wrong has to be reported while its author still looks at the terminal.
_HUB_TIMEOUT_S: Final = 5.0

_HUB_ID: Final = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")

_WANTED_FILES: Final = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
# Second copies of the same weights, in other formats' layouts.
_UNWANTED_FILES: Final = ("*/*", "consolidated*.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk. `revision` is the commit of the hub it was taken from, empty when it comes from elsewhere."""

    directory: Path
    revision: str


def resolve(model_id: str, *, revision: str | None = None, cache: Path | None = None) -> Checkpoint:
    """Finds the model, fetching or converting it if need be.

    `cache` is where converted models are kept, by default $SHARDSTREAM_CACHE or ~/.cache/shardstream.
    Raises `LoadError`: no such model, no safetensors, no way to the hub. A name that is wrong fails within seconds.
    """
    path = Path(model_id).expanduser()
    if path.is_dir():
        return _checked(path.resolve())
    if model_id == DEFAULT_MODEL_ID:
        return _checked(_converted(cache or _default_cache()))
    if path.exists() or not _HUB_ID.fullmatch(model_id):
        raise LoadError(f"model {model_id!r}: no such directory")
    return _checked(_downloaded(model_id, revision))


def resolve_adapter(adapter_id: str, *, revision: str | None = None) -> Path:
    """The folder of a LoRA adapter, found as a model is. Raises `LoadError`."""
    path = Path(adapter_id).expanduser()
    if not path.is_dir():
        if path.exists() or not _HUB_ID.fullmatch(adapter_id):
            raise LoadError(f"adapter {adapter_id!r}: no such directory")
        path = _downloaded(adapter_id, revision)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (path / name).is_file():
            raise LoadError(f"{path} is not a LoRA adapter with safetensors weights: it has no {name}")
    return path.resolve()


def _checked(directory: Path) -> Checkpoint:
    if not (directory / "config.json").is_file():
        raise LoadError(f"{directory} is not a model: it has no config.json")
    if not any(directory.glob("*.safetensors")):
        raise LoadError(f"{directory} has no safetensors weights; other formats can run code when read and are refused")
    from_hub = directory.parent.name == "snapshots" and _COMMIT.fullmatch(directory.name)
    return Checkpoint(directory, revision=directory.name if from_hub else "")


def _default_cache() -> Path:
    return Path(os.environ.get("SHARDSTREAM_CACHE") or "~/.cache/shardstream").expanduser()


def _converted(cache: Path) -> Path:
    """The default model's directory, which appears in one piece: it is filled under another name, then renamed."""
    directory = cache / DEFAULT_MODEL_ID
    if directory.is_dir():
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{DEFAULT_MODEL_ID}.lock"):
        if not directory.is_dir():  # it may have been made while we waited
            _convert_into(directory, cache / f"{DEFAULT_MODEL_ID}.partial")
    return directory


def _convert_into(directory: Path, partial: Path) -> None:
    from shard.smollm2 import convert  # numpy and gguf: half a second that only the first start need pay

    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed; the lock is ours
    partial.mkdir()
    convert(partial)
    partial.rename(directory)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a file lock between processes; the kernel drops it with a process that dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _downloaded(model_id: str, revision: str | None) -> Path:
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    obstacle = _ask_hub(model_id, revision)
    try:
        directory = snapshot_download(
            model_id,
            revision=revision,  # the name, not its commit: only names are found again offline
            allow_patterns=list(_WANTED_FILES),
            ignore_patterns=list(_UNWANTED_FILES),
            local_files_only=obstacle is not None,
        )
    except (LocalEntryNotFoundError, HTTPError) as error:
        if obstacle is None:
            raise LoadError(f"model {model_id!r}: the download failed: {_first_line(error)}") from None
        raise LoadError(f"model {model_id!r}: no such directory, not in the hub's cache, and {obstacle}") from None
    return Path(directory)


def _ask_hub(model_id: str, revision: str | None) -> str | None:
    """Why the cache has to do, or None when the model can be downloaded. Raises `LoadError` when it never can be.

    Asked before any download because huggingface_hub itself would wait minutes for a network that swallows packets.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().model_info(model_id, revision=revision, timeout=_HUB_TIMEOUT_S)
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE forbids to ask the hub"
    except GatedRepoError:
        raise LoadError(f"model {model_id!r}: the hub wants an HF_TOKEN that was granted access") from None
    except RepositoryNotFoundError:
        raise LoadError(f"model {model_id!r}: no such directory, and none on the hub that HF_TOKEN may see") from None
    except RevisionNotFoundError:
        raise LoadError(f"model {model_id!r}: the hub knows no revision {revision!r}") from None
    except HTTPError as error:
        return f"the hub cannot be reached ({type(error).__name__}: {_first_line(error)})"
    if not any(file.rfilename.endswith(".safetensors") for file in info.siblings or ()):
        raise LoadError(f"model {model_id!r}: the hub has no safetensors weights for it")
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m shard.checkpoint", description="Prints a model's directory.")
    parser.add_argument("model_id")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--adapter", action="store_true", help="it is a LoRA adapter")
    parser.add_argument("--parent-pid", type=int, default=0, help="end when this process is gone")
    parser.add_argument("--report", action="store_true", help="say how it went in one JSON line on stdout")
    return parser.parse_args()


def main() -> None:
    arguments = _parse_arguments()
    end_with(arguments.parent_pid)
    try:
        if arguments.adapter:
            directory = str(resolve_adapter(arguments.model_id, revision=arguments.revision))
        else:
            directory = str(resolve(arguments.model_id, revision=arguments.revision).directory)
    except LoadError as error:
        if arguments.report:
            print(json.dumps({"failed": str(error)}))
            sys.exit(1)
        sys.exit(f"error: {error}")
    print(json.dumps({"directory": directory}) if arguments.report else directory)


if __name__ == "__main__":
    main()
