"""The picture of a report: tokens per second of every engine at each number of streams.

`python plot.py results.json picture.png`, run where matplotlib is installed; knows only the JSON of report.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS: Final = {
    "shardstream": "#d1495b",
    "llama.cpp": "#8d99ae",
    "OpenVINO": "#5b8e7d",
    "vLLM": "#3d5a80",
    "transformers": "#c9a227",
}
DPI: Final = 100
INCHES_PER_ENGINE: Final = 0.27
INCHES_PER_PANEL: Final = 2.9

Json = Any


def main(source: Path, target: Path) -> None:
    results = json.loads(source.read_text())
    engines = results["engines"]
    measures = [measure for measure in results["measures"] if measure["name"].startswith("streams_")]
    if not measures:
        sys.exit("nothing to draw: no numbers of streams were measured")
    size = (INCHES_PER_PANEL * len(measures) + 1.6, INCHES_PER_ENGINE * len(engines) + 1.2)
    figure = Figure(size, layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)
    for panel, measure in zip(panels[0], measures, strict=True):
        draw(panel, engines, measure)
    figure.suptitle(f"{results['facts']['model']}: tokens/s, prompts of 64 tokens, 128 new", fontsize=10)
    figure.savefig(target, dpi=DPI)


def draw(panel: Axes, engines: list[Json], measure: Json) -> None:
    """A bar for each engine, with the spread over turns as a whisker and the median as its number."""
    for row, engine in enumerate(engines):
        found = engine["figures"].get(measure["name"])
        if found is None:
            continue
        spread = [[found["median"] - found["low"]], [found["high"] - found["median"]]]
        panel.barh(row, found["median"], xerr=spread, color=COLOURS[engine["family"]], ecolor="#444444", height=0.72)
        panel.annotate(
            f"{found['median']:.0f}", (found["high"], row), (3, 0), textcoords="offset points", va="center", fontsize=7
        )
    panel.set_title(measure["title"], fontsize=9)
    panel.set_yticks(range(len(engines)), [engine["label"] for engine in engines], fontsize=8)
    panel.tick_params(axis="x", labelsize=7)
    panel.margins(x=0.15)
    panel.set_ylim(len(engines) - 0.5, -0.5)
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
