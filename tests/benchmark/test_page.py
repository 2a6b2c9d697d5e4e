from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import markdown_it
import numpy as np
import pytest
import yaml
from benchmark_fakes import SHORT, fake_measurements, four_subjects, id_and_ood, paint_images
from browser import CHROMIUM, open_page
from matplotlib.figure import Figure

from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.report import charts
from edgekd.benchmark.report.charts import DARK, LIGHT, Point, accuracy_figure, front
from edgekd.benchmark.report.document import document, points_of
from edgekd.benchmark.report.elements import Gallery, Table
from edgekd.benchmark.report.failures import BUDGET_BYTES, failure_items
from edgekd.benchmark.report.modelcard import model_card
from edgekd.benchmark.report.recommend import verdict
from edgekd.benchmark.report.render import escape, markdown
from edgekd.benchmark.report.render import html as render
from edgekd.benchmark.report.summary import answers, notes
from edgekd.benchmark.report.write import print_report
from edgekd.benchmark.results.schema import GateRow, Report
from edgekd.benchmark.results.storage import RawResults, read_results

EVIL = ("<script>alert(1)</script>", "dog & 'co'", 'fish" onload="x')

RUN = "<img src=x onerror=alert(2)>"

FACTS = {
    "name": RUN,
    "student": "tiny",
    "recipe": "kd",
    "teacher": "toy",
    "data": "</style><b>paint",
    "split_hash": "ab",
}

PARITY = {
    "n": 8,
    "top1_agreement": 1.0,
    "max_error_relative": 1e-6,
    "cosine": 1.0,
    "kl": 0.0,
    "passed": True,
}

ARTIFACT = {"run": RUN, "name": "onnxruntime-int8", "target": "onnxruntime", "format": "onnx", "parity": PARITY,
            "files": {"model.onnx": "00ff"}, "source": {}, "versions": {}, "created": "",
            "quantization": None}  # fmt: skip

VOID = {"meta", "img", "br", "link", "input", "hr"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a run whose name and classes are an attack."""
    place = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as monkeypatch:
        times = {f"{RUN}/onnxruntime-fp32": 2.0, f"{RUN}/onnxruntime-int8": 3.0}
        fake_measurements(monkeypatch, times, picture=True)
        images = replace(paint_images(), classes=EVIL)
        subjects = [
            replace(one, classes=EVIL) for one in four_subjects(place, run=RUN, sketch_every=3)
        ]
        context = {"runs": [FACTS], "artifacts": [ARTIFACT]}
        run_benchmark(subjects, id_and_ood(images), place / "out", speed=SHORT, context=context)
    return place / "out"


@pytest.fixture(scope="module")
def kept(folder: Path) -> RawResults:
    return read_results(folder)


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every start tag with its attributes and the tags it stands in; fails on tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def named(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes, _ in self.found if name == tag)


def test_what_users_wrote_stays_text(html: str) -> None:
    found = Elements(html)
    assert list(found.named("script")) == []
    assert all(
        (image["src"] or "").startswith("data:image/jpeg;base64,") for image in found.named("img")
    )
    assert not any(name.startswith("on") for _, attributes, _ in found.found for name in attributes)
    assert html.count("<style>") == html.count("</style>") == 1
    for part in (
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "dog &amp; &#39;co&#39;",
        "&lt;img src=x",
    ):
        assert part in html


def test_the_file_loads_nothing(html: str) -> None:
    found = Elements(html)
    for _, attributes, _ in found.found:
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), attributes
    assert "default-src 'none'" in next(
        str(one["content"])
        for one in found.named("meta")
        if one.get("http-equiv") == "Content-Security-Policy"
    )
    assert all(target.startswith("#f") for target in re.findall(r"url\(([^)]*)\)", html))
    assert "@import" not in html


def test_tables_and_drawings_are_accessible(html: str) -> None:
    found = Elements(html)
    tables = html.split("<table")[1:]
    assert len(tables) > 8
    assert all("<caption" in table.split("</table>")[0] for table in tables)
    assert all(cell.get("scope") in ("col", "row") for cell in found.named("th"))
    assert all(image.get("alt") for image in found.named("img"))
    drawings = [one for one in found.named("svg") if one.get("role") == "img"]
    assert len(drawings) > 10
    ids = [str(attributes["id"]) for _, attributes, _ in found.found if attributes.get("id")]
    assert len(ids) == len(set(ids))
    for drawing in drawings:
        title, description = str(drawing["aria-labelledby"]).split()
        assert title in ids
        assert description in ids
    targets = {str(link["href"])[1:] for link in found.named("a")}
    assert targets <= set(ids)


def test_gates_stand_first_and_name_what_failed(kept: RawResults) -> None:
    def gate(
        expression: str, value: float | None, passed: bool, reason: str | None = None
    ) -> GateRow:
        return GateRow(expression=expression, run=RUN, subject="onnxruntime-int8", metric="p90_ms", operator="<=",
                       limit=20.0, value=value, passed=passed, reason=reason)  # fmt: skip

    gates = (gate("p90_ms<=20", 3.3, True), gate("mce<=1", None, False, "no corruptions"))
    report = kept.report.model_copy(update={"gates": gates})
    assert verdict(report) == ("failed", "1 of 2 gates failed")
    text = render(document(report))
    assert (
        text.index("1 of 2 gates failed")
        < text.index("not evaluated: no corruptions")
        < text.index('id="results"')
    )
    report = kept.report.model_copy(update={"gates": gates[:1]})
    assert verdict(report) == ("passed", "1 gate passed")


def test_answers_call_nothing_a_difference_that_is_none(kept: RawResults) -> None:
    told = {text.label: text.body for text in answers(kept.report)}
    assert "changed the outcome of no image" in told["Export"]
    files = tuple(
        row for row in kept.report.summary if row.precision != "fp32" or row.kind == "torch"
    )
    told = {
        text.label: text.body for text in answers(kept.report.model_copy(update={"summary": files}))
    }
    # 10 of 60 net losses in domain: the paired interval includes zero; of 60 out of domain likewise.
    assert "no loss shown (+16.7 points" in told["Export"]
    assert any(
        "takes 1.50 times as long as onnxruntime-fp32 (95 % CI " in n for n in notes(kept.report)
    )


def test_no_renderer_states_a_speed_that_is_withheld(
    kept: RawResults, capsys: pytest.CaptureFixture[str]
) -> None:
    withheld = {"withheld": "the latencies scatter (CV 0.80)"}
    speed = tuple(row.model_copy(update=withheld) for row in kept.report.speed)
    assert speed
    report = kept.report.model_copy(update={"speed": speed})
    report = report.model_copy(update={"notes": tuple(notes(report))})
    print_report(report)
    page = document(report)
    for shown in (render(page), markdown(page), model_card(report), capsys.readouterr().out):
        assert "times as long" not in shown
        assert "times as fast" not in shown
        assert "CV 0.80" in shown


def test_confusion_and_mistakes_by_hand(kept: RawResults) -> None:
    matrix, _, gallery = failure_items(kept)
    assert isinstance(matrix, Table)
    assert isinstance(gallery, Gallery)
    # INT8 is wrong on every second image, naming the next class; the images of a suite alternate between three classes.
    assert matrix.title.endswith("/onnxruntime-int8 on ood:photo: 50.0 % of 30 images")
    assert [row[1:4] for row in matrix.rows] == [("5", "5", "·"), ("·", "5", "5"), ("5", "·", "5")]
    assert len(gallery.pictures) == 6  # two of each of three kinds
    confidence = 100 * np.exp(4) / (np.exp(4) + 2)
    for error in gallery.pictures:
        label, _, predicted = error.lines[0].partition(" → ")
        assert EVIL.index(predicted) == (EVIL.index(label) + 1) % 3
        assert error.lines[1] == f"{confidence:.0f} %"


def test_thumbnails_are_small_few_and_optional(kept: RawResults, html: str) -> None:
    suites = id_and_ood(replace(paint_images(), classes=EVIL))
    *_, gallery = failure_items(kept, suites)
    assert isinstance(gallery, Gallery)
    sizes = [len(picture.address) for picture in gallery.pictures]
    assert len(sizes) == 6
    assert all(sizes)
    assert sum(sizes) <= BUDGET_BYTES
    assert html.count("<img ") == 6
    without = render(document(kept.report, kept))
    assert "<img " not in without
    assert gallery.pictures[0].name in without


def test_front_keeps_what_nothing_beats(kept: RawResults) -> None:
    row = next(one for one in kept.report.summary if one.kind == "artifact")
    time = kept.report.time(row)

    def point(name: str, p50: float, accuracy: float) -> Point:
        return Point(name, "c0", row.model_copy(update={"id": 0.9, "ood_avg": accuracy}),
                     time.model_copy(update={"p50_ms": p50, "p50_ci95_ms": (p50, p50)}))  # fmt: skip

    points = [
        point("slow", 9.0, 0.5),
        point("good", 5.0, 0.7),
        point("fast", 2.0, 0.6),
        point("worse", 3.0, 0.55),
    ]
    assert [one.name for one in front(points)] == ["fast", "good"]
    points.append(
        replace(point("torch", 0.0061234, 0.9), summary=row.model_copy(update={"kind": "torch"}))
    )
    drawn = charts.svg(charts.accuracy_figure(points, 340), "f0", "title", "<what>")
    assert "&lt;what&gt;" in drawn
    assert "← 0.006" in drawn, "numbers in text are not shortened"


def test_no_sample_is_outside_a_latency_drawing(kept: RawResults) -> None:
    parts = [np.array([1.0] * 400 + [250.0]), np.array([1.1] * 400)]
    row = kept.report.latency[-1].model_copy(update={"p50_ms": 1.0, "p90_ms": 1.1})
    [axes] = charts.histogram_figure(parts, row, "c0").axes
    low, high = axes.get_xlim()
    assert low < 1.0 < 250.0 < high
    heights = axes.patches[0].get_data().values
    assert heights[-1] == pytest.approx(0.012 * heights.max(), rel=0.2)  # one of 801 can be seen
    [axes] = charts.timeline_figure(parts, "c0").axes
    ranges = next(line for line in axes.lines if len(line.get_xdata()) == 360).get_ydata()
    assert (np.nanmin(ranges), np.nanmax(ranges)) == (1.0, 250.0)
    assert axes.get_ylim()[0] < 1.0 < 250.0 < axes.get_ylim()[1]


def test_colours_have_contrast_in_both_themes(html: str) -> None:
    page = re.sub(r"@media screen.*?\n}\n", lambda m: "DARK" + m[0], html, count=1, flags=re.DOTALL)
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in page.split("DARK")[:2]
    )
    assert LIGHT.items() <= light.items()
    assert DARK.items() <= dark.items()

    def luminance(colour: str) -> float:
        parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(first: str, second: str) -> float:
        high, low = sorted((luminance(first), luminance(second)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for theme in (light, dark):
        for name in ("ink", "soft", "link", "good", "bad", *(f"c{n}" for n in range(7)), "ct"):
            assert contrast(theme[name], theme["paper"]) >= 4.5, name
            assert contrast(theme[name], theme["wash"]) >= 4.2, name
        assert contrast(theme["warn"], theme["warn-wash"]) >= 4.5


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
def test_in_a_browser_without_scripts_and_network(folder: Path, tmp_path: Path) -> None:
    seen = open_page(folder / "report.html", tmp_path, (320, 375, 768, 1280))
    assert seen.requests == []
    for frame in seen.frames:
        assert frame["scroll"] <= frame["width"], frame["wide"]
        assert frame["wide"] == []
        assert frame["drawings"] > 10
        for part in (
            "No gates were set",
            "onnxruntime-int8",
            "<script>alert(1)</script>",
            "How each number is measured",
        ):
            assert part in frame["text"]
    assert (
        len({frame["drawings"] for frame in seen.frames}) == 1
    )  # each large drawing in one of its two widths


HOSTILE = (
    "<b>a|b</b>\n`x` *y*",
    "![x](http://evil/x.png)",
    "[x](http://evil)",
    "[x]: http://evil",
    "# big",
    "- item",
    "1. item",
    "https://evil/ www.evil.org",
    "~~gone~~ _thin_ &lt;b&gt;",
    "\x1b[31mred\x07\u202eback",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_text_in_markdown(name: str) -> None:
    """Rendered by a CommonMark parser with tables and autolinks, a name is one text and nothing else."""
    parser = markdown_it.MarkdownIt("commonmark", {"linkify": True}).enable(
        ["table", "strikethrough"]
    )
    plain = (
        " ".join(name.split())
        .replace("\x1b", "\\x1b")
        .replace("\x07", "\\x07")
        .replace("\u202e", "\\u202e")
    )
    for line in (f"# {escape(name)}", f"- {escape(name)}", f"| a |\n|---|\n| {escape(name)} |"):
        inline = [token for token in parser.parse(line) if token.type == "inline"][-1]
        kinds = {child.type for child in inline.children or ()}
        assert kinds <= {"text", "text_special"}, (line, kinds)
        assert "".join(child.content for child in inline.children or ()) == plain


@pytest.mark.parametrize("name", [*HOSTILE, "=1+1", "@SUM(A1)", "[bold red]x[/]"])
def test_hostile_names_in_every_form(
    kept: RawResults, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = kept.report.model_dump_json().replace(json.dumps(RUN)[1:-1], json.dumps(name)[1:-1])
    report = Report.model_validate_json(data)
    page, text, card = (
        render(document(report)), markdown(document(report)), model_card(report),
    )  # fmt: skip
    print_report(report)
    printed = capsys.readouterr().out
    assert "[bold red]x[/]" in printed if name.startswith("[bold") else True
    for written in (page, text, card, printed):
        assert not set(written) & {"\x1b", "\x07", "\u202e"}
    for written in (text, card):
        assert "![x](" not in written
        assert "<b>a" not in written
    front = yaml.safe_load(card.split("---\n")[1])
    plain = " ".join(name.split()).replace("\x1b", "\\x1b")
    assert front["model-index"][0]["name"][:3] == plain[:3]
    assert list(Elements(page).named("script")) == []


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Three runs of equal accuracy and nearly equal latency."""
    runs = ("erm", "kd", "vl2v-adip")
    times = {
        f"{run}/onnxruntime-{kind}": 2.0 + 0.01 * n
        for n, run in enumerate(runs)
        for kind in ("fp32", "int8")
    }
    folder = tmp_path_factory.mktemp("crowded")
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_measurements(monkeypatch, times)
        subjects = [subject for run in runs for subject in four_subjects(folder, run=run)]
        return run_benchmark(subjects, id_and_ood(paint_images()), folder / "out", speed=SHORT)


@pytest.fixture(scope="module")
def drawn(crowded: Report) -> Figure:
    return accuracy_figure(points_of(crowded), 1000)


def test_points_stand_at_latency_and_accuracy(crowded: Report, drawn: Figure) -> None:
    axes = drawn.axes[0]
    marked = {
        (float(line.get_xdata()[0]), round(float(line.get_ydata()[0]), 6))
        for line in axes.lines
        if line.get_marker() not in ("None", None)
    }
    for row in crowded.exported:
        p50 = crowded.time(row).p50_ms
        assert {(p50, round(100 * row.id, 6)), (p50, round(100 * row.ood_avg, 6))} <= marked
    assert axes.get_xscale() == "log"
    names = axes.get_legend_handles_labels()[1]
    assert {"teacher zero-shot†", "kd: onnxruntime-int8"} <= set(names)
    assert len(names) == len(set(names)) == 10


def test_a_slow_torch_student_does_not_stretch_the_axis(crowded: Report) -> None:
    def slower(point: Point) -> Point:
        if point.summary.kind == "artifact":
            return point
        time = point.time.model_copy(update={"p50_ms": 80.0, "p50_ci95_ms": (79.0, 81.0)})
        return replace(point, time=time)

    figure = accuracy_figure(list(map(slower, points_of(crowded))), 1000)
    low, high = figure.axes[0].get_xlim()
    assert high / low < 4
    assert "80.00 →" in {text.get_text().strip() for text in figure.axes[0].texts}
