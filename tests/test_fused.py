"""Fused layers against the modules they are made from: on tiny models of every fused family, and on the real one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shard import fused, model
from shard.attention import AttentionBatch, AttentionOptions, PagedAttention
from shard.distributed import RankGroup, connect
from shard.errors import LoadError
from shard.fused import FAMILIES
from shard.kernels import build, native
from shard.kernels.build import AVX2, AVX512, best_variant
from shard.kernels.native import Library, Norm, Options, Threads, library
from shard.kernels.packing import Kind
from shard.model import Model, load_model, native_attention
from tests.paged_runs import PagedRun
from tests.server import PATIENCE_S
from tests.tiny_models import VOCAB_SIZE, Setting, save_tiny

pytestmark = pytest.mark.skipif(library() is None, reason="the native operations are not built for this machine")

needs_bytes = pytest.mark.skipif(best_variant() is not AVX512, reason="a matter of AVX-512")

CPU = torch.device("cpu")

# As wide as the native operations want them, and no wider; the MLP's 72 features need padding in every kind.
WIDE: dict[str, Setting] = {
    "hidden_size": 192,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "initializer_range": 0.1,
}

TEXT = (
    "The lighthouse stood on the northern cape, where two currents met and the fog came in without warning. Its keeper "
    "had written the weather into the same book for thirty years. In 1871 the engineers brought a new lens from Paris, "
    'cut from seventy prisms, and with it a clockwork that had to be wound every four hours. "You will not sleep '
    'again," said the eldest of them, and he was right. The theory of the lens is simple: light from a point at the '
    "focus leaves as a parallel beam, and only errors of the grinding spread it. def area(radius): return 3.14159 * "
    "radius ** 2. When the price of oil rose from 12 to 19 cents, the ministry asked for a report, month "
    "by month, and the keeper copied his numbers onto a clean sheet.\n"
)


def load(
    directory: Path, dtype: torch.dtype = torch.float32, *, use_native: bool = True, quantize: Kind | None = None
) -> Model:
    torch.set_num_threads(2)
    return load_model(
        directory,
        dtype=dtype,
        device=CPU,
        group=RankGroup(),
        on_progress=lambda done, total: None,
        use_native=use_native,
        quantize=quantize,
    )


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator) for n in (40, 23, 70, 1)]


def answers(model: Model, oracle: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of every prompt: the model's, which is fed in parts, and the oracle's of the whole."""
    hidden = PagedRun(model, prompts()).finish()
    for tokens, states in zip(prompts(), hidden, strict=True):
        yield model.logits(states), dense_logits(oracle, tokens)


@torch.inference_mode()
def dense_logits(oracle: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = oracle(tokens[None], use_cache=False).logits[0]
    return logits


def is_fused(model: Model) -> bool:
    return model._fused is not None


VARIANTS: dict[str, tuple[str, dict[str, Setting]]] = {
    **{family: (family, {}) for family in sorted(FAMILIES - {"cohere"})},
    "biased_llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "scaled_rope_llama": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "one_kv_head_qwen2": ("qwen2", {"num_key_value_heads": 1}),
    "no_rope_smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "partly_rotated_phi3": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "plain_cohere": ("cohere", {"use_qk_norm": False}),
    "one_kv_head_olmo2": ("olmo2", {"num_key_value_heads": 1}),
    "windowless_exaone4": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "parallel_stablelm": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "differently_rotated_granite_swa": ("granite_swa", {"layer_rope_theta": [500.0, 0]}),
    "multiplied_granite": ("granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.4}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_fused_layers_equal_transformers(name: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[name]
    oracle = save_tiny(tmp_path, family, **{**WIDE, **overrides})
    model = load(tmp_path)

    assert is_fused(model)
    for actual, expected in answers(model, oracle):
        assert float((actual - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


def test_queries_that_grow_past_a_position_keep_their_modules(tmp_path: Path) -> None:
    """ministral3 scales them from a position on which the self-test does not reach."""
    rope: dict[str, object] = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "llama_4_scaling_beta": 0.5,
    }
    oracle = save_tiny(tmp_path, "ministral3", **WIDE, rope_parameters=rope)
    model = load(tmp_path)

    for actual, expected in answers(model, oracle):
        assert float((actual - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("quantize", "limit"),
    [(None, 0.02), pytest.param(Kind.INT8, 0.06, marks=needs_bytes), pytest.param(Kind.INT4, 0.45, marks=needs_bytes)],
)
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("gemma2", {}),
        ("olmo2", {}),
        ("phi", {}),
        # Neither 208 hidden numbers nor 13 heads of 16 fill the last group of quantised inputs.
        ("llama", {"hidden_size": 208, "num_attention_heads": 13, "num_key_value_heads": 1}),
    ],
)
def test_smaller_numbers_give_nearly_the_same(
    family: str, overrides: dict[str, Setting], quantize: Kind | None, limit: float, tmp_path: Path
) -> None:
    save_tiny(tmp_path, family, **{**WIDE, **overrides})
    exact, small = load(tmp_path), load(tmp_path, torch.bfloat16, quantize=quantize)

    pairs = zip(PagedRun(exact, prompts()).finish(), PagedRun(small, prompts()).finish(), strict=True)

    assert is_fused(small)
    for expected, actual in pairs:
        assert float((actual.float() - expected).norm() / expected.norm()) < limit


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("mixtral", {}, "the layers of mixtral have another shape"),
        ("olmo", {"clip_qkv": 8.0}, "clip_qkv is not known here"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm is not known here"),
        ("llama", {"head_dim": 8}, "heads are 8 wide, not a multiple of 16"),
        ("llama", {"hidden_size": 216}, "hidden states are 216 wide, not a multiple of 16"),
        ("llama", {"hidden_act": "relu"}, "its activation is relu"),
    ],
)
def test_quantized_weights_are_refused_where_layers_cannot_be_fused(
    family: str, overrides: dict[str, Setting], reason: str, tmp_path: Path
) -> None:
    save_tiny(tmp_path, family, **{**WIDE, **overrides})

    with pytest.raises(LoadError, match=reason):
        load(tmp_path, torch.bfloat16, quantize=Kind.INT8)


@pytest.fixture
def older_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has AVX2 and nothing later."""
    older = Library(build.build(AVX2))
    monkeypatch.setattr(native, "library", lambda: older)
    monkeypatch.setattr(native, "threads", cache(lambda count: Threads(older, count)))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.bfloat16, 0.03)])
def test_older_processors_fuse_too(dtype: torch.dtype, limit: float, tmp_path: Path, older_processor: None) -> None:
    oracle = save_tiny(tmp_path, "gemma3_text", **WIDE)
    model = load(tmp_path, dtype)

    assert is_fused(model)
    for actual, expected in answers(model, oracle):
        assert float((actual - expected).norm() / expected.norm()) < limit


def test_older_processors_refuse_what_they_cannot_multiply(tmp_path: Path, older_processor: None) -> None:
    save_tiny(tmp_path, "llama", **WIDE)

    with pytest.raises(LoadError, match="this processor has no int8 products"):
        load(tmp_path, torch.bfloat16, quantize=Kind.INT8)


@needs_bytes
def test_quantized_weights_want_bfloat16_activations(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", **WIDE)

    with pytest.raises(LoadError, match=r"activations are torch\.float32, not bfloat16"):
        load(tmp_path, torch.float32, quantize=Kind.INT8)


def test_layers_that_differ_from_the_modules_do_not_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    oracle = save_tiny(tmp_path, "llama", **WIDE)
    right = fused._norm
    monkeypatch.setattr(fused, "_norm", lambda norm: Norm(right(norm).weight * 1.01))

    with caplog.at_level("INFO"):
        model = load(tmp_path)

    assert not is_fused(model)
    assert "they differ from the modules by" in caplog.text
    for actual, expected in answers(model, oracle):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_native_operations_can_be_switched_off(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", **WIDE)

    model = load(tmp_path, use_native=False)

    assert not is_fused(model)
    assert model.attention is PagedAttention


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "gpt_neox"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_modules_that_are_not_fused_attend_natively(
    family: str, dtype: torch.dtype, limit: float, tmp_path: Path
) -> None:
    oracle = save_tiny(tmp_path, family, **WIDE)
    model = load(tmp_path, dtype)

    assert not is_fused(model)
    assert model.attention is native_attention
    for actual, expected in answers(model, oracle):
        assert float((actual - expected).norm() / expected.norm()) < limit


def test_native_attention_that_differs_from_the_modules_does_not_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    oracle = save_tiny(tmp_path, "gpt_oss", **WIDE)
    monkeypatch.setattr(AttentionOptions, "native", lambda self: Options(self.scaling, self.window))  # without sinks

    model = load(tmp_path)

    assert model.attention is PagedAttention
    assert "attention is not native: it differs from dense by" in caplog.text
    for actual, expected in answers(model, oracle):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_packed_weights_are_held_once(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", **WIDE)

    layers = load(tmp_path)._backbone.layers

    assert isinstance(layers, nn.ModuleList)
    assert sum(parameter.numel() for name, parameter in layers.named_parameters() if "norm" not in name) == 0


@torch.inference_mode()
def log_probabilities(model: Model, tokens: Tensor) -> Tensor:
    """[n, vocab] of one sequence as one chunk."""
    count = len(tokens)
    table, at = torch.arange(1, count // 16 + 2), torch.arange(count)
    model.allocate(len(table) + 1)
    batch = AttentionBatch.build(
        slots=table[at // 16] * 16 + at % 16,
        query_starts=[0, count],
        context_lens=[count],
        block_tables=table[None],
        block_size=16,
        device=CPU,
    )
    return model.logits(model.hidden(tokens, at, batch)).log_softmax(dim=-1)


def divergence(expected: Tensor, actual: Tensor) -> float:
    """Mean KL of next-token distributions, in nats."""
    return float((expected.exp() * (expected - actual)).sum(dim=-1).mean())


@pytest.fixture(scope="module")
def tokens(smollm2: Path) -> Tensor:
    from tokenizers import Tokenizer

    return torch.tensor(Tokenizer.from_file(str(smollm2 / "tokenizer.json")).encode(TEXT).ids)


@pytest.fixture(scope="module")
def exact(smollm2: Path, tokens: Tensor) -> Tensor:
    """By transformers' modules in float32."""
    return log_probabilities(load(smollm2, use_native=False), tokens)


def test_real_weights_in_float32_give_the_same_distribution(smollm2: Path, tokens: Tensor, exact: Tensor) -> None:
    actual = log_probabilities(load(smollm2), tokens)

    assert float((actual - exact).abs().max()) < 1e-3
    assert float((actual - exact).gather(1, exact.argmax(dim=-1, keepdim=True)).abs().max()) < 1e-4


def test_real_weights_in_bfloat16_are_nearer_to_float32_than_the_modules(
    smollm2: Path, tokens: Tensor, exact: Tensor
) -> None:
    by_modules = log_probabilities(load(smollm2, torch.bfloat16, use_native=False), tokens)
    by_layers = log_probabilities(load(smollm2, torch.bfloat16), tokens)

    # Measured: 0.0013 by modules, which round after every operation, and 0.0002 by fused layers.
    assert divergence(exact, by_layers) < 0.0005
    assert divergence(exact, by_layers) < divergence(exact, by_modules)
    changed = by_layers.argmax(dim=-1) != exact.argmax(dim=-1)
    margins = exact.topk(2).values[changed]
    assert ((margins[:, 0] - margins[:, 1]) < 0.1).all(), "another token was chosen where it was not a near tie"


@needs_bytes
@pytest.mark.parametrize(("kind", "limit"), [(Kind.INT8, 0.02), (Kind.INT4, 0.01)])
def test_real_weights_in_few_bits_keep_the_stated_quality(
    kind: Kind, limit: float, smollm2: Path, tokens: Tensor, exact: Tensor
) -> None:
    actual = log_probabilities(load(smollm2, torch.bfloat16, quantize=kind), tokens)

    # Measured: 0.012 and 0.005. Four bits lose less here, because these weights were made of sixteen steps once.
    assert divergence(exact, actual) < limit
    targets = tokens[1:, None]
    perplexity, whole = (torch.exp(-scores[:-1].gather(1, targets).mean()) for scores in (exact, actual))
    assert float(whole / perplexity) < 1.02


def test_limits_of_the_self_test_know_every_kind() -> None:
    assert set(model._MAX_FUSED_DISTANCE) == set(fused.Kind)


def run_rank(rank: int, folder: Path, checkpoints: list[Path]) -> None:
    """Writes `{name}.{rank}.pt`: logits of all prompts, and whether the layers were fused."""
    torch.set_num_threads(1)
    group = connect(rank, 2, str(folder / "store"), CPU, timeout_s=PATIENCE_S)
    for directory in checkpoints:
        model = load_model(
            directory, dtype=torch.float32, device=CPU, group=group, on_progress=lambda done, total: None
        )
        hidden = PagedRun(model, prompts()).finish()
        result = is_fused(model), [model.logits(states) for states in hidden]
        torch.save(result, folder / f"{directory.name}.{rank}.pt")
    group.close()


def test_two_ranks_with_fused_layers_equal_transformers(tmp_path: Path) -> None:
    cases: dict[str, dict[str, Setting]] = {
        "llama": {"attention_bias": True, "mlp_bias": True},
        "gemma3_text": {},  # norms after the sums of the ranks
        "phi3": {},
        "granite": {"residual_multiplier": 0.4},
        "gemma2": {},
        "olmo2": {},  # norms over the heads of both ranks
        "glm4": {},
        "phi": {},  # biases that one rank adds, attention and MLP in parallel
        "nemotron": {},
    }
    oracles = {family: save_tiny(tmp_path / family, family, **{**WIDE, **cases[family]}) for family in cases}
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=run_rank, args=(rank, tmp_path, [tmp_path / f for f in cases])) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=5 * PATIENCE_S)
        assert process.exitcode == 0

    for family, oracle in oracles.items():
        (fused, logits), (other_fused, _) = (torch.load(tmp_path / f"{family}.{rank}.pt") for rank in range(2))
        assert fused, family
        assert other_fused, family
        for tokens, actual in zip(prompts(), logits, strict=True):
            expected = dense_logits(oracle, tokens)
            assert float((actual - expected).abs().max()) <= 2e-5 * float(expected.abs().max()), family
