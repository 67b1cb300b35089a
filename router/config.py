"""Every setting of the router, once: field, flag, environment name, default, bounds, help and README row.

A flag beats the environment, the environment beats the default. In the environment `SHARDSTREAM_<FIELD>` is always
understood, and TGI's bare name where nobody else sets a variable of that name: Docker and Kubernetes set `HOSTNAME`,
and Kubernetes sets `<SERVICE>_PORT` to `tcp://...`. Empty variables count as not set. TGI flags that mean nothing here
are accepted and named in a notice, so that a deployment moves over unchanged; unknown flags are refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, Final, NamedTuple, NoReturn, TypeVar, cast

from router.adapters import parse_adapters

VERSION: Final = "0.1.0"
ENV_PREFIX: Final = "SHARDSTREAM_"
BUNDLED_MODEL_ID: Final = "smollm2-135m-instruct"
"""Of the model that comes with the shards' package, which no hub knows by this name."""
HOSTED_CACHE_BYTES: Final = 16_000_000

T = TypeVar("T")
Value = str | int | float | bool | tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Option:
    """What a field's metadata says beside its default."""

    help: str
    group: str
    flags: tuple[str, ...] = ()
    """Further spellings, e.g. `-p`."""
    env: tuple[str, ...] = ()
    """Bare environment names."""
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None


def _option(default: T, help_: str, group: str, *, env: str = "", secret: bool = False, **rest: Any) -> T:
    """A dataclass field that is a setting; `env` lists TGI's bare names, separated by blanks."""
    option = Option(help_, group, env=tuple(env.split()), **rest)
    value: T = field(default=default, repr=not secret, metadata={"option": option})
    return value


QUANTIZE: Final = (
    *("none", "bf16", "int8", "int4"),
    *("awq", "bitsandbytes", "bitsandbytes-fp4", "bitsandbytes-nf4", "compressed-tensors", "eetq", "exl2", "fp8"),
    *("gptq", "marlin"),
)
"""All values of TGI's flag, and ours in front."""


@dataclass(frozen=True, slots=True)
class Config:
    """The router's settings. None stands for "worked out at start"."""

    model_id: str = _option(
        BUNDLED_MODEL_ID, f"folder, hub id, or the bundled {BUNDLED_MODEL_ID}", "Model", env="MODEL_ID"
    )
    revision: str | None = _option(None, "hub revision", "Model", env="REVISION")
    served_model_name: str | None = _option(None, "name clients see; default: the model id", "Model")
    dtype: str = _option(
        "auto",
        "of weights and activations; auto: bfloat16 where the device computes in it",
        "Model",
        env="DTYPE",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str = _option(
        "none",
        "weights in fewer bits: bf16; int8 and int4 on a CPU with the native operations, which multiply them by 8-bit "
        "integers; other values are TGI's and name how the checkpoint is quantised, which is found out in any case",
        "Model",
        env="QUANTIZE",
        choices=QUANTIZE,
    )
    lora_adapters: tuple[str, ...] = _option(
        (),
        "LoRA adapters to load, with commas or repeated: id, id@revision, name=folder or name=id@revision",
        "Model",
        env="LORA_ADAPTERS",
    )
    huggingface_hub_cache: str | None = _option(
        None, "where hub downloads are kept", "Model", env="HUGGINGFACE_HUB_CACHE"
    )

    shard_addresses: tuple[str, ...] = _option(
        (), "shards that run already, in order of rank, with commas; default: local ones are started", "Shards"
    )
    num_shard: int | None = _option(None, "ranks to start; default: 1", "Shards", env="NUM_SHARD", at_least=1)
    sharded: bool | None = _option(
        None, "true: several ranks, false: one; must agree with --num-shard", "Shards", env="SHARDED"
    )
    shard_uds_path: str | None = _option(
        None, "folder for the shards' sockets; default: a private one made at start", "Shards", env="SHARD_UDS_PATH"
    )
    device: str = _option(
        "auto", "where shards run; auto: cuda if there is one", "Shards", choices=("auto", "cpu", "cuda")
    )
    cuda_memory_fraction: float = _option(
        0.9,
        "share of a device's memory a rank may take",
        "Shards",
        env="CUDA_MEMORY_FRACTION",
        at_least=0.01,
        at_most=1.0,
    )
    kv_cache_bytes: int = _option(
        0,
        "KV memory of each rank in bytes; 0: a share of what is free",
        "Shards",
        flags=("--kv-cache-memory",),
        at_least=0,
    )
    step_timeout: float = _option(300.0, "seconds after which a step counts as lost", "Shards", at_least=0.1)

    max_batch_size: int = _option(
        256, "sequences that run at once", "Scheduling", env="MAX_BATCH_SIZE", at_least=1, at_most=65_536
    )
    max_batch_prefill_tokens: int = _option(
        2048, "tokens one step may feed", "Scheduling", env="MAX_BATCH_PREFILL_TOKENS", at_least=1
    )
    max_batch_total_tokens: int | None = _option(
        None, "tokens KV memory may hold; default: all that fit", "Scheduling", env="MAX_BATCH_TOTAL_TOKENS", at_least=1
    )
    lookahead: int = _option(
        1,
        "steps sent ahead of the one that runs. Above 0 a plan may stand for up to four decode steps, as far as those "
        "behind the first take 10 ms: so long a request that arrives meanwhile may wait",
        "Scheduling",
        at_least=0,
        at_most=8,
    )
    prefix_caching: bool = _option(
        True, "share the KV blocks of equal prompt beginnings", "Scheduling", env="PREFIX_CACHING"
    )
    speculate: int = _option(
        0,
        "tokens guessed ahead from earlier text and verified in one step, while few sequences run",
        "Scheduling",
        env="SPECULATE",
        at_least=0,
        at_most=32,
    )

    max_concurrent_requests: int = _option(
        128, "sequences accepted at once; 429 beyond", "Request limits", env="MAX_CONCURRENT_REQUESTS", at_least=1
    )
    max_input_tokens: int | None = _option(
        None,
        "longest prompt; default: one less than --max-total-tokens",
        "Request limits",
        flags=("--max-input-length",),
        env="MAX_INPUT_TOKENS MAX_INPUT_LENGTH",
        at_least=1,
    )
    max_total_tokens: int | None = _option(
        None,
        "longest prompt and generation together; default: what model and memory allow",
        "Request limits",
        env="MAX_TOTAL_TOKENS",
        at_least=2,
    )
    max_best_of: int = _option(2, "largest `best_of`", "Request limits", env="MAX_BEST_OF", at_least=1)
    max_num_beams: int = _option(8, "largest `num_beams`", "Request limits", at_least=1)
    max_stop_sequences: int = _option(
        4, "most stop strings of a request", "Request limits", env="MAX_STOP_SEQUENCES", at_least=0
    )
    max_top_n_tokens: int = _option(5, "largest `top_n_tokens`", "Request limits", env="MAX_TOP_N_TOKENS", at_least=0)
    max_client_batch_size: int = _option(
        4, "most prompts of one call", "Request limits", env="MAX_CLIENT_BATCH_SIZE", at_least=1
    )
    payload_limit: int = _option(
        2_000_000, "largest request body in bytes; 413 beyond", "Request limits", env="PAYLOAD_LIMIT", at_least=1
    )
    validation_workers: int = _option(
        2, "threads that encode long prompts", "Request limits", env="VALIDATION_WORKERS", at_least=1, at_most=64
    )
    disable_grammar_support: bool = _option(
        False,
        "refuse requests with a grammar, and spare the process that compiles them",
        "Request limits",
        env="DISABLE_GRAMMAR_SUPPORT",
    )
    watermark_gamma: float = _option(
        0.5,
        "fraction of the vocabulary a watermark favours",
        "Request limits",
        env="WATERMARK_GAMMA",
        at_least=0.0,
        at_most=1.0,
    )
    watermark_delta: float = _option(
        2.0, "what a watermark adds to favoured logits", "Request limits", env="WATERMARK_DELTA", at_least=0.0
    )
    default_return_full_text: bool = _option(
        True, "on `/`, answer with the prompt in front when the request does not say", "Request limits"
    )

    tool_call_parser: str = _option(
        "auto",
        "how the model writes tool calls; auto: as its chat template shows them",
        "Chat",
        choices=("auto", "hermes", "llama", "mistral"),
    )
    reasoning_parser: str = _option(
        "none",
        "think: text in <think> tags is answered as reasoning_content",
        "Chat",
        choices=("none", "think"),
    )
    trust_request_chat_template: bool = _option(
        False, "run chat templates that requests bring along; for trusted clients only", "Chat"
    )

    hostname: str = _option("0.0.0.0", "address to listen on", "HTTP")
    port: int = _option(
        3000, "port to listen on", "HTTP", flags=("-p",), env="AIP_HTTP_PORT PORT", at_least=0, at_most=65_535
    )
    aip_predict_route: str | None = _option(
        None, "a further path for /vertex, as Vertex AI chooses it", "HTTP", env="AIP_PREDICT_ROUTE"
    )
    aip_health_route: str | None = _option(
        None, "a further path for /health, as Vertex AI chooses it", "HTTP", env="AIP_HEALTH_ROUTE"
    )
    api_key: str | None = _option(None, "key that clients must show", "HTTP", env="API_KEY", secret=True)
    protect_info: bool = _option(False, "ask for the key on /info and /metrics too", "HTTP")
    cors_allow_origin: tuple[str, ...] = _option(
        (), "origins browsers may call from, with commas or repeated; default: any", "HTTP", env="CORS_ALLOW_ORIGIN"
    )
    compute_type: str = _option("gpu+optimized", "value of the x-compute-type header", "HTTP", env="COMPUTE_TYPE")
    drain_timeout: float = _option(
        90.0,
        "seconds that running requests are given at shutdown",
        "HTTP",
        flags=("--graceful-termination-timeout", "-g"),
        env="GRACEFUL_TERMINATION_TIMEOUT",
        at_least=0.0,
    )

    response_cache_bytes: int | None = _option(
        None,
        "memory for whole answers, which equal requests are given again; 0: every request is computed; default: "
        f"{HOSTED_CACHE_BYTES}, and only on the routes of the hosted Inference API, where clients expect it",
        "Response cache",
        at_least=0,
    )
    response_cache_sampled: bool = _option(
        False, "keep answers too that were drawn without a seed of the client's", "Response cache"
    )

    json_output: bool = _option(False, "log as JSON lines", "Logging", env="JSON_OUTPUT")
    log_level: str = _option(
        "info", "least severe records to log", "Logging", env="LOG_LEVEL", choices=("debug", "info", "warn", "error")
    )

    @property
    def model_name(self) -> str:
        """The model's name in answers."""
        return self.served_model_name or self.model_id


class Ignored(NamedTuple):
    """A TGI flag that is accepted and does nothing."""

    flag: str
    reason: str
    takes_value: bool = True
    short: tuple[str, ...] = ()
    has_env: bool = True


_AT_ONCE: Final = "waiting sequences join at every step"
_STORE: Final = "ranks meet through a file"
_TUNNEL: Final = "tunnels are not supported"
_NO_ROPE: Final = "the model's own positions are used"

IGNORED: Final = (
    Ignored("--kv-cache-dtype", "KV memory has the model's dtype"),
    Ignored("--trust-remote-code", "code from model repositories is never run", takes_value=False),
    Ignored("--waiting-served-ratio", _AT_ONCE),
    Ignored("--max-waiting-tokens", _AT_ONCE),
    Ignored("--cuda-graphs", "shards choose their graphs themselves"),
    Ignored("--prometheus-port", "/metrics is on the main port"),
    Ignored("--master-addr", _STORE),
    Ignored("--master-port", _STORE),
    Ignored("--weights-cache-override", "give the folder as --model-id"),
    Ignored("--disable-custom-kernels", "shards choose their kernels themselves", takes_value=False),
    Ignored("--rope-scaling", _NO_ROPE),
    Ignored("--rope-factor", _NO_ROPE),
    Ignored("--otlp-endpoint", "traces are not exported"),
    Ignored("--otlp-service-name", "traces are not exported"),
    Ignored("--ngrok", _TUNNEL, takes_value=False),
    Ignored("--ngrok-authtoken", _TUNNEL),
    Ignored("--ngrok-edge", _TUNNEL),
    Ignored("--tokenizer-config-path", "the model's own tokenizer_config.json is used"),
    Ignored("--usage-stats", "usage is never reported to anybody"),
    Ignored("--enable-prefill-logprobs", "prompt log-probabilities are always available", takes_value=False),
    Ignored("--env", "the start-up log says what matters", takes_value=False, short=("-e",), has_env=False),
)
LISTS: Final = ("lora_adapters", "shard_addresses", "cors_allow_origin")


class Loaded(NamedTuple):
    """The settings, and what to log about flags without effect as soon as there is a log."""

    config: Config
    notices: tuple[str, ...]


def load_config(arguments: Sequence[str], environ: Mapping[str, str]) -> Loaded:
    """Reads flags and environment. A bad value ends the process with one line and exit code 2; `--help` with 0."""
    parser = _build_parser()
    given = vars(parser.parse_args(list(arguments)))
    try:
        values: dict[str, Any] = {spec.name: _value(spec, given[spec.name], environ) for spec in fields(Config)}
        config = Config(**values)
        _check_together(config)
    except ValueError as error:
        parser.error(str(error))
    return Loaded(config, tuple(_notices(given, environ)))


def config_table() -> str:
    """The README's configuration table, in Markdown."""
    lines = ["| Flag | Environment | Default | Meaning |", "|---|---|---|---|"]
    group = ""
    for spec in fields(Config):
        option = _option_of(spec)
        if option.group != group:
            group = option.group
            lines.append(f"| **{group}** | | | |")
        flags = ", ".join(f"`{flag}`" for flag in _flags(spec))
        names = ", ".join(f"`{name}`" for name in _env_names(spec))
        default = _show(spec.default)
        lines.append(f"| {flags} | {names} | {f'`{default}`' if default else ''} | {_help(option)} |")
    lines.append("| **Accepted without effect** | | | |")
    lines.extend(f"| `{item.flag}` | {_show_env(item)} | | {item.reason} |" for item in IGNORED)
    return "\n".join(lines) + "\n"


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage of sixty flags before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class _OneSpelling(argparse.Action):
    """Stores what a flag was given and refuses a second spelling of it; values of lists add up."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, flag: str | None = None
    ) -> None:
        before: _Given | None = getattr(namespace, self.dest)
        if before and before.flag != flag:
            parser.error(f"{before.flag} and {flag} mean the same: give one of them")
        given = _Given(str(flag), values)
        if before and self.dest in LISTS:
            given = _Given(before.flag, f"{before.value},{values}")
        setattr(namespace, self.dest, given)


class _Given(NamedTuple):
    flag: str
    value: str


def _build_parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="python -m router",
        usage="%(prog)s [OPTIONS]",
        description="Serves a language model over HTTP.",
        epilog=f"In the environment a flag is {ENV_PREFIX}<FLAG>, one of TGI's also <FLAG>: {ENV_PREFIX}NUM_SHARD or "
        "NUM_SHARD for --num-shard. A flag beats the environment, the environment beats the default.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=42, width=120),
    )
    specs: dict[str, list[Field[Any]]] = {}
    for spec in fields(Config):
        specs.setdefault(_option_of(spec).group, []).append(spec)
    for group, members in specs.items():
        section = parser.add_argument_group(group)
        for spec in members:
            default = _show(spec.default)
            text = _help(_option_of(spec)) + (f" (default: {default})" if default else "")
            _add_flag(section, _flags(spec), spec.name, text, takes_value=_kind(spec) != "bool")
    section = parser.add_argument_group("Accepted without effect")
    for item in IGNORED:
        _add_flag(section, (item.flag, *item.short), item.flag, item.reason, takes_value=item.takes_value)
    return parser


def _add_flag(
    section: argparse._ArgumentGroup, flags: Sequence[str], name: str, text: str, *, takes_value: bool
) -> None:
    """Flags that are switches may be followed by true or false, as in the environment."""
    text = text.replace("%", "%%")
    if takes_value:
        section.add_argument(*flags, dest=name, action=_OneSpelling, metavar="X", help=text)
    else:
        section.add_argument(*flags, dest=name, action=_OneSpelling, metavar="X", help=text, nargs="?", const="true")


def _option_of(spec: Field[Any]) -> Option:
    option: Option = spec.metadata["option"]
    return option


def _kind(spec: Field[Any]) -> str:
    """The type's name without `| None`; annotations are strings in this module."""
    return str(spec.type).removesuffix(" | None")


def _flags(spec: Field[Any]) -> tuple[str, ...]:
    return (f"--{spec.name.replace('_', '-')}", *_option_of(spec).flags)


def _env_names(spec: Field[Any]) -> tuple[str, ...]:
    return (ENV_PREFIX + spec.name.upper(), *_option_of(spec).env)


def _help(option: Option) -> str:
    return option.help + (f" [{', '.join(option.choices)}]" if option.choices else "")


def _show(default: object) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return "" if default in (None, ()) else str(default)


def _bare_name(item: Ignored) -> str:
    return item.flag.removeprefix("--").replace("-", "_").upper() if item.has_env else ""


def _show_env(item: Ignored) -> str:
    return f"`{_bare_name(item)}`" if item.has_env else ""


def _value(spec: Field[Any], given: _Given | None, environ: Mapping[str, str]) -> Value:
    """A setting from wherever it is given first. Raises `ValueError` with the flag's or variable's name."""
    found = given or _from_environment(spec, environ)
    if found is None:
        return cast(Value, spec.default)
    return _parse(spec, found)


def _from_environment(spec: Field[Any], environ: Mapping[str, str]) -> _Given | None:
    prefixed, *bare = _env_names(spec)
    if _is_set(spec, prefixed, environ):
        return _Given(prefixed, environ[prefixed])
    names = [name for name in bare if _is_set(spec, name, environ)]
    if len(names) > 1 and spec.name != "port":  # an image may set PORT; Vertex AI knows where it will ask
        raise ValueError(f"{' and '.join(names)} mean the same: set one of them")
    return _Given(names[0], environ[names[0]]) if names else None


def _is_set(spec: Field[Any], name: str, environ: Mapping[str, str]) -> bool:
    value = environ.get(name, "").strip()
    if spec.name != "port" or not value:
        return bool(value)
    # A Kubernetes Service called "shardstream" sets SHARDSTREAM_PORT=tcp://10.0.0.1:80 in every pod beside it.
    return not value.startswith("tcp://") if name.startswith(ENV_PREFIX) else value.isdecimal()


def _parse(spec: Field[Any], given: _Given) -> Value:
    option, text = _option_of(spec), given.value.strip()
    kind = _kind(spec)
    if kind == "bool":
        return _parse_bool(given.flag, text)
    if kind == "tuple[str, ...]":
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind == "str":
        if not option.choices:
            return text
        if text.lower() not in option.choices:
            raise ValueError(f"{given.flag}: {text!r} is not one of {', '.join(option.choices)}")
        return text.lower()
    return _parse_number(given.flag, text, option, int if kind == "int" else float)


def _parse_bool(flag: str, text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError(f"{flag}: {text!r} is neither true nor false")
    return text.lower() in ("true", "1")


def _parse_number(flag: str, text: str, option: Option, kind: type[int] | type[float]) -> int | float:
    try:
        number = kind(text)
    except ValueError:
        raise ValueError(f"{flag}: {text!r} is not {'an integer' if kind is int else 'a number'}") from None
    low = float("-inf") if option.at_least is None else option.at_least
    high = float("inf") if option.at_most is None else option.at_most
    if not low <= number <= high or number in (float("-inf"), float("inf")):
        raise ValueError(f"{flag}: {text} is not between {low:g} and {high:g}")
    return number


def _check_together(config: Config) -> None:
    """Rules between settings, with TGI's names and sentences."""
    max_input, max_total, max_batch = config.max_input_tokens, config.max_total_tokens, config.max_batch_total_tokens
    if max_input and max_total and max_input >= max_total:
        raise ValueError(f"`max_input_tokens` must be < `max_total_tokens`. Given: {max_input} and {max_total}")
    if max_total and max_batch and max_total > max_batch:
        raise ValueError(f"`max_total_tokens` must be <= `max_batch_total_tokens`. Given: {max_total} and {max_batch}")
    if config.model_name in (adapter.name for adapter in parse_adapters(config.lora_adapters)):
        raise ValueError(f"a LoRA adapter and the model are both called {config.model_name}")
    for path in (config.aip_predict_route, config.aip_health_route):
        if path is not None and (not path.startswith("/") or "{" in path):
            raise ValueError(f"{path!r} is not the path of a route")
    if config.sharded is not None and config.num_shard and config.sharded != (config.num_shard > 1):
        raise ValueError(f"`sharded` is {str(config.sharded).lower()} but `num_shard` is {config.num_shard}")
    if config.sharded and not (config.num_shard or config.shard_addresses):
        raise ValueError("`sharded` is true: say how many ranks with `num_shard`")
    if config.num_shard and config.shard_addresses and config.num_shard != len(config.shard_addresses):
        raise ValueError(f"`num_shard` is {config.num_shard} but there are {len(config.shard_addresses)} addresses")


def _notices(given: Mapping[str, _Given | None], environ: Mapping[str, str]) -> Iterator[str]:
    for item in IGNORED:
        found = given[item.flag] or _Given(_bare_name(item), environ.get(_bare_name(item), ""))
        if found.value.lower() not in ("", "false", "0", "off"):
            yield f"{found.flag} has no effect: {item.reason}"
