"""A short part of the model zoo: what broke once, and one of each kind of fused family."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import zoo


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precisions"),
    [
        ("edgenext_xx_small", ["fp32", "fp16"]),
        ("mobileone_s0", ["int8"]),
        ("mixnet_s", ["int8"]),
        ("mobilenetv4_conv_small", ["int8"]),
    ],
)
def test_a_model_of_the_zoo_is_exported(name: str, precisions: list[str]) -> None:
    cells = zoo.run_model(name, ["onnxruntime", "tensorrt"], precisions)
    assert {cell["status"] for cell in cells.values()} == {"ok"}, cells
    for cell in cells.values():
        assert cell.get("batch_error", 0) < 1e-2
    assert any(cell["fused"] for cell in cells.values()) == (name == "mobileone_s0")


def test_the_table_counts_and_names_reasons() -> None:
    good = {"status": "ok", "mb": 1.25, "error": 0.001, "fused": True, "batch_error": 0.0}
    bad = {"status": "refused", "why": "No such layer."}
    text = zoo.table({"resnet18": {"onnxruntime-fp32": good, "onnxruntime-int8": bad}})
    assert "| `resnet18` | 64 | yes | 1.2 MB, 0.001 | refused |" in text
    assert "| exported | | | 1 of 1 | 0 of 1 |" in text
    assert "`resnet18`, onnxruntime-int8: No such layer." in text
