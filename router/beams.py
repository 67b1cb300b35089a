"""A beam search as one sequence: the beams run, a token at a time, and the winner's tokens are told at the end.

Every beam of a step is a sequence of its own, of one new token, whose prompt is the beam so far. So a shard needs to
know nothing of beams: the full blocks of a beam are prefix hits for whatever grows out of it, only the tokens behind
them are fed again, and a lost group replays the step. What a step returns of a beam is its likeliest tokens; which of
them go on is `core.beams`' to say.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace

from router.core.beams import Beam, BeamSearch
from router.core.request import BeamSettings, FinishReason, Request
from router.errors import RouterError
from router.generation import Finish, Generation, Token, TokenEvent
from router.text.output import OutputText
from router.text.tokenizer import Tokenizer


class BeamGeneration(Generation):
    """A generation whose search goes on while it is read, and not by `pass_on`: requests that stream have no beams.

    `submit` queues a beam, and raises `NotReady` when there is nobody left to run it. `on_end` is told once: how the
    winner finished, what the search failed with, or None when its client left.
    """

    def __init__(
        self,
        request: Request,
        settings: BeamSettings,
        submit: Callable[[Request], Generation],
        tokenizer: Tokenizer,
        on_end: Callable[[Generation, Finish | RouterError | None], None],
    ) -> None:
        super().__init__(request, self._abandon)
        self._submit = submit
        self._tokenizer = tokenizer
        self._on_end = on_end
        self._search = BeamSearch(settings, request.max_new_tokens, request.eos_token_ids)
        self._first: TokenEvent | None = None
        self._top_tokens: list[list[tuple[Token, ...]]] = []
        self._parts = [submit(self._request_of(Beam()))]

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """The winner's events, once there is one. Raises the `RouterError` that a beam failed with."""
        for event in await self.read_all():
            yield event

    async def read_all(self) -> list[TokenEvent]:
        """The same together."""
        try:
            await self._run()
        except RouterError as error:
            self._cancel_parts()
            self.fail(error)
            self._on_end(self, error)
            raise
        for event in self._events_of(self._search.winner):
            self.publish(event)
            if event.finish is not None:
                self._on_end(self, event.finish)
        return await super().read_all()

    async def _run(self) -> None:
        while True:
            self._take_step([event for part in self._parts for event in await part.read_all()])
            if self._search.is_done:
                return
            self._parts = []
            for beam in self._search.running:
                self._parts.append(self._submit(self._request_of(beam)))

    def _request_of(self, beam: Beam) -> Request:
        """The first waits for its turn like any other; those behind it go on with what runs already."""
        request, is_first = self.request, not beam.token_ids
        num_top = max(self._search.num_candidates, request.sampling.top_n_tokens)
        return replace(
            request,
            prompt=request.prompt + beam.token_ids,
            max_new_tokens=1,
            sampling=replace(request.sampling, top_n_tokens=num_top),
            prompt_logprobs=request.prompt_logprobs and is_first,
            priority=request.priority if is_first else request.priority + 1,
            beams=None,
        )

    def _take_step(self, events: Sequence[TokenEvent]) -> None:
        if self._first is None:
            [self._first] = events
            self._planned_at = self._submitted_at + self._parts[0].queue_s
        num_told = self.request.sampling.top_n_tokens
        self._top_tokens.append([_with_ties(event.top_tokens, num_told) for event in events])
        self._search.advance([tuple((token.id, token.logprob) for token in event.top_tokens) for event in events])

    def _events_of(self, beam: Beam) -> Iterator[TokenEvent]:
        text = OutputText(self._tokenizer, self.request.prompt, (), keep_stop=True)
        num_tokens = len(beam.token_ids)
        reason = FinishReason.LENGTH if num_tokens == self.request.max_new_tokens else FinishReason.EOS_TOKEN
        for index, (token_id, logprob, source) in enumerate(
            zip(beam.token_ids, beam.logprobs, beam.sources, strict=True), 1
        ):
            piece = text.push(token_id, last=index == num_tokens)
            finish = Finish(reason, text.text, num_tokens) if index == num_tokens else None
            token = Token(token_id, piece.text, logprob, piece.special)
            event = TokenEvent(index, token, self._top_tokens[index - 1][source], finish)
            yield self._with_prompt(event) if index == 1 else event

    def _with_prompt(self, event: TokenEvent) -> TokenEvent:
        """Scores of the prompt came with the first step."""
        assert self._first is not None, "there is a winner without a step"
        return event._replace(prompt_logprobs=self._first.prompt_logprobs, prompt_tops=self._first.prompt_tops)

    def _cancel_parts(self) -> None:
        for part in self._parts:
            part.cancel()

    def _abandon(self, _: Generation) -> None:
        self._cancel_parts()
        self.drop()
        self._on_end(self, None)


def _with_ties(top_tokens: tuple[Token, ...], num: int) -> tuple[Token, ...]:
    """The first `num`, and those that are as likely as the last of them."""
    if num == 0:
        return ()
    least = top_tokens[:num][-1].logprob
    return tuple(token for token in top_tokens if token.logprob >= least)
