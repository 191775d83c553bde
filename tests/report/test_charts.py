"""Charts: whole markup whatever the numbers and names are, marks where they belong, the same files each time."""

from __future__ import annotations

import errno
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import Page

from unlearn.errors import RunFolderError
from unlearn.report.charts import COLOURS, Axis, Chart, Point, Series, axis_of, chart, spark, style
from unlearn.text import tick_label

HOSTILE = '</svg><script>alert(1)</script><b onclick="x">\'&"]]>-->$\\frac{1}$<svg/onload=1>\x00\x1b\ud800 字'


def marks(source: str) -> list[tuple[float, float]]:
    """Where the points with a tip are."""
    found = re.findall(r"<g><title>.*?</title>.*?<use [^>]*?x=\"([\d.]+)\" y=\"([\d.]+)\"", source)
    return [(float(a), float(b)) for a, b in found]


def drawn(points: list[Point], **changed: object) -> Chart:
    return chart([Series(points, colour="retain")], Axis(0, 2, "λ"), Axis(0, 1), **changed)  # type: ignore[arg-type]


def test_points_are_where_they_belong() -> None:
    points = [Point(0, 0, tip="a"), Point(1, 0.5, 0.2, tip="b"), Point(2, 1, tip="c"), Point(1, 9, tip="d"),
              Point(math.nan, 0, tip="never"), Point(1, math.nan, tip="never")]  # fmt: skip
    source = drawn(points, at=1.0, at_label="λ = 1", bound=0.25, chance=0.75).svg("t <&>", "d", "u")
    # frame 46..308 by 20..154, λ inset by 8 pixels; what lies outside is on the edge
    wide = 262 / (1 + 16 / 262)
    at = [177 + wide * (v - 1) / 2 for v in (0, 1, 2, 1)]
    assert [x for x, _ in marks(source)] == pytest.approx(at, abs=0.02)
    assert [y for _, y in marks(source)] == pytest.approx([154, 87, 20, 20], abs=0.02)
    assert "never" not in source
    assert '<title id="u-t">t &lt;&amp;&gt;</title>' in source
    assert ">λ = 1<" in source
    bar = re.search(r"M 177 ([\d.]+) L 177 ([\d.]+) ?\"[^>]*stroke: var\(--retain\); stroke-opacity", source)
    assert bar
    assert sorted(float(v) for v in bar.groups()) == pytest.approx([154 - 134 * 0.7, 154 - 134 * 0.3], abs=0.02)
    for name, y in (("bound", "120.5"), ("muted", "53.5")):
        assert re.search(rf"M 46 {y} L 308 {y} ?\"[^>]*stroke: var\(--{name}\)", source)


def test_the_page_s_colours_are_used_and_nothing_is_fetched() -> None:
    points = [Point(x / 2, x / 4, 0.1, label=f"{x}", tip=f"{x}", ring=x == 2) for x in range(4)]
    source = drawn([*points, Point(1, 0.9, mark="hollow"), Point(1.5, 0.9, mark="cross")], bound=0.5, shaded=True).svg(
        "t", "d", "u"
    )
    assert not re.search(r"#[0-9a-f]{6}|https?:|<style|<metadata|<!--|font-family", source)
    assert "var(--panel)" in source  # hollow
    assert set(re.findall(r"var\(--(\w+)\)", source)) <= set(COLOURS)
    ids, used = re.findall(r' id="([^"]+)"', source), re.findall(r'(?:href="|url\()#([^")]+)', source)
    assert len(ids) == len(set(ids))
    assert set(used) <= set(ids)
    assert all(name.startswith("u-") for name in ids)
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_hostile_names_stay_text() -> None:
    points = [Point(0, 0.5, label=HOSTILE, tip=HOSTILE), Point(1, 0.6)]
    lines = [Series(points, name=HOSTILE), Series(points, name="$x", **style(1))]
    found = chart(lines, Axis(0, 1, HOSTILE), Axis(0, 1, HOSTILE), at=0.5, at_label=HOSTILE, size=(360, 380))
    source = found.svg(HOSTILE, HOSTILE, "u")
    page = Page(source)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert set(page.tags) <= {"svg", "title", "desc", "g", "path", "defs", "use", "text", "clippath", "rect"}
    assert not re.search(r"[\x00-\x08\x0e-\x1f\ud800-\udfff]", source)


@given(st.lists(st.floats(), min_size=1, max_size=6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_axis_holds_its_values_and_any_number_can_be_drawn(values: list[float], unit: bool) -> None:
    axis = axis_of(values, unit=unit)
    assert all(
        axis.low - 1e-9 * abs(axis.low) <= v <= axis.high * (1 + 1e-9) for v in values if 1e-100 < abs(v) < 1e100
    )
    assert axis.low < axis.high
    points = [Point(n, v, error=abs(v), tip=str(n)) for n, v in enumerate(values)]
    source = chart([Series(points)], Axis(0, 6), axis).svg("t", "d", "u")
    assert not re.search(r"\b(nan|inf)\b", source)
    assert len(re.findall("<text", source)) <= 20
    assert len(marks(source)) == sum(not math.isnan(v) for v in values)


def test_the_axis_fits_the_values() -> None:
    assert axis_of([0.2, 0.9]) == Axis(0.0, 1.0)
    assert axis_of([30.0, 1.2e12]) == Axis(10.0, 1e13, kind="log")
    assert axis_of([30.0, 2000.0]).kind == "linear"
    assert axis_of([30.0, 4000.0]).kind == "log"
    assert axis_of([0.0, 0.5, 4000.0]) == Axis(0.0, 1e4, kind="symlog", threshold=0.1)
    assert axis_of([-3.0, -6.0]).low == pytest.approx(-6.18)
    assert axis_of([5.0]).low < 5.0 < axis_of([5.0]).high
    assert axis_of([]) == axis_of([math.nan, math.inf]) == Axis(0.0, 1.0)


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(0, 1), (0, 0.2, 0.4, 0.6, 0.8, 1)),
        (Axis(-3, 12), (0, 5, 10)),
        (Axis(10, 1e5, kind="log"), (10, 100, 1000, 1e4, 1e5)),
        (Axis(1, 1e12, kind="log"), (1, 1e3, 1e6, 1e9, 1e12)),
        (Axis(-10, 100, kind="symlog"), (-10, -1, 0, 1, 10, 100)),
    ],
)
def test_ticks_are_round(axis: Axis, ticks: tuple[float, ...]) -> None:
    source = chart([], Axis(0, 1), axis).svg("t", "d", "u")
    shown = re.findall(r"text-anchor: end[^>]*>([^<]+)<", source)
    assert shown == [tick_label(v) for v in ticks]


def test_labels_touch_neither_points_nor_each_other() -> None:
    points = [Point(1, 0.5, label="λ = 1", ring=True), Point(1.1, 0.5, label="1.1"), Point(2, 1, label="2")]
    source = drawn(points, bound=0.5, bound_label="bound").svg("t", "d", "u")
    spots = re.findall(r'<g class="halo"> <text [^>]*?x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)<', source)
    assert [word for *_, word in spots] == ["λ = 1", "2", "1.1"]
    boxes = [(float(x) - 3.6 * len(w), float(y) - 11, float(x) + 3.6 * len(w), float(y)) for x, y, w in spots]
    for n, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[n + 1 :])


def test_files_for_papers_have_the_same_bytes_each_time(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        lines = [Series([Point(0, 0), Point(1, 1)], name=f"set {n}", **style(n)) for n in range(2)]
        chart(lines, Axis(0, 1, "x"), Axis(0, 1, "y"), size=(640, 360)).save(tmp_path / name / "chart")
        found.append([(tmp_path / name / f"chart.{kind}").read_bytes() for kind in ("pdf", "png")])
    assert found[0] == found[1]
    assert found[0][0].startswith(b"%PDF")
    assert chart(lines, Axis(0, 1), Axis(0, 1)).svg("t", "d", "u") == chart(lines, Axis(0, 1), Axis(0, 1)).svg(
        "t", "d", "u"
    )


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = drawn([Point(0, 0), Point(1, 1)])
    found.save(tmp_path / "chart")
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(old) == {"chart.pdf", "chart.png"}

    def half(self: object, path: Path, **how: object) -> None:
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    with pytest.raises(RunFolderError):
        found.save(tmp_path / "chart")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_nothing_is_written_in_the_home_of_who_draws(tmp_path: Path) -> None:
    code = (
        "from unlearn.report.charts import *; import os\n"
        "print(chart([], Axis(0, 1, 'x'), Axis(0, 1)).svg('t', 'd', 'u')[:4], os.environ['MPLCONFIGDIR'])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "MPLCONFIGDIR" and "XDG" not in key}
    home, kept = tmp_path / "home", tmp_path / "cache"
    home.mkdir()
    environment |= {"HOME": str(home), "UNLEARN_CACHE": str(kept), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    drawing, folder = done.stdout.split()
    assert drawing == "<svg"
    assert Path(folder) == kept / "matplotlib"
    assert not list(home.iterdir())


def test_spark() -> None:
    assert 'points="3.0,3.0 65.0,15.0 127.0,27.0"' in spark([2.0, 1.0, 0.0])
    assert spark([1.0]) == spark([math.nan, 2.0]) == ""
    assert "nan" not in spark([1.0, math.nan, 1.0])
