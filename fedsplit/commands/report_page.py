"""The page of a report: from what the run left on the disk to HTML, with nothing fetched from anywhere.

Names, reasons and settings come from clients and users: every text is escaped on its way into the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from fedsplit import cli
from fedsplit.commands.tables import format_seconds
from fedsplit.run.events import format_bytes
from fedsplit.run.history import Line
from fedsplit.run.time_account import STAGES, account, update_bytes
from fedsplit.watch.plot import charts
from fedsplit.watch.rounds import cells, columns, headings, metrics_of, ranks_of, refusals, value

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
        return list(self.record.get("sessions", []))

    @property
    def software(self) -> Mapping[str, Any]:
        """The versions that the last session ran on."""
        return self.sessions[-1].get("software", {}) if self.sessions else {}


def render(report: Report) -> str:
    """Return the page; raises MissingPackageError without matplotlib."""
    drawn = charts(report.lines)
    sections = {
        "": _headline(report),
        "Metrics": _metrics(report.lines, drawn),
        "Where the time went": _time(report.lines, drawn["time"]),
        "Rounds": _rounds(report.lines),
        "Not counted": _failures(report.lines),
        "The split": _split(report.record.get("split", [])),
        "Settings": _table(("setting", "value"), report.record.get("settings", {}).items(), code=True),
        "Software": _table(("on the server", "version"), report.software.items(), code=True),
        "How to reproduce": _reproduce(report),
    }
    body = "".join(
        f"<section>{f'<h2>{title}</h2>' if title else ''}{content}</section>"
        for title, content in sections.items()
        if content
    )
    title = escape(f"fedsplit run {report.run_id}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{title}</title><style>{_STYLE}</style></head>'
        f"<body><main><h1>{title}</h1>{body}</main></body></html>\n"
    )


def _headline(report: Report) -> str:
    lines, tiles = report.lines, {}
    for name in ("accuracy", "loss"):
        judged = [(line["round"], found) for line in lines if not math.isnan(found := value(line, "evaluate", name))]
        if judged:
            best = (max if name == "accuracy" else min)(judged, key=lambda pair: pair[1])
            tiles[f"test {name} after round {judged[-1][0]}"] = f"{judged[-1][1]:.4f}"
            tiles[f"best test {name}, in round {best[0]}"] = f"{best[1]:.4f}"
            break
    seconds = sum(line.get("seconds") or 0.0 for line in lines)
    tiles |= {
        "rounds": str(len(lines)), "ranks": str(len(ranks_of(lines))), "in all rounds": format_seconds(seconds),
        "a round, mean": f"{seconds / len(lines):.2f} s",
        "of updates merged": format_bytes(sum(map(update_bytes, lines))),
        "answers not counted": str(len(refusals(lines))),
    }  # fmt: skip
    began = f"Began {report.record.get('began', 'at an unknown time')}, "
    began += f"{cli.count(len(report.sessions) or 1, 'session')} of the server."
    items = "".join(f"<li><b>{escape(text)}</b> {escape(label)}</li>" for label, text in tiles.items())
    return f'<p>{escape(began)}</p><ul class="tiles">{items}</ul>'


def _metrics(lines: Sequence[Line], drawn: Mapping[str, str]) -> str:
    figures = "".join(_figure(name, svg) for name, svg in drawn.items() if name != "time")
    left_out = len({name for _, name in metrics_of(lines)}) - len(drawn) + 1
    more = f"<p>{left_out} further metrics are in history.jsonl.</p>" if left_out > 0 else ""
    return f'<div class="charts">{figures}</div>{more}' if figures else ""


def _time(lines: Sequence[Line], chart: str) -> str:
    accounts = [account(line) for line in lines]
    spent = {stage: sum(seconds[stage] for seconds in accounts) for stage in STAGES}
    total = sum(spent.values()) or 1.0
    rows = [(stage, f"{spent[stage]:.2f}", f"{spent[stage] / total:.0%}", what) for stage, what in STAGES.items()]
    table = _table(("stage", "seconds", "share", "what it is"), rows, numbers=(1, 2))
    return f'<div class="charts">{_figure("seconds a round", chart)}<div>{table}</div></div>{_time_by_rank(lines)}'


def _time_by_rank(lines: Sequence[Line]) -> str:
    """Return the means of what the server measured for each rank, from sending to merging."""
    stages = ("training", "hand-off", "transfer", "checking", "merging", "waiting", "turn")
    rows = []
    for rank in ranks_of(lines):
        answers = [line.get("clients", {}).get(rank, {}) for line in lines]
        if measured := [answer["stages"] for answer in answers if answer.get("stages")]:
            means = [sum(each.get(stage, 0.0) for each in measured) / len(measured) for stage in stages]
            rows.append((rank, *(f"{mean:.3f}" for mean in means)))
    note = "<p>Seconds of a round by rank, means. <i>turn</i>: done, and waiting for lower ranks to be merged.</p>"
    return note + _table(("rank", *stages), rows, numbers=range(len(stages) + 1)) if rows else ""


def _rounds(lines: Sequence[Line]) -> str:
    metrics = columns(lines)
    names = headings(metrics)
    return _table(names, [cells(line, metrics) for line in lines], numbers=range(len(names)))


def _failures(lines: Sequence[Line]) -> str:
    rows = refusals(lines)
    if not rows:
        return "<p>Every answer of every rank was counted.</p>"
    more = f"<p>The newest {_MOST_FAILURES} of {len(rows)}.</p>" if len(rows) > _MOST_FAILURES else ""
    return more + _table(("round", "rank", "why"), rows[-_MOST_FAILURES:], numbers=(0, 1))


def _split(rows: Sequence[Mapping[str, Any]]) -> str:
    shown = [(row["part"], row["rule"], f"{row['entries']:,}", format_bytes(row["bytes"])) for row in rows]
    return _table(("part", "rule", "entries", "bytes"), shown, numbers=(2, 3), code=True)


def _reproduce(report: Report) -> str:
    if not report.sessions:
        return ""
    pins = [f"{name}=={version}" for name, version in report.software.items() if name not in ("python", "platform")]
    # Under `flwr run` there is no command of ours: the settings above are the run config.
    starts = [f"# {each.get('began')}\n{each.get('command') or 'flwr run'}" for each in report.sessions]
    scripts = ("client_main.py", "model_main.py")
    others = [f"python {script} --rank {rank}" for script in scripts for rank in ranks_of(report.lines)]
    steps = {
        f"With Python {report.software.get('python', '')}:": "pip install " + " ".join(pins),
        "The server, as it was started:": "\n".join(starts),
        "For each rank a client and a trainer. The server is not told their flags: the trainers need the same "
        "--workload, --workload-option, --num-partitions and --seed as before.": "\n".join(others),
    }
    if report.state_digest:
        steps[
            f"The state after round {report.state_round} has this SHA-256; with the same software, hardware and "
            "threads the same run gives the same one:"
        ] = report.state_digest
    return "".join(f'<p>{escape(text)}</p><pre tabindex="0">{escape(code)}</pre>' for text, code in steps.items())


def _figure(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"


def _table(
    names: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: Iterable[int] = (), code: bool = False
) -> str:
    """Return a table; empty without rows. ``numbers`` are the columns that stand to the right."""
    right = set(numbers)

    def row(tag: str, items: Sequence[Any]) -> str:
        return "".join(
            f"<{tag}{' class=n' if index in right else ''}>{escape(str(item))}</{tag}>"
            for index, item in enumerate(items)
        )

    body = "".join(f"<tr>{row('td', items)}</tr>" for items in rows)
    # Focusable, so that the keyboard can scroll what is wider than the page.
    opened = f'<div class="{"table code" if code else "table"}" tabindex="0"><table>'
    return f"{opened}<thead><tr>{row('th', names)}</tr></thead><tbody>{body}</tbody></table></div>" if body else ""


# The colours --c-… are those of the charts (see watch/plot.py): darker on white, lighter where the ground is dark, so
# that each is told from the ground.
_STYLE = """
:root{--ground:#fff;--raised:#f5f6f8;--ink:#1b1f24;--soft:#57606a;--rule:#d5dae0;
--c-d55e00:#c04a00;--c-56b4e9:#2f8fc4;--c-009e73:#00806a;--c-e69f00:#b07d00;--c-b4b4b4:#8b949e}
@media(prefers-color-scheme:dark){:root{--ground:#14171c;--raised:#1e232a;--ink:#e6e9ed;--soft:#a5afba;--rule:#363d47;
--c-0072b2:#4fb0ea;--c-d55e00:#ff8f4a;--c-56b4e9:#8fd0f5;--c-009e73:#3cc7a6;--c-e69f00:#f0bf4d}}
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
svg{display:block;width:100%;height:auto;--c-000000:var(--soft);--c-e6e6e6:var(--rule)}svg text{fill:var(--soft)}
.table{overflow:auto;max-height:32rem;border:1px solid var(--rule);border-radius:.5rem}
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
