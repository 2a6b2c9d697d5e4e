"""The whole way once, nothing faked: train, export, and measure through the device agent on this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import edgekd
from edgekd.benchmark.results.storage import read_report
from edgekd.core.errors import EdgekdError


@pytest.mark.slow
def test_a_trained_run_is_measured_by_the_agent(tmp_path: Path, tiny_teacher: Path) -> None:
    rng = np.random.default_rng(0)
    for domain in ("photo", "sketch"):
        for name, tint in (("cat", (90, 0, 0)), ("dog", (0, 0, 90))):
            for number in range(12):
                path = tmp_path / "data" / domain / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((rng.integers(0, 160, (32, 32, 3)) + tint).astype(np.uint8)).save(
                    path
                )
    settings: dict[str, Any] = {
        "student": "test_efficientnet",
        "teacher": f"local-dir:{tiny_teacher}", "data": str(tmp_path / "data"), "pretrained": "scratch", "size": 32,
        "steps": 2, "batch_size": 8, "views": 1, "out": tmp_path / "run", "test_domain": "sketch",
        "recipe": "vl2v-adip", "accelerator": "cpu",
    }  # fmt: skip
    edgekd.train(**settings)
    edgekd.export(tmp_path / "run")
    words = tmp_path / "words.txt"
    words.write_text("a drawing of a {}\nhorse\n")
    others = tmp_path / "others" / "noise"
    others.mkdir(parents=True)
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(
            others / f"{number}.png"
        )
    strangers = [f"noise={tmp_path / 'others'}"]
    report = edgekd.benchmark(
        tmp_path / "run", quick=True, device=["local"], vocabulary=[f"new={words}"], unknown=strangers,
        out=tmp_path / "report",
    )  # fmt: skip
    assert read_report(tmp_path / "report") == report
    [artifact] = [row for row in report.latency if row.device != "local" or "@" in row.subject]
    assert artifact.subject.startswith("onnxruntime-fp32@")
    assert artifact.complete
    assert artifact.peak_rss_mb is not None
    [placement] = report.placements
    assert placement.nodes is not None
    assert list(placement.nodes) == ["CPUExecutionProvider"]
    facts = report.environment["devices"][0]["artifacts"][
        "/".join((artifact.run, artifact.subject))
    ]
    assert facts == {"agreement_here": 1.0, "same_pixels": 1.0}
    told = {row.subject: row for row in report.unknowns}
    assert set(told) == {"teacher", "torch", artifact.subject}
    assert (told[artifact.subject].n, told[artifact.subject].device) == (3, artifact.device)
    assert told[artifact.subject].msp.auroc_cost is not None
    with pytest.raises(EdgekdError, match="no in-domain test images to compare unknown ones with"):
        edgekd.benchmark(tmp_path / "run", data=str(tmp_path / "data" / "photo"), unknown=strangers)
    asked = {row.subject: row.top1 for row in report.vocabularies if row.suite == "vocab:new"}
    assert asked["torch"] is not None
    assert asked[artifact.subject] is None


@pytest.mark.slow
def test_nothing_of_ours_dies_of_warnings_made_errors(tmp_path: Path) -> None:
    strict = [sys.executable, "-W", "error", "-m", "edgekd.cli"]
    for arguments in (["--help"], ["train", "--smoke", "--out", str(tmp_path / "run")]):
        done = subprocess.run([*strict, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Warning" not in done.stderr
