from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import markdown_it
import numpy as np
import pytest
import yaml
from benchmark_fakes import (
    SHORT,
    fake_measurements,
    four_measured,
    four_subjects,
    id_and_ood,
    paint_images,
)
from browser import CHROMIUM, open_page
from huggingface_hub import ModelCard

from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.report import charts
from edgekd.benchmark.report.charts import Point, accuracy_figure, front
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
from edgekd.benchmark.results.storage import RawResults, read_report, read_results
from edgekd.core.readers import printable
from edgekd.export.parity import compare

EVIL = ("<script>alert(1)</script>", "dog & 'co'", 'fish" onload="x')

RUN = "<img src=x onerror=alert(2)>"

FACTS = {"name": RUN, "student": "tiny", "recipe": "kd", "teacher": "toy", "data": "</style><b>paint",
         "split_hash": "ab"}  # fmt: skip

SAME = np.eye(3, dtype=np.float32)

PARITY = compare(SAME, SAME) | {"passed": True}

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
def html(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def kept(folder: Path) -> RawResults:
    return read_results(folder)


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


def test_the_page_is_text_and_loads_nothing(html: str) -> None:
    """What users wrote stays text; tables and drawings have captions, labels and titles."""
    found = Elements(html)
    assert list(found.named("script")) == []
    assert html.count("<style>") == html.count("</style>") == 1
    for part in ("&lt;script&gt;alert(1)", "dog &amp; &#39;co&#39;", "&lt;img src=x"):
        assert part in html
    for _, attributes, _ in found.found:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), attributes
    policies = [one["content"] for one in found.named("meta") if one.get("http-equiv")]
    assert any("default-src 'none'" in str(one) for one in policies)
    assert all(target.startswith("#f") for target in re.findall(r"url\(([^)]*)\)", html))
    assert "@import" not in html
    tables = html.split("<table")[1:]
    assert len(tables) > 8
    assert all("<caption" in table.split("</table>")[0] for table in tables)
    assert all(cell.get("scope") in ("col", "row") for cell in found.named("th"))
    assert all(image.get("alt") for image in found.named("img"))
    ids = [str(attributes["id"]) for _, attributes, _ in found.found if attributes.get("id")]
    assert len(ids) == len(set(ids))
    drawings = [one for one in found.named("svg") if one.get("role") == "img"]
    assert len(drawings) > 10
    for drawing in drawings:
        assert set(str(drawing["aria-labelledby"]).split()) <= set(ids)
    assert {str(link["href"])[1:] for link in found.named("a")} <= set(ids)


def test_verdict_and_answers(kept: RawResults) -> None:
    def gate(expression: str, value: float | None, reason: str | None = None) -> GateRow:
        return GateRow(expression=expression, run=RUN, subject="onnxruntime-int8", metric="p90_ms", operator="<=",
                       limit=20.0, value=value, passed=value is not None, reason=reason)  # fmt: skip

    gates = (gate("p90_ms<=20", 3.3), gate("mce<=1", None, "no corruptions"))
    report = kept.report.model_copy(update={"gates": gates})
    assert verdict(report) == ("failed", "1 of 2 gates failed")
    text = render(document(report))
    parts = ("1 of 2 gates failed", "not evaluated: no corruptions", 'id="results"')
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert verdict(report.model_copy(update={"gates": gates[:1]})) == ("passed", "1 gate passed")
    [export] = [text.body for text in answers(kept.report) if text.label == "Export"]
    assert "changed the outcome of no image" in export
    rows = (row for row in kept.report.summary if (row.kind, row.precision) != ("artifact", "fp32"))
    report = kept.report.model_copy(update={"summary": tuple(rows)})
    [export] = [text.body for text in answers(report) if text.label == "Export"]
    # 10 of 60 net losses in domain: the paired interval includes zero; of 60 out of domain likewise.
    assert "no loss shown (+16.7 points" in export
    assert any(
        "takes 1.50 times as long as onnxruntime-fp32" in note for note in notes(kept.report)
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


def test_confusion_and_mistakes_by_hand(kept: RawResults, html: str) -> None:
    matrix, _, gallery = failure_items(kept)
    assert isinstance(matrix, Table)
    assert isinstance(gallery, Gallery)
    # INT8 is wrong on every second image, naming the next class; the images of a suite alternate between three classes.
    assert matrix.title.endswith("/onnxruntime-int8 on ood:photo: 50.0 % of 30 images")
    assert [row[1:4] for row in matrix.rows] == [("5", "5", "·"), ("·", "5", "5"), ("5", "·", "5")]
    assert len(gallery.pictures) == html.count("<img ") == 6  # two of each of three kinds
    confidence = 100 * np.exp(4) / (np.exp(4) + 2)
    for error in gallery.pictures:
        label, _, predicted = error.lines[0].partition(" → ")
        assert EVIL.index(predicted) == (EVIL.index(label) + 1) % 3
        assert error.lines[1] == f"{confidence:.0f} %"
    # Thumbnails are small, and optional.
    *_, gallery = failure_items(kept, id_and_ood(replace(paint_images(), classes=EVIL)))
    assert isinstance(gallery, Gallery)
    sizes = [len(picture.address) for picture in gallery.pictures]
    assert all(sizes)
    assert sum(sizes) <= BUDGET_BYTES
    without = render(document(kept.report, kept))
    assert "<img " not in without
    assert gallery.pictures[0].name in without


def test_drawings_show_every_file_and_every_sample(kept: RawResults) -> None:
    report = kept.report
    points = points_of(report)
    axes = accuracy_figure(points, 1000).axes[0]
    marked = {
        (float(line.get_xdata()[0]), round(float(line.get_ydata()[0]), 6))
        for line in axes.lines
        if line.get_marker() not in ("None", None)
    }
    for row in report.exported:
        p50 = report.time(row).p50_ms
        assert {(p50, round(100 * row.id, 6)), (p50, round(100 * row.ood_avg, 6))} <= marked
    assert axes.get_xscale() == "log"

    def changed(point: Point, name: str, p50: float, **summary: Any) -> Point:
        times = {"p50_ms": p50, "p50_ci95_ms": (0.99 * p50, 1.01 * p50)}
        row, time = point.summary.model_copy(update=summary), point.time.model_copy(update=times)
        return replace(point, name=name, summary=row, time=time)

    # A slow torch student does not stretch the axis.
    slow = [p if p.summary.kind == "artifact" else changed(p, p.name, 80.0) for p in points]
    figure = accuracy_figure(slow, 1000)
    low, high = figure.axes[0].get_xlim()
    assert high / low < 4
    assert "80.00 →" in {text.get_text().strip() for text in figure.axes[0].texts}
    # The front keeps what nothing beats.
    one = next(point for point in points if point.summary.kind == "artifact")
    values = (("slow", 9.0, 0.5), ("good", 5.0, 0.7), ("fast", 2.0, 0.6), ("worse", 3.0, 0.55))
    chosen = [changed(one, name, p50, id=0.9, ood_avg=value) for name, p50, value in values]
    assert [point.name for point in front(chosen)] == ["fast", "good"]
    drawn = charts.svg(charts.accuracy_figure(chosen, 340), "f0", "title", "<what>")
    assert "&lt;what&gt;" in drawn
    # No sample is outside a drawing of latencies, and one of 801 can be seen.
    parts = [np.array([1.0] * 400 + [250.0]), np.array([1.1] * 400)]
    row = report.latency[-1].model_copy(update={"p50_ms": 1.0, "p90_ms": 1.1})
    [axes] = charts.histogram_figure(parts, row, "c0").axes
    low, high = axes.get_xlim()
    assert low < 1.0 < 250.0 < high
    heights = axes.patches[0].get_data().values
    assert heights[-1] == pytest.approx(0.012 * heights.max(), rel=0.2)
    [axes] = charts.timeline_figure(parts, "c0").axes
    ranges = next(line for line in axes.lines if len(line.get_xdata()) == 360).get_ydata()
    assert (np.nanmin(ranges), np.nanmax(ranges)) == (1.0, 250.0)
    assert axes.get_ylim()[0] < 1.0 < 250.0 < axes.get_ylim()[1]


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
def test_in_a_browser_without_scripts_and_network(folder: Path, tmp_path: Path) -> None:
    seen = open_page(folder / "report.html", tmp_path, (320, 375, 768, 1280))
    assert seen.requests == []
    for frame in seen.frames:
        assert frame["scroll"] <= frame["width"], frame["wide"]
        assert frame["wide"] == []
        assert frame["drawings"] > 10
        for part in ("No gates were set", "onnxruntime-int8", "<script>alert(1)</script>"):
            assert part in frame["text"]
    # Each large drawing in one of its two widths.
    assert len({frame["drawings"] for frame in seen.frames}) == 1


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
    plain = printable(" ".join(name.split()))
    for line in (f"# {escape(name)}", f"- {escape(name)}", f"| a |\n|---|\n| {escape(name)} |"):
        inline = [token for token in parser.parse(line) if token.type == "inline"][-1]
        kinds = {child.type for child in inline.children or ()}
        assert kinds <= {"text", "text_special"}, (line, kinds)
        assert "".join(child.content for child in inline.children or ()) == plain


@pytest.mark.parametrize("name", ["".join(HOSTILE), "[bold red]x[/] =1+1"])
def test_hostile_names_in_every_form(
    kept: RawResults, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = kept.report.model_dump_json().replace(json.dumps(RUN)[1:-1], json.dumps(name)[1:-1])
    report = Report.model_validate_json(data)
    page, text, card = render(document(report)), markdown(document(report)), model_card(report)
    print_report(report)
    printed = capsys.readouterr().out
    assert ("[bold red]x[/]" in printed) is name.startswith("[bold")
    for written in (page, text, card, printed):
        assert not set(written) & {"\x1b", "\x07", "\u202e"}
    for written in (text, card):
        assert "![x](" not in written
        assert "<b>a" not in written
    front_matter = yaml.safe_load(card.split("---\n")[1])
    assert front_matter["model-index"][0]["name"][:3] == name[:3]
    assert list(Elements(page).named("script")) == []


@pytest.fixture(scope="module")
def card_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    context = {"runs": [FACTS | {"name": "r"}], "artifacts": [ARTIFACT | {"run": "r"}]}
    return four_measured(tmp_path_factory.mktemp("card"), context=context).folder


def code_of(card: str) -> str:
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return str(code)


def test_model_index_has_the_numbers_of_the_report(card_folder: Path) -> None:
    report = read_report(card_folder)
    accuracy = {(f"{row.run}/{row.subject}", row.suite): row for row in report.accuracy}
    latency = {f"{row.run}/{row.subject}": row for row in report.latency}
    card = ModelCard.load(card_folder / "MODEL_CARD.md")
    assert card.data.pipeline_tag == "image-classification"
    assert "onnx" in card.data.tags
    results = card.data.eval_results
    assert results is not None
    found = {(r.dataset_split, r.metric_name, r.metric_value) for r in results}
    suites = ("id", "ood:photo", "ood:sketch")
    wanted = set()
    for name in ("r/onnxruntime-fp32", "r/onnxruntime-int8"):
        wanted |= {("id", f"p{q}, ms", getattr(latency[name], f"p{q}_ms")) for q in (50, 90)}
        for row in (accuracy[name, suite] for suite in suites):
            values = {"top-1": row.top1, "macro": row.macro, "ECE": row.ece}
            wanted |= {(row.suite, label, value) for label, value in values.items()}
    assert found == wanted
    assert len(results) == 2 * (3 * 3 + 2)


def test_sections_and_example(card_folder: Path) -> None:
    text = (card_folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == ["Results", "Latency", "Use", "Limits", "Training", "Files",
                        "How each number is measured"]  # fmt: skip
    assert "image.resize((16, 16), Image.Resampling.BICUBIC)" in code_of(text)
    assert "**Lowest accuracy measured**: 50.0 % (onnxruntime-int8" in text
    assert "</style>" not in text.replace("\\</style\\>", "")


def test_the_example_prepares_what_the_file_takes(card_folder: Path) -> None:
    report = read_report(card_folder)

    def of(*taken: dict[str, Any], **facts: Any) -> Report:
        """The report with artifacts of these inputs."""
        own = ARTIFACT | {"run": "r"} | facts
        names = ("onnxruntime-int8", "onnxruntime-int8-float-input")
        found = [own | {"name": n, "inputs": [t]} for n, t in zip(names, taken, strict=False)]
        return report.model_copy(update={"context": {"artifacts": found}})

    floats, pixels = {"dtype": "float32"}, {"dtype": "uint8", "shape": ["batch", 4, 4, 3]}
    whole = ": np.asarray(image)[None]}"
    alone, both = of(floats), of(pixels, floats)
    [note] = [note for note in notes(both) if "float input" in note]
    assert note.startswith("r: onnxruntime-int8-float-input has float input")
    assert not any("float input" in note for note in notes(report))
    assert whole in model_card(both)
    code = code_of(model_card(alone))
    assert ": planes.astype(np.float32)}" in code
    image = np.full((4, 4, 3), (255, 0, 51), dtype=np.uint8)
    told: dict[str, Any] = {"np": np, "image": image}
    lines = (line for line in code.splitlines() if line.startswith(("values", "planes")))
    exec("\n".join(lines), told)
    rule = report.protocol["preprocess"][report.summary[3].preprocess]
    assert told["planes"].shape == (1, 3, 4, 4)
    expected = (np.array((1, 0, 0.2)) - rule["mean"]) / rule["std"]
    np.testing.assert_allclose(told["planes"][0, :, 0, 0], expected)
    # A file that resizes gets the picture.
    resizes = of({"dtype": "uint8", "shape": ["batch", "height", "width", 3]})
    code = code_of(model_card(resizes))
    assert ".resize(" not in code
    assert whole in code
    assert any("resizes in the graph" in note for note in notes(resizes))
    # The name of a file stays text.
    name = "{exit()}'.onnx"
    parsed = list(ast.walk(ast.parse(code_of(model_card(of(pixels, files={name: "0" * 64}))))))
    assert f"/{name}" in [one.value for one in parsed if isinstance(one, ast.Constant)]
    assert not any(isinstance(one, ast.FormattedValue) for one in parsed)
