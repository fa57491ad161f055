"""A headless Chromium opens the report page without console messages and shows its numbers.

The tests are skipped where there is no program `chromium`.
"""

from __future__ import annotations

import csv
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megatron_laer.telemetry.metrics_file import METRICS
from megatron_laer.tools import cli
from megatron_laer.tools.report.metrics_recording import read_metrics
from tests.recorded_runs import LAYERS, RUN, record_run
from tests.tools.report_pages import data_of, figure_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no program chromium: apt-get install chromium, to see the page drawn"
)

# Chromium logs console messages with this source; its own warnings have others.
_CONSOLE = re.compile(r"CONSOLE[:(].*")


def opened(
    page: Path, tmp_path: Path, *, fragment: str = "", width: int = 1200, shot: Path | None = None
) -> tuple[str, list[str]]:
    assert CHROMIUM is not None
    asked = ["--dump-dom"] if shot is None else [f"--screenshot={shot}"]
    address = f"{page.as_uri()}{fragment}"
    if shot is not None:
        # In a frame: a window of Chromium cannot be narrower than 500 pixels.
        frame = tmp_path / "frame.html"
        style = f"border:0;width:{width}px;height:3000px"
        frame.write_text(
            f'<body style="margin:0"><iframe style="{style}" src="{address}"></iframe>'
        )
        address = frame.as_uri()
    result = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--enable-logging=stderr", "--log-level=0", "--virtual-time-budget=5000"),
            *(
                f"--user-data-dir={tmp_path / 'profile'}",
                f"--window-size={max(width, 500)},3000",
                *asked,
            ),
            address,
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout, _CONSOLE.findall(result.stderr)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    record_run(folder)
    assert cli.main(["report", str(folder), "--out", str(folder.parent / "page.html")]) == 0
    return folder


@pytest.fixture(scope="module")
def drawn(run, tmp_path_factory):
    return opened(run.parent / "page.html", tmp_path_factory.mktemp("chromium"), fragment="#tables")


def table(page: str, title: str) -> list[list[str]]:
    figure = next(
        part for part in page.split("<figure") if f"<h3>{title}</h3>" in html.unescape(part)
    )
    lines = re.findall(r"<tr>(.*?)</tr>", figure.partition("</figure>")[0], re.S)
    return [[html.unescape(c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t", line)] for line in lines]


def test_the_console_stays_silent_and_every_figure_is_drawn(drawn):
    page, console = drawn
    assert console == []
    (number,) = re.findall(r'data-drawn="(\d+)"', page)
    assert int(number) == page.count("<figure") >= 10


def test_what_a_page_says_in_its_console_is_noticed(run, tmp_path):
    _, console = with_script(run, 'console.error("heard"); undefinedName();', tmp_path)
    said = " ".join(console)
    assert "heard" in said and "undefinedName" in said


def test_tables_have_the_recorded_numbers(run, drawn):
    recorded = read_metrics(METRICS.path(run, 0))
    for title, name in (
        ("FSEP: max/mean tokens per rank", "max_over_mean"),
        ("Stock's placement: max/mean tokens per rank", "stock_max_over_mean"),
    ):
        cells = table(drawn[0], title)
        assert tuple(line[0] for line in cells[1:]) == LAYERS
        shown_LT = np.array([[float(cell) for cell in line[1:]] for line in cells[1:]])
        assert shown_LT == pytest.approx(recorded.of_layers[name].T, rel=1e-3)
    cells = table(drawn[0], "A step's time by kind")
    shown_T = [float(line[cells[0].index("dispatch")]) for line in cells[1:]]
    assert shown_T == pytest.approx(recorded.of_steps["dispatch_ms"], rel=1e-3)


def test_what_is_drawn_is_named_for_those_who_do_not_see_it(drawn):
    page = drawn[0]
    for plot in re.findall(r'<div class="plot [^>]*>', page):
        assert re.search(r'tabindex="0" role="img" aria-label="[^"]{20,}"', plot), plot
    assert page.count("<h1>FSEP balance report: ") == 1 and '<html lang="en"' in page


def with_script(run: Path, script: str, tmp_path: Path) -> tuple[str, list[str]]:
    """Open the run's page with a script at its end."""
    page = tmp_path / "page.html"
    content = (run.parent / "page.html").read_text(encoding="utf-8")
    content = content.replace("</body>", f"<script>{script}</script></body>")
    page.write_text(content, encoding="utf-8")
    return opened(page, tmp_path)


_CSV = """
document.body.dataset.csv = JSON.stringify(csvOf([["a\\r=1+1", "=2", "-3"]]));
"""


def test_no_layer_begins_a_row_of_the_saved_table(run, tmp_path):
    dom, console = with_script(run, _CSV, tmp_path)
    assert console == []
    (found,) = re.findall(r'data-csv="([^"]*)"', dom)
    rows = list(csv.reader(io.StringIO(json.loads(html.unescape(found)), newline="")))
    assert rows == [["a\r=1+1", "'=2", "-3"]]


_CHOSEN = """
drawn.then(() => {
  const [choice, ...others] = document.querySelectorAll("select");
  choice.value = 1;
  choice.dispatchEvent(new Event("change"));
  setTables(true);
  const names = new Set(figures.map((figure) => fileOf(figure, ".csv")));
  document.body.dataset.files = [others.length, ...names].join();
});
"""


_ZOOMED = """
const zoom = { "xaxis.range[0]": 1, "xaxis.range[1]": 3 };
drawn.then(() => Plotly.relayout(figures[0].plot, zoom)).then(() => {
  const plots = figures.filter(({ by_steps }) => by_steps).map(({ plot }) => plot);
  const shown = new Set(plots.map(({ layout }) => layout.xaxis.range.join()));
  document.body.dataset.shown = [...shown].join("; ");
});
"""


def test_a_zoom_of_one_figure_is_one_of_all_by_steps(run, tmp_path):
    dom, console = with_script(run, _ZOOMED, tmp_path)
    assert console == []
    assert re.findall(r'data-shown="([^"]*)"', dom) == ["1,3"]


def test_one_menu_chooses_the_layer_of_all_figures_of_one_and_of_their_tables(run, tmp_path):
    dom, console = with_script(run, _CHOSEN, tmp_path)
    assert console == []
    content = (run.parent / "page.html").read_text(encoding="utf-8")
    titles = (
        "Tokens of each expert, over an even share",
        "Slots of each expert in the planned layouts",
    )
    for title in titles:
        trace = figure_of(data_of(content), title)["data"][1]
        cells = table(dom, title)
        assert [line[0] for line in cells[1:]] == [*map(str, trace["y"])]
        assert [float(line[1]) for line in cells[1:]] == [row[0] for row in trace["z"]]
    assert dom.count('<b class="layer">layer 2</b>') == 2
    (files,) = re.findall(r'data-files="([^"]*)"', dom)
    others, *names = files.split(",")
    assert int(others) == 0 and len(names) == dom.count("<figure")
    assert "tokens-of-each-expert-over-an-even-share-layer-2.csv" in names


def test_hostile_names_stay_text(tmp_path):
    hostile = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"
    record_run(tmp_path / "run", layers=(hostile, "layer 2"), run=RUN | {"planner": hostile})
    page = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path / "run"), "--out", str(page)]) == 0
    dom, console = opened(page, tmp_path, fragment="#tables")
    assert console == []
    assert "<title>taken" not in dom and "<img src=x" not in dom
    assert html.escape(hostile, quote=False) in dom


@pytest.mark.parametrize("fragment", ["", "#dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_pictures_have_both_themes_and_no_sideways_scrolling(run, tmp_path, width, fragment):
    from matplotlib import image

    shot = tmp_path / "shot.png"
    opened(run.parent / "page.html", tmp_path, fragment=fragment, width=width, shot=shot)
    pixels = image.imread(shot)[:, :width, :3]
    corner = pixels[2990, 0].mean()
    assert corner < 0.2 if fragment else corner > 0.9
    # The page fits: its margin on the right is empty, from top to bottom.
    assert np.ptp(pixels[:2990, -6:-2].reshape(-1, 3), axis=0).max() < 0.02
    assert (np.ptp(pixels, axis=2) > 0.3).sum() > 500
