"""Random LoRA adapters in PEFT's format, and the models that they are merged into: the oracle of what they do."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from shard.adapters import AdapterFolder

NAMES = ("first", "second")
"""Of what `save_two` saves."""

OWN_ALPHA = ("o_proj", "c_proj", "dense")
"""Tails of the layers to which the second adapter gives an alpha of their own."""

Layers = Mapping[str, tuple[int, int]]


def linear_layers(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the layers that adapters may change, by path."""
    layers = {}
    for path, module in model.base_model.named_modules(prefix=model.base_model_prefix):
        if type(module) is nn.Linear or type(module).__name__ == "FalconLinear":
            layers[path] = (module.in_features, module.out_features)
        elif type(module).__name__ == "Conv1D":
            layers[path] = (module.weight.shape[0], module.weight.shape[1])
    return layers


def random_tensors(layers: Layers, rank: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"base_model.model.{path}.lora_{side}.weight": 0.3 * torch.randn(shape, generator=generator)
        for path, (inputs, outputs) in layers.items()
        for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank)))
    }


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: object) -> AdapterFolder:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    whole = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/model", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(whole | config))
    return AdapterFolder(folder.name, folder)


def save_two(folder: Path, model: PreTrainedModel) -> list[PreTrainedModel]:
    """Two adapters: one of all layers, and one of every other, rank-stabilised and with alphas of its own. Returns the
    model and what each makes of it."""
    layers = linear_layers(model)
    some = dict(list(layers.items())[::2])
    first, second = random_tensors(layers, 4, seed=1), random_tensors(some, 2, seed=2)
    pattern = {"|".join(OWN_ALPHA): 5}
    save_adapter(folder / NAMES[0], first, r=4, lora_alpha=6)
    save_adapter(folder / NAMES[1], second, r=2, lora_alpha=3, use_rslora=True, alpha_pattern=pattern)
    alphas = {path: 5 if path.rpartition(".")[2] in OWN_ALPHA else 3 for path in some}
    return [
        model,
        merged(model, first, dict.fromkeys(layers, 6 / 4)),
        merged(model, second, {path: alpha / math.sqrt(2) for path, alpha in alphas.items()}),
    ]


def merged(model: PreTrainedModel, tensors: Mapping[str, Tensor], scalings: Mapping[str, float]) -> PreTrainedModel:
    """A copy whose layers' weights are W + s B A."""
    whole = copy.deepcopy(model)
    for path, scaling in scalings.items():
        down, up = (tensors[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
        module = whole.get_submodule(path)
        change = scaling * (up @ down)
        with torch.no_grad():
            module.weight += change.T if type(module).__name__ == "Conv1D" else change
    return whole
