"""How the tokens of one sequence are chosen, as the shard sees it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The fields and neutral values of the wire's `Sampling`.

    Tokens outside the vocabulary in `bias_token_ids` or `bad_words` cannot be generated and are passed over.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    bias_token_ids: tuple[int, ...] = ()
    bias_values: tuple[float, ...] = ()
    watermark_gamma: float = 0.0
    watermark_delta: float = 0.0
    top_n_tokens: int = 0
    prompt_top_n_tokens: int = 0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether the largest logit is all that is wanted, except for end tokens that come too early."""
        return not (self.do_sample or self.looks_back or self.bias_token_ids or self.top_n_tokens)

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0 or self.typical_p < 1.0

    @property
    def penalises_counts(self) -> bool:
        return self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    @property
    def forbids_known(self) -> bool:
        """Whether no token may come twice."""
        return self.no_repeat_ngram_size == 1

    @property
    def penalises(self) -> bool:
        """Whether known tokens have other scores than their logits."""
        return self.repetition_penalty != 1.0 or self.penalises_counts or self.forbids_known

    @property
    def watermarks(self) -> bool:
        return self.watermark_delta != 0.0

    @property
    def forbids(self) -> bool:
        """Whether runs of known tokens rule out what would follow."""
        return self.no_repeat_ngram_size > 1 or bool(self.bad_words)

    @property
    def needs_tokens(self) -> bool:
        """Whether the host must know the sequence's tokens, one by one."""
        return self.watermarks or self.forbids

    @property
    def looks_back(self) -> bool:
        """Whether choosing a token needs the tokens before it, beyond the model's own logits."""
        return self.needs_tokens or self.penalises
