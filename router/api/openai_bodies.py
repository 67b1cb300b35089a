"""The bodies of the OpenAI routes: OpenAI's fields in every form that clients send, turned into ours.

Strict on the way in as the native bodies are: null is the same as a field left out, unknown fields are ignored, and a
wrong type is told in serde's words. What is understood but not supported is refused by its name, never ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeVar

import orjson
from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic import ValidationError as PydanticError

from router.api.openai_formats import read_format
from router.api.schemas import F32, I32, U32, Body, Bool, Seed, Text, mismatch, refusal
from router.errors import ValidationError
from router.text.grammar import Grammar
from router.validate import Manner, Parameters

MAX_CHOICES: Final = 128
"""OpenAI's own limit of `n`."""

T = TypeVar("T")
Json = dict[str, object]


def _object(value: object) -> object:
    if value is not None and type(value) is not dict:
        raise mismatch(value, "a map")
    return value


def _stops(value: object) -> tuple[str, ...]:
    """A string, a list, or nothing. Empty strings stop nothing."""
    given = [value] if type(value) is str else value or []
    if type(given) is not list or not all(type(stop) is str for stop in given):
        raise mismatch(value, "a string or a sequence of strings")
    return tuple(stop for stop in given if stop)


def _biases(value: object) -> dict[str, float]:
    """OpenAI's map; TGI's clients send a list, which never meant anything."""
    if value is None or type(value) is list:
        return {}
    if type(value) is not dict:
        raise mismatch(value, "a map")
    if not all(type(bias) in (int, float) for bias in value.values()):
        raise refusal("invalid value in `logit_bias`, expected f32")
    return {token: float(bias) for token, bias in value.items()}


def _prompts(value: object) -> list[str | tuple[int, ...]]:
    """A text, token ids, or a list of either."""
    if type(value) is str:
        return [value]
    if type(value) is not list:
        raise mismatch(value, "a string, token ids, or a sequence of either")
    if not value:
        raise refusal("Empty array detected. Do not use an empty array for the prompt.")
    if _are_token_ids(value):
        return [tuple(value)]
    if all(type(prompt) is str for prompt in value):
        return list(value)
    if all(type(prompt) is list and _are_token_ids(prompt) for prompt in value):
        return [tuple(prompt) for prompt in value]
    raise refusal("invalid value: expected a string, token ids, or a sequence of either")


def _are_token_ids(values: list[object]) -> bool:
    return all(type(token_id) is int and 0 <= token_id < 2**32 for token_id in values)


def _messages(value: object) -> list[Json]:
    if type(value) is not list:
        raise mismatch(value, "a sequence")
    return [_message(message) for message in value]


def _message(value: object) -> Json:
    """One message; what templates know beyond OpenAI's fields is kept."""
    if type(value) is not dict:
        raise mismatch(value, "struct Message")
    if type(value.get("role")) is not str:
        raise refusal("missing field `role`")
    calls = value.get("tool_calls") or None
    if calls is not None and (type(calls) is not list or not all(map(_is_call, calls))):
        raise refusal("invalid `tool_calls`, expected a sequence of {id, type, function: {name, arguments}}")
    content = value.get("content")
    if content is None and calls is None:
        raise refusal("missing field `content`")
    return {**value, "tool_calls": calls, "content": _text_of(content)}


def _is_call(value: object) -> bool:
    return isinstance(value, dict) and _has_name(value.get("function"))


def _has_name(function: object) -> bool:
    return isinstance(function, dict) and type(function.get("name")) is str


def _text_of(content: object) -> str | None:
    """Parts are joined without anything between them. Raises for parts that are not text."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise mismatch(content, "a string or a sequence of parts")
    return "".join(map(_text_of_part, content))


def _text_of_part(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) and kind in ("text", "input_text", "output_text") else None
    if isinstance(text, str):
        return text
    raise refusal(f"content of type {orjson.dumps(kind).decode()} is not supported: this model reads text")


def _tools(value: object) -> list[Json]:
    """OpenAI's functions; TGI's `arguments` are OpenAI's `parameters`, and both may be missing."""
    if value is None:
        return []
    if type(value) is not list:
        raise mismatch(value, "a sequence")
    return [_tool(tool) for tool in value]


def _tool(value: object) -> Json:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(value, dict) or value.get("type", "function") != "function" or not isinstance(function, dict):
        raise refusal("invalid `tools`, expected a sequence of {type: function, function: {name, parameters}}")
    if not _has_name(function):
        raise refusal("missing field `name`")
    parameters = function.get("parameters") or function.get("arguments") or {"type": "object", "properties": {}}
    rest = {key: item for key, item in function.items() if key not in ("arguments", "parameters") and item is not None}
    return {"type": "function", "function": {**rest, "parameters": parameters}}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether functions are called; `name` is the only one that may be."""

    mode: Literal["auto", "none", "required"] = "auto"
    name: str | None = None


def _tool_choice(value: object) -> ToolChoice:
    """A mode, a function's name alone, as TGI's clients send it, or a function."""
    match value:
        case None:
            return ToolChoice()
        case "auto" | "none" | "required":
            return ToolChoice(value)
        case str(name) | {"function": {"name": str(name)}}:
            return ToolChoice("required", name)
    raise mismatch(value, "auto, none, required, or a function")


def _documents(value: object) -> list[Json] | None:
    if value is not None and (type(value) is not list or not all(type(document) is dict for document in value)):
        raise mismatch(value, "a sequence of maps")
    return value


def _input(value: object) -> list[Json]:
    """A text is what the user says. What was thought before is not part of a conversation."""
    if isinstance(value, list):
        value = [item for item in value if not (isinstance(item, dict) and item.get("type") == "reasoning")]
    return _messages([{"role": "user", "content": value}] if isinstance(value, str) else value)


def _generation_config(value: object) -> GenerationConfig:
    """transformers' own, as an object or, from its command line, as JSON in a string."""
    try:
        return GenerationConfig.model_validate(orjson.loads(value) if isinstance(value, str) else value or {})
    except (orjson.JSONDecodeError, PydanticError) as error:
        raise refusal("invalid `generation_config`, expected transformers' GenerationConfig as JSON") from error


def _format(value: object) -> object:
    """As it came, for it is told back."""
    read_format(value)
    return value


def _schema(**schema: object) -> WithJsonSchema:
    return WithJsonSchema(dict(schema))


STRINGS: Final = _schema(type="array", items={"type": "string"})
Object = Annotated[dict[str, Any] | None, BeforeValidator(_object), _schema(type="object")]
Stops = Annotated[tuple[str, ...], BeforeValidator(_stops), STRINGS]
Biases = Annotated[dict[str, float], BeforeValidator(_biases), _schema(type="object")]
Prompts = Annotated[list[Any], BeforeValidator(_prompts), STRINGS]
Objects = _schema(type="array", items={"type": "object"})
Format = Annotated[Grammar | None, BeforeValidator(read_format), _schema(type="object")]


class GenerationConfig(Body):
    """What of transformers' GenerationConfig means something here."""

    do_sample: Bool = None
    max_new_tokens: U32 = None
    min_new_tokens: U32 = None
    min_p: F32 = None
    no_repeat_ngram_size: U32 = None
    repetition_penalty: F32 = None
    stop_strings: Stops = ()
    temperature: F32 = None
    top_k: I32 = None
    top_p: F32 = None
    typical_p: F32 = None


class StreamOptions(Body):
    include_usage: Bool = Field(None, description="Send a last chunk with the usage.")
    continuous_usage_stats: Bool = Field(None, description="Send the usage so far with every chunk.")


class SamplingBody(Body):
    """What completions and chat have in common."""

    model: Text = Field(None, description="LoRA adapter to use; any other name means the model.", examples=["tgi"])
    do_sample: Bool = Field(None, description="False takes the likeliest token, as temperature 0 does.")
    frequency_penalty: F32 = Field(None, description="Subtracted from a token's logit for every time it was generated.")
    ignore_eos: Bool = Field(None, description="Go on behind the end token.")
    logit_bias: Biases = Field({}, description="Added to the logits of these token ids, -100 to 100.")
    max_tokens: U32 = Field(None, description="Most tokens to generate.", examples=[20])
    min_p: F32 = Field(None, description="Keep tokens at least this share as likely as the likeliest.")
    min_tokens: U32 = Field(None, description="The text does not end of itself before.")
    n: U32 = Field(None, description="How many answers to each prompt.", examples=[1])
    presence_penalty: F32 = Field(None, description="Subtracted from the logit of every generated token.")
    repetition_penalty: F32 = Field(None, description="1 is no penalty.")
    response_format: Format = Field(
        None, description="text, json_object, json_schema or regex, in OpenAI's, TGI's and Hugging Face's shapes."
    )
    seed: Seed = Field(None, description="Of the random numbers.", examples=[42])
    stop: Stops = Field((), description="A string or a list: the text ends before the first of them.")
    stream: Bool = Field(None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = None
    temperature: F32 = Field(None, description="Divides the logits; 0 takes the likeliest token.", examples=[0.7])
    top_k: I32 = Field(None, description="Keep the k likeliest tokens; 0 and -1 keep all.")
    top_p: F32 = Field(None, description="Keep the smallest set of tokens with this mass; 1 keeps all.")
    typical_p: F32 = Field(None, description="Keep the most typical tokens with this mass.")

    @property
    def num_choices(self) -> int:
        """Raises `ValidationError`."""
        num = 1 if self.n is None else self.n
        if not 0 < num <= MAX_CHOICES:
            raise ValidationError(f"`n` must be > 0 and <= {MAX_CHOICES}. Given: {num}")
        return num

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def to_parameters(self, config: GenerationConfig, *, max_new_tokens: int | None, num_top: int | None) -> Parameters:
        """In the validator's words. `config` counts where the body itself says nothing."""
        top_k = _first(self.top_k, config.top_k)
        return Parameters(
            adapter_id=self.model,
            do_sample=True,
            frequency_penalty=self.frequency_penalty,
            grammar=self.response_format,
            logit_bias=self.logit_bias,
            max_new_tokens=max_new_tokens,
            min_new_tokens=_first(self.min_tokens, config.min_new_tokens),
            min_p=_first(self.min_p, config.min_p),
            no_repeat_ngram_size=config.no_repeat_ngram_size,
            presence_penalty=self.presence_penalty,
            repetition_penalty=_first(self.repetition_penalty, config.repetition_penalty),
            seed=None if self.seed is None else self.seed % 2**64,
            stop=self.stop or config.stop_strings,
            temperature=_first(self.temperature, config.temperature) or None,
            top_k=None if top_k == -1 else top_k,
            top_n_tokens=num_top,
            top_p=_first(self.top_p, config.top_p),
            typical_p=_first(self.typical_p, config.typical_p),
        )

    def to_manner(self, config: GenerationConfig) -> Manner:
        """OpenAI draws tokens unless the temperature is 0, and removes the stop string."""
        temperature = _first(self.temperature, config.temperature)
        do_sample = _first(self.do_sample, config.do_sample if self.temperature is None else None)
        return Manner(
            greedy=temperature == 0 or do_sample is False,
            ignore_eos=bool(self.ignore_eos),
            keep_stop=False,
            num_sequences=self.num_choices,
        )


def _first(given: T | None, default: T | None) -> T | None:
    return default if given is None else given


DEFAULT_COMPLETION_TOKENS: Final = 16
"""OpenAI's own default of `max_tokens`, for completions only."""

NO_CONFIG: Final = GenerationConfig()


class CompletionRequest(SamplingBody):
    """Body of /v1/completions."""

    prompt: Prompts = Field(
        description="A text, token ids, or a list of either.", examples=["The capital of France is"]
    )
    best_of: U32 = Field(None, description="Generate that many answers and give the `n` likeliest.")
    echo: Bool = Field(None, description="Begin the answer with the prompt.")
    logprobs: U32 = Field(None, description="Return tokens with their log-probabilities, and so many likeliest ones.")
    suffix: Text = Field(None, description="Not supported.")
    truncate: U32 = Field(None, description="Keep the last tokens of the prompt.")

    @property
    def num_new_tokens(self) -> int:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens


class ChatRequest(SamplingBody):
    """Body of /v1/chat/completions and /chat_tokenize."""

    messages: Annotated[list[Json], BeforeValidator(_messages), Objects] = Field(
        description="The conversation.", examples=[[{"role": "user", "content": "What is the capital of France?"}]]
    )
    add_generation_prompt: Bool = Field(None, description="Whether the prompt ends where the assistant begins.")
    chat_template: Text = Field(None, description="Used in place of the model's, if the operator allows it.")
    chat_template_kwargs: Object = Field(None, description="Further variables of the chat template.")
    continue_final_message: Bool = Field(None, description="Default: if the last message is the assistant's.")
    documents: Annotated[list[Json] | None, BeforeValidator(_documents), Objects] = Field(
        None, description="For templates that show documents."
    )
    generation_config: Annotated[GenerationConfig, BeforeValidator(_generation_config)] = NO_CONFIG
    logprobs: Bool = Field(None, description="Return tokens with their log-probabilities.")
    max_completion_tokens: U32 = Field(None, description="The same as max_tokens.")
    parallel_tool_calls: Bool = Field(None, description="False: at most one call.")
    reasoning_effort: Text = Field(None, description="For templates that know it.")
    tool_choice: Annotated[ToolChoice, BeforeValidator(_tool_choice), _schema(type="string")] = Field(
        ToolChoice(), description="auto, none, required, or a function: its name, or the object that names it."
    )
    tool_prompt: Text = Field(None, description="How to call tools, for models whose template does not say.")
    tools: Annotated[list[Json], BeforeValidator(_tools), Objects] = Field([], description="Functions to call.")
    top_logprobs: U32 = Field(None, description="So many likeliest tokens with every token.")

    @property
    def num_new_tokens(self) -> int | None:
        """None: all that fit."""
        given = _first(self.max_completion_tokens, self.max_tokens)
        return _first(given, self.generation_config.max_new_tokens)

    @property
    def wants_continuation(self) -> bool:
        """As TGI: a last message of the assistant's is gone on with, unless the client says otherwise."""
        last = self.messages[-1] if self.messages else {}
        if self.continue_final_message is not None:
            return self.continue_final_message
        is_answer = last.get("role") == "assistant" and bool(last.get("content")) and not last.get("tool_calls")
        return is_answer and self.add_generation_prompt is None


class LoadRequest(Body):
    """Body of /load_model."""

    model: Text = Field(None, description="The model that is wanted.")


class TextOptions(Body):
    """`text` of /v1/responses."""

    format: Annotated[dict[str, Any] | None, BeforeValidator(_format), _schema(type="object")] = Field(
        None, description="text, json_object or json_schema."
    )
    verbosity: Text = Field(None, description="Only medium.")


class ReasoningOptions(Body):
    """What `reasoning` of /v1/responses may say."""

    effort: Text = Field(None, description="For templates that know it.")


class ResponseRequest(Body):
    """Body of /v1/responses, for text."""

    input: Annotated[list[Json], BeforeValidator(_input), _schema(type="string")] = Field(
        description="A text, or messages.", examples=["What is the capital of France?"]
    )
    model: Text = Field(None, description="LoRA adapter to use; any other name means the model.")
    instructions: Text = Field(None, description="The system message.")
    max_output_tokens: U32 = Field(None, description="Most tokens to generate; default: all that fit.")
    metadata: Object = Field(None, description="Returned as it is.")
    reasoning: ReasoningOptions | None = Field(None, description="How much is thought.")
    stream: Bool = Field(None, description="Answer with server-sent events.")
    temperature: F32 = Field(None, description="Divides the logits; 0 takes the likeliest token.")
    text: TextOptions | None = Field(None, description="What the text must look like.")
    top_p: F32 = Field(None, description="Keep the smallest set of tokens with this mass.")

    @property
    def format(self) -> dict[str, Any] | None:
        """None: free text."""
        return self.text.format if self.text else None
