"""Thousands of seeded lives of the scheduler, in which whatever can happen to a sequence happens in any order."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from router.core.request import FinishReason, Request, Sampling
from router.core.scheduler import POISON_FAULT, Limits
from tests.ghost import COPYING_SEED
from tests.house import NUM_ADAPTERS, VOCAB_SIZE, House, make_request


class RandomLife:
    """One seeded run: requests of every kind arrive, are cancelled, stopped and replayed, until all have ended."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.met: Counter[str] = Counter()
        depth = self.random.randint(1, 3)
        caching = self.random.random() < 0.85
        max_drafts = self.random.choice((0, 1, 3, 6))
        self.house = House(
            self._draw_limits(),
            depth=depth,
            prefix_caching=caching,
            max_drafts=max_drafts,
            max_prompt_tokens=self.random.choice((None, None, 3)),
            max_repeats=self.random.choice((0, 1, 3, 6)),
        )
        self.num_to_come = self.random.randint(4, 20)
        self.crash_chance = self.random.choice((0.0, 0.01, 0.03, 0.2))
        self.common_prompt = [self.random.randrange(5) for _ in range(40)]
        self.met[f"depth {depth}"] += 1

    def _draw_limits(self) -> Limits:
        draw = self.random.randint
        block_size = self.random.choice((1, 2, 3, 4, 8))
        return Limits(draw(24, 120) // block_size + 1, block_size, draw(1, 8), draw(1, 24))

    def live(self) -> Counter[str]:
        for _ in range(4000):
            self._happen()
            if self.house.turn():
                if self.random.random() < 0.1:
                    self.house.scheduler.check_integrity()
            elif self.num_to_come == 0:
                break
        self._check_nothing_is_left()
        return self.met + Counter(self._count())

    def _happen(self) -> None:
        chance = self.random.random
        if self.num_to_come and chance() < 0.5:
            self._arrive()
        if chance() < 0.3:
            self.house.fill()  # so that what follows happens amid whatever can be in flight
        if chance() < 0.02:
            self._end_one()
        if chance() < self.crash_chance:
            self._crash()

    def _arrive(self) -> None:
        self.num_to_come -= 1
        request = self._draw_request()
        capacity = self.house.scheduler.limits.capacity_tokens
        if len(request.prompt) + request.max_new_tokens > capacity:
            with pytest.raises(ValueError, match="never fit"):
                self.house.scheduler.add(request)
            self.met["refused"] += 1
            return
        self.house.add(request)

    def _draw_request(self) -> Request:
        chance, draw = self.random.random, self.random.randint
        copying = COPYING_SEED if chance() < 0.5 else 0
        sampling = Sampling(seed=copying + draw(0, 3)) if chance() < 0.8 else self._draw_sampling()
        return Request(
            request_id="r",
            prompt=tuple(self._draw_prompt()),
            max_new_tokens=draw(1, 24),
            sampling=sampling,
            eos_token_ids=tuple(draw(1, VOCAB_SIZE - 1) for _ in range(draw(0, 4))),
            prompt_logprobs=chance() < 0.25,
            grammar=self.random.choice(("force:1/1", "force:1/3", "force:1/9")) if chance() < 0.4 else "",
            priority=draw(-1, 1) if chance() < 0.3 else 0,
            cache_salt=b"tenant" if chance() < 0.1 else b"",
            adapter=draw(1, NUM_ADAPTERS) if chance() < 0.3 else 0,
        )

    def _draw_sampling(self) -> Sampling:
        return Sampling(
            do_sample=True,
            temperature=0.7,
            top_k=self.random.randint(1, 3),
            repetition_penalty=1.1,
            logit_bias=((3, -1.5),),
            top_n_tokens=self.random.randint(0, 3),
            prompt_top_n_tokens=self.random.randint(0, 2),
            bad_words=((1, 2), (5,)),
        )

    def _draw_prompt(self) -> list[int]:
        chance, draw = self.random.random, self.random.randint
        others = [sequence.tokens for sequence in self.house.expected]
        if others and chance() < 0.4:
            tokens = self.random.choice(others)
            return [*tokens[: draw(1, len(tokens))], draw(1, 3)]
        if chance() < 0.6:
            return [*self.common_prompt[: draw(1, 40)], draw(1, 3)]
        return [draw(1, VOCAB_SIZE - 1) for _ in range(draw(1, 30))]

    def _end_one(self) -> None:
        alive = [sequence for sequence, expected in self.house.expected.items() if not expected.ended]
        if not alive:
            return
        sequence = self.random.choice(alive)
        self.met[f"ended while {sequence.state.value}"] += 1
        self.met["ended amid repeats"] += self.house.is_amid_repeats()
        if self.random.random() < 0.5:
            self.house.cancel(sequence)
            return
        self.house.scheduler.finish(sequence, FinishReason.STOP_SEQUENCE)
        self.house.expected[sequence].ended = True

    def _crash(self) -> None:
        died = self.random.random() < 0.8
        in_flight = self.house.seats_in_flight()
        limits = self._draw_limits() if self.random.random() < 0.1 else None
        self.met["deaths" if died else "reconnects"] += 1
        self.met["deaths in flight"] += died and self.house.scheduler.num_outstanding > 0
        self.met["new limits"] += limits is not None
        self.met["deaths amid forced tokens"] += self._num_amid_forced()
        self.met["deaths amid repeats"] += died and self.house.is_amid_repeats()
        self.met["deaths amid drafts"] += any(sequence.num_drafts for sequence in self.house.expected)
        for end in self.house.crash(limits, died=died):
            assert end.fault is not None
            is_poison = end.fault == POISON_FAULT
            assert not is_poison or len(in_flight) == 1, f"sequence {end.sequence.arrival} was not alone at its death"
            self.met["poisoned" if is_poison else "no longer fits"] += 1

    def _num_amid_forced(self) -> int:
        """Sequences that run and know tokens whose score they do not know."""
        running = self.house.scheduler.running
        return sum(s.num_prompt_tokens <= s.num_scored < len(s.tokens) for s in running)

    def _check_nothing_is_left(self) -> None:
        house = self.house
        stuck = [s.arrival for s, expected in house.expected.items() if not expected.ended]
        assert not stuck, f"sequences {stuck} never ended"
        house.scheduler.check_integrity()
        assert house.scheduler.num_free_blocks == house.scheduler.limits.num_blocks - 1
        house.add(make_request((1,), 1))
        house.run()
        assert len(house.ghost.seats) == 1, "a seat was never closed"

    def _count(self) -> dict[str, int]:
        counters = self.house.scheduler.counters
        opens = [open_ for plan in self.house.plans for open_ in plan.opens]
        rows = [row for plan in self.house.plans for row in plan.rows]
        scored_twice = [s for s in self.house.expected if s.request.prompt_logprobs and s.num_admissions > 1]
        return {
            "preemptions": counters.num_preemptions,
            "hit tokens": counters.num_hit_tokens,
            "drains": counters.num_drains,
            "forced tokens": counters.num_forced_tokens,
            "accepted drafts": sum(counters.num_rows_by_accepted[1:]),
            "drafts of which none was accepted": counters.num_rows_by_accepted[0],
            "dropped tokens": counters.num_dropped_tokens,
            "replays": counters.num_replays,
            "chunks that do not emit": sum(not row.emit for row in rows),
            "rows without literals": sum(not row.literals for row in rows),
            "repeats": sum(plan.num_repeats for plan in self.house.plans),
            "repeats that bring blocks": sum(
                plan.num_repeats > 0 and any(r.new_blocks for r in plan.rows) for plan in self.house.plans
            ),
            "opens with history": sum(bool(open_.history) for open_ in opens),
            "replayed prompt logprobs": len(scored_twice),
        }


SITUATIONS = (
    *("depth 1", "depth 2", "depth 3", "refused", "ended while waiting", "ended while running", "deaths"),
    *("deaths in flight", "reconnects", "new limits", "poisoned", "no longer fits", "preemptions", "hit tokens"),
    *("drains", "dropped tokens", "replays", "chunks that do not emit", "rows without literals"),
    *("opens with history", "replayed prompt logprobs", "forced tokens", "deaths amid forced tokens"),
    *("accepted drafts", "drafts of which none was accepted", "deaths amid drafts", "repeats"),
    *("repeats that bring blocks", "ended amid repeats", "deaths amid repeats"),
)


@pytest.mark.parametrize("first_seed", range(0, 2400, 400))
def test_random_lives_give_the_oracles_tokens_and_leak_nothing(first_seed: int) -> None:
    met: Counter[str] = Counter()

    for seed in range(first_seed, first_seed + 400):
        try:
            met += RandomLife(seed).live()
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise

    assert [situation for situation in SITUATIONS if met[situation] == 0] == []
