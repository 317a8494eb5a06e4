"""Draws loss, accuracy and time of every round, as one PNG or as an SVG for each part of a page.

The mean over the clients is bold, each client is a faint line; a round's seconds are divided by stage. What a line of
the history lacks, or has as null, is a gap. Nothing here uses pyplot: it keeps figures for the whole process.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.disk.files import write_chunks
from fedsplit.errors import MissingPackageError
from fedsplit.run.history import Line
from fedsplit.run.time_account import STAGES, account
from fedsplit.watch.rounds import judged, metrics_of, ranks_of, value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by colour-blind readers, and by their grey on paper.
_TRAIN, _TEST, _CENTRAL = "#0072b2", "#d55e00", "#009e73"
_PHASES = {"train": (_TRAIN, "training"), "evaluate": (_TEST, "test"), "central": (_CENTRAL, "test on the server")}
_STAGE_COLORS = {
    "training": _TRAIN, "hand-off": "#56b4e9", "transfer": "#009e73", "merging": "#e69f00", "evaluation": _TEST,
    "waiting": "#b4b4b4",
}  # fmt: skip
_UNITS = {"loss": " (mean over examples)", "accuracy": " (share of examples)"}
_MOST_MARKERS = 40
_MOST_BARS = 60
_MOST_CHARTS = 8

# A metric may have any name: none is read as a formula.
_STYLE = {"text.parse_math": False, "legend.frameon": False}
_PNG_STYLE = {
    **_STYLE, "figure.dpi": 120, "figure.titlesize": 12, "axes.titlesize": 11, "legend.fontsize": 8.5,
    "legend.title_fontsize": 8,
}  # fmt: skip
# Text stays text, as large as the page's around it. Equal drawings get equal names, so that pages can be compared.
_SVG_STYLE = {
    **_STYLE, "svg.fonttype": "none", "svg.hashsalt": "fedsplit", "font.size": 13, "axes.labelsize": 13,
    "legend.fontsize": 13, "legend.title_fontsize": 13, "xtick.labelsize": 13, "ytick.labelsize": 13,
}  # fmt: skip
_SVG_INCHES = (400 / 72, 270 / 72)
_COLOR = re.compile(r"(fill|stroke): #([0-9a-f]{6})")


def write_plot(lines: Sequence[Line], output: Path) -> None:
    """Draw a history into a PNG file; see `draw`."""
    write_chunks(output, [draw(lines)])


def draw(lines: Sequence[Line]) -> bytes:
    """Draw a history of at least one line as a PNG; raises MissingPackageError without matplotlib."""
    buffer = io.BytesIO()
    with _style(_PNG_STYLE):
        make_figure(lines).savefig(buffer, format="png")
    return buffer.getvalue()


def make_figure(lines: Sequence[Line]) -> Figure:
    """Return the figure that `draw` writes: the loss, one more metric if there is one, and the time."""
    from matplotlib.figure import Figure

    names = ["loss", *[name for _, name in metrics_of(lines) if name != "loss"][:1]]
    figure = Figure(figsize=(4.0 * len(names) + 5.0, 4.2), layout="constrained")
    clients = len(ranks_of(lines))
    title = f"{len(lines)} round{'s' * (len(lines) != 1)}, {clients} client{'s' * (clients != 1)}"
    for server_round, number in judged(lines, names[-1])[-1:]:
        title += f", test {names[-1]} {number:.4f} after round {server_round}"
    figure.suptitle(title)
    *panels, last = figure.subplots(1, len(names) + 1)
    for axes, name in zip(panels, names, strict=True):
        _draw_metric(axes, lines, name)
        axes.set_title(name.capitalize(), loc="left")
    _draw_time(last, lines)
    last.set_title("Time per round", loc="left")
    return figure


def charts(lines: Sequence[Line]) -> dict[str, str]:
    """Draw each metric and the time as an SVG element of its own, for an HTML page.

    They are named after the metric, at most 8 of them; the last is ``time``. Each colour ``#rrggbb`` is written as
    ``var(--c-rrggbb, #rrggbb)``, so that a page can replace it to suit its theme. Text has no colour of its own.
    Raises MissingPackageError without matplotlib.
    """
    with _style(_SVG_STYLE):
        names = dict.fromkeys(name for _, name in metrics_of(lines))
        found = {name: _svg(lines, name) for name in list(names)[:_MOST_CHARTS]}
        return found | {"time": _svg(lines, None)}


def _svg(lines: Sequence[Line], name: str | None) -> str:
    """Draw a metric, or the time."""
    from matplotlib.figure import Figure

    figure, buffer = Figure(figsize=_SVG_INCHES, layout="constrained"), io.StringIO()
    if name is None:
        _draw_time(figure.subplots(), lines)
    else:
        _draw_metric(figure.subplots(), lines, name)
    unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=unsaid)
    text = buffer.getvalue()
    text = _COLOR.sub(r"\1: var(--c-\2, #\2)", text[text.index("<svg") :])
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(name or "seconds")} by round"', 1)


def _draw_metric(axes: Axes, lines: Sequence[Line], name: str) -> None:
    rounds, ranks = [line["round"] for line in lines], ranks_of(lines)
    marker = "o" if len(lines) <= _MOST_MARKERS else ""
    faint = {"linewidth": 1.0, "alpha": max(0.08, min(0.35, 3 / max(1, len(ranks)))), "markersize": 2.0}
    # The means last, so that no client's line covers them.
    for rank in [*ranks, None]:
        for phase, (color, label) in _PHASES.items():
            values = [value(line, phase, name, rank) for line in lines]
            if not all(map(math.isnan, values)):
                style: dict[str, Any] = faint if rank else {"linewidth": 2.4, "markersize": 4.5, "label": label}
                axes.plot(rounds, values, color=color, marker=marker, **style)
    axes.set_ylabel(name + _UNITS.get(name, ""))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(title="bold: mean, faint: each client")
    _finish(axes)


def _draw_time(axes: Axes, lines: Sequence[Line]) -> None:
    rounds, accounts = [line["round"] for line in lines], [account(line) for line in lines]
    totals = [sum(seconds.values()) for seconds in accounts]
    rows = {stage: [seconds[stage] for seconds in accounts] for stage in STAGES}
    # A stage that never took a tenth of a percent would only be a name in the legend.
    rows = {stage: row for stage, row in rows.items() if sum(row) > 0.001 * sum(totals)}
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
    axes.set_ylim(0, 1.6 * max(totals) or 1)
    if rows:
        axes.legend(loc="upper right", ncols=2)
    _finish(axes)


def _finish(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(visible=True, axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


@contextmanager
def _style(style: dict[Any, Any]) -> Iterator[None]:
    try:
        import matplotlib
    except ImportError as exc:
        raise MissingPackageError("a plot", "matplotlib", "plot") from exc
    with matplotlib.rc_context(style):
        yield
