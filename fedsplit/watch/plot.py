"""Draws loss, accuracy and time of every round, as one PNG or as an SVG for each part of a page; and runs side by side.

The mean over the clients is bold, each client is a faint line, and one more panel tells the ranks apart; a round's
seconds are divided by stage. What a line of the history lacks, or has as null, is a gap. Nothing here uses pyplot: it
keeps figures for the whole process.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any, TypeAlias

from fedsplit.cli import count
from fedsplit.errors import MissingPackageError
from fedsplit.run.history import JUDGED_BY, Line
from fedsplit.run.time_account import STAGES, STEP_STAGES, account, account_step
from fedsplit.watch.rounds import judged, metrics_of, ranks_of, value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Round, mean and deviation.
Curve: TypeAlias = Sequence[tuple[int, float, float]]

# Okabe and Ito's colours: told apart by colour-blind readers, and by their grey on paper.
_TRAIN, _TEST, _CENTRAL = "#0072b2", "#d55e00", "#009e73"
_PHASES = {"train": (_TRAIN, "training"), "evaluate": (_TEST, "test"), "central": (_CENTRAL, "test on the server")}
_STAGE_COLORS = {
    "training": _TRAIN, "hand-off": "#56b4e9", "transfer": "#009e73", "merging": "#e69f00", "evaluation": _TEST,
    "waiting": "#b4b4b4",
}  # fmt: skip
_STEP_COLORS = dict(
    zip(STEP_STAGES, (_TRAIN, "#56b4e9", "#009e73", "#cc79a7", "#b4b4b4", "#e69f00", _TEST), strict=True)
)
# What there are many of: five colours, and dashes once these are used up.
_COLORS = (_TRAIN, _TEST, _CENTRAL, "#e69f00", "#56b4e9")
_DASHES = ("-", "--", ":", "-.")
_MEAN = "#000000"
_FAINT = "#b4b4b4"
_MOST_NAMED = 10
_UNITS = {"loss": " (mean over examples)", "accuracy": " (share of examples)"}
_MOST_MARKERS = 40
_MOST_BARS = 60
_MOST_CHARTS = 8
_TITLES = {"time": "Time per round", "step": "Time per step"}

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


def draw(lines: Sequence[Line]) -> bytes:
    """Draw a history of at least one line as a PNG; raises MissingPackageError without matplotlib."""
    return _png(partial(make_figure, lines))


def make_figure(lines: Sequence[Line]) -> Figure:
    """Return the figure that `draw` writes: the loss, one more metric if there is one, the ranks, and the time."""
    from matplotlib.figure import Figure

    names = ["loss", *[name for _, name in metrics_of(lines) if name != "loss"][:1]]
    panels = _panels(lines, names)
    figure = Figure(figsize=(4.0 * len(panels) + 1.0, 4.2), layout="constrained")
    title = f"{count(len(lines), 'round')}, {count(len(ranks_of(lines)), 'client')}"
    for server_round, number in judged(lines, names[-1])[-1:]:
        title += f", test {names[-1]} {number:.4f} after round {server_round}"
    figure.suptitle(title)
    for axes, (name, draw_panel) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        draw_panel(axes)
        axes.set_title(_TITLES.get(name, name.capitalize()), loc="left")
    return figure


def charts(lines: Sequence[Line]) -> dict[str, str]:
    """Draw each metric, the ranks and the time as an SVG element of its own, for an HTML page.

    They are named after the metric, at most 8 of them; ``accuracy of each rank`` and, of a model that is cut, ``step``
    may follow, the last is ``time``. Each colour ``#rrggbb`` is written as ``var(--c-rrggbb, #rrggbb)``, so that a page
    can replace it to suit its theme. Text has no colour of its own. Raises MissingPackageError without matplotlib.
    """
    with _style(_SVG_STYLE):
        metrics = dict.fromkeys(name for _, name in metrics_of(lines))
        panels = _panels(lines, list(metrics)[:_MOST_CHARTS])
        names = {"time": "seconds", "step": "milliseconds of a step"}
        return {name: _svg(names.get(name, name), panel) for name, panel in panels.items()}


def draw_comparison(curves: Mapping[str, Mapping[str, Curve]]) -> bytes:
    """Draw what `make_comparison` returns as a PNG; raises MissingPackageError without matplotlib."""
    return _png(partial(make_comparison, curves))


def make_comparison(curves: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """Return a figure with a panel for each metric, in it a curve by label with a band of one deviation around it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(curves) + 1.0, 5.2), layout="constrained")
    (panels,) = figure.subplots(1, len(curves), squeeze=False)
    for axes, (name, labelled) in zip(panels, curves.items(), strict=True):
        for number, (label, curve) in enumerate(labelled.items()):
            rounds, means = [each for each, _, _ in curve], [mean for _, mean, _ in curve]
            style, marker = _distinct(number), "o" if len(rounds) <= _MOST_MARKERS else ""
            axes.plot(rounds, means, label=label, marker=marker, markersize=3.5, linewidth=1.8, **style)
            low, high = [mean - each for _, mean, each in curve], [mean + each for _, mean, each in curve]
            axes.fill_between(rounds, low, high, color=style["color"], alpha=0.18, linewidth=0)
        axes.set_title(f"Test {name}", loc="left")
        axes.set_ylabel(name + _UNITS.get(name, ""))
        _finish(axes)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, title="band: one standard deviation over seeds")
    return figure


def _panels(lines: Sequence[Line], names: Iterable[str]) -> dict[str, Callable[[Axes], None]]:
    """Return what draws each panel, by its name: the metrics, the ranks if there are several, a step, and the time."""
    panels: dict[str, Callable[[Axes], None]] = {name: partial(_draw_metric, lines=lines, name=name) for name in names}
    for name in JUDGED_BY:
        if len(curves := _curves(lines, name)) > 1:
            panels[f"{name} of each rank"] = partial(_draw_ranks, lines=lines, name=name, curves=curves)
            break
    if any(map(account_step, lines)):
        panels["step"] = partial(_draw_step, lines=lines)
    return {**panels, "time": partial(_draw_time, lines=lines)}


def _png(make: Callable[[], Figure]) -> bytes:
    buffer = io.BytesIO()
    with _style(_PNG_STYLE):
        make().savefig(buffer, format="png")
    return buffer.getvalue()


def _svg(name: str, draw_panel: Callable[[Axes], None]) -> str:
    from matplotlib.figure import Figure

    figure, buffer = Figure(figsize=_SVG_INCHES, layout="constrained"), io.StringIO()
    draw_panel(figure.subplots())
    unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=unsaid)
    text = buffer.getvalue()
    text = _COLOR.sub(r"\1: var(--c-\2, #\2)", text[text.index("<svg") :])
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(name)} by round"', 1)


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


def _curves(lines: Sequence[Line], name: str) -> dict[str, list[float]]:
    """Return a test metric by rank, of the ranks that have it."""
    ranks = [rank for rank in ranks_of(lines) if judged(lines, name, rank)]
    return {rank: [value(line, "evaluate", name, rank) for line in lines] for rank in ranks}


def _draw_ranks(axes: Axes, lines: Sequence[Line], name: str, curves: Mapping[str, Sequence[float]]) -> None:
    """Draw each rank's own curve with its name; of more than ten only the best and the worst one's."""
    rounds, marker = [line["round"] for line in lines], "o" if len(lines) <= _MOST_MARKERS else ""
    last = {rank: judged(lines, name, rank)[-1][1] for rank in curves}
    ordered = sorted(curves, key=lambda rank: JUDGED_BY[name] * last[rank])
    named = {rank: rank for rank in curves}
    if len(curves) > _MOST_NAMED:
        named = {ordered[-1]: f"{ordered[-1]} (best)", ordered[0]: f"{ordered[0]} (worst)"}
        for rank in ordered[1:-1]:
            axes.plot(rounds, curves[rank], color=_FAINT, alpha=0.5, marker=marker, markersize=1.5, linewidth=0.8)
    for number, (rank, label) in enumerate(named.items()):
        axes.plot(rounds, curves[rank], label=label, marker=marker, markersize=2.5, linewidth=1.4, **_distinct(number))
    means = [value(line, "evaluate", name) for line in lines]
    axes.plot(rounds, means, color=_MEAN, label="mean", marker=marker, markersize=3.5, linewidth=2.4)
    axes.set_ylabel(f"test {name}")
    axes.legend(title="rank", ncols=2, handlelength=2.6)
    _finish(axes)


def _distinct(number: int) -> dict[str, Any]:
    dashes = _DASHES[number // len(_COLORS) % len(_DASHES)]
    return {"color": _COLORS[number % len(_COLORS)], "linestyle": dashes}


def _draw_time(axes: Axes, lines: Sequence[Line]) -> None:
    accounts = [account(line) for line in lines]
    _draw_stages(axes, lines, {stage: [seconds[stage] for seconds in accounts] for stage in STAGES}, _STAGE_COLORS)
    axes.set_ylabel("seconds")


def _draw_step(axes: Axes, lines: Sequence[Line]) -> None:
    accounts = [account_step(line) for line in lines]
    rows = {stage: [1000 * seconds.get(stage, 0.0) for seconds in accounts] for stage in STEP_STAGES}
    _draw_stages(axes, lines, rows, _STEP_COLORS)
    axes.set_ylabel("milliseconds, mean")


def _draw_stages(
    axes: Axes, lines: Sequence[Line], rows: Mapping[str, Sequence[float]], colors: Mapping[str, str]
) -> None:
    """Draw how each round's total is divided."""
    rounds, totals = [line["round"] for line in lines], [sum(column) for column in zip(*rows.values(), strict=True)]
    # A stage that never took a tenth of a percent would only be a name in the legend.
    rows = {stage: row for stage, row in rows.items() if sum(row) > 0.001 * sum(totals)}
    if len(lines) > _MOST_BARS:
        axes.stackplot(rounds, *rows.values(), colors=[colors[stage] for stage in rows], labels=list(rows), step="mid")
    else:
        bottom = [0.0] * len(lines)
        for stage, row in rows.items():
            axes.bar(rounds, row, bottom=bottom, width=0.7, color=colors[stage], label=stage)
            bottom = [low + high for low, high in zip(bottom, row, strict=True)]
        # A single bar would fill the panel.
        axes.set_xlim(min(rounds) - 0.9, max(rounds) + 0.9)
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
