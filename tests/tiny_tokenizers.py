"""Small tokenizers of the three families whose text can be streamed, made on the spot."""

from __future__ import annotations

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer

from router.text.tokenizer import Tokenizer

CORPUS = [
    "The capital of France is Paris. The capital of Spain is Madrid.",
    "Größe, naïve café, 東京 and 北京, 😀😃 and emoji; don't stop now, it's fine.",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 3 4 5 6 7 8 9",
] * 4


def byte_level() -> FastTokenizer:
    """GPT-2's family: tokens are bytes, so that one character may be several tokens."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    fast.add_tokens([AddedToken("<think>"), AddedToken("two words")])
    fast.add_special_tokens(["<|start|>", "<|end|>"])
    return fast


def sentencepiece() -> FastTokenizer:
    """Llama's family: `▁` for a space, whole words, and 256 byte tokens for what the vocabulary lacks."""
    words = ["▁", "▁the", "▁capital", "of", "▁of", "s", "e", "a", "▁a", "é", "京", "▁▁", "n", "!"]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    fast = FastTokenizer(models.Unigram([(token, -1.0) for token in vocab], 0, byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return fast


def wordpiece() -> FastTokenizer:
    """BERT's family: `##` continues a word, everything else begins one."""
    fast = FastTokenizer(models.WordPiece(unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece(prefix="##")
    special = ["[UNK]", "[SEP]"]
    fast.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    return fast


def tokenizer_of(fast: FastTokenizer) -> Tokenizer:
    special = frozenset(token_id for token_id, token in fast.get_added_tokens_decoder().items() if token.special)
    return Tokenizer(fast, special_ids=special)
