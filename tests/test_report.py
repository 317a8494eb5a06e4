"""The report: one page that tells all of a run, needs nothing from anywhere, and is readable where people read."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedsplit.__main__ import main
from fedsplit.commands.report import Report, read_report, render
from fedsplit.disk.remote_store import without_password
from fedsplit.errors import CheckpointError, UsageError
from fedsplit.run.directory import Places, Run
from fedsplit.run.history import History, Line
from tests.chromium import contrast, look_at, needs_chromium, run_chromium
from tests.handoffs import blob
from tests.programs import Programs

RECORD = {
    "run_id": "0123abc", "began": "2026-01-31 12:00:00",
    "settings": {"rounds": "3", "aggregate": "['<b>*=median']"},
    "split": [{"part": "head.*", "entries": 2, "bytes": 2560, "rule": "local"}],
    "sessions": [{
        "began": "2026-01-31 12:00:00", "command": "python server_main.py --aggregate 'a*=median'",
        "software": {"python": "3.11.4", "platform": "Linux", "flwr": "1.41.0", "torch": "2.14.1"},
    }],
}  # fmt: skip


def line(server_round: int, ranks: int = 2, **more: Any) -> Line:
    stages = {"waiting": 0.0, "training": 1.0, "hand-off": 0.25, "transfer": 0.1, "turn": 0.0, "merging": 0.05}
    clients = {
        str(rank): {
            "loss": rank / server_round,
            "bytes": 1000,
            "stages": stages,
            "evaluate": {"loss": 0.1, "accuracy": 0.8},
        }
        for rank in range(1, ranks + 1)
    }
    return {
        "round": server_round, "seconds": 2.0, "asked": ranks, "accepted": ranks, "refused": {}, "clients": clients,
        "train": {"loss": 1 / server_round}, "evaluate": {"loss": 0.5 / server_round, "accuracy": 0.8},
        "stages": {"train": 1.5, "merge": 0.1, "evaluate": 0.4}, **more,
    }  # fmt: skip


REPORT = Report(
    record=RECORD, lines=[line(1), line(2, refused={"2": "NaN in <fc.weight>"}), line(3)], state_round=3,
    state_digest="ab" * 32,
)  # fmt: skip


class Tags(HTMLParser):
    """Every tag that a page opens; fails on one that is not closed in order."""

    VOID = ("meta", "br", "line", "!doctype")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.opened: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def test_a_page_refers_to_nothing_outside_itself() -> None:
    page = render(REPORT)
    tags = Tags(page).opened
    assert not {"script", "link", "img", "iframe", "base"} & {tag for tag, _ in tags}
    for _, attributes in tags:
        assert not {"src", "href", "srcset"} & attributes.keys()
        assert (attributes.get("xlink:href") or "#").startswith("#"), "only to a mark of the same drawing"
    assert "url(" not in page.replace("url(#", "") and "@import" not in page


def test_what_users_wrote_is_text_and_no_markup() -> None:
    page = render(REPORT)
    assert "NaN in &lt;fc.weight&gt;" in page
    assert "<fc.weight>" not in page and "<b>*" not in page


def test_every_fact_of_the_run_is_on_the_page() -> None:
    page = render(REPORT)
    facts = [
        "0123abc", "head.*", "local", "2.6 kB", "1.41.0", "python server_main.py --aggregate", "ab" * 32, "0.8000",
        "python model_main.py --rank 2", "pip install flwr==1.41.0 torch==2.14.1", "0.3333",
    ]  # fmt: skip
    for fact in facts:
        assert fact in page, fact
    assert "the trainer of the slowest rank at work" in page


def test_each_rank_is_told_with_its_last_and_its_best_test() -> None:
    lines = [line(1), line(2)]
    lines[0]["clients"]["2"]["evaluate"] = {"num_examples": 7, "loss": 0.25, "accuracy": 0.9}
    page = render(Report(record=RECORD, lines=lines))
    rows = re.findall(r"<tr>(?:<td class=n>[^<]*</td>){6}</tr>", page)
    cells = [re.findall(r">([^<]+)</td>", row) for row in rows]
    assert cells == [
        ["1", "0.8000", "0.8000", "0.1000", "0.1000", "–"],
        ["2", "0.8000", "0.9000", "0.1000", "0.1000", "7"],
    ]
    assert "accuracy of each rank by round" in page


def test_a_run_of_an_older_version_has_what_it_has() -> None:
    lines: list[Line] = [{"round": 1, "seconds": 1.0, "train": {"loss": None}}]
    page = render(Report(record={"run_id": "old"}, lines=lines))
    headings = re.findall(r"<h2>(.+?)</h2>", page)
    assert headings == ["Where the time went", "Rounds", "Not counted"]


def test_the_command_that_is_noted_has_no_password() -> None:
    command = "server_main.py --tracker mlflow:https://me:secret@host/x --payload-store s3://bucket/a@b"
    assert without_password(command) == (
        "server_main.py --tracker mlflow:https://…@host/x --payload-store s3://bucket/a@b"
    )


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server/run.json").write_text(json.dumps(RECORD))
    History(tmp_path / "server/history.jsonl").append(line(1))
    output = tmp_path / "report.html"
    assert main(["report", "--checkpoint-dir", str(tmp_path), "--output", str(output)]) == 0
    assert output.read_text().startswith("<!doctype html>")
    assert capsys.readouterr().out == f"{output}: 1 round of run 0123abc\n"


def test_a_report_of_nothing_and_under_a_wrong_name_are_errors(tmp_path: Path) -> None:
    command = ["report", "--checkpoint-dir", str(tmp_path), "--output"]
    assert main([*command, str(tmp_path / "report.html")]) == CheckpointError.exit_code
    assert main([*command, str(tmp_path / "report.pdf")]) == UsageError.exit_code
    assert main([*command, str(tmp_path / "nowhere/report.html")]) == UsageError.exit_code
    assert list(tmp_path.iterdir()) == []


def test_each_start_of_a_resumed_run_is_told(tmp_path: Path) -> None:
    for resume in (False, True):
        with Run(tmp_path, resume=resume) as run:
            run.note_session(command=f"server_main.py --resume={resume}", software={"torch": "2.14.1"})
            if not resume:
                payload = run.payloads.put([blob("state")])
                run.save(1, payload.digest, {"state.safetensors": payload.path}, {}, line(1), None)
                run.history.append(line(1))
    page = render(read_report(Places(tmp_path)))
    assert "2 sessions of the server" in page
    assert page.index("--resume=False") < page.index("--resume=True")


@pytest.mark.slow
def test_the_report_of_a_real_run_says_how_it_was_started_and_what_it_ran_on(tmp_path: Path) -> None:
    programs = Programs(tmp_path, server_flags=("--rounds", "1", "--train-config", "note=a b"))
    programs.start_all()
    assert set(programs.wait().values()) == {0}, programs.tails()
    output = tmp_path / "report.html"
    assert main(["report", "--checkpoint-dir", str(programs.checkpoints), "--output", str(output)]) == 0
    page = output.read_text()
    assert "--rounds 1 --train-config &#39;note=a b&#39;" in page
    assert re.search(r"torch</td><td>\d", page)
    assert re.search(r"fedavg</td><td class=n>8<", page)


# -- in a browser ------------------------------------------------------------------------------------------------------


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280], ids=["phone", "desktop"])
def test_a_browser_shows_the_page_within_its_width_and_with_contrast(tmp_path: Path, width: int, dark: bool) -> None:
    seen = look_at(render(REPORT), tmp_path, width=width, dark=dark)
    assert seen["scrollWidth"] == seen["width"] == width, seen["tooWide"]
    assert seen["tooWide"] == []
    assert contrast(seen["background"], seen["color"]) > 7
    assert (contrast(seen["background"], "rgb(0, 0, 0)") < 2) is dark
    assert min(seen["fontSizes"]) >= 10, "nothing is too small to read"
    assert seen["headings"][:2] == ["fedsplit run 0123abc", "Metrics"]
    assert len(seen["charts"]) == 4 and min(seen["charts"]) > 300
    assert seen["drawn"] > 20
    assert seen["fetched"] == []
    assert "NaN in <fc.weight>" in seen["text"]


@needs_chromium
def test_colours_of_the_lines_are_told_from_the_ground_in_both_themes(tmp_path: Path) -> None:
    script = """<script>document.title = [...document.querySelectorAll("svg [style*='--c-']")].flatMap((e) => {
      const style = getComputedStyle(e);
      return ["fill", "stroke"].filter((name) => e.style[name].includes("--c-")).map((name) => style[name]);
    }).concat(getComputedStyle(document.body).backgroundColor).join(";")</script>"""
    page = tmp_path / "probe.html"
    page.write_text(render(REPORT).replace("</body>", f"{script}</body>"))
    for dark, grid in ((False, "rgb(213, 218, 224)"), (True, "rgb(54, 61, 71)")):
        dom = run_chromium(tmp_path, "--dump-dom", page.as_uri(), dark=dark)
        title = re.search(r"<title>(.+?)</title>", dom)
        assert title
        *found, ground = title[1].split(";")
        colors = {color for color in found if color.startswith("rgb(")} - {grid}
        assert len(colors) == 6, "the axes, and every stage that was drawn"
        # What WCAG asks of graphics.
        assert {color: contrast(color, ground) for color in colors if contrast(color, ground) < 3} == {}


def test_a_metric_may_have_any_name(tmp_path: Path) -> None:
    names = ["</text><script>", "$\\frac{", "a&b", "x" * 300]
    lines = [{**line(number), "train": dict.fromkeys(names, float(number))} for number in (1, 2)]
    page = render(Report(record=RECORD, lines=lines))
    Tags(page)
    assert "<script>" not in page
    assert page.count("$\\frac{") >= 3, "in the chart, above it, and in the table: as it is, and not as a formula"


def test_a_missing_matplotlib_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "server").mkdir()
    (tmp_path / "server/run.json").write_text(json.dumps(RECORD))
    History(tmp_path / "server/history.jsonl").append(line(1))
    for command, name in (("report", "report.html"), ("plot", "plot.png")):
        output = tmp_path / name
        code = main([command, "--checkpoint-dir", str(tmp_path), "--output", str(output)])
        assert (code, output.exists()) == (UsageError.exit_code, False)
        assert (
            "a plot needs matplotlib, which is not installed: pip install 'fedsplit[plot]'" in capsys.readouterr().err
        )


def test_a_model_that_is_cut_has_its_steps_on_the_page() -> None:
    seconds = {"lower": 0.4, "upper": 0.2, "turn": 0.2, "upper hand-off": 0.4, "rank hand-off": 0.8}
    cut = {"mode": "sfl-v2", "steps": 40, "steps_per_second": 20.0, "bytes_up": 4_000_000, "bytes_down": 2_000_000}
    page = render(Report(record=RECORD, lines=[line(1, split={**cut, "seconds": seconds})]))
    for text in ("steps a second, mean", "4.0 MB", "2.0 MB", "milliseconds a step", "rank hand-off", "20.00", "40%"):
        assert text in page
    assert "milliseconds a step" not in render(REPORT)
