"""Request bodies: raw bytes under a limit, strict JSON, then a model. Every refusal is a `RouterError`.

FastAPI's own body parsing is not used: it answers NaN and lone surrogates with 500, and other mistakes in a shape that
no client of this contract reads.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, TypeVar

import orjson
from fastapi import Request
from pydantic import ValidationError as PydanticError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect

from router.api.schemas import Body, mismatch
from router.api.sse import ClientGone
from router.errors import BadBody, BodyTooLarge, BodyTooSlow, UnsupportedMedia

FIRST_BYTES_S: Final = 10.0
MIN_BYTES_PER_S: Final = 10_000
"""How fast a body must come, behind the time for its first bytes."""

TOO_DEEP: Final = "recursion limit exceeded"
MAX_DEPTH: Final = 127
"""Objects and lists within each other, as in serde_json; what is written again elsewhere must not fail of depth."""

B = TypeVar("B", bound=Body)
Path = Sequence[str | int]


class Parsed(NamedTuple):
    """A body that is JSON and has yet to be fitted to a model; `raw` is kept to say where it does not fit."""

    raw: bytes
    value: object

    def has(self, field: str) -> bool:
        """Whether it is an object with this field: what routes that take several shapes tell them by."""
        return isinstance(self.value, dict) and field in self.value

    def option(self, name: str) -> object:
        """One of the `options` that clients of the hosted Inference API put beside what they ask; None without it."""
        options = self.value.get("options") if isinstance(self.value, dict) else None
        return options.get(name) if isinstance(options, dict) else None


async def read_body(request: Request, model: type[B], *, limit_bytes: int) -> B:
    """The body as a model. Raises `UnsupportedMedia`, `BodyTooLarge` or `BadBody`, in this order of checks."""
    return fit_body(await read_json(request, limit_bytes=limit_bytes), model)


async def read_json(request: Request, *, limit_bytes: int, any_type: bool = False) -> Parsed:
    """The body before anybody knows its model, with `any_type` whatever it is declared to be; may be called again on
    the same request. Raises as `read_body`."""
    parsed: Parsed | None = getattr(request.state, "parsed_body", None)
    if parsed is None:
        _check_headers(request, any_type=any_type)
        raw = await _read_bytes(request, limit_bytes)
        parsed = request.state.parsed_body = Parsed(raw, _parse_json(raw))
    return parsed


def _check_headers(request: Request, *, any_type: bool) -> None:
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = media == "application/json" or (media.startswith("application/") and media.endswith("+json"))
    if not is_json and not any_type:
        raise UnsupportedMedia("Expected request with `Content-Type: application/json`")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMedia("Expected request without `Content-Encoding`")


async def _read_bytes(request: Request, limit_bytes: int) -> bytes:
    """A body that declares to be too large is refused unread, one that trickles when it should be here by now."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit_bytes:
        raise BodyTooLarge
    body, begun_at = bytearray(), asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(begun_at + FIRST_BYTES_S) as deadline:
            async for part in request.stream():
                body += part
                if len(body) > limit_bytes:
                    raise BodyTooLarge
                deadline.reschedule(begun_at + FIRST_BYTES_S + len(body) / MIN_BYTES_PER_S)
    except TimeoutError:
        raise BodyTooSlow from None
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(body)


def fit_body(parsed: Parsed, model: type[B]) -> B:
    """Raises `BadBody` where the JSON is not what the model takes."""
    raw, value = parsed
    if not isinstance(value, dict):
        raise BadBody(422, f"{mismatch(value, f'struct {model.__name__}')} at {_position(raw, len(raw.rstrip()))}")
    try:
        return model.model_validate(value)
    except PydanticError as error:
        raise BadBody(422, _first_problem(error, raw)) from error


def _parse_json(raw: bytes) -> object:
    """orjson refuses NaN, infinite numbers, lone surrogates and bad UTF-8; json sees repeated keys."""
    try:
        value: object = orjson.loads(raw)
        json.loads(raw, object_pairs_hook=_refuse_repeated)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise BadBody(400, f"{error.msg} at {where}") from error
    except RecursionError as error:
        raise BadBody(400, TOO_DEEP) from error
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH and is_deep(value):
        raise BadBody(400, TOO_DEEP)
    return value


def is_deep(value: object) -> bool:
    """Whether a JSON value is nested deeper than bodies may be."""
    level = _inner(value)
    for _ in range(MAX_DEPTH - 1):
        level = [inner for outer in level for inner in _inner(outer)]
    return bool(level)


def _inner(outer: object) -> list[object]:
    """The objects and lists in one of them."""
    items: Iterable[object] = ()
    if isinstance(outer, dict):
        items = outer.values()
    elif isinstance(outer, list):
        items = outer
    return [item for item in items if isinstance(item, dict | list)]


def _refuse_repeated(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields: dict[str, object] = {}
    for name, value in pairs:
        if name in fields:
            raise BadBody(422, f"duplicate field `{name[:40]}`")
        fields[name] = value
    return fields


def _first_problem(error: PydanticError, raw: bytes) -> str:
    """serde's sentence: path, problem, position. It meets missing fields last, when the object ends."""
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] == "missing")
    problem = problems[0]
    path: Path = problem["loc"]
    if problem["type"] == "missing":
        path, field = path[:-1], path[-1]
        sentence = f"missing field `{field}`"
    else:
        sentence = _sentence(problem)
    prefix = f"{_dotted(path)}: " if path else ""
    return f"{prefix}{sentence} at {_position(raw, _end_of_value(raw, path))}"


def _sentence(problem: ErrorDetails) -> str:
    match problem["type"]:
        case "serde":
            return problem["msg"]
        case "literal_error":
            return f"unknown variant, expected one of {problem['ctx']['expected']}"
        case "model_type":
            return str(mismatch(problem["input"], f"struct {problem['ctx']['class_name']}"))
        case "dict_type":
            return str(mismatch(problem["input"], "a map"))
    return str(mismatch(problem["input"], "another type"))


def _dotted(path: Path) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _end_of_value(raw: bytes, path: Path) -> int:
    """Where the value at `path` ends, in bytes. `raw` is valid JSON in which the path exists."""
    text = raw.decode()
    decoder = json.JSONDecoder()
    start = _skip_blanks(text, 0)
    for part in path:
        start = _start_of_member(text, start, part, decoder)
    _, end = decoder.raw_decode(text, start)
    return len(text[:end].encode())


def _start_of_member(text: str, start: int, wanted: str | int, decoder: json.JSONDecoder) -> int:
    """Where a member of the object or array that begins at `start` begins."""
    index, at = 0, _skip_blanks(text, start + 1)
    while True:
        name: object = index
        if isinstance(wanted, str):
            name, at = decoder.raw_decode(text, at)
            at = _skip_blanks(text, _skip_blanks(text, at) + 1)
        if name == wanted:
            return at
        _, at = decoder.raw_decode(text, at)
        at = _skip_blanks(text, _skip_blanks(text, at) + 1)
        index += 1


def _skip_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _position(raw: bytes, end: int) -> str:
    line, line_start = raw.count(b"\n", 0, end) + 1, raw.rfind(b"\n", 0, end) + 1
    return f"line {line} column {end - line_start}"
