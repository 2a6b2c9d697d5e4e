"""Which exported files are measured for `--target auto`, and which are left out before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import edgekd
from edgekd.benchmark.gates import parse_gates
from edgekd.configs.export import ExportConfig
from edgekd.core.errors import EdgekdError
from edgekd.core.formats import Precision
from edgekd.evaluation.candidates import Candidate, prune


def file(
    name: str, precision: Precision, mb: float, p50: float | None, p90: float = 0.0
) -> Candidate:
    return Candidate(name, Path(name), precision, mb, p50, None if p50 is None else p90 or p50)


def names(*found: Candidate, gates: tuple[str, ...] = ()) -> list[str]:
    return [one.name for one in prune(found, parse_gates(gates))[0]]


def test_a_slower_file_goes_where_another_is_as_exact_and_as_small() -> None:
    fast = file("a", "fp32", 10.0, 1.0)
    assert names(fast, file("b", "fp32", 10.0, 1.4)) == ["a"]
    # Within the noise of the quick clock, smaller, or more exact: each may still be chosen.
    assert names(fast, file("b", "fp32", 10.0, 1.2)) == ["a", "b"]
    assert names(fast, file("b", "fp16", 5.0, 9.0)) == ["a", "b"]
    assert names(file("a", "int8", 1.0, 1.0), file("b", "fp32", 10.0, 9.0)) == ["a", "b"]
    # A device's files have no quick latency.
    assert names(fast, file("b", "fp32", 10.0, None)) == ["a", "b"]


def test_the_budget_leaves_out_what_is_far_beyond_it() -> None:
    small, big = file("small", "int8", 4.0, 30.0), file("big", "fp32", 16.0, 9.0)
    assert names(small, big, gates=("mb<=5",)) == ["small"]
    assert names(small, big, gates=("p90_ms<=19",)) == ["big"]
    assert names(small, big, gates=("p90_ms<=21",)) == ["small", "big"]  # the quick clock is rough
    # The nearest is looked for among all where none is within.
    assert names(small, big, gates=("mb<=1",)) == ["small", "big"]
    assert dict(prune([small, big], parse_gates(["mb<=5"]))[1]).keys() == {"big"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target": "auto", "precision": "int8"}, "precision"),
        ({"target": "onnxruntime", "budget": "mb<=5"}, "--budget"),
        ({"target": "onnxruntime", "device": "local"}, "--device"),
    ],
)
def test_what_does_not_go_together(given: dict[str, Any], message: str) -> None:
    with pytest.raises(EdgekdError, match=message):
        ExportConfig.load(**given)


def test_a_budget_is_read_before_anything_is_exported() -> None:
    with pytest.raises(EdgekdError, match="speed<=3"):
        edgekd.export(Path("no run"), target="auto", budget="speed<=3")


def test_a_budget_is_gates_with_commas() -> None:
    config = ExportConfig.load(target="auto", budget="ood_avg_drop<=1.0, mb<=5")
    assert config.budget == ("ood_avg_drop<=1.0", "mb<=5")
