"""Draws loss, accuracy and time of every round as a PNG.

    python -m fedsplit plot --checkpoint-dir checkpoints --output plot.png

The mean over the clients is bold, each client is a faint line; a round's seconds are divided into training, hand-off,
transfer, merging, evaluation and waiting. It may be drawn while the run is on; the server draws it as the run ends.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit import cli
from fedsplit.disk.files import write_chunks
from fedsplit.errors import CheckpointError
from fedsplit.run.history import Line, read_history
from fedsplit.run.paths import Places
from fedsplit.run.time_account import STAGES, account

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by colour-blind readers, and by their grey on paper.
_TRAIN, _TEST = "#0072B2", "#D55E00"
_STAGE_COLORS = {
    "training": _TRAIN, "hand-off": "#56B4E9", "transfer": "#009E73", "merging": "#E69F00", "evaluation": _TEST,
    "waiting": "#B4B4B4",
}  # fmt: skip
_DPI = 120
_MOST_MARKERS = 40
_MOST_BARS = 60

_ENDINGS = (".png",)


def add_to(commands: cli.Commands) -> None:
    """Add the command's parser."""
    parser = cli.add_command(commands, "plot", __doc__, run)
    cli.add_files(parser, endings=_ENDINGS)


def run(arguments: argparse.Namespace) -> int:
    """Write the picture."""
    output: Path = arguments.output
    cli.check_output(output, endings=_ENDINGS)
    path = Places(arguments.checkpoint_dir).history
    lines = read_history(path)
    if not lines:
        raise CheckpointError(f"no rounds in {path} yet; is it the server's --checkpoint-dir?")
    write_plot(lines, output)
    print(f"{output}: {cli.count(len(lines), 'round')} of {path}")
    return 0


def write_plot(lines: Sequence[Line], output: Path) -> None:
    """Draw a history into a PNG file."""
    write_chunks(output, [draw(lines)])


def draw(lines: Sequence[Line]) -> bytes:
    """Draw a history.

    Parameters
    ----------
    lines
        At least one line of ``history.jsonl``. What a line lacks, or has as null, is a gap.

    Returns
    -------
    png : bytes
        1560 pixels wide with an accuracy or another metric, 1080 without.
    """
    buffer = io.BytesIO()
    make_figure(lines).savefig(buffer, format="png")
    return buffer.getvalue()


def make_figure(lines: Sequence[Line]) -> Figure:
    """Return the figure that `draw` writes: loss, the metric if there is one, time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    metric = _metric(lines)
    panels = 2 + (metric is not None)
    # Not pyplot: it keeps figures and a choice of backend for the whole process.
    figure = Figure(figsize=(4.0 * panels + 1.0, 4.2), dpi=_DPI, layout=ConstrainedLayoutEngine(wspace=0.05))
    FigureCanvasAgg(figure)
    figure.suptitle(_title(lines, metric), fontsize=12)
    axes = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    _draw_metric(axes[0], lines, "loss", "loss (mean over examples)")
    if metric is not None:
        unit = " (share of examples)" if metric == "accuracy" else ""
        _draw_metric(axes[1], lines, metric, metric + unit)
    _draw_time(axes[-1], lines)
    for each, title in zip(axes, ["Loss", *([metric.capitalize()] if metric else []), "Time per round"], strict=True):
        each.set_title(title, fontsize=11, loc="left")
        each.set_xlabel("round")
        each.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        each.grid(visible=True, axis="y", color="#E6E6E6", linewidth=0.8)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_metric(axes: Axes, lines: Sequence[Line], name: str, label: str) -> None:
    rounds = [line["round"] for line in lines]
    marker = "o" if len(lines) <= _MOST_MARKERS else ""
    ranks = _ranks(lines)
    faint: dict[str, Any] = {
        "linewidth": 1.0,
        "alpha": max(0.08, min(0.35, 3 / max(1, len(ranks)))),
        "marker": marker,
        "markersize": 2.0,
    }
    for rank in ranks:
        answers = [line.get("clients", {}).get(rank, {}) for line in lines]
        axes.plot(rounds, [_number(answer, name) for answer in answers], color=_TRAIN, **faint)
        evaluated = [answer.get("evaluate", {}) for answer in answers]
        axes.plot(rounds, [_number(answer, name) for answer in evaluated], color=_TEST, **faint)
    for phase, color, title in (("train", _TRAIN, "training"), ("evaluate", _TEST, "test")):
        values = [_number(line.get(phase, {}), name) for line in lines]
        if not all(map(math.isnan, values)):
            axes.plot(rounds, values, color=color, linewidth=2.4, marker=marker, markersize=4.5, label=title)
    axes.set_ylabel(label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, title="bold: mean, faint: each client", title_fontsize=8)


def _draw_time(axes: Axes, lines: Sequence[Line]) -> None:
    rounds = [line["round"] for line in lines]
    accounts = [account(line) for line in lines]
    rows = {stage: [seconds[stage] for seconds in accounts] for stage in STAGES}
    # A stage that never took a tenth of a percent would only be a name in the legend.
    total = sum(map(sum, rows.values()))
    rows = {stage: row for stage, row in rows.items() if sum(row) > 0.001 * total}
    if len(lines) > _MOST_BARS:
        colors = [_STAGE_COLORS[stage] for stage in rows]
        axes.stackplot(rounds, *rows.values(), colors=colors, labels=list(rows), step="mid")
    else:
        bottom = [0.0] * len(lines)
        for stage, row in rows.items():
            axes.bar(rounds, row, bottom=bottom, width=0.7, color=_STAGE_COLORS[stage], label=stage)
            bottom = [low + high for low, high in zip(bottom, row, strict=True)]
        # A single bar would fill the panel.
        axes.set_xlim(min(rounds) - 0.9, max(rounds) + 0.9)
    axes.set_ylabel("seconds")
    # Room above the bars, so that the legend covers none of them.
    axes.set_ylim(0, 1.4 * max(sum(seconds.values()) for seconds in accounts) or 1)
    if rows:
        axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)


def _title(lines: Sequence[Line], metric: str | None) -> str:
    parts = [cli.count(len(lines), "round"), cli.count(len(_ranks(lines)), "client")]
    name = metric or "loss"
    judged = [(line["round"], value) for line in lines
              if not math.isnan(value := _number(line.get("evaluate", {}), name))]  # fmt: skip
    if judged:
        parts.append(f"test {name} {judged[-1][1]:.4f} after round {judged[-1][0]}")
    return ", ".join(parts)


def _metric(lines: Sequence[Line]) -> str | None:
    """Return the metric that is drawn beside the loss: the accuracy, else the first that there is."""
    names = [
        name for phase in ("evaluate", "train") for line in lines for name in line.get(phase, {}) if name != "loss"
    ]
    return "accuracy" if "accuracy" in names else next(iter(names), None)


def _ranks(lines: Sequence[Line]) -> list[str]:
    return sorted({rank for line in lines for rank in line.get("clients", {})}, key=lambda rank: (len(rank), rank))


def _number(row: dict[str, Any], name: str) -> float:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else math.nan
