"""`MODEL_CARD.md`: the card that a model hub shows, with a `model-index` for programs, from the report's numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from edgekd.benchmark.report import provenance, tables
from edgekd.benchmark.report.answers import answers
from edgekd.benchmark.report.markdown import escape, section
from edgekd.benchmark.report.metric import percent
from edgekd.benchmark.report.notes import takes_floats
from edgekd.benchmark.report.rows import Row, SummaryRow
from edgekd.benchmark.report.schema import Report, of
from edgekd.benchmark.report.sections import Item, Section, Text, facts, printable, table


def model_card(report: Report) -> str:
    """Return the card of the report's first run; other runs in the report are measured beside it and left out."""
    report = _of_run(report, report.runs[0])
    run = report.runs[0]
    run_facts: dict[str, Any] = next(
        (one for one in report.context["runs"] if one["name"] == run), {}
    )
    sections = [
        Section("results", "Results", tuple(_results(report))),
        Section("calibration", "Calibration", tuple(tables.calibration(report))),
        Section("latency", "Latency", (next(tables.latencies(report)), *_clock(report))),
    ]
    body = [line for one in sections for line in section(one)]
    body += [*_use(report, run), *section(Section("limits", "Limits", tuple(_limits(report))))]
    if training := facts(run_facts, "name"):
        settings = table("Settings", training, words=True)
        body += section(Section("training", "Training", (settings,)))
    body += _files(report)
    method = tuple(Text(text, name) for name, text in provenance.definitions())
    body += section(Section("method", "How each number is measured", method))
    body.append(f"From `report.json`, measured {report.created[:10]} with edgekd.")
    lines = [_front(report), f"# {escape(run)}", "", escape(_about(report, run_facts)), "", *body]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _of_run(report: Report, run: str) -> Report:
    """Return the report with one run's rows only."""
    tuples = {name: rows for name, rows in report if isinstance(rows, tuple)}
    apart = ("notes", "suites", "comparisons", "speed")
    groups = [name for name in tuples if name not in apart]
    own = {name: tuple(row for row in tuples[name] if row.run == run) for name in groups}
    artifacts = [one for one in report.context.get("artifacts", ()) if one["run"] == run]
    context = {"runs": report.context.get("runs", ()), "artifacts": artifacts}
    suites = tuple(row for row in report.suites if row.run in (None, run))
    return report.model_copy(update=own | {"context": context, "suites": suites, "comparisons": ()})


def _front(report: Report) -> str:
    """Return the front matter in the form of the hub's model card specification.

    Strings that Markdown would take for markup are written with escapes of YAML, so that their value stays what it is.
    """
    subjects = report.exported or [row for row in report.summary if row.kind == "torch"]
    formats = {one["format"] for one in report.context["artifacts"]}
    data = {
        "pipeline_tag": "image-classification",
        "tags": ["edgekd", "knowledge-distillation", "out-of-distribution", *sorted(formats)],
        "model-index": [
            {"name": printable(f"{row.run}/{row.subject}"), "results": list(_index(report, row))}
            for row in subjects
        ],
    }

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        quoted = '"' if re.search(r"[\[\]<>`]", value) else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=quoted)

    Dumper.add_representer(str, text)
    written = yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)
    for character in "<`":
        written = written.replace(character, f"\\x{ord(character):02X}")
    return (
        f"---\n{written.replace('![', '!' + chr(92) + 'x5B').replace('](', chr(92) + 'x5D(')}---\n"
    )


def _index(report: Report, row: SummaryRow) -> Iterator[dict[str, Any]]:
    """Yield one result for each suite, with the very numbers of report.json: fractions 0–1 and milliseconds."""
    suites, time = {one.suite: one for one in report.suites}, report.time(row)
    for found in of(report.accuracy, row):
        suite = suites[found.suite]
        if suite.family == "corruption":
            continue
        metrics = [
            {"type": "accuracy", "name": "top-1", "value": found.top1},
            {"type": "recall", "name": "macro recall", "value": found.macro},
            {"type": "ece", "name": "ECE, 15 bins", "value": found.ece},
        ]
        if found.suite == "id":
            # The hub has no place for a latency outside a data set; these images are what it was measured on.
            metrics += [
                {"type": "latency", "name": "p50, ms", "value": time.p50_ms},
                {"type": "latency", "name": "p90, ms", "value": time.p90_ms},
            ]
        data, split = printable(suite.data), printable(found.suite)
        yield {
            "task": {"type": "image-classification"},
            "dataset": {"type": data, "name": f"{data}, {split}", "split": split},
            "metrics": metrics,
        }


def _about(report: Report, run: dict[str, Any]) -> str:
    kinds = ", ".join(row.subject for row in report.exported) or "no exported file yet"
    files = f"Exported files measured here: {kinds}."
    if not run:
        return files
    return (
        f"A {run.get('student', '')} image classifier, trained with the recipe {run.get('recipe', 'unknown')} from "
        f"the teacher {run.get('teacher', 'unknown')} on {run.get('data', 'unknown data')}. {files}"
    )


def _results(report: Report) -> Iterator[Item]:
    yield from answers(report)
    if report.gates:
        yield tables.gates(report.gates)
    yield tables.results(report)
    yield Text(provenance.images(report))


def _clock(report: Report) -> Iterator[Text]:
    short = f" {provenance.QUICK_MARK}." if report.quick else ""
    yield Text(f"On {provenance.machine_line(report)}. {provenance.latency_rule(report)}{short}")
    if any(tables.mark(row) for row in report.latency):
        yield Text("†: measured briefly as background, not comparable with a file.")


def _use(report: Report, run: str) -> list[str]:
    onnx = [one for one in report.context["artifacts"] if one["format"] == "onnx"]
    if not onnx:
        return []
    # Pixels are easier to give; floats only where nothing else was exported.
    onnx = [one for one in onnx if not takes_floats(one)] or onnx
    row = next(
        row for row in report.exported if row.who == Row(run=run, subject=onnx[0]["name"]).who
    )
    pixels = report.protocol["preprocess"][row.preprocess]
    size, interpolation = pixels["size"], pixels["interpolation"].upper()
    if pixels["resize"] == "squash":
        resize = f"image = image.resize(({size}, {size}), Image.Resampling.{interpolation})"
    else:
        resize = (
            f"short = {round(size / pixels['crop_pct'])}\n"
            "sides = [int(short * side / min(image.size)) for side in image.size]\n"
            f"image = image.resize(sides, Image.Resampling.{interpolation})\n"
            f"left, top = round((image.width - {size}) / 2), round((image.height - {size}) / 2)\n"
            f"image = image.crop((left, top, left + {size}, top + {size}))"
        )
    taken = f"RGB uint8, `[batch, {size}, {size}, 3]`; normalisation is inside"
    given = "np.asarray(image)[None]"
    if takes_floats(onnx[0]):
        taken = f"RGB float32, `[batch, 3, {size}, {size}]`, normalised"
        given = "planes.astype(np.float32)"
        resize += (
            f"\nvalues = (np.asarray(image) / 255 - {pixels['mean']}) / {pixels['std']}\n"
            "planes = values.transpose(2, 0, 1)[None]"
        )
    code = f"""import json
import numpy as np
import onnxruntime
from PIL import Image

folder = {printable(onnx[-1]["name"])!r}
classes = json.load(open(folder + "/artifact.json"))["classes"]
session = onnxruntime.InferenceSession(folder + {"/" + printable(next(iter(onnx[0]["files"])))!r})
image = Image.open("picture.jpg").convert("RGB")
{resize}
logits = session.run(None, {{session.get_inputs()[0].name: {given}}})[0]
print(classes[logits[0].argmax()])"""
    text = f"Input: {taken}. Output: logits, in the order of `classes` in `artifact.json`."
    return ["## Use", "", text, "", "```python", code, "```", ""]


def _limits(report: Report) -> Iterator[Text]:
    students = {row.who for row in report.summary if row.kind != "teacher"}
    own = [row for row in report.accuracy if row.who in students]
    if own:
        worst = min(own, key=lambda row: row.top1)
        yield Text(
            f"{percent(worst.top1)} % ({worst.subject} on {worst.suite}, worst class {worst.worst_class} at "
            f"{percent(worst.worst_class_recall)} %).",
            "Lowest accuracy measured",
        )
    yield from (Text(note, "Note") for note in report.notes)
    yield Text(
        "it predicts one of its classes for every image, whatever the image shows.", "Closed set"
    )
    for row in (row for one in report.exported for row in of(report.unknowns, one)):
        yield Text(
            f"on images of none of its classes ({row.suite}, n = {row.n:,}) {row.subject} is "
            f"{percent(row.confidence)} % "
            f"confident on average, on known ones {percent(row.confidence_inside)} %; AUROC "
            f"{percent(row.msp.auroc)} % (50 is "
            "chance).",
            "Unknown images",
        )
    yield Text(
        "latencies hold for the machine named above, accuracies for these images.", "Transfer"
    )
    yield Text(
        "it follows from those of the teacher, of the student's first weights and of the training images, which "
        "this card does "
        "not know.",
        "Licence",
    )


def _files(report: Report) -> list[str]:
    lines = [
        f"- {escape(one['name'])}: "
        + ", ".join(f"{escape(name)} sha256 `{value}`" for name, value in one["files"].items())
        + f"; same class as the torch student on {percent(one['parity']['top1_agreement'])} % of "
        f"{one['parity']['n']} images "
        "at export."
        for one in report.context["artifacts"]
    ]
    return ["## Files", "", *lines, ""] if lines else []
