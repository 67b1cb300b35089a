"""The native bodies as pydantic models: strict on the way in, documentation on the way out.

Every optional or defaulted field takes null, unknown fields are ignored, and a wrong type is told in serde's words,
which the clients of TGI know. Answers are written by `render`, not by these models; `*Response` and its parts only
describe them in the OpenAPI document, and a test holds both together.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from router.text.grammar import Grammar, GrammarKind
from router.validate import Parameters

MAX_QUOTED_CHARS: Final = 60
"""How much of a wrong value an error repeats."""

PARAMETER_NAMES: Final = frozenset(parameter.name for parameter in fields(Parameters))


def mismatch(value: object, expected: str) -> PydanticCustomError:
    """serde's `invalid type` sentence."""
    return refusal(f"invalid type: {_describe(value)}, expected {expected}")


def refusal(text: str) -> PydanticCustomError:
    """Any other sentence about a value; the position in the body is added to it."""
    return PydanticCustomError("serde", "{text}", {"text": text})


def _describe(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return f"boolean `{str(value).lower()}`"
        case int():
            return f"integer `{value}`"
        case float():
            return f"floating point `{value}`"
        case str():
            cut = value if len(value) <= MAX_QUOTED_CHARS else value[:MAX_QUOTED_CHARS] + "…"
            return f"string {json.dumps(cut, ensure_ascii=False)}"
        case list():
            return "sequence"
    return "map"


def _integer(kind: str, low: int, high: int) -> Callable[[object], int | None]:
    def check(value: object) -> int | None:
        if value is None:
            return None
        if type(value) is not int:
            raise mismatch(value, kind)
        if not low <= value <= high:
            raise refusal(f"invalid value: integer `{value}`, expected {kind}")
        return value

    return check


def _float32(value: object) -> float | None:
    """The nearest float32, as a shard will see it; so 1e-50 is 0 already here."""
    if value is None:
        return None
    if type(value) not in (int, float):
        raise mismatch(value, "f32")
    try:
        number: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except (OverflowError, struct.error):
        number = math.inf
    if math.isinf(number):
        raise refusal(f"invalid value: {_describe(value)}, expected f32")
    return number


def _only(kind: type, expected: str, *, required: bool = False) -> Callable[[object], object]:
    def check(value: object) -> object:
        if type(value) is not kind and (required or value is not None):
            raise mismatch(value, expected)
        return value

    return check


Unsigned = Annotated[int, Field(ge=0)]
U32 = Annotated[Unsigned | None, BeforeValidator(_integer("u32", 0, 2**32 - 1))]
U64 = Annotated[Unsigned | None, BeforeValidator(_integer("u64", 0, 2**64 - 1))]
Seed = Annotated[int | None, BeforeValidator(_integer("u64", -(2**63), 2**64 - 1))]
I32 = Annotated[int | None, BeforeValidator(_integer("i32", -(2**31), 2**31 - 1))]
F32 = Annotated[float | None, BeforeValidator(_float32)]
Bool = Annotated[bool | None, BeforeValidator(_only(bool, "a boolean"))]
Text = Annotated[str | None, BeforeValidator(_only(str, "a string"))]
RequiredText = Annotated[str, BeforeValidator(_only(str, "a string", required=True))]
IsList = BeforeValidator(_only(list, "a sequence"))
IsGivenList = BeforeValidator(_only(list, "a sequence", required=True))


def _bad_word(value: object) -> object:
    """Text, a token id, or a run of token ids."""
    if type(value) is str:
        return value
    ids = value if type(value) is list else [value]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < 2**32:
            raise mismatch(value, "a string or token ids")
    return value


def _early_stopping(value: object) -> object:
    if value is not None and value != "never" and type(value) is not bool:
        raise mismatch(value, 'a boolean or "never"')
    return value


def _bytes_of(value: object) -> bytes:
    """Without a look at every number: there may be a million of them."""
    if type(value) is not list:
        raise mismatch(value, "a sequence")
    try:
        return bytes(value)
    except (TypeError, ValueError):
        raise refusal("invalid value: expected a sequence of u8") from None


U8s = Annotated[
    bytes,
    BeforeValidator(_bytes_of),
    WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}}),
]


class Body(BaseModel):
    """What all request bodies have in common."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class GrammarBody(Body):
    """What the text must look like."""

    type: Literal["json", "json_object", "json_schema", "regex", "lark"] = Field(
        description="How `value` is to be read."
    )
    value: Any = Field(
        description="A JSON schema (object or string); for json_schema an object with one as `schema`; a regular "
        "expression; or a grammar in Lark's notation."
    )

    @model_validator(mode="after")
    def check_value(self) -> GrammarBody:
        if self.type in ("regex", "lark") and not isinstance(self.value, str):
            raise mismatch(self.value, "a string")
        if self.type == "json_schema":
            if not isinstance(self.value, dict):
                raise mismatch(self.value, "struct JsonSchemaConfig")
            if "schema" not in self.value:
                raise refusal("missing field `schema`")
        return self

    def to_grammar(self) -> Grammar:
        match self.type:
            case "regex":
                return Grammar(GrammarKind.REGEX, self.value)
            case "lark":
                return Grammar(GrammarKind.LARK, self.value)
            case "json_schema":
                return Grammar(GrammarKind.JSON, self.value["schema"], needs_properties=True)
        return Grammar(GrammarKind.JSON, self.value, needs_properties=True)


class GenerateParameters(Body):
    """How to generate. Leaving a field out is the same as null."""

    adapter_id: Text = Field(None, description="LoRA adapter to use; any name that is none means the model itself.")
    bad_words: Annotated[list[Annotated[str | int | list[int], BeforeValidator(_bad_word)]] | None, IsList] = Field(
        None, description="Words that must not be generated: texts, token ids, or runs of token ids."
    )
    best_of: U32 = Field(None, description="Generate that many sequences and answer with the likeliest.", examples=[1])
    decoder_input_details: Bool = Field(None, description="Return the prompt's tokens with their log-probabilities.")
    details: Bool = Field(None, description="Return the tokens and why the text ended.")
    do_sample: Bool = Field(None, description="Draw tokens instead of taking the likeliest.")
    early_stopping: Annotated[bool | Literal["never"] | None, BeforeValidator(_early_stopping)] = Field(
        None,
        description="When a beam search ends: with the `num_beams`-th beam that ended (true), when a better one is "
        'unlikely (false), or when it is as good as impossible ("never").',
        examples=[False],
    )
    frequency_penalty: F32 = Field(
        None, description="Subtracted from a token's logit for every time it was generated.", examples=[0.1]
    )
    grammar: GrammarBody | None = Field(None, description="Structure of the text.")
    length_penalty: F32 = Field(
        None,
        description="Beams are compared by log-probability / length ** length_penalty: above 0 favours long ones.",
        examples=[1.0],
    )
    logit_bias: dict[str, Annotated[float, BeforeValidator(_float32)]] | None = Field(
        None, description="Added to the logits of these token ids, -100 to 100.", examples=[{"198": -100}]
    )
    max_new_tokens: U32 = Field(None, description="Most tokens to generate; default: all that fit.", examples=[20])
    min_new_tokens: U32 = Field(None, description="The sequence does not end of itself before.", examples=[1])
    min_p: F32 = Field(None, description="Keep tokens at least this share as likely as the likeliest.", examples=[0.05])
    no_repeat_ngram_size: U32 = Field(None, description="No run of this many tokens occurs twice.", examples=[3])
    num_beams: U32 = Field(
        None, description="Above 1: search for the likeliest sequence with that many beams.", examples=[1]
    )
    presence_penalty: F32 = Field(
        None, description="Subtracted from the logit of every generated token.", examples=[0.1]
    )
    repetition_penalty: F32 = Field(None, description="1 is no penalty.", examples=[1.03])
    return_full_text: Bool = Field(None, description="Put the prompt in front of the text.")
    seed: U64 = Field(None, description="Of the random numbers.", examples=[42])
    stop: Annotated[list[RequiredText] | None, IsList] = Field(
        None, description="The text ends with the first of these.", examples=[["\n\n"]]
    )
    temperature: F32 = Field(None, description="Divides the logits.", examples=[0.7])
    top_k: I32 = Field(None, description="Keep the k likeliest tokens.", examples=[50])
    top_n_tokens: U32 = Field(None, description="Return the n likeliest tokens with every token.", examples=[5])
    top_p: F32 = Field(None, description="Keep the smallest set of tokens with this mass.", examples=[0.95])
    truncate: U32 = Field(None, description="Keep the last tokens of the prompt.", examples=[1000])
    typical_p: F32 = Field(None, description="Keep the most typical tokens with this mass.", examples=[0.95])
    watermark: Bool = Field(None, description="Favour a secret part of the vocabulary.")

    def to_parameters(self) -> Parameters:
        """The same in the validator's words; what was null keeps its default."""
        given = {name: value for name, value in self if value is not None and name in PARAMETER_NAMES}
        for name in ("stop", "bad_words"):
            if name in given:
                given[name] = tuple(tuple(item) if isinstance(item, list) else item for item in given[name])
        if self.grammar is not None:
            given["grammar"] = self.grammar.to_grammar()
        return Parameters(**given)


class GenerateRequest(Body):
    """Body of /generate, /generate_stream and /tokenize."""

    inputs: RequiredText = Field(description="The prompt.", examples=["The capital of France is"])
    parameters: GenerateParameters | None = Field(
        None, description="Left out, tokens are drawn; an empty object takes the likeliest."
    )

    def to_parameters(self) -> Parameters:
        return Parameters(do_sample=True) if self.parameters is None else self.parameters.to_parameters()


class CompatGenerateRequest(GenerateRequest):
    """Body of / and /invocations."""

    stream: Bool = Field(None, description="Answer with server-sent events.")


class TokenizePromptRequest(Body):
    """Body of /tokenize in vLLM's form."""

    prompt: RequiredText = Field(description="The text.", examples=["Hello"])
    add_special_tokens: Bool = Field(None, description="Whether to add what stands around a prompt; default: yes.")


class VertexInstance(Body):
    """One prompt of a call of /vertex. Tokens are drawn; `max_new_tokens` and `seed` are the parameters that count."""

    inputs: RequiredText = Field(description="The prompt.", examples=["The capital of France is"])
    parameters: GenerateParameters | None = None


class VertexRequest(Body):
    """Body of /vertex."""

    instances: Annotated[list[dict[str, Any]], IsGivenList] = Field(
        description="Each is a `VertexInstance`, or a body of /v1/chat/completions."
    )


class KserveInput(Body):
    """One prompt of a call of KServe's protocol, as the bytes of its UTF-8."""

    name: RequiredText
    shape: Annotated[list[Unsigned], IsGivenList]
    datatype: RequiredText
    data: U8s


class KserveOutput(Body):
    """Where the answer to the prompt at the same place goes."""

    name: RequiredText


class KserveRequest(Body):
    """Body of KServe's infer route."""

    id: RequiredText
    parameters: GenerateParameters | None = None
    inputs: Annotated[list[KserveInput], IsGivenList]
    outputs: Annotated[list[KserveOutput], IsGivenList]


class Answer(BaseModel):
    """What all answers have in common."""


class PrefillToken(Answer):
    id: int
    text: str
    logprob: float | None


class Token(Answer):
    id: int
    text: str
    logprob: float | None
    special: bool


FinishReason = Literal["length", "eos_token", "stop_sequence"]


class BestOfSequence(Answer):
    generated_text: str
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] = Field([], description="Only with top_n_tokens.")


class Details(Answer):
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] = Field([], description="Only with best_of above 1.")
    top_tokens: list[list[Token]] = Field([], description="Only with top_n_tokens.")
    prompt_tokens: int


class GenerateResponse(Answer):
    generated_text: str
    details: Details | None = Field(None, description="Only when asked for.")


class StreamDetails(Answer):
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    input_length: int
    prompt_tokens: int


class StreamResponse(Answer):
    """One server-sent event."""

    index: int = Field(description="From 1.")
    token: Token
    top_tokens: list[Token] = Field([], description="Only with top_n_tokens.")
    generated_text: str | None = Field(description="The whole text, with the last token.")
    details: StreamDetails | None


class SimpleToken(Answer):
    id: int
    text: str
    start: int = Field(description="Byte offset into the inputs.")
    stop: int


class Predictions(Answer):
    predictions: list[str] = Field(description="A text per instance, in their order.")


class KserveTensor(Answer):
    name: str
    shape: list[int]
    datatype: Literal["BYTES"]
    data: list[int] = Field(description="The text's UTF-8.")


class KserveResponse(Answer):
    id: str
    outputs: list[KserveTensor]


class Info(Answer):
    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None


class ErrorResponse(Answer):
    error: str
    error_type: str | None = Field(None, description="Left out where TGI has none.")
