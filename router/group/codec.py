"""Plans and outputs to and from the wire: the router's only code that knows protobuf messages field by field."""

from __future__ import annotations

from itertools import chain, islice

from proto import shard_pb2 as pb
from router.core.plan import Open, Row, RowOutput, SampledToken, StepOutput, StepPlan, Timings, TopTokens
from router.core.request import Sampling
from router.errors import GroupLost


def encode_plan(plan: StepPlan) -> pb.StepPlan:
    """Columns and deltas; a plan of 256 rows is about 1 KB."""
    seats, nums_tokens, literals, new_blocks, emits, targets, nums_drafts = zip(*plan.rows, strict=True)
    return pb.StepPlan(
        step=plan.step,
        closes=plan.closes,
        opens=[_encode_open(o) for o in plan.opens],
        row_seat=seats,
        row_num_tokens=nums_tokens,
        row_num_literals=map(len, literals),
        row_num_new_blocks=map(len, new_blocks),
        row_emit=emits,
        row_num_targets=map(len, targets),
        row_num_drafts=nums_drafts if plan.has_drafts else (),
        num_repeats=plan.num_repeats,
        literals=chain.from_iterable(literals),
        new_blocks=chain.from_iterable(new_blocks),
        targets=chain.from_iterable(targets),
    )


def _encode_open(open_: Open) -> pb.Open:
    return pb.Open(
        seat=open_.seat,
        blocks=open_.blocks,
        num_cached_tokens=open_.num_cached_tokens,
        num_prompt_tokens=open_.num_prompt_tokens,
        sampling=_encode_sampling(open_.sampling),
        history=open_.history,
        grammar=open_.grammar,
        request_id=open_.request_id,
        trace_id=open_.trace_id,
        adapter=open_.adapter,
    )


def _encode_sampling(sampling: Sampling) -> pb.Sampling:
    return pb.Sampling(
        do_sample=sampling.do_sample,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        typical_p=sampling.typical_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        seed=sampling.seed,
        bias_token_ids=[token for token, _ in sampling.logit_bias],
        bias_values=[value for _, value in sampling.logit_bias],
        watermark_gamma=sampling.watermark_gamma,
        watermark_delta=sampling.watermark_delta,
        top_n_tokens=sampling.top_n_tokens,
        no_repeat_ngram_size=sampling.no_repeat_ngram_size,
        min_new_tokens=sampling.min_new_tokens,
        bad_words=[pb.TokenRun(token_ids=run) for run in sampling.bad_words],
        prompt_top_n_tokens=sampling.prompt_top_n_tokens,
    )


def decode_output(message: pb.StepOutput, plan: StepPlan, vocab_size: int, *, repeat: int = 0) -> StepOutput:
    """Cuts the ragged columns along the plan's rows. It should answer the plan's first step, or that `repeat` of it.

    Raises `GroupLost` when the answer does not fit the plan: a wrong length, a token outside the vocabulary, a token
    from a row that should not emit. Such a rank cannot be trusted with anything else it says.
    """
    step = plan.step + repeat
    try:
        if message.step != step:
            raise ValueError(f"it is numbered {message.step}")
        return _decode_output(message, plan, vocab_size)
    except (IndexError, ValueError) as error:
        raise GroupLost(f"step {step}: the answer does not fit the plan: {error}") from error


def _decode_output(message: pb.StepOutput, plan: StepPlan, vocab_size: int) -> StepOutput:
    if len(message.row_num_emitted) != len(plan.rows):
        raise ValueError(f"{len(message.row_num_emitted)} rows for {len(plan.rows)}")
    timings = message.timings
    return StepOutput(
        message.step,
        _plain_rows(message, plan, vocab_size) or _ragged_rows(message, plan, vocab_size),
        Timings(timings.wait_us, timings.inputs_us, timings.forward_us, timings.sample_us),
    )


def _plain_rows(message: pb.StepOutput, plan: StepPlan, vocab_size: int) -> list[RowOutput] | None:
    """For the answer that nearly every step has: one token of each row, and nothing else. None: it has more or less."""
    if message.row_faults or message.row_num_forced or message.forced_token_ids:
        return None
    if message.top_token_ids or message.top_logprobs or message.target_logprobs:
        return None
    if message.target_num_top or message.target_top_token_ids or message.target_top_logprobs:
        return None
    if plan.has_drafts or not all(row.emit and not row.targets for row in plan.rows):
        return None
    token_ids, logprobs, ones = message.token_ids[:], message.logprobs[:], [1] * len(plan.rows)
    if message.row_num_emitted != ones or not len(token_ids) == len(logprobs) == len(message.num_top) == len(ones):
        return None
    if any(message.num_top) or max(token_ids) >= vocab_size:
        return None
    return list(map(RowOutput, zip(map(SampledToken, token_ids, logprobs))))


def _ragged_rows(message: pb.StepOutput, plan: StepPlan, vocab_size: int) -> list[RowOutput]:
    faults = {fault.row: fault.message for fault in message.row_faults}
    token_ids, logprobs, num_top = list(message.token_ids), list(message.logprobs), list(message.num_top)
    top_ids, top_logprobs = list(message.top_token_ids), list(message.top_logprobs)
    target_logprobs, target_tops = list(message.target_logprobs), _target_tops(message)
    if token_ids and max(token_ids) >= vocab_size:
        raise ValueError(f"token {max(token_ids)} in a vocabulary of {vocab_size}")
    forced = _forced_runs(message, plan, vocab_size)
    rows: list[RowOutput] = []
    token = top = target = 0
    for index, (row, num_emitted) in enumerate(zip(plan.rows, message.row_num_emitted, strict=True)):
        fault = faults.get(index)
        if not _may_emit(row, num_emitted, has_failed=fault is not None):
            raise ValueError(f"row {index} emitted {num_emitted} tokens")
        sampled = []
        for _ in range(num_emitted):
            end = top + num_top[token]
            tops = tuple(zip(top_ids[top:end], top_logprobs[top:end], strict=True)) if end > top else ()
            sampled.append(SampledToken(token_ids[token], logprobs[token], tops))
            token, top = token + 1, end
        if num_emitted > 1 and [s.token_id for s in sampled[:-1]] != _drafts(row)[: num_emitted - 1]:
            raise ValueError(f"row {index} accepted other tokens than its drafts")
        end = target + len(row.targets)
        row_tops = tuple(target_tops[target:end])
        rows.append(
            RowOutput(
                tuple(sampled),
                tuple(target_logprobs[target:end]),
                fault,
                row_tops if any(row_tops) else (),
                forced.get(index, ()),
            )
        )
        target = end
    given = (len(token_ids), len(logprobs), len(num_top), len(top_ids), len(top_logprobs), len(target_logprobs))
    if given != (token, token, token, top, top, target):
        raise ValueError(f"ragged columns of {given} entries")
    return rows


def _may_emit(row: Row, num_tokens: int, *, has_failed: bool) -> bool:
    if row.emit and not has_failed:
        return 1 <= num_tokens <= 1 + row.num_drafts
    return num_tokens == 0


def _drafts(row: Row) -> list[int]:
    return row.literals[len(row.literals) - row.num_drafts :]


def _forced_runs(message: pb.StepOutput, plan: StepPlan, vocab_size: int) -> dict[int, tuple[int, ...]]:
    """The forced tokens of each row that has some."""
    counts, ids = message.row_num_forced, list(message.forced_token_ids)
    if len(counts) not in (0, len(plan.rows)) or sum(counts) != len(ids):
        raise ValueError(f"{len(ids)} forced tokens of {len(counts)} rows")
    if not ids:
        return {}
    if max(ids) >= vocab_size:
        raise ValueError(f"forced token {max(ids)} in a vocabulary of {vocab_size}")
    rest = iter(ids)
    runs = {index: tuple(islice(rest, count)) for index, count in enumerate(counts) if count}
    silent = [index for index in runs if not message.row_num_emitted[index]]
    if silent:
        raise ValueError(f"rows {silent} emitted nothing and force what follows")
    return runs


def _target_tops(message: pb.StepOutput) -> list[TopTokens]:
    """The likeliest tokens of each target, cut out of their column; empty when nobody asked for any."""
    counts, ids, logprobs = message.target_num_top, list(message.target_top_token_ids), message.target_top_logprobs
    if (len(counts), sum(counts)) != (len(message.target_logprobs), len(ids)) or len(ids) != len(logprobs):
        raise ValueError(f"{len(ids)} top tokens of {len(counts)} targets")
    if not ids:
        return []
    pairs = zip(ids, logprobs, strict=True)
    return [tuple(islice(pairs, count)) for count in counts]
