from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_fakes import four_measured
from huggingface_hub import ModelCard
from test_page import ARTIFACT, FACTS

from edgekd.benchmark.report.modelcard import model_card
from edgekd.benchmark.report.summary import notes
from edgekd.benchmark.results.schema import Report
from edgekd.benchmark.results.storage import read_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    context = {"runs": [FACTS | {"name": "r"}], "artifacts": [ARTIFACT | {"run": "r"}]}
    return four_measured(tmp_path_factory.mktemp("card"), context=context).folder


def code_of(card: str) -> str:
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return str(code)


def test_model_index_has_the_numbers_of_the_report(folder: Path) -> None:
    report = read_report(folder)
    accuracy = {(f"{row.run}/{row.subject}", row.suite): row for row in report.accuracy}
    latency = {f"{row.run}/{row.subject}": row for row in report.latency}
    card = ModelCard.load(folder / "MODEL_CARD.md")
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


def test_sections_and_example(folder: Path) -> None:
    text = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == ["Results", "Latency", "Use", "Limits", "Training", "Files",
                        "How each number is measured"]  # fmt: skip
    assert "image.resize((16, 16), Image.Resampling.BICUBIC)" in code_of(text)
    assert "**Lowest accuracy measured**: 50.0 % (onnxruntime-int8" in text
    assert "</style>" not in text.replace("\\</style\\>", "")


def test_the_example_prepares_what_the_file_takes(folder: Path) -> None:
    report = read_report(folder)

    def of(*taken: dict[str, Any], **facts: Any) -> Report:
        """The report with artifacts of these inputs."""
        own = ARTIFACT | {"run": "r"} | facts
        names = ("onnxruntime-int8", "onnxruntime-int8-float-input")
        found = [own | {"name": n, "inputs": [t]} for n, t in zip(names, taken, strict=False)]
        return report.model_copy(update={"context": {"artifacts": found}})

    floats, pixels = {"dtype": "float32"}, {"dtype": "uint8", "shape": ["batch", 4, 4, 3]}
    whole = ": np.asarray(image)[None]}"
    alone, both = of(floats), of(pixels, floats)
    [note] = [note for note in notes(both) if "floats" in note]
    assert note.startswith("r: onnxruntime-int8-float-input takes floats")
    assert not any("floats" in note for note in notes(report))
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
    assert any("resizes inside" in note for note in notes(resizes))
    # The name of a file stays text.
    name = "{exit()}'.onnx"
    parsed = list(ast.walk(ast.parse(code_of(model_card(of(pixels, files={name: "0" * 64}))))))
    assert f"/{name}" in [one.value for one in parsed if isinstance(one, ast.Constant)]
    assert not any(isinstance(one, ast.FormattedValue) for one in parsed)
