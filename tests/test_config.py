"""Settings: where they come from, which of several sources wins, and how mistakes are told."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from router.config import IGNORED, VERSION, Config, config_table, load_config

# Every option of TGI's launcher, as its documentation lists them.
TGI_FLAGS = """
--model-id --revision --validation-workers --sharded --num-shard --quantize --speculate --dtype
--kv-cache-dtype --trust-remote-code --max-concurrent-requests --max-best-of --max-stop-sequences --max-top-n-tokens
--max-input-tokens --max-input-length --max-total-tokens --waiting-served-ratio --max-batch-prefill-tokens
--max-batch-total-tokens --max-waiting-tokens --max-batch-size --cuda-graphs --hostname --port --prometheus-port
--shard-uds-path --master-addr --master-port --huggingface-hub-cache --weights-cache-override --disable-custom-kernels
--cuda-memory-fraction --rope-scaling --rope-factor --json-output --otlp-endpoint --otlp-service-name
--cors-allow-origin --api-key --watermark-gamma --watermark-delta --ngrok --ngrok-authtoken --ngrok-edge
--tokenizer-config-path --disable-grammar-support --env --max-client-batch-size --lora-adapters --usage-stats
--payload-limit --enable-prefill-logprobs --graceful-termination-timeout -p -g -e
"""


def config(*arguments: str, **environ: str) -> Config:
    return load_config(arguments, environ).config


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str, **environ: str) -> str:
    """The one line a bad setting ends with."""
    with pytest.raises(SystemExit) as ended:
        load_config(arguments, environ)
    assert ended.value.code == 2
    line, rest = capsys.readouterr().err.split("\n")
    assert rest == ""
    return line.removeprefix("python -m router: error: ")


def test_defaults() -> None:
    assert config() == Config()
    assert (Config().port, Config().model_id, Config().lookahead) == (3000, "smollm2-135m-instruct", 1)


def test_flag_beats_environment_beats_default() -> None:
    assert config("--port", "1", SHARDSTREAM_PORT="2", PORT="3").port == 1
    assert config(SHARDSTREAM_PORT="2", PORT="3").port == 2
    assert config(PORT="3").port == 3


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("MODEL_ID", "org/m", "model_id", "org/m"),
        ("NUM_SHARD", "2", "num_shard", 2),
        ("MAX_BATCH_PREFILL_TOKENS", "512", "max_batch_prefill_tokens", 512),
        ("MAX_INPUT_LENGTH", "9", "max_input_tokens", 9),
        ("JSON_OUTPUT", "true", "json_output", True),
        ("PREFIX_CACHING", "0", "prefix_caching", False),
        ("CORS_ALLOW_ORIGIN", "https://a, https://b", "cors_allow_origin", ("https://a", "https://b")),
        ("GRACEFUL_TERMINATION_TIMEOUT", "5", "drain_timeout", 5.0),
        ("SHARDSTREAM_SHARD_ADDRESSES", "unix:/a,unix:/b", "shard_addresses", ("unix:/a", "unix:/b")),
        ("SHARDSTREAM_HOSTNAME", "::1", "hostname", "::1"),
        ("LOG_LEVEL", "DEBUG", "log_level", "debug"),
        ("API_KEY", " ", "api_key", None),
    ],
)
def test_environment_is_read_by_both_names(name: str, value: str, field: str, expected: object) -> None:
    assert getattr(config(**{name: value}), field) == expected


@pytest.mark.parametrize("name", ["HOSTNAME", "LOOKAHEAD", "SERVED_MODEL_NAME"])
def test_bare_names_that_others_may_set_are_not_read(name: str) -> None:
    assert config(**{name: "pod-1"}) == Config()


@pytest.mark.parametrize("name", ["PORT", "SHARDSTREAM_PORT"])
def test_service_links_of_kubernetes_are_no_port(name: str) -> None:
    assert config(**{name: "tcp://10.0.0.1:80"}).port == 3000


def test_vertex_ai_names_its_port_and_paths() -> None:
    chosen = config(AIP_HTTP_PORT="8085", PORT="80", AIP_PREDICT_ROUTE="/p:predict", AIP_HEALTH_ROUTE="/up")

    assert (chosen.port, chosen.aip_predict_route, chosen.aip_health_route) == (8085, "/p:predict", "/up")


def test_switches_take_no_value_or_a_truth_value() -> None:
    assert config("--json-output").json_output
    assert not config("--json-output", "false", JSON_OUTPUT="true").json_output


def test_lists_may_be_repeated() -> None:
    assert config("--cors-allow-origin", "a", "--cors-allow-origin", "b,c").cors_allow_origin == ("a", "b", "c")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--port", "x"], "--port: 'x' is not an integer"),
        (["--port", "70000"], "--port: 70000 is not between 0 and 65535"),
        (["--cuda-memory-fraction", "nan"], "--cuda-memory-fraction: nan is not between 0.01 and 1"),
        (["--step-timeout", "inf"], "--step-timeout: inf is not between 0.1 and inf"),
        (["--watermark-delta", "x"], "--watermark-delta: 'x' is not a number"),
        (["--max-best-of", "0"], "--max-best-of: 0 is not between 1 and inf"),
        (["--dtype", "int3"], "--dtype: 'int3' is not one of auto, float32, bfloat16, float16"),
        (["--sharded", "perhaps"], "--sharded: 'perhaps' is neither true nor false"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--max-input", "3"], "unrecognized arguments: --max-input 3"),
        (
            ["--max-input-length", "3", "--max-input-tokens", "3"],
            "--max-input-length and --max-input-tokens mean the same: give one of them",
        ),
        (
            ["--max-input-tokens", "8", "--max-total-tokens", "8"],
            "`max_input_tokens` must be < `max_total_tokens`. Given: 8 and 8",
        ),
        (
            ["--max-total-tokens", "9", "--max-batch-total-tokens", "8"],
            "`max_total_tokens` must be <= `max_batch_total_tokens`. Given: 9 and 8",
        ),
        (["--sharded", "true", "--num-shard", "1"], "`sharded` is true but `num_shard` is 1"),
        (["--sharded", "false", "--num-shard", "2"], "`sharded` is false but `num_shard` is 2"),
        (["--sharded", "true"], "`sharded` is true: say how many ranks with `num_shard`"),
        (["--aip-predict-route", "predict"], "'predict' is not the path of a route"),
        (["--aip-health-route", "/{x}"], "'/{x}' is not the path of a route"),
        (["--num-shard", "2", "--shard-addresses", "a"], "`num_shard` is 2 but there are 1 addresses"),
    ],
)
def test_bad_flags_end_with_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], line: str) -> None:
    assert refusal(capsys, *arguments) == line


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        ({"SHARDSTREAM_PORT": "x"}, "SHARDSTREAM_PORT: 'x' is not an integer"),
        ({"NUM_SHARD": "0"}, "NUM_SHARD: 0 is not between 1 and inf"),
        (
            {"MAX_INPUT_TOKENS": "3", "MAX_INPUT_LENGTH": "3"},
            "MAX_INPUT_TOKENS and MAX_INPUT_LENGTH mean the same: set one of them",
        ),
    ],
)
def test_bad_variables_end_with_one_line(
    capsys: pytest.CaptureFixture[str], environ: dict[str, str], line: str
) -> None:
    assert refusal(capsys, **environ) == line


def test_every_tgi_flag_is_known() -> None:
    table = config_table() + " ".join(flag for item in IGNORED for flag in item.short)

    assert [flag for flag in TGI_FLAGS.split() if not re.search(rf"(?<![\w-]){flag}(?![\w-])", table)] == []


def test_every_flag_without_effect_is_accepted_and_noticed() -> None:
    for item in IGNORED:
        arguments = [item.flag, "x"] if item.takes_value else [item.flag]

        loaded = load_config(arguments, {})

        assert loaded.config == Config()
        assert loaded.notices == (f"{item.flag} has no effect: {item.reason}",)


def test_variables_without_effect_are_noticed_unless_they_switch_off() -> None:
    environ = {"KV_CACHE_DTYPE": "fp8", "TRUST_REMOTE_CODE": "false", "USAGE_STATS": "off", "ENV": "production"}

    assert load_config([], environ).notices == ("KV_CACHE_DTYPE has no effect: KV memory has the model's dtype",)


def test_ways_of_quantizing_that_are_not_ours_are_for_the_shards_to_judge() -> None:
    loaded = load_config([], {"QUANTIZE": "awq"})

    assert (loaded.config.quantize, loaded.notices) == ("awq", ())


def test_key_is_not_shown() -> None:
    assert "sesame" not in repr(config("--api-key", "sesame"))


def test_served_name_defaults_to_the_model() -> None:
    assert config("--model-id", "org/m").model_name == "org/m"
    assert config("--model-id", "org/m", "--served-model-name", "n").model_name == "n"


def test_help_names_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load_config(["--help"], {})

    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(f"--{field.name.replace('_', '-')} " in text for field in fields(Config))
    assert "(default: 3000)" in text
    assert "SHARDSTREAM_<FLAG>" in text


def test_help_has_the_groups_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(["--help"], {})

    shown = re.findall(r"^(\w[\w ]*):$", capsys.readouterr().out, re.MULTILINE)
    groups = re.findall(r"^\| \*\*(.+)\*\*", config_table(), re.MULTILINE)
    assert shown == ["options", *groups]
    assert len(groups) == len(set(groups)) >= 8


def test_table_has_a_row_for_every_setting() -> None:
    table = config_table()

    rows = [f"| `--{field.name.replace('_', '-')}`" for field in fields(Config)]
    assert [row for row in rows if row not in table] == []
    assert len(table.splitlines()) > len(rows) + len(IGNORED)
    assert "| `--port`, `-p` | `SHARDSTREAM_PORT`, `AIP_HTTP_PORT`, `PORT` | `3000` | port to listen on |" in table


def test_version_is_the_projects() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]

    assert project["version"] == VERSION
