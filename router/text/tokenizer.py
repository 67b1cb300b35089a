"""Text to token ids and back to bytes, from the files of a Hugging Face directory, with the `tokenizers` package alone.

`transformers` would do the same and bring torch along. What it adds at load time is done here: special tokens that only
`tokenizer_config.json` names, and the BOS token that Llama's tokenizer classes put in front of a text whatever
`tokenizer.json` says.

Every token has bytes of its own (`Tokenizer.bytes_of`), the same wherever it stands behind other tokens; that is what
the incremental detokenizer is made of. Three families of decoders have this property: byte-level BPE, sentencepiece
(with or without byte fallback) and WordPiece. Others are refused.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Final, TypeVar

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as FastTokenizer

from router.errors import StartupError, ValidationError
from router.text.model_files import read_object

LONG_TEXT_CHARS: Final = 4_000
"""Texts above this leave the event loop; encoding this many takes about a millisecond."""

NO_LIMIT: Final = 1_000_000_000
"""`model_max_length` above this is transformers' way to say that there is none."""

LLAMA_CLASSES: Final = frozenset({"LlamaTokenizer", "LlamaTokenizerFast"})
KNOWN_DECODERS: Final = frozenset({"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"})
SPECIAL_NAMES: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")

T = TypeVar("T")
Json = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class TextToken:
    """A token of an encoded text; `start` and `stop` are byte offsets into it, both 0 for tokens that are not in it."""

    id: int
    text: str
    start: int
    stop: int


class Tokenizer:
    """One model's tokenizer. Long texts are worked on in `workers` threads, where encoding does not hold the GIL."""

    def __init__(
        self, fast: FastTokenizer, *, special_ids: frozenset[int], model_max_length: int | None = None, workers: int = 2
    ) -> None:
        fast.no_truncation()
        fast.no_padding()
        self._fast = fast
        self._special_ids = special_ids
        self._pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="tokenizer")
        self._decoders = _decoder_names(fast)
        self._bytes: dict[int, bytes] = {}
        self.whole_texts: Mapping[int, str | None] = _WholeTexts(self.bytes_of)
        """What a token adds to a text that ends with a whole character; None for one with parts of characters."""
        self._byte_of_char = _byte_level_alphabet()
        self._context = _plain_token(fast, special_ids)
        self._marker_ids = _marker_ids(fast)
        self.model_max_length = model_max_length
        self.vocab_size: int = fast.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, directory: Path, *, workers: int = 2) -> Tokenizer:
        """Raises `StartupError` when the directory holds no tokenizer that can be used."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise StartupError(f"{directory} has no tokenizer.json")
        try:
            fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more specific
            raise StartupError(f"{path} cannot be read: {error}") from error
        config = read_object(directory / "tokenizer_config.json")
        named = {**read_object(directory / "special_tokens_map.json"), **config}
        _add_configured_tokens(fast, config, read_object(directory / "added_tokens.json"))
        if config.get("tokenizer_class") in LLAMA_CLASSES:
            _surround_as_llama(fast, config)
        return cls(
            fast,
            special_ids=_special_ids(fast, named),
            model_max_length=_max_length(config),
            workers=workers,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Takes 1.3 ms per thousand tokens: long texts go through `encode_async`.

        Raises `ValidationError` for a text that the tokenizer has no token for and no unknown token either.
        """
        # Only the batch calls release the GIL, and only the fast ones spare themselves the offsets: twice the speed.
        try:
            [encoding] = self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except Exception as error:  # the package raises nothing more specific
            raise ValidationError(f"tokenizer error {error}") from error
        ids: list[int] = encoding.ids
        return ids

    async def encode_async(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """As `encode`, without keeping the event loop from other requests."""
        return await self.run(text, partial(self.encode, add_special_tokens=add_special_tokens))

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[TextToken]:
        """The text's tokens with the part of it that each one covers. Raises as `encode`."""
        try:
            [encoding] = self._fast.encode_batch([text], add_special_tokens=add_special_tokens)
        except Exception as error:  # the package raises nothing more specific
            raise ValidationError(f"tokenizer error {error}") from error
        byte_at = _byte_positions(text)
        return [
            TextToken(token_id, text[start:stop], byte_at[start], byte_at[stop])
            for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    async def run(self, text: str, work: Callable[[str], T]) -> T:
        """`work(text)`: at once when the text is short, else in one of the threads."""
        if len(text) <= LONG_TEXT_CHARS:
            return work(text)
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, text)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def token_text(self, token_id: int) -> str:
        """The token alone; a token that is only part of a character gives U+FFFD, an unknown id nothing."""
        text: str = self._fast.decode([token_id], skip_special_tokens=False)
        return text

    def marker_id(self, text: str) -> int | None:
        """The token by which a grammar must name a marker that is written so; None if it is text like any other."""
        return self._marker_ids.get(text)

    def special_text(self, token_id: int) -> str:
        """A special token as it is written, e.g. `<|im_end|>`."""
        return self._fast.id_to_token(token_id) or ""

    def bytes_of(self, token_id: int) -> bytes:
        """What a token adds to the UTF-8 text before it; nothing for special tokens and ids without a token."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._compute_bytes(token_id)
        return known

    def _compute_bytes(self, token_id: int) -> bytes:
        token = self._fast.id_to_token(token_id)
        if token is None or token_id in self._special_ids:
            return b""
        if "ByteLevel" in self._decoders:
            return self._byte_level(token)
        byte = BYTE_TOKEN.fullmatch(token) if "ByteFallback" in self._decoders else None
        if byte:
            return bytes([int(byte[1], 16)])
        before = self._fast.decode([self._context], skip_special_tokens=False)
        both = self._fast.decode([self._context, token_id], skip_special_tokens=False)
        return both[len(before) :].encode()

    def _byte_level(self, token: str) -> bytes:
        """One character per byte, unless some character stands for none: then the token is text as it is."""
        try:
            return bytes([self._byte_of_char[char] for char in token])
        except KeyError:
            return token.encode()

    def describe(self) -> str:
        """The text of a tokenizer.json."""
        text: str = self._fast.to_str()
        return text

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class _WholeTexts(dict[int, str | None]):
    """Filled as it is asked."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        super().__init__()
        self._bytes_of = bytes_of

    def __missing__(self, token_id: int) -> str | None:
        try:
            text = self._bytes_of(token_id).decode()
        except UnicodeDecodeError:
            text = None
        self[token_id] = text
        return text


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's mapping, reversed: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _byte_positions(text: str) -> Sequence[int]:
    """Byte offset of every character, and of the end."""
    if text.isascii():
        return range(len(text) + 1)
    return list(accumulate((len(char.encode()) for char in text), initial=0))


def _decoder_names(fast: FastTokenizer) -> frozenset[str]:
    if fast.decoder is None:  # tokens are words, joined by spaces
        return frozenset()
    decoder = json.loads(fast.decoder.__getstate__())
    names = frozenset(part["type"] for part in decoder.get("decoders", [decoder]))
    unknown = sorted(names - KNOWN_DECODERS)
    if unknown:
        raise StartupError(f"tokenizer.json: text cannot be streamed through the decoder {', '.join(unknown)}")
    return names


def _plain_token(fast: FastTokenizer, special_ids: frozenset[int]) -> int:
    """Some ordinary token: what others are decoded behind. The smallest id, so that it is always the same one."""
    ordinary = (i for t, i in fast.get_vocab().items() if t.isascii() and t.isalnum() and i not in special_ids)
    found = min(ordinary, default=None)
    if found is None:
        raise StartupError("tokenizer.json: the vocabulary has no ordinary token")
    return found


def _marker_ids(fast: FastTokenizer) -> dict[str, int]:
    """What llguidance takes for markers: not only special tokens, but every added token in angle brackets."""
    added = [(token.content, token_id, token.special) for token_id, token in fast.get_added_tokens_decoder().items()]
    return {text: token_id for text, token_id, is_special in added if is_special or (text[:1] + text[-1:] == "<>")}


def _add_configured_tokens(fast: FastTokenizer, config: Json, added: Json) -> None:
    """Tokens that only the files beside `tokenizer.json` know, in the order of their ids."""
    tokens = {token_id: AddedToken(text, normalized=False) for text, token_id in added.items()}
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        tokens |= {int(token_id): AddedToken(**entry) for token_id, entry in decoder.items()}
    for _, token in sorted(tokens.items(), key=lambda item: int(str(item[0]))):
        if fast.token_to_id(token.content) is None:
            fast.add_tokens([token])


def _special_ids(fast: FastTokenizer, named: Json) -> frozenset[int]:
    marked = {token_id for token_id, token in fast.get_added_tokens_decoder().items() if token.special}
    by_name = {fast.token_to_id(text) for text in _special_texts(named)}
    return frozenset(marked | {token_id for token_id in by_name if token_id is not None})


def _special_texts(named: Json) -> Iterator[str]:
    extra = named.get("additional_special_tokens")
    for value in [*(named.get(name) for name in SPECIAL_NAMES), *(extra if isinstance(extra, list) else [])]:
        text = _content(value)
        if text:
            yield text


def _content(value: object) -> str | None:
    """Special tokens are strings or objects with a `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _surround_as_llama(fast: FastTokenizer, config: Json) -> None:
    """`add_bos_token` (default on) and `add_eos_token` (default off) override what `tokenizer.json` does."""
    bos = _content(config.get("bos_token")) if config.get("add_bos_token", True) else None
    eos = _content(config.get("eos_token")) if config.get("add_eos_token", False) else None
    tokens = [(text, token_id) for text in (bos, eos) if text and (token_id := fast.token_to_id(text)) is not None]
    known = [text for text, _ in tokens]
    single = [*([bos] if bos in known else []), "$A", *([eos] if eos in known else [])]
    fast.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)


def _max_length(config: Json) -> int | None:
    length = config.get("model_max_length")
    return int(length) if isinstance(length, int | float) and 0 < length < NO_LIMIT else None
