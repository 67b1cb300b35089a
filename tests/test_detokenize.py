"""Tokens to text: whole characters, right spaces, nothing lost; and the tokenizer's own files."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders

from router.errors import StartupError
from router.text.detokenize import Detokenizer
from router.text.output import OutputText, Piece
from router.text.tokenizer import LONG_TEXT_CHARS, TextToken, Tokenizer
from tests.server import PATIENCE_S
from tests.shards import real_model
from tests.tiny_tokenizers import byte_level, sentencepiece, tokenizer_of, wordpiece

KINDS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "wordpiece": wordpiece}


def real() -> FastTokenizer:
    fast: FastTokenizer = FastTokenizer.from_file(str(real_model() / "tokenizer.json"))
    return fast


def push_all(output: OutputText, token_ids: Sequence[int]) -> list[Piece]:
    last = len(token_ids) - 1
    return [output.push(token_id, last=index == last) for index, token_id in enumerate(token_ids)]


def plain_text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces if not piece.special)


def behind(fast: FastTokenizer, prompt: list[int], token_ids: list[int]) -> str:
    """The package's own decode of the whole, without the prompt's part of it."""
    before: str = fast.decode(prompt)
    whole: str = fast.decode(prompt + token_ids)
    assert whole.startswith(before)
    return whole[len(before) :]


def random_tokens(rng: random.Random, tokenizer: Tokenizer, fast: FastTokenizer) -> list[int]:
    """Mostly text cut into tokens, so that characters span them, some tokens at random and some special ones."""
    texts = ["東京 café", " naïve 😀", "the capital", " two words<think>", "ß", " of a a"]
    ids: list[int] = []
    for _ in range(rng.randint(1, 5)):
        ids += tokenizer.encode(rng.choice(texts), add_special_tokens=False)
        ids += rng.choices(range(tokenizer.vocab_size), k=rng.randint(0, 2))
    return ids


@pytest.mark.parametrize("make", [byte_level, wordpiece, real])
def test_random_sequences_decode_as_the_whole(make: Callable[[], FastTokenizer]) -> None:
    fast = make()
    tokenizer = tokenizer_of(fast)
    rng = random.Random(11)
    prompt = tokenizer.encode("the capital", add_special_tokens=False)
    for _ in range(400):
        token_ids = random_tokens(rng, tokenizer, fast)
        while tokenizer.is_special(token_ids[-1]):
            token_ids.pop()
            token_ids = token_ids or prompt

        output = OutputText(tokenizer, prompt, (), keep_stop=True)
        pieces = push_all(output, token_ids)

        expected = behind(fast, prompt, token_ids)
        assert output.text == expected, token_ids
        assert plain_text(pieces) == expected


def test_random_sequences_with_byte_fallback_decode_as_the_whole() -> None:
    """Runs of byte tokens are valid here: the package turns every byte of an invalid run into U+FFFD, good ones too."""
    fast = sentencepiece()
    tokenizer = tokenizer_of(fast)
    rng = random.Random(12)
    prompt = tokenizer.encode("the capital")
    words = range(3 + 256, tokenizer.vocab_size)
    for _ in range(400):
        token_ids: list[int] = []
        for _ in range(rng.randint(1, 6)):
            token_ids += rng.choices(words, k=2)
            token_ids += [3 + byte for byte in rng.choice(["é", "漢", "😀", "x"]).encode()]

        output = OutputText(tokenizer, prompt, (), keep_stop=True)
        pieces = push_all(output, token_ids)

        assert output.text == plain_text(pieces) == behind(fast, prompt, token_ids)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_no_piece_holds_part_of_a_character(make: Callable[[], FastTokenizer]) -> None:
    tokenizer = tokenizer_of(make())
    text = " 東京 😀 café" if make is not wordpiece else "the capital of France"

    output = OutputText(tokenizer, tokenizer.encode("a"), (), keep_stop=True)
    pieces = push_all(output, tokenizer.encode(text, add_special_tokens=False))

    assert "\ufffd" not in "".join(piece.text for piece in pieces)
    assert plain_text(pieces).split() == text.split()


def test_token_inside_a_character_shows_nothing() -> None:
    tokenizer = tokenizer_of(byte_level())
    first, *rest = tokenizer.encode("\u0107", add_special_tokens=False)

    detokenizer = Detokenizer(tokenizer, tokenizer.encode("x"))

    assert detokenizer.push(first) == ""
    assert [detokenizer.push(token_id) for token_id in rest] == ["\u0107"]


def test_end_inside_a_character_shows_a_replacement_and_keeps_the_rest() -> None:
    tokenizer = tokenizer_of(byte_level())
    token_ids = [*tokenizer.encode("ok "), *tokenizer.encode("\u2603", add_special_tokens=False)[:-1]]

    output = OutputText(tokenizer, tokenizer.encode("x"), (), keep_stop=True)
    pieces = push_all(output, token_ids)

    assert output.text == "ok \ufffd"
    assert plain_text(pieces) == "ok \ufffd"


def test_end_inside_a_character_before_a_special_token_is_part_of_the_text() -> None:
    tokenizer = tokenizer_of(byte_level())
    token_ids = tokenizer.encode("\u2603")[:-1] + tokenizer.encode("<|end|>")

    output = OutputText(tokenizer, tokenizer.encode("x"), (), keep_stop=True)
    pieces = push_all(output, token_ids)

    assert output.text == "\ufffd"
    assert pieces[-1].text == "<|end|>"


def test_leading_space_is_kept_behind_the_prompt() -> None:
    tokenizer = tokenizer_of(sentencepiece())
    the = tokenizer.encode("the", add_special_tokens=False)

    output = OutputText(tokenizer, tokenizer.encode("a"), (), keep_stop=True)

    assert output.push(the[0], last=True).text == " the"


def test_prompt_that_ends_inside_a_character_is_continued() -> None:
    tokenizer = tokenizer_of(byte_level())
    snowman = tokenizer.encode("\u2603", add_special_tokens=False)

    output = OutputText(tokenizer, [*tokenizer.encode("hi"), *snowman[:-1]], (), keep_stop=True)

    assert output.push(snowman[-1], last=False).text == "\u2603"


def test_special_token_is_shown_but_not_part_of_the_text() -> None:
    tokenizer = tokenizer_of(byte_level())
    [end] = tokenizer.encode("<|end|>")

    output = OutputText(tokenizer, tokenizer.encode("x"), (), keep_stop=True)
    pieces = push_all(output, [*tokenizer.encode("hi"), end, end])

    assert pieces[-2:] == [Piece("<|end|>", special=True, stopped=False)] * 2
    assert output.text == "hi"


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.encode(char)[0] for char in text]


def test_kept_stop_string_ends_the_text_behind_it_even_inside_a_token() -> None:
    tokenizer = tokenizer_of(byte_level())
    [two_words] = tokenizer.encode("two words")

    output = OutputText(tokenizer, tokenizer.encode("x"), ("o w",), keep_stop=True)
    pieces = [output.push(letters(tokenizer, "a")[0], last=False), output.push(two_words, last=False)]

    assert pieces == [Piece("a", False, False), Piece("two w", False, True)]
    assert output.text == "atwo w"


def test_kept_stop_string_holds_nothing_back() -> None:
    tokenizer = tokenizer_of(byte_level())

    output = OutputText(tokenizer, tokenizer.encode("x"), ("abc",), keep_stop=True)

    assert [output.push(i, last=False).text for i in letters(tokenizer, "zab")] == ["z", "a", "b"]


def test_removed_stop_string_is_never_shown() -> None:
    tokenizer = tokenizer_of(byte_level())

    output = OutputText(tokenizer, tokenizer.encode("x"), ("abc",), keep_stop=False)
    pieces = [output.push(i, last=False) for i in letters(tokenizer, "zababc")]

    assert [piece.text for piece in pieces] == ["z", "", "", "ab", "", ""]
    assert [piece.stopped for piece in pieces] == [False] * 5 + [True]
    assert output.text == "zab"


def test_held_text_is_released_when_it_ends_otherwise() -> None:
    tokenizer = tokenizer_of(byte_level())

    output = OutputText(tokenizer, tokenizer.encode("x"), ("abc",), keep_stop=False)
    pieces = push_all(output, letters(tokenizer, "zab"))

    assert [piece.text for piece in pieces] == ["z", "", "ab"]
    assert output.text == "zab"


def test_held_text_is_part_of_the_text_when_a_special_token_ends_it() -> None:
    tokenizer = tokenizer_of(byte_level())

    output = OutputText(tokenizer, tokenizer.encode("x"), ("abc",), keep_stop=False)
    push_all(output, [*letters(tokenizer, "zab"), *tokenizer.encode("<|end|>")])

    assert output.text == "zab"


@pytest.mark.parametrize("keep_stop", [True, False])
def test_random_texts_are_cut_at_their_first_stop_string(keep_stop: bool) -> None:
    tokenizer = tokenizer_of(byte_level())
    ids = {char: letters(tokenizer, char)[0] for char in "abc"}
    rng = random.Random(5)
    num_stopped = 0
    for _ in range(500):
        text = "".join(rng.choices("abc", k=12))
        stop = "".join(rng.choices("abc", k=rng.randint(1, 4)))
        output = OutputText(tokenizer, [ids["a"]], (stop,), keep_stop=keep_stop)

        shown = ""
        for index, char in enumerate(text):
            piece = output.push(ids[char], last=index == len(text) - 1)
            shown += piece.text
            if piece.stopped:
                break

        cut = text.find(stop)
        expected = text if cut < 0 else text[: cut + len(stop) * keep_stop]
        assert shown == output.text == expected, (text, stop)
        num_stopped += cut >= 0
    assert 100 < num_stopped < 490


def test_stop_string_may_name_a_special_token() -> None:
    tokenizer = tokenizer_of(byte_level())

    output = OutputText(tokenizer, tokenizer.encode("x"), ("<|end|>",), keep_stop=True)

    assert output.push(tokenizer.encode("<|end|>")[0], last=False) == Piece("<|end|>", True, True)
    assert output.text == ""


def test_empty_stop_string_ends_the_text_with_its_first_token() -> None:
    tokenizer = tokenizer_of(byte_level())

    output = OutputText(tokenizer, tokenizer.encode("x"), ("", "zz"), keep_stop=True)

    assert output.push(letters(tokenizer, "a")[0], last=False) == Piece("a", False, True)


def test_offsets_are_bytes_of_the_text() -> None:
    tokenizer = tokenizer_of(byte_level())

    tokens = tokenizer.tokenize("z\u2603<|end|>")

    assert tokens[0] == TextToken(tokenizer.encode("z")[0], "z", 0, 1)
    assert {(t.text, t.start, t.stop) for t in tokens[1:-1]} == {("\u2603", 1, 4)}
    assert tokens[-1] == TextToken(tokenizer.encode("<|end|>")[0], "<|end|>", 4, 11)


def test_tokens_that_are_not_in_the_text_have_no_offsets() -> None:
    tokens = tokenizer_of(sentencepiece()).tokenize("the")

    assert tokens[0] == TextToken(1, "", 0, 0)


def test_long_texts_are_encoded_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(byte_level())
    text = "The capital of France. " * (LONG_TEXT_CHARS // 10)
    encode, loop_went_on = tokenizer.encode, threading.Event()

    def encode_late(*args: Any, **options: Any) -> list[int]:
        assert loop_went_on.wait(PATIENCE_S), "the event loop waits for the text"
        return encode(*args, **options)

    async def encode_meanwhile() -> list[int]:
        encoding = asyncio.create_task(tokenizer.encode_async(text))
        await asyncio.sleep(0)
        loop_went_on.set()
        return await encoding

    monkeypatch.setattr(tokenizer, "encode", encode_late)

    assert asyncio.run(encode_meanwhile()) == encode(text)


def save(directory: Path, fast: FastTokenizer, **config: object) -> Path:
    fast.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_load_reads_length_and_named_special_tokens(tmp_path: Path) -> None:
    save(tmp_path, byte_level(), model_max_length=512, eos_token={"content": "<think>"})

    tokenizer = Tokenizer.load(tmp_path)

    assert tokenizer.model_max_length == 512
    assert tokenizer.is_special(tokenizer.encode("<think>")[0])
    assert not tokenizer.is_special(tokenizer.encode("two words")[0])


def test_load_takes_an_enormous_length_for_none(tmp_path: Path) -> None:
    save(tmp_path, byte_level(), model_max_length=1e30)

    assert Tokenizer.load(tmp_path).model_max_length is None


def test_load_adds_tokens_that_only_the_config_names(tmp_path: Path) -> None:
    fast = byte_level()
    new_id = fast.get_vocab_size()
    save(tmp_path, fast, added_tokens_decoder={str(new_id): {"content": "<|new|>", "special": True}})

    tokenizer = Tokenizer.load(tmp_path)

    assert tokenizer.encode("<|new|>") == [new_id]
    assert tokenizer.is_special(new_id)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"tokenizer_class": "LlamaTokenizerFast"}, "S."),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, "."),
        ({"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}, "S.E"),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, "."),
    ],
)
def test_load_surrounds_texts_as_llama_classes_do(tmp_path: Path, config: dict[str, object], expected: str) -> None:
    save(tmp_path, byte_level(), bos_token="<|start|>", eos_token="<|end|>", **config)

    tokenizer = Tokenizer.load(tmp_path)

    start, end = tokenizer.encode("<|start|><|end|>", add_special_tokens=False)
    letter = tokenizer.encode("a", add_special_tokens=False)
    around = {"S": [start], ".": letter, "E": [end]}
    assert tokenizer.encode("a") == [token_id for part in expected for token_id in around[part]]


def test_load_refuses_a_directory_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"model": 5}'])
def test_load_refuses_a_broken_file_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)

    with pytest.raises(StartupError, match=r"tokenizer\.json cannot be read") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_load_refuses_decoders_that_cannot_be_streamed(tmp_path: Path) -> None:
    fast = byte_level()
    fast.decoder = decoders.CTC()
    save(tmp_path, fast)

    with pytest.raises(StartupError, match="CTC"):
        Tokenizer.load(tmp_path)


def test_specials_of_the_real_model() -> None:
    tokenizer = Tokenizer.load(real_model())

    end = tokenizer.encode("<|im_end|>")
    assert len(end) == 1
    assert tokenizer.is_special(end[0])
    assert tokenizer.model_max_length == 8192
    assert len(tokenizer.encode("2026")) == 4
