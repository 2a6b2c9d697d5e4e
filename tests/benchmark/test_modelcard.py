from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from benchmark_fakes import four_measured
from huggingface_hub import ModelCard
from test_page import ARTIFACT, FACTS

from edgekd.benchmark.report.modelcard import model_card
from edgekd.benchmark.report.summary import notes
from edgekd.benchmark.results.storage import read_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    context = {"runs": [FACTS | {"name": "r"}], "artifacts": [ARTIFACT | {"run": "r"}]}
    return four_measured(tmp_path_factory.mktemp("card"), context=context).folder


def test_model_index_has_the_numbers_of_the_report(folder: Path) -> None:
    _, front, _ = (folder / "MODEL_CARD.md").read_text(encoding="utf-8").split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["pipeline_tag"] == "image-classification"
    assert "onnx" in data["tags"]
    report = json.loads((folder / "report.json").read_text())
    accuracy = {(f"{row['run']}/{row['subject']}", row["suite"]): row for row in report["accuracy"]}
    latency = {f"{row['run']}/{row['subject']}": row for row in report["latency"]}
    assert [model["name"] for model in data["model-index"]] == [
        "r/onnxruntime-fp32",
        "r/onnxruntime-int8",
    ]
    for model in data["model-index"]:
        assert [result["dataset"]["split"] for result in model["results"]] == [
            "id",
            "ood:photo",
            "ood:sketch",
        ]
        for result in model["results"]:
            row = accuracy[model["name"], result["dataset"]["split"]]
            values = {metric["name"]: metric["value"] for metric in result["metrics"]}
            assert (values["top-1"], values["macro"], values["ECE"]) == (
                row["top1"],
                row["macro"],
                row["ece"],
            )
            if result["dataset"]["split"] == "id":
                time = latency[model["name"]]
                assert (values["p50, ms"], values["p90, ms"]) == (time["p50_ms"], time["p90_ms"])


def test_the_hub_library_reads_it(folder: Path) -> None:
    card = ModelCard.load(folder / "MODEL_CARD.md")
    assert card.data.pipeline_tag == "image-classification"
    results = card.data.eval_results
    assert results is not None
    assert len(results) == 2 * (3 * 3 + 2)
    assert {result.task_type for result in results} == {"image-classification"}


def test_sections_and_example(folder: Path) -> None:
    text = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == ["Results", "Latency", "Use", "Limits", "Training", "Files",
                        "How each number is measured"]  # fmt: skip
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ast.parse(code)
    assert "image.resize((16, 16), Image.Resampling.BICUBIC)" in code
    assert "**Lowest accuracy measured**: 50.0 % (onnxruntime-int8" in text
    assert "</style>" not in text.replace("\\</style\\>", "")


def test_floats_are_normalised_in_the_example_and_noted(folder: Path) -> None:
    report = read_report(folder)
    floats = ARTIFACT | {
        "run": "r",
        "name": "onnxruntime-int8-float-input",
        "inputs": [{"dtype": "float32"}],
    }
    shape = ["batch", 4, 4, 3]
    pixels = ARTIFACT | {
        "run": "r",
        "name": "onnxruntime-int8",
        "inputs": [{"dtype": "uint8", "shape": shape}],
    }
    note = "r: onnxruntime-int8-float-input takes floats; its latencies include making them from the image, in numpy."
    alone = pixels | {"inputs": [{"dtype": "float32"}]}
    one, both = (
        report.model_copy(update={"context": {"artifacts": found}})
        for found in ([alone], [floats, pixels])
    )
    assert [said for said in notes(both) if "floats" in said] == [note]
    assert [said for said in notes(report) if "floats" in said] == []
    [code] = re.findall(r"```python\n(.*?)```", model_card(one), re.DOTALL)
    lines = [line for line in code.splitlines() if line.startswith(("values", "planes"))]
    image = np.full((4, 4, 3), (255, 0, 51), dtype=np.uint8)
    told: dict[str, Any] = {"np": np, "image": image}
    exec("\n".join(lines), told)
    rule = report.protocol["preprocess"][report.summary[3].preprocess]
    assert told["planes"].shape == (1, 3, 4, 4)
    expected = (np.array((1, 0, 0.2)) - rule["mean"]) / rule["std"]
    np.testing.assert_allclose(told["planes"][0, :, 0, 0], expected)
    assert "{session.get_inputs()[0].name: planes.astype(np.float32)}" in code
    assert "{session.get_inputs()[0].name: np.asarray(image)[None]}" in model_card(both)


def test_a_file_name_is_text_in_the_example(folder: Path) -> None:
    name = "{exit()}'.onnx"
    artifact = ARTIFACT | {"run": "r", "files": {name: "0" * 64}}
    report = read_report(folder).model_copy(update={"context": {"artifacts": [artifact]}})
    [code] = re.findall(r"```python\n(.*?)```", model_card(report), re.DOTALL)
    found = list(ast.walk(ast.parse(code)))
    assert f"/{name}" in [one.value for one in found if isinstance(one, ast.Constant)]
    assert not any(isinstance(one, ast.FormattedValue) for one in found)


def test_the_example_of_a_file_that_resizes_feeds_it_the_picture(folder: Path) -> None:
    report = read_report(folder)
    taken = {"dtype": "uint8", "shape": ["batch", "height", "width", 3]}
    one = ARTIFACT | {"run": "r", "name": "onnxruntime-int8", "inputs": [taken]}
    report = report.model_copy(update={"context": {"artifacts": [one]}})
    [code] = re.findall(r"```python\n(.*?)```", model_card(report), re.DOTALL)
    assert ".resize(" not in code
    assert ": np.asarray(image)[None]}" in code
    assert [note for note in notes(report) if "resizes inside" in note]
