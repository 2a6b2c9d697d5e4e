"""`MODEL_CARD.md`: the card that a model hub shows, with a `model-index` for programs, from the report's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from edgekd.benchmark.definitions import ACCURACY, LATENCY, latency_rule, shown
from edgekd.benchmark.markdown import escaped, markdown_table
from edgekd.benchmark.remarks import takes_floats
from edgekd.benchmark.rows import AccuracyRow, LatencyRow, Report, SummaryRow
from edgekd.benchmark.table import NONE, SIZE_HEADER, fraction, label, mark, ms, percent, size_cells
from edgekd.benchmark.verdict import verdict


def model_card(report: Report) -> str:
    """The card of the report's first run; other runs in the report are measured beside it and have no part in it."""
    run = report.summary[0].run
    rows = [row for row in report.summary if row.run == run]
    facts: dict[str, Any] = next(
        (one for one in report.context.get("runs", ()) if one["name"] == run), {}
    )
    front = yaml.safe_dump(
        _front(report, run, rows, facts), sort_keys=False, allow_unicode=True, width=1000
    )
    parts = [
        f"# {escaped(run)}", _about(rows, facts), _results(report, rows), _calibration(rows), _latency(report, rows),
        _use(report, run), _limits(report, run, rows), _training(facts), _files(report, run), _method(report),
    ]  # fmt: skip
    return f"---\n{front}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _front(
    report: Report, run: str, rows: list[SummaryRow], facts: dict[str, Any]
) -> dict[str, Any]:
    """Front matter in the form of the hub's model card specification."""
    formats = {one["format"] for one in report.context.get("artifacts", ()) if one["run"] == run}
    subjects = [row for row in rows if row.kind == "artifact"] or [
        row for row in rows if row.kind == "torch"
    ]
    return {
        "pipeline_tag": "image-classification",
        "tags": ["edgekd", "knowledge-distillation", "out-of-distribution", *sorted(formats)],
        "model-index": [
            {"name": f"{run}/{row.subject}", "results": list(_index(report, row))}
            for row in subjects
        ],
    }


def _index(report: Report, row: SummaryRow) -> Iterator[dict[str, Any]]:
    """One result for each suite; values are the very numbers of report.json, fractions 0–1 and milliseconds."""
    suites = {one.suite: one for one in report.suites if one.run in (None, row.run)}
    time = next(one for one in report.latency if (one.run, one.subject) == (row.run, row.subject))
    for found in report.accuracy:
        if (found.run, found.subject) != (row.run, row.subject) or suites[
            found.suite
        ].family == "corruption":
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
        name = f"{suites[found.suite].data}, {found.suite}"
        data = {"type": suites[found.suite].data, "name": name, "split": found.suite}
        yield {"task": {"type": "image-classification"}, "dataset": data, "metrics": metrics}


def _about(rows: list[SummaryRow], facts: dict[str, Any]) -> str:
    kinds = (
        ", ".join(row.subject for row in rows if row.kind == "artifact") or "no exported file yet"
    )
    if not facts:
        return f"Exported files measured here: {escaped(kinds)}."
    return escaped(
        f"A {facts.get('student', '')} image classifier, trained with the recipe {facts.get('recipe', 'unknown')} from "
        f"the teacher {facts.get('teacher', 'unknown')} on {facts.get('data', 'unknown data')}. "
        f"Exported files measured here: {kinds}."
    )


def _results(report: Report, rows: list[SummaryRow]) -> str:
    found = verdict(report)
    outside = list(dict.fromkeys(domain for row in rows for domain in row.ood))
    header = (
        "model",
        "ID",
        *(f"OOD: {domain}" for domain in outside),
        "gap, points",
        "kept of the teacher",
        *SIZE_HEADER[2:],
    )
    cells = [
        (label(row), percent(row.id), *(percent(row.ood.get(domain)) for domain in outside), percent(row.gap),
         percent(row.retention), *size_cells(row)[2:])
        for row in rows
    ]  # fmt: skip
    gates = [
        f"- {'passed' if gate.passed else '**failed**'}: {escaped(gate.expression)}"
        for gate in report.gates
    ]
    lines = ["## Results", "", "Top-1 accuracy in percent.", "", *markdown_table(header, cells), ""]
    lines += [f"{found.headline}.", "", *gates, ""] if gates else []
    own = {row.run for row in rows}
    mine = [one for one in report.accuracy if one.run in own]
    lines.append(
        f"Images: {escaped(', '.join(dict.fromkeys(f'{one.suite} n = {one.n:,}' for one in mine)))}."
    )
    return "\n".join(lines)


def _calibration(rows: list[SummaryRow]) -> str:
    cells = [
        (label(row), fraction(row.ece_id), fraction(row.ece_ood), fraction(row.temperature),
         fraction(row.ece_id_scaled), fraction(row.ece_ood_scaled))
        for row in rows
    ]  # fmt: skip
    header = ("model", "ECE ID", "ECE OOD", "temperature", "ECE ID scaled", "ECE OOD scaled")
    return "\n".join(["## Calibration", "", *markdown_table(header, cells)])


def _latency(report: Report, rows: list[SummaryRow]) -> str:
    of: dict[str, LatencyRow] = {
        row.subject: row for row in report.latency if row.run == rows[0].run
    }
    cells = [
        (label(row) + mark(time), time.provider, NONE if time.threads is None else str(time.threads),
         f"{ms(time.p50_ms)} [{ms(time.p50_ci95_ms[0])}, {ms(time.p50_ci95_ms[1])}]", ms(time.p90_ms), f"{time.n:,}")
        for row in rows
        if (time := of[row.subject])
    ]  # fmt: skip
    env = report.environment
    short = ", by the short protocol (indicative only)" if report.quick else ""
    where = f"On {env['cpu']}, {env['usable_cores']} cores{short}."
    lines = ["## Latency", "", escaped(where), ""]
    lines += markdown_table(
        ("model", "runtime", "threads", "p50 ms [95 % CI]", "p90 ms", "runs"), cells
    )
    lines += ["", latency_rule(report)]
    if any(mark(time) for time in of.values()):
        lines.append("†: measured briefly as background; not comparable with an exported file.")
    return "\n".join(lines)


def _use(report: Report, run: str) -> str:
    onnx = [
        one
        for one in report.context.get("artifacts", ())
        if one["run"] == run and one["format"] == "onnx"
    ]
    if not onnx:
        return ""
    # Pixels are easier to give; floats only where nothing else was exported.
    onnx = [one for one in onnx if not takes_floats(one)] or onnx
    settings = next(
        row for row in report.summary if (row.run, row.subject) == (run, onnx[0]["name"])
    )
    pixels = report.protocol["preprocess"][settings.preprocess]
    size, interpolation = pixels["size"], pixels["interpolation"].upper()
    if pixels["resize"] == "squash":
        resize = f"image = image.resize(({size}, {size}), Image.Resampling.{interpolation})"
    else:
        short = round(size / pixels["crop_pct"])
        resize = (
            f"sides = [int({short} * side / min(image.size)) for side in image.size]\n"
            f"image = image.resize(sides, Image.Resampling.{interpolation})\n"
            f"left, top = round((image.width - {size}) / 2), round((image.height - {size}) / 2)\n"
            f"image = image.crop((left, top, left + {size}, top + {size}))"
        )
    model = next(iter(onnx[0]["files"]))
    taken = f"RGB uint8, `[batch, {size}, {size}, 3]`; normalisation is inside"
    given = "np.asarray(image)[None]"
    if takes_floats(onnx[0]):
        taken = f"RGB float32, `[batch, 3, {size}, {size}]`, normalised"
        given = "planes.astype(np.float32)"
        resize += (
            f"\nvalues = (np.asarray(image) / 255 - {pixels['mean']}) / {pixels['std']}\n"
            "planes = values.transpose(2, 0, 1)[None]"
        )
    return f"""## Use

Input: {taken}. Output: logits, in the order of `classes` in
`artifact.json`.

```python
import json
import numpy as np
import onnxruntime
from PIL import Image

folder = "{onnx[-1]["name"]}"
classes = json.load(open(f"{{folder}}/artifact.json"))["classes"]
session = onnxruntime.InferenceSession(f"{{folder}}/{model}")
image = Image.open("picture.jpg").convert("RGB")
{resize}
logits = session.run(None, {{session.get_inputs()[0].name: {given}}})[0]
print(classes[logits[0].argmax()])
```"""


def _limits(report: Report, run: str, rows: list[SummaryRow]) -> str:
    kinds = {row.subject: row.kind for row in rows}
    own = [
        row
        for row in report.accuracy
        if row.run == run and kinds[row.subject] != "teacher" and row.suite != "val"
    ]
    lines = ["## Limits", ""]
    if own:
        worst: AccuracyRow = min(own, key=lambda row: row.top1)
        lines.append(
            f"- Lowest accuracy measured: {percent(worst.top1)} % ({escaped(worst.subject)} on {escaped(worst.suite)}, "
            f"worst class {escaped(worst.worst_class)} at {percent(worst.worst_class_recall)} %)."
        )
    lines += [f"- {escaped(note)}" for note in report.notes]
    lines.append("- It names one of its classes for every image, whatever the image shows.")
    lines += [
        f"- On images of none of its classes ({escaped(row.suite)}, n = {row.n:,}) {escaped(row.subject)} is "
        f"{percent(row.confidence)} % confident on average, on known ones {percent(row.confidence_inside)} %; its "
        f"confidence tells them apart with an AUROC of {percent(row.msp.auroc)} % (50 is chance)."
        for row in report.unknowns
        if row.run == run and kinds[row.subject] == "artifact"
    ]
    lines.append(
        "- Latencies hold for the machine named above. Accuracy on other data than this has to be measured."
    )
    lines.append(
        "- Its licence follows from those of the teacher, of the student's first weights and of the training images; "
        "this card does not know them."
    )
    return "\n".join(lines)


def _training(facts: dict[str, Any]) -> str:
    if not facts:
        return ""
    told = [(key.replace("_", " "), shown(value)) for key, value in facts.items() if key != "name"]
    return "\n".join(["## Training", "", *markdown_table(("what", "value"), told)])


def _files(report: Report, run: str) -> str:
    lines = []
    for one in report.context.get("artifacts", ()):
        if one["run"] == run:
            agreement = percent(one["parity"]["top1_agreement"])
            names = ", ".join(f"`{name}` sha256 `{value}`" for name, value in one["files"].items())
            lines.append(
                f"- {escaped(one['name'])}: {names}; same class as the torch student on {agreement} % of "
                f"{one['parity']['n']} images at export."
            )
    return "\n".join(["## Files", "", *lines]) if lines else ""


def _method(report: Report) -> str:
    lines = ["## How each number was measured", ""]
    lines += [f"- **{name}**: {escaped(text)}" for name, text in (*ACCURACY, *LATENCY)]
    return "\n".join(
        [*lines, "", f"From `report.json`, measured {report.created[:10]} with edgekd."]
    )
