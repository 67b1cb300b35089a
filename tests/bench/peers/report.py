"""What was measured, without what was disturbed: medians, spreads and ratios.

The rules:
    * A reading is disturbed when somebody else kept more than a tenth of a core busy, or when memory read faster before
      the engine's turn than after it, or slower, by more than a quarter. Disturbed readings are dropped; where nothing
      else is left they are used and marked with a `~`.
    * An engine's figure in a turn is the median of its readings there; of turns, the median, the smallest and the
      largest are told.
    * A ratio is taken within a turn, where both saw about the same machine, and the median over turns is told. It is
      turned such that more than 1 is always good for us.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

from tests.bench.client import Json
from tests.bench.peers.cases import PEAK_RSS, Measure
from tests.bench.peers.engines import OURS, Engine
from tests.bench.report import table

MAX_FOREIGN_CORES: Final = 0.1
MAX_BANDWIDTH_DRIFT: Final = 1.25

NOTHING: Final = "–"


@dataclass(frozen=True, slots=True)
class Reading:
    """One measurement."""

    measure: str
    value: float
    foreign_cores: float
    """How many cores others kept busy meanwhile."""
    client_us_per_token: float
    """Processor time that asking took, which engines over HTTP share their cores with."""

    @property
    def disturbed(self) -> bool:
        return self.foreign_cores > MAX_FOREIGN_CORES


@dataclass(frozen=True, slots=True)
class Turn:
    """One engine's life: started, measured, stopped."""

    engine: str
    number: int
    bandwidth_gb_s: tuple[float, float]
    """Before and after."""
    readings: list[Reading]

    def disturbs(self, reading: Reading) -> bool:
        """Whether something else than the engine had a part in the reading."""
        drifted = max(self.bandwidth_gb_s) > MAX_BANDWIDTH_DRIFT * min(self.bandwidth_gb_s)
        return reading.disturbed or (drifted and reading.measure != PEAK_RSS.name)


@dataclass(frozen=True, slots=True)
class Figure:
    """What is told of an engine and a measure: a value for each turn that counts."""

    in_turn: Mapping[int, float]
    disturbed: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.in_turn.values())

    @property
    def low(self) -> float:
        return min(self.in_turn.values())

    @property
    def high(self) -> float:
        return max(self.in_turn.values())


Figures = Mapping[str, Mapping[str, Figure]]
"""By engine and measure."""


@dataclass(frozen=True, slots=True)
class Run:
    """All there is to tell, growing turn by turn."""

    engines: list[Engine]
    measures: list[Measure]
    turns: list[Turn] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    """Why engines, or cases of theirs, were left out."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Us against a peer: a ratio for each measure that both have."""

    title: str
    ratios: Mapping[str, Figure]


def figures(turns: Sequence[Turn]) -> Figures:
    found: dict[str, dict[str, Figure]] = {}
    for engine in dict.fromkeys(turn.engine for turn in turns):
        own = [turn for turn in turns if turn.engine == engine]
        measures = dict.fromkeys(reading.measure for turn in own for reading in turn.readings)
        found[engine] = {measure: _figure(own, measure) for measure in measures}
    return found


def ratio(ours: Figure, theirs: Figure, measure: Measure) -> Figure:
    """Of the turns that both have; of the medians if they share none."""
    disturbed = ours.disturbed or theirs.disturbed
    shared = ours.in_turn.keys() & theirs.in_turn.keys()
    pairs = {turn: (ours.in_turn[turn], theirs.in_turn[turn]) for turn in sorted(shared)}
    if not pairs:
        pairs, disturbed = {0: (ours.median, theirs.median)}, True
    quotients = {turn: a / b if measure.more_is_better else b / a for turn, (a, b) in pairs.items()}
    return Figure(quotients, disturbed)


def comparisons(run: Run) -> list[Comparison]:
    """Every precision that we and a peer both have, then our best against the peer's best, measure by measure."""
    known = figures(run.turns)
    ours = [engine for engine in run.engines if engine.family == OURS and engine.name in known]
    found = []
    for family in dict.fromkeys(engine.family for engine in run.engines if engine.family != OURS):
        theirs = [engine for engine in run.engines if engine.family == family and engine.name in known]
        for mine in ours:
            for peer in theirs:
                if mine.precision == peer.precision:
                    title = f"{mine.precision} against {peer.label}"
                    found.append(Comparison(title, _ratios(run.measures, known, [mine], [peer])))
        if ours and theirs:
            found.append(Comparison(f"best against {family}'s best", _ratios(run.measures, known, ours, theirs)))
    return found


def markdown(run: Run, facts: Mapping[str, str]) -> str:
    """The whole report; `facts` are told first, line by line."""
    known = figures(run.turns)
    header = ["", *(f"{measure.title}, {measure.unit}" for measure in run.measures)]
    speeds = [
        [engine.label, *(_shown(known[engine.name].get(measure.name), measure) for measure in run.measures)]
        for engine in run.engines
        if engine.name in known
    ]
    ratios = [
        [comparison.title, *(_shown_ratio(comparison.ratios.get(measure.name)) for measure in run.measures)]
        for comparison in comparisons(run)
    ]
    parts = [
        "\n".join(f"- {name}: {fact}" for name, fact in facts.items()),
        "Medians (smallest–largest) over turns; `~`: not one reading was undisturbed.",
        table(header, speeds),
        "Ratios within turns; more than 1 is always good for Shardstream." if ratios else "",
        table(["Shardstream", *header[1:]], ratios) if ratios else "",
        _circumstances(run.turns),
        "\n".join(f"- left out: {name}: {reason}" for name, reason in run.failures.items()),
        "\n".join(f"- {engine.name}: `{engine.shown_command()}`" for engine in run.engines if engine.name in known),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_json(run: Run, facts: Mapping[str, str]) -> Json:
    """What `plot` reads, and every reading for whoever wants to look closer."""
    known = figures(run.turns)
    return {
        "facts": dict(facts),
        "measures": [asdict(measure) for measure in run.measures],
        "engines": [
            {
                "name": engine.name,
                "family": engine.family,
                "label": engine.label,
                "command": engine.shown_command(),
                "figures": {
                    name: {"median": figure.median, "low": figure.low, "high": figure.high}
                    for name, figure in known[engine.name].items()
                },
            }
            for engine in run.engines
            if engine.name in known
        ],
        "ratios": [
            {"title": c.title, **{name: figure.median for name, figure in c.ratios.items()}} for c in comparisons(run)
        ],
        "failures": dict(run.failures),
        "turns": [asdict(turn) for turn in run.turns],
    }


def _figure(turns: Sequence[Turn], measure: str) -> Figure:
    def in_turn(counts: Iterable[tuple[Turn, Reading]]) -> dict[int, float]:
        values: dict[int, list[float]] = {}
        for turn, reading in counts:
            values.setdefault(turn.number, []).append(reading.value)
        return {number: statistics.median(readings) for number, readings in values.items()}

    every = [(turn, reading) for turn in turns for reading in turn.readings if reading.measure == measure]
    quiet = [(turn, reading) for turn, reading in every if not turn.disturbs(reading)]
    return Figure(in_turn(quiet or every), disturbed=not quiet)


def _ratios(
    measures: Sequence[Measure], known: Figures, ours: Sequence[Engine], theirs: Sequence[Engine]
) -> dict[str, Figure]:
    found = {}
    for measure in measures:
        mine, peer = (_best(known, engines, measure) for engines in (ours, theirs))
        if mine and peer:
            found[measure.name] = ratio(mine, peer, measure)
    return found


def _best(known: Figures, engines: Sequence[Engine], measure: Measure) -> Figure | None:
    rated = [known[engine.name][measure.name] for engine in engines if measure.name in known[engine.name]]
    choose = max if measure.more_is_better else min
    return choose(rated, key=lambda figure: figure.median, default=None)


def _shown(figure: Figure | None, measure: Measure) -> str:
    return _with_spread(figure, 1 if measure.unit == "s" else 0)


def _shown_ratio(figure: Figure | None) -> str:
    return _with_spread(figure, 2)


def _with_spread(figure: Figure | None, digits: int) -> str:
    if figure is None:
        return NOTHING
    mark = "~" if figure.disturbed else ""
    spread = f" ({figure.low:.{digits}f}–{figure.high:.{digits}f})" if len(figure.in_turn) > 1 else ""
    return f"{mark}{figure.median:.{digits}f}{spread}"


def _circumstances(turns: Sequence[Turn]) -> str:
    readings = [(turn, reading) for turn in turns for reading in turn.readings]
    if not readings:
        return ""
    num_dropped = sum(turn.disturbs(reading) for turn, reading in readings)
    foreign_cores = statistics.median(reading.foreign_cores for _, reading in readings)
    bandwidths = [bandwidth for turn in turns for bandwidth in turn.bandwidth_gb_s]
    asking_us = [reading.client_us_per_token for _, reading in readings if reading.client_us_per_token]
    asking = f"; asking took {statistics.median(asking_us):.0f} µs per token" if asking_us else ""
    return (
        f"{num_dropped} of {len(readings)} readings were disturbed; others took {foreign_cores:.2f} cores in the "
        f"median; memory read {min(bandwidths):.0f}–{max(bandwidths):.0f} GB/s{asking}."
    )
