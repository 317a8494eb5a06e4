"""The page of a report: from what the run left on the disk to HTML, with nothing fetched from anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from fedsplit.commands.charts import Series, legend, line_chart, stacked_bars
from fedsplit.commands.status import format_seconds
from fedsplit.run.events import format_bytes
from fedsplit.run.history import Line
from fedsplit.run.time_account import STAGES, account, update_bytes
from fedsplit.watch.console import cells, headings_of, metric_columns

_MOST_CHARTS = 8
_MOST_FAILURES = 200


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a page tells.

    Attributes
    ----------
    record
        ``run.json``.
    lines
        The history, at least one round.
    state_round, state_digest
        The newest checkpoint's round and the SHA-256 of its state; 0 and empty without one.
    """

    record: Mapping[str, Any]
    lines: Sequence[Line]
    state_round: int = 0
    state_digest: str = ""

    @property
    def run_id(self) -> str:
        """The run's id."""
        return str(self.record.get("run_id"))

    @property
    def sessions(self) -> list[Mapping[str, Any]]:
        """Every start of the server on this run."""
        return [each for each in self.record.get("sessions", []) if isinstance(each, dict)]


def render(report: Report) -> str:
    """Return the page."""
    sections = [
        ("", _headline(report)),
        ("Metrics", _metric_charts(report.lines)),
        ("Where the time went", _time(report.lines)),
        ("Rounds", _rounds(report.lines)),
        ("Not counted", _failures(report.lines)),
        ("The split", _split(report.record.get("split", []))),
        ("Settings", _table(("setting", "value"), report.record.get("settings", {}).items(), code=True)),
        ("Software", _software(report)),
        ("How to reproduce", _reproduce(report)),
    ]
    body = "".join(
        f"<section>{f'<h2>{escape(title)}</h2>' if title else ''}{content}</section>"
        for title, content in sections
        if content
    )
    title = f"fedsplit run {report.run_id}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{_STYLE}</style></head>'
        f"<body><main><h1>{escape(title)}</h1>{body}</main></body></html>\n"
    )


def _headline(report: Report) -> str:
    lines, ranks = report.lines, _ranks(report.lines)
    tiles = {}
    for name in ("accuracy", "loss"):
        judged = [(line["round"], value) for line in lines if math.isfinite(value := _value(line, "evaluate", name))]
        if judged:
            best = (max if name == "accuracy" else min)(judged, key=lambda pair: pair[1])
            tiles[f"test {name} after round {judged[-1][0]}"] = f"{judged[-1][1]:.4f}"
            tiles[f"best test {name}, in round {best[0]}"] = f"{best[1]:.4f}"
            break
    seconds = [_number(line.get("seconds")) for line in lines]
    tiles["rounds"] = str(len(lines))
    tiles["ranks"] = str(len(ranks))
    tiles["in all rounds"] = format_seconds(sum(seconds))
    tiles["a round, mean"] = f"{sum(seconds) / len(seconds):.2f} s"
    tiles["of updates merged"] = format_bytes(sum(map(update_bytes, lines)))
    tiles["answers not counted"] = str(sum(len(line.get("refused") or {}) for line in lines))
    began = f"<p>Began {escape(str(report.record.get('began', 'at an unknown time')))}, "
    began += f"{_count(len(report.sessions) or 1, 'session')} of the server.</p>"
    items = "".join(f"<li><b>{escape(value)}</b> {escape(label)}</li>" for label, value in tiles.items())
    return f'{began}<ul class="tiles">{items}</ul>'


def _metric_charts(lines: Sequence[Line]) -> str:
    names = ["loss", *dict.fromkeys(name for _, name in metric_columns(lines))]
    rounds, ranks = [line["round"] for line in lines], _ranks(lines)
    charts = []
    for name in names[:_MOST_CHARTS]:
        series = []
        for phase, label in (("train", "training"), ("evaluate", "test")):
            means = [_value(line, phase, name) for line in lines]
            if not any(map(math.isfinite, means)):
                continue
            series.append(Series(label=f"{label} {name}", values=means, color=phase))
            series += [
                Series(
                    label=rank, values=[_of_rank(line, rank, phase, name) for line in lines], color=phase, faint=True
                )
                for rank in ranks
            ]
        if series:
            chart = line_chart(f"{name} by round", rounds, series)
            charts.append(f"<figure><figcaption>{escape(name)}</figcaption>{chart}</figure>")
    left_out = len(names) - _MOST_CHARTS
    more = f"<p>{left_out} further metrics are in history.jsonl.</p>" if left_out > 0 else ""
    keys = legend({"training": "train", "test": "evaluate"})
    note = "<p>Strong lines are means over the examples of all ranks, faint ones are the ranks'.</p>"
    return f'{note}{keys}<div class="charts">{"".join(charts)}</div>{more}'


def _time(lines: Sequence[Line]) -> str:
    accounts = [account(line) for line in lines]
    total = sum(sum(seconds.values()) for seconds in accounts) or 1.0
    rows = {stage: [seconds[stage] for seconds in accounts] for stage in STAGES}
    chart = stacked_bars("seconds by round", [line["round"] for line in lines], rows)
    table = _table(
        ("stage", "seconds", "share", "what it is"),
        [(stage, f"{sum(row):.2f}", f"{sum(row) / total:.0%}", STAGES[stage]) for stage, row in rows.items()],
        numbers=(1, 2),
    )
    keys = legend({stage: stage for stage in STAGES})
    figure = f"<figure><figcaption>seconds a round</figcaption>{chart}{keys}</figure>"
    return f'<div class="charts">{figure}<div>{table}</div></div>{_time_by_rank(lines)}'


def _time_by_rank(lines: Sequence[Line]) -> str:
    """Return the means of what the server measured for each rank, from sending to merging."""
    stages = ("training", "hand-off", "transfer", "checking", "merging", "waiting", "turn")
    rows = []
    for rank in _ranks(lines):
        measured = [row["stages"] for line in lines if (row := line.get("clients", {}).get(rank, {})).get("stages")]
        if measured:
            means = [sum(_number(each.get(stage)) for each in measured) / len(measured) for stage in stages]
            rows.append((rank, *(f"{mean:.3f}" for mean in means)))
    if not rows:
        return ""
    note = "<p>Seconds of a round by rank, means. <i>turn</i>: done, and waiting for lower ranks to be merged.</p>"
    return note + _table(("rank", *stages), rows, numbers=range(len(stages) + 1))


def _rounds(lines: Sequence[Line]) -> str:
    metrics = metric_columns(lines)
    headings = headings_of(metrics)
    return _table(headings, [cells(line, metrics) for line in lines], numbers=range(len(headings)))


def _failures(lines: Sequence[Line]) -> str:
    rows = [(line["round"], rank, reason) for line in lines for rank, reason in (line.get("refused") or {}).items()]
    if not rows:
        return "<p>Every answer of every rank was counted.</p>"
    more = f"<p>The newest {_MOST_FAILURES} of {len(rows)}.</p>" if len(rows) > _MOST_FAILURES else ""
    return more + _table(("round", "rank", "why"), rows[-_MOST_FAILURES:], numbers=(0, 1))


def _split(rows: Sequence[Mapping[str, Any]]) -> str:
    shown = [(row["part"], row["rule"], f"{row['entries']:,}", format_bytes(row["bytes"])) for row in rows]
    return _table(("part", "rule", "entries", "bytes"), shown, numbers=(2, 3), code=True) if shown else ""


def _software(report: Report) -> str:
    versions = dict(report.sessions[-1].get("software", {})) if report.sessions else {}
    return _table(("on the server", "version"), versions.items(), code=True) if versions else ""


def _reproduce(report: Report) -> str:
    if not report.sessions:
        return ""
    versions = report.sessions[-1].get("software", {})
    pins = " ".join(f"{name}=={version}" for name, version in versions.items() if name not in ("python", "platform"))
    # Under `flwr run` there is no command of ours: the settings above are the run config.
    commands = [f"# {each.get('began')}\n{each.get('command') or 'flwr run'}" for each in report.sessions]
    ranks = _ranks(report.lines)
    others = [f"python {script} --rank {rank}" for script in ("client_main.py", "model_main.py") for rank in ranks]
    parts = [
        f"<p>With Python {escape(str(versions.get('python', '')))}:</p>{_pre(f'pip install {pins}')}",
        f"<p>The server, as it was started:</p>{_pre(chr(10).join(commands))}",
        f"<p>For each rank a client and a trainer. The server is not told their flags: the trainers need the same "
        f"--workload, --workload-option, --num-partitions and --seed as before.</p>{_pre(chr(10).join(others))}",
    ]
    if report.state_digest:
        parts.append(
            f"<p>The state after round {report.state_round} has this SHA-256; with the same software, hardware and "
            f"threads the same run gives the same one:</p>{_pre(report.state_digest)}"
        )
    return "".join(parts)


def _table(
    headings: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: Iterable[int] = (), code: bool = False
) -> str:
    right = set(numbers)

    def row(tag: str, items: Sequence[Any]) -> str:
        return "".join(
            f"<{tag}{' class=n' if index in right else ''}>{escape(str(item))}</{tag}>"
            for index, item in enumerate(items)
        )

    body = "".join(f"<tr>{row('td', items)}</tr>" for items in rows)
    style = "table code" if code else "table"
    # Focusable, so that the keyboard can scroll what is wider than the page.
    return (
        f'<div class="{style}" tabindex="0"><table><thead><tr>{row("th", headings)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _pre(text: str) -> str:
    return f'<pre tabindex="0">{escape(text)}</pre>'


def _ranks(lines: Sequence[Line]) -> list[str]:
    found = {rank for line in lines for rank in (*line.get("clients", {}), *(line.get("refused") or {}))}
    return sorted(found, key=lambda rank: (len(rank), rank))


def _of_rank(line: Line, rank: str, phase: str, name: str) -> float:
    row = line.get("clients", {}).get(rank, {})
    return _value({"own": row.get("evaluate", {}) if phase == "evaluate" else row}, "own", name)


def _value(line: Mapping[str, Any], phase: str, name: str) -> float:
    value = (line.get(phase) or {}).get(name)
    return float(value) if isinstance(value, int | float) else math.nan


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# Okabe and Ito's colours, which colour-blind readers tell apart; lighter where the ground is dark.
_STYLE = """
:root{--ground:#fff;--raised:#f5f6f8;--ink:#1b1f24;--soft:#57606a;--rule:#d5dae0;
--train:#0072b2;--evaluate:#c04a00;--handoff:#2f8fc4;--transfer:#00806a;--merging:#b07d00;--waiting:#8b949e}
@media(prefers-color-scheme:dark){:root{--ground:#14171c;--raised:#1e232a;--ink:#e6e9ed;--soft:#a5afba;--rule:#363d47;
--train:#4fb0ea;--evaluate:#ff8f4a;--handoff:#8fd0f5;--transfer:#3cc7a6;--merging:#f0bf4d;--waiting:#8b949e}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:68rem;margin:0 auto;padding:1rem 1rem 4rem}
h1{font-size:1.5rem;overflow-wrap:anywhere;margin:1rem 0 0}
h2{font-size:1.15rem;margin:2.5rem 0 .5rem}
p{color:var(--soft);margin:.5rem 0;max-width:60ch}
.tiles{list-style:none;display:grid;grid-template-columns:repeat(auto-fill,minmax(9rem,1fr));gap:.5rem;padding:0}
.tiles li{background:var(--raised);border-radius:.5rem;padding:.6rem .8rem;color:var(--soft);font-size:.875rem}
.tiles b{display:block;font-size:1.3rem;color:var(--ink);font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1.5rem;align-items:start}
figure{margin:0}figcaption{font-weight:600;margin-bottom:.25rem}
svg{display:block;width:100%;height:auto;font-size:13px}
svg text{fill:var(--soft)}svg .grid{stroke:var(--rule)}
polyline{fill:none;stroke:currentColor;stroke-width:2.2;stroke-linejoin:round}
circle,rect{fill:currentColor}.faint{stroke-width:1;opacity:.35}
.c-train,.c-training{color:var(--train)}.c-evaluate,.c-evaluation{color:var(--evaluate)}.c-hand-off{color:var(--handoff)}
.c-transfer{color:var(--transfer)}.c-merging{color:var(--merging)}.c-waiting{color:var(--waiting)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1rem;padding:0;margin:.5rem 0;font-size:.875rem}
.legend i{display:inline-block;width:.8em;height:.8em;border-radius:2px;background:currentColor;margin-right:.4em}
.table{overflow-x:auto;max-height:32rem;overflow-y:auto;border:1px solid var(--rule);border-radius:.5rem}
table{border-collapse:collapse;width:100%;font-size:.875rem}
th,td{padding:.35rem .7rem;text-align:left;border-bottom:1px solid var(--rule);vertical-align:top}
tr:last-child td{border-bottom:0}
th{position:sticky;top:0;background:var(--raised);white-space:nowrap}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.code td,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.8125rem}
.code td{overflow-wrap:anywhere}
pre{background:var(--raised);border-radius:.5rem;padding:.8rem;overflow-x:auto;margin:.5rem 0}
@media print{.table{max-height:none}}
"""
