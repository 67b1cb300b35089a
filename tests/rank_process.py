"""One rank of a real group in a process of its own, for `test_tensor_parallel`."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from shard.adapters import AdapterFolder
from shard.distributed import RankGroup, connect
from shard.model import load_model
from tests.paged_runs import PagedRun
from tests.server import PATIENCE_S

CPU = torch.device("cpu")
ADAPTERS_OF_PROMPTS = (0, 1, 2, 1)


def prompts(vocab_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab_size, (n,), generator=generator) for n in (40, 23, 31, 9)]


def run_rank(
    rank: int, world_size: int, folder: Path, checkpoints: Sequence[Path], adapters: Sequence[str] = ()
) -> None:
    """Runs every checkpoint through the group. Writes `{name}.{rank}.pt` into `folder`: logits, or an error's text.

    With two `adapters`, which lie in each checkpoint's folder, the prompts are `ADAPTERS_OF_PROMPTS`'.
    """
    torch.set_num_threads(1)
    group = connect(rank, world_size, str(folder / "store"), CPU, timeout_s=PATIENCE_S)
    told = torch.full((3,), rank)
    group.broadcast(told)
    torch.save(told, folder / f"told.{rank}.pt")
    for directory in checkpoints:
        try:
            result = run_checkpoint(directory, group, [AdapterFolder(name, directory / name) for name in adapters])
        except Exception:
            result = {"error": traceback.format_exc()}
        torch.save(result, folder / f"{directory.name}.{rank}.pt")
    group.close()


def run_checkpoint(directory: Path, group: RankGroup, adapters: Sequence[AdapterFolder]) -> dict[str, object]:
    read_bytes: list[int] = []
    model = load_model(
        directory,
        dtype=torch.float32,
        device=CPU,
        group=group,
        on_progress=lambda done, total: read_bytes.append(done),
        block_size=4,
        adapters=adapters,
    )
    numbers = ADAPTERS_OF_PROMPTS if adapters else None
    hidden = PagedRun(model, prompts(model.vocab_size), adapters=numbers).finish()
    return {
        "logits": [model.logits(states) for states in hidden],
        "bytes_per_block": model.bytes_per_block,
        "read_bytes": read_bytes[-1],
    }
