"""Every served family, packed and paged against its own dense forward pass; every other refused with a reason."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from shard import model as shard_model
from shard.attention import NAME, AttentionOptions, PagedAttention
from shard.bridges import BRIDGES, alibi_slopes
from shard.distributed import RankGroup
from shard.errors import LoadError
from shard.families import PLANS, REFUSED, served_config
from shard.model import Model, load_model
from tests.paged_runs import PagedRun
from tests.readme import README
from tests.tiny_models import FALCON_7B, FALCON_RW, SETTINGS, VOCAB_SIZE, Setting, save_tiny

CPU = torch.device("cpu")
LENGTHS = (40, 23, 31, 9)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Model:
    return load_model(
        directory, dtype=dtype, device=CPU, group=RankGroup(), on_progress=lambda done, total: None, block_size=4
    )


def random_sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator) for n in LENGTHS]


@torch.inference_mode()
def dense_logits(oracle: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits: Tensor = oracle(tokens[None], use_cache=False).logits[0].float()
    return logits


def assert_close_to(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest of the expected."""
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


def rewrite_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_every_served_family_is_tested() -> None:
    assert set(SETTINGS) == set(PLANS)
    assert not set(REFUSED) & set(PLANS)


def test_the_readme_names_every_served_family() -> None:
    listed = re.search(r"on one and two ranks: ([^.]+)\.", README.read_text().replace("\n ", ""))

    assert listed is not None
    assert listed[1].split(", ") == list(PLANS)


@pytest.mark.parametrize("family", PLANS)
def test_paged_equals_dense(family: str, tmp_path: Path) -> None:
    oracle = save_tiny(tmp_path, family)
    model = load(tmp_path)
    sequences = random_sequences()

    hidden = PagedRun(model, sequences).finish()

    for tokens, states in zip(sequences, hidden, strict=True):
        assert_close_to(model.logits(states), dense_logits(oracle, tokens))


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("gpt_bigcode", {"multi_query": False}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 48}),
        ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False}),
        ("bloom", {"apply_residual_connection_post_layernorm": True, "num_attention_heads": 8}),
        ("falcon", {"num_ln_in_parallel_attn": 1}),
        ("falcon", FALCON_7B),
        ("falcon", FALCON_RW),
        ("falcon", {**FALCON_RW, "alibi": False, "parallel_attn": True}),
        ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
        ("mpt", {"attn_config": {"softmax_scale": 0.7}, "n_heads": 8}),
    ],
)
def test_variants_of_a_family_equal_dense(family: str, overrides: Mapping[str, Setting], tmp_path: Path) -> None:
    oracle = save_tiny(tmp_path, family, **overrides)
    model = load(tmp_path)
    sequences = random_sequences()

    hidden = PagedRun(model, sequences).finish()

    for tokens, states in zip(sequences, hidden, strict=True):
        assert_close_to(model.logits(states), dense_logits(oracle, tokens))


def test_real_model_equals_transformers(smollm2: Path) -> None:
    model = load(smollm2)
    oracle = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.arange(1000, 1048)

    (hidden,) = PagedRun(model, [tokens]).finish()

    assert_close_to(model.logits(hidden), dense_logits(oracle, tokens))
    assert (model.vocab_size, model.eos_token_ids, model.max_positions) == (49152, (2,), 8192)


def test_half_precision_passes_the_self_test_and_stays_near_float32(tmp_path: Path) -> None:
    oracle = save_tiny(tmp_path, "llama", initializer_range=0.1)
    model = load(tmp_path, torch.bfloat16)
    tokens = random_sequences()[0]

    (hidden,) = PagedRun(model, [tokens]).finish()

    assert hidden.dtype == torch.bfloat16
    assert_close_to(model.logits(hidden), dense_logits(oracle, tokens), tolerance=0.1)


@pytest.mark.parametrize("family", BRIDGES)
def test_tokens_of_bridged_families_are_those_of_generate(family: str, tmp_path: Path) -> None:
    oracle = save_tiny(tmp_path, family)
    model = load(tmp_path)
    prompt = random_sequences()[3]
    tokens = oracle.generate(prompt[None], max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)[0]

    (hidden,) = PagedRun(model, [tokens]).finish()

    likeliest = model.logits(hidden).argmax(dim=-1)
    assert likeliest[len(prompt) - 1 : -1].tolist() == tokens[len(prompt) :].tolist()


@pytest.mark.parametrize("num_heads", [1, 6, 8, 12, 71])
def test_slopes_equal_those_of_transformers(num_heads: int) -> None:
    theirs = build_mpt_alibi_tensor(num_heads, 2)[:, 0, 0].neg()  # of a key at distance one

    torch.testing.assert_close(alibi_slopes(num_heads), theirs)


def test_alibi_is_rounded_as_the_model_was_trained(tmp_path: Path) -> None:
    """falcon's slopes and positions are bfloat16 in any model: past 256 tokens neighbours have the same bias."""
    oracle = save_tiny(tmp_path, "falcon", **FALCON_RW, max_position_embeddings=512)
    model = load(tmp_path)
    tokens = torch.randint(3, VOCAB_SIZE, (400,), generator=torch.Generator().manual_seed(2))

    (hidden,) = PagedRun(model, [tokens]).finish()

    assert_close_to(model.logits(hidden), dense_logits(oracle, tokens))


@pytest.mark.parametrize("model_type", REFUSED)
def test_families_that_would_be_silently_wrong_are_refused(model_type: str) -> None:
    with pytest.raises(LoadError, match="silently wrong: its") as refusal:
        served_config({"model_type": model_type})

    assert REFUSED[model_type] in str(refusal.value)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "names no model_type"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "gemma3", "text_config": {}, "vision_config": {}}, "more than text"),
        ({"model_type": "dbrx"}, "not been verified"),
        ({"model_type": "my_model", "auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "brings its own code"),
        ({"model_type": "llama", "layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"model_type": "mpt", "attn_config": {"alibi": True}, "no_bias": False}, "no_bias is False"),
        ({"model_type": "mpt", "attn_config": {"alibi": False}}, r"attn_config\.alibi is False"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_sentence(config: dict[str, object], reason: str) -> None:
    with pytest.raises(LoadError, match=reason):
        served_config(config)  # type: ignore[arg-type]


def test_a_config_says_what_the_model_is_and_not_what_is_run_or_returned() -> None:
    config = {"model_type": "llama", "hidden_size": 8, "auto_map": {}, "use_kernels": True, "return_dict": False}
    config["quantization_config"] = {"quant_method": "gptq"}

    assert served_config(config) == {"model_type": "llama", "hidden_size": 8}


def test_config_keys_that_name_code_or_kernels_never_take_effect(tmp_path: Path) -> None:
    oracle = save_tiny(tmp_path, "llama")
    rewrite_config(
        tmp_path,
        _attn_implementation_internal="somebody/kernel",
        attn_implementation="somebody/kernel",
        _experts_implementation_internal="somebody/kernel",
        auto_map={"AutoModelForCausalLM": "modeling.Mine"},
    )
    (tmp_path / "modeling.py").write_text("raise SystemExit('code from a checkpoint was run')")
    tokens = random_sequences()[0]

    model = load(tmp_path)
    (hidden,) = PagedRun(model, [tokens]).finish()

    assert model._backbone.config._attn_implementation == NAME
    assert_close_to(model.logits(hidden), dense_logits(oracle, tokens))


@pytest.mark.parametrize("family", ["mixtral", "phimoe"])
def test_a_mixture_is_not_refused_because_rounding_decides_between_experts(tmp_path: Path, family: str) -> None:
    save_tiny(tmp_path, family, num_hidden_layers=7)

    assert load(tmp_path, torch.bfloat16).model_type == family


@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("mixtral", torch.bfloat16)])
def test_attention_that_is_wrong_on_the_loaded_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
) -> None:
    right = PagedAttention.__call__

    def forgetful(
        self: PagedAttention, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        return right(self, layer, query, key, value, AttentionOptions(options.scaling, window=8))

    monkeypatch.setattr(PagedAttention, "__call__", forgetful)
    save_tiny(tmp_path, family)

    with pytest.raises(LoadError, match="self-test failed"):
        load(tmp_path, dtype)


def test_a_window_that_does_not_reach_attention_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, "gemma2")
    right = shard_model.ShapeProbe.__call__

    def blind(
        self: shard_model.ShapeProbe, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        return right(self, layer, query, key, value, AttentionOptions(options.scaling))

    monkeypatch.setattr(shard_model.ShapeProbe, "__call__", blind)

    with pytest.raises(LoadError, match="within a window"):
        load(tmp_path)


def test_positions_end_where_a_length_dependent_rotation_would_begin(tmp_path: Path) -> None:
    factors = [1.0, 1.0, 1.5, 2.0]  # half of a head's 8
    save_tiny(
        tmp_path,
        "phi3",
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": factors,
            "long_factor": factors,
            "original_max_position_embeddings": 64,
        },
    )

    assert load(tmp_path).max_positions == 64


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_positions_end_where_the_rotation_of_some_layers_would_change(kind: str, tmp_path: Path) -> None:
    rope: dict[str, object] = {
        of_kind: {"rope_type": "default", "rope_theta": 10000.0} for of_kind in ("full_attention", "sliding_attention")
    }
    rope[kind] = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.0, 1.5, 2.0],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 64,
    }
    save_tiny(tmp_path, "mellum", rope_parameters=rope)

    assert load(tmp_path).max_positions == 64


def test_end_tokens_come_from_the_generation_config(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')

    assert load(tmp_path).eos_token_ids == (7, 9)


def test_bytes_per_block_counts_the_heads_that_reach_attention(tmp_path: Path) -> None:
    save_tiny(tmp_path, "deepseek_v3")  # keys of 8 + 4, values of 10, 6 heads, 2 layers

    assert load(tmp_path).bytes_per_block == 4 * 2 * 6 * (12 + 10) * 4


def test_a_value_of_another_type_is_refused_with_both_types(tmp_path: Path) -> None:
    save_tiny(tmp_path, "mpt")
    rewrite_config(tmp_path, attn_config={"clip_qkv": 6})

    with pytest.raises(LoadError, match=r"field 'clip_qkv': .*expected float, got int"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_config_that_cannot_be_read_is_refused_by_name(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)

    with pytest.raises(LoadError, match=r"config\.json"):
        load(tmp_path)
