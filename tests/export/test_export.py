from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_fakes import export_parts
from PIL import Image
from torch import nn

from edgekd.core.errors import EdgekdError, GateFailed
from edgekd.core.manifest import Artifact, read_artifact
from edgekd.core.preprocess import Preprocess
from edgekd.export.graph import Deployable, torch_logits
from edgekd.export.quantize.search import AccuracyBudget
from edgekd.export.run import int8_speed
from edgekd.targets.session import open_session

PREPROCESS = Preprocess(size=32)
CLASSES = ("cat", "dog", "élan")


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu().mean((2, 3))


def build(seed: int = 0) -> Deployable:
    torch.manual_seed(seed)
    return Deployable(Backbone(), nn.Linear(8, len(CLASSES)), PREPROCESS)


def pictures(n: int, seed: int = 0) -> np.ndarray:
    coarse = torch.rand(n, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    fine = nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    return (255 * fine).byte().permute(0, 2, 3, 1).numpy()


def export(model: Deployable, folder: Path, precision: str, **changes: Any) -> Artifact:
    arguments: dict[str, Any] = {
        "target": "onnxruntime",
        "precision": precision,
        "classes": CLASSES,
        "preprocess": PREPROCESS,
        "calibration": pictures(32),
        "calibration_ids": [f"image {index}" for index in range(32)],
        "parity_images": pictures(64, seed=1),
        "facts": {"student": "test"},
    }
    return export_parts(model, folder, **arguments | changes)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "onnxruntime-fp32"
    export(build(), folder, "fp32")
    return folder


def test_fp32_artifact_computes_the_model_and_says_what_it_is(fp32: Path) -> None:
    artifact = read_artifact(fp32)
    images = pictures(10, seed=5)
    np.testing.assert_allclose(
        open_session(fp32, threads=1).run(images), torch_logits(build(), images), atol=1e-5
    )
    assert artifact.parity["passed"] is True
    assert artifact.parity["n"] == 64
    assert artifact.quantization is None
    assert sorted(path.name for path in fp32.iterdir()) == [
        "artifact.json",
        "labels.txt",
        "model.onnx",
    ]
    inside = {
        entry.key: json.loads(entry.value)
        for entry in onnx.load(fp32 / "model.onnx").metadata_props
    }
    assert inside["classes"] == list(CLASSES)
    assert inside["preprocess"] == artifact.preprocess.model_dump(mode="json")
    assert inside["provenance"]["student"] == "test"


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_the_same_model_is_the_same_file(tmp_path: Path, target: str, precision: str) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    first, again = (
        export(build(), tmp_path / name, precision, target=target, parity_keys=["a"] * 64)
        for name in ("first", "again")
    )
    assert first.files == again.files
    assert first.quantization == again.quantization


def test_int8_artifact_records_its_calibration(fp32: Path, tmp_path: Path) -> None:
    artifact = export(build(), tmp_path / "int8", "int8", fp32_path=fp32 / "model.onnx")
    assert read_artifact(tmp_path / "int8") == artifact
    assert artifact.quantization is not None
    assert artifact.quantization["calibration_images"] == 32
    assert artifact.quantization["ids"][1] == "image 1"
    assert sorted(path.name for path in (tmp_path / "int8").iterdir()) == [
        "artifact.json",
        "labels.txt",
        "model.onnx",
    ]
    assert any(
        node.op_type == "QuantizeLinear"
        for node in onnx.load(tmp_path / "int8" / "model.onnx").graph.node
    )
    assert artifact.parity["cosine"] > 0.99


def test_fp16_artifact_passes_its_gate(fp32: Path, tmp_path: Path) -> None:
    assert (
        export(build(), tmp_path / "fp16", "fp16", fp32_path=fp32 / "model.onnx").parity["passed"]
        is True
    )


def test_wrong_fp32_file_fails_the_gate_and_is_kept_aside(fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(GateFailed, match="does not compute what the student computes") as caught:
        export(build(seed=9), tmp_path / "a", "fp32", fp32_path=fp32 / "model.onnx")
    assert caught.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.failed"]
    assert read_artifact(tmp_path / "a.failed").parity["passed"] is False


def test_weak_int8_fails_the_gate_and_says_how_to_go_on(fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(
        GateFailed, match="differs too much from the student: top-1 agreement is"
    ) as caught:
        export(build(seed=9), tmp_path / "a", "int8", fp32_path=fp32 / "model.onnx")
    assert caught.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.failed"]
    kept = read_artifact(tmp_path / "a.failed").parity
    assert kept["passed"] is False
    hint = caught.value.hint
    assert "--max-drop-id 1.0 --max-drop-ood 1.5" in hint
    percent = int(hint.partition("--min-agreement ")[2].rstrip("."))
    assert percent <= 100 * kept["top1_agreement"] < percent + 1, (
        "the hint must name a threshold that passes"
    )
    artifact = export(
        build(seed=9),
        tmp_path / "a",
        "int8",
        fp32_path=fp32 / "model.onnx",
        min_agreement=percent,
    )
    assert artifact.parity["passed"] is True
    assert read_artifact(tmp_path / "a").parity["min_agreement"] == percent / 100


def test_ways_on_leave_out_what_was_tried(fp32: Path, tmp_path: Path) -> None:
    def hint(**changes: Any) -> str:
        with pytest.raises(GateFailed) as caught:
            export(build(seed=9), tmp_path / "a", "int8", fp32_path=fp32 / "model.onnx", **changes)
        return caught.value.hint

    few, many, narrowed = hint(), hint(calibration=pictures(100)), hint(calibrator="mse")
    assert "more images than 32: --calibration-images 300" in few
    assert "--calibration-images" not in many
    assert "--calibrator percentile or entropy or mse" in few
    assert "--calibrator" not in narrowed
    limits = AccuracyBudget(
        pictures(8), np.zeros(8, dtype=np.int64), pictures(8), 100.0, 100.0, min_agreement=0
    )
    within = hint(budget=limits)
    assert "--max-drop" not in within
    assert "--min-agreement" in within


def test_existing_folder_needs_overwrite(fp32: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(fp32, folder)
    (folder / "mine.txt").write_text("precious")
    with pytest.raises(EdgekdError, match="exists"):
        export(build(), folder, "fp32", fp32_path=fp32 / "model.onnx")
    assert (folder / "mine.txt").exists()
    export(build(), folder, "fp32", fp32_path=fp32 / "model.onnx", overwrite=True)
    assert (folder / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("precision", "changes", "message"),
    [
        ("int8", {"calibration": None}, "needs calibration images"),
        ("fp32", {"parity_images": pictures(1)[:0]}, "no images for the parity check"),
        ("int4", {}, 'no precision "int4"'),
        ("int8", {"calibrator": "mes"}, 'no calibrator "mes". Did you mean "mse"'),
        ("fp16", {"calibrator": "mse"}, "no ranges to choose"),
        ("int8", {"calibrator": "mse", "target": "openvino"}, "openvino has no calibrator"),
        ("fp32", {"min_agreement": 50}, "has to agree with the student"),
        ("fp32", {"target": "onnxruntim"}, "There is no target"),
    ],
)
def test_impossible_wishes_leave_nothing_behind(
    fp32: Path, tmp_path: Path, precision: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(EdgekdError, match=message):
        export(build(), tmp_path / "a", precision, fp32_path=fp32 / "model.onnx", **changes)
    assert list(tmp_path.iterdir()) == []


def test_killed_export_leaves_nothing_that_looks_like_an_artifact(
    fp32: Path, tmp_path: Path
) -> None:
    code = f"""
import sys, time
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
import test_export, edgekd.export.artifact as module
from pathlib import Path
def stop(*_):
    print("ready", flush=True)
    time.sleep(600)
module.compare = stop
target, start = Path({str(tmp_path / "a")!r}), Path({str(fp32 / "model.onnx")!r})
test_export.export(test_export.build(), target, "int8", fp32_path=start)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = [path.name for path in tmp_path.iterdir() if path.name != ".a.lock"]
    assert len(left) == 1, "the test must kill while the scratch folder exists"
    assert left[0].startswith(".tmp-")
    export(build(), tmp_path / "a", "int8", fp32_path=fp32 / "model.onnx")
    read_artifact(tmp_path / "a")


def test_two_exports_at_once_leave_one_whole_artifact(fp32: Path, tmp_path: Path) -> None:
    outcomes: list[str] = []

    def work(model: Deployable) -> None:
        try:
            export(model, tmp_path / "a", "int8", fp32_path=fp32 / "model.onnx")
            outcomes.append("done")
        except EdgekdError as error:
            outcomes.append(error.message)

    threads = [threading.Thread(target=work, args=(copy.deepcopy(build()),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "done" in outcomes
    assert all(
        outcome == "done" or "exists" in outcome or "is writing" in outcome for outcome in outcomes
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    open_session(tmp_path / "a", threads=1).run(pictures(1))


SNIPPET = """
import json, sys
from pathlib import Path
import numpy as np, onnxruntime
from PIL import Image

folder, photo = Path(sys.argv[1]), sys.argv[2]
card = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))
session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
size = (card["preprocess"]["size"],) * 2
pixels = np.asarray(Image.open(photo).convert("RGB").resize(size, Image.Resampling.BICUBIC))
logits = session.run(None, {"image": pixels[None]})[0]
print(card["classes"][int(logits[0].argmax())])
"""


def test_copied_folder_works_with_onnxruntime_and_numpy_only(fp32: Path, tmp_path: Path) -> None:
    shutil.copytree(fp32, tmp_path / "elsewhere")
    picture = Image.fromarray(pictures(1, seed=3)[0]).resize((90, 60))
    picture.save(tmp_path / "photo.png")
    blocked = "import sys\nfor name in ('edgekd', 'torch', 'timm', 'onnx', 'pydantic'): sys.modules[name] = None\n"
    (tmp_path / "use.py").write_text(blocked + SNIPPET, encoding="utf-8")
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-X",
            "utf8",
            tmp_path / "use.py",
            tmp_path / "elsewhere",
            tmp_path / "photo.png",
        ],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    expected = torch_logits(build(), PREPROCESS.pixels(picture)[None]).argmax()
    assert done.stdout.strip() == CLASSES[int(expected)]


def test_int8_is_timed_beside_its_own_fp32_or_else_onnx_runtimes(
    fp32: Path, tmp_path: Path
) -> None:
    int8 = export(build(), tmp_path / "onnxruntime-int8", "int8", fp32_path=fp32 / "model.onnx")
    assert int8_speed(int8) is None
    shutil.copytree(fp32, tmp_path / "onnxruntime-fp32")
    other = int8.model_copy(update={"name": "openvino-int8", "target": "openvino"})
    for artifact in (int8, other):
        assert "onnxruntime-fp32" in str(int8_speed(artifact))
    shutil.copytree(fp32, tmp_path / "openvino-fp32")
    assert "openvino-fp32" in str(int8_speed(other))


def test_what_a_killed_export_left_goes_with_a_later_one(fp32: Path, tmp_path: Path) -> None:
    left = [tmp_path / f".tmp-0123456789a{digit}-a" for digit in "bc"]
    for folder in left:
        (folder / "search-x").mkdir(parents=True)
        (folder / "search-x" / "trial.onnx").write_bytes(b"half")
    yesterday = time.time() - 25 * 3600
    for path in (left[0] / "search-x" / "trial.onnx", left[0] / "search-x", left[0]):
        os.utime(path, (yesterday, yesterday))
    export(build(), tmp_path / "a", "int8", fp32_path=fp32 / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == [left[1].name, "a"], (
        "the other may be at work"
    )
