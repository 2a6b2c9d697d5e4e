"""The same artifacts on arm64: a Debian root with Python and ONNX Runtime under qemu-user (scripts/arm64_root.sh)."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmark_fakes import ONE_THREAD
from device_fakes import BRIEF, artifact_subject

from edgekd.benchmark import device as devices
from edgekd.benchmark.evaluate.predictions import predict_suite
from edgekd.benchmark.subjects import Suite
from edgekd.data.image_set import load_images

ROOT = os.environ.get("EDGEKD_ARM64_ROOT", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not ROOT or not (Path(ROOT) / "python3").is_file(),
        reason="EDGEKD_ARM64_ROOT names no folder that scripts/arm64_root.sh made",
    ),
]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """FP32 and INT8 of a student whose weights come with edgekd; no training that matters here."""
    import edgekd

    run = tmp_path_factory.mktemp("run") / "run"
    edgekd.train(smoke=True, out=run)
    return [artifact.folder for artifact in edgekd.export(run, precision="int8") if artifact.folder]


def test_the_same_answers_on_arm64(
    artifacts: list[Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "QUICK", replace(BRIEF, seconds=0.5, limit_s=2.0))
    images = load_images("toy")
    suites = [Suite("id", images, np.arange(0, len(images), 80))]
    subjects = [artifact_subject(folder) for folder in artifacts]
    found = devices.on_devices(subjects, suites, [f"local:{ROOT}/python3"], ONE_THREAD)
    for subject, there in zip(subjects, found, strict=True):
        assert there.measured is not None
        assert there.name.endswith("(emulated)")
        assert there.measured.facts["machine"] == "aarch64"
        assert there.measured.facts["emulated"] is True
        assert there.measured.same_pixels == 1.0
        [here] = predict_suite([subject], suites[0])
        logits = there.measured.logits[0]
        agreement = (here.argmax(axis=1) == logits.argmax(axis=1)).mean()
        assert agreement >= (1.0 if subject.precision == "fp32" else 0.98)
