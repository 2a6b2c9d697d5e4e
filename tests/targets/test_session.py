from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from artifact_fakes import channel_means, network, red_and_green, write_artifact, write_colours
from benchmark_fakes import SHORT, fake_measurements, four_subjects, id_and_ood, paint_images
from device_fakes import artifact_subject, write_images
from onnx import TensorProto, helper

import edgekd.targets
from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.evaluate.predictions import predict_suite
from edgekd.benchmark.results.schema import Report
from edgekd.benchmark.subjects import Suite
from edgekd.core.errors import EdgekdError
from edgekd.core.manifest import read_artifact
from edgekd.core.predictor import in_batches
from edgekd.targets.bank import ClassBank, read_bank, unit
from edgekd.targets.bank_change import change_bank
from edgekd.targets.onnxruntime import profiled_nodes
from edgekd.targets.openvino import open_file
from edgekd.targets.registry import TARGETS, get_target, target_of
from edgekd.targets.session import Placement, RuntimeOptions, open_session, refuse_fallback


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "artifact", channel_means().SerializeToString())


def test_runs_any_batch(folder: Path) -> None:
    session = open_session(folder, threads=1)
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    logits = session.run(images)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, images.mean(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(session.run(images[:1]), logits[:1])
    assert (session.provider, session.threads) == ("CPUExecutionProvider", 1)
    assert session.load_ms > 0
    for wrong in (images / 255, images.transpose(0, 3, 1, 2), images[0], images[:0]):
        with pytest.raises(EdgekdError, match="takes uint8"):
            session.run(wrong)


def test_files_of_a_fixed_batch_are_run_in_batches_or_refused(tmp_path: Path) -> None:
    folders = [
        write_artifact(tmp_path / name, batch=n) for name, n in (("free", "batch"), ("one", 1))
    ]
    free, single = (open_session(folder, threads=1) for folder in folders)
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    assert (free.largest_batch, single.largest_batch) == (None, 1)
    np.testing.assert_allclose(single.run(images), free.run(images), rtol=1e-6)
    suite = Suite("id", write_images(tmp_path / "images", 7), np.arange(7))
    wanted, logits = predict_suite([artifact_subject(folder) for folder in folders], suite, batch=4)
    np.testing.assert_allclose(logits, wanted, rtol=1e-6)
    with pytest.raises(EdgekdError, match="takes exactly 4 images at a time"):
        open_session(write_artifact(tmp_path / "four", batch=4), threads=1)
    pieces: list[int] = []

    def run(images: np.ndarray) -> np.ndarray:
        pieces.append(len(images))
        return images[:, 0, 0].astype(np.float32)

    for largest in (2, None):
        np.testing.assert_array_equal(in_batches(run, images, largest), images[:, 0, 0])
    assert pieces == [2, 2, 1, 5]


def test_files_that_onnx_runtime_cannot_open_or_run_are_one_sentence(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(EdgekdError, match="There is no artifact"):
        open_session(tmp_path)
    with pytest.raises(EdgekdError, match="0 threads"):
        open_session(folder, threads=0)
    future, operators = channel_means(), channel_means()
    future.ir_version = 999
    operators.opset_import[0].version = 999
    for number, (content, message) in enumerate((
        (future.SerializeToString(), "needs a newer ONNX Runtime"),
        (operators.SerializeToString(), "needs a newer ONNX Runtime"),
        (channel_means().SerializeToString()[:60], "cannot load"),
    )):  # fmt: skip
        with pytest.raises(EdgekdError, match=message) as caught:
            open_session(write_artifact(tmp_path / str(number), content))
        assert "\n" not in str(caught.value)
    words = network(helper.make_node("Cast", ["mean"], ["logits"], to=TensorProto.STRING))
    words.graph.output[0].type.tensor_type.elem_type = TensorProto.STRING
    session = open_session(write_artifact(tmp_path / "words", words.SerializeToString()))
    with pytest.raises(EdgekdError, match="fails on"):
        session.run(np.zeros((1, 16, 16, 3), np.uint8))
    manifest = json.loads((folder / "artifact.json").read_text())
    manifest["outputs"][0]["shape"] = []  # as Core ML's class label has
    for shape in ([], ["batch"]):
        manifest["inputs"][0]["shape"] = shape
        (folder / "artifact.json").write_text(json.dumps(manifest))
        with pytest.raises(EdgekdError, match="shape"):
            open_session(folder)


@pytest.mark.parametrize(("batch", "dim"), [(1, 513), (3, 12), (32, 64)])
def test_a_class_that_is_added_leaves_the_others_logits_as_they_are(batch: int, dim: int) -> None:
    rng = np.random.default_rng(dim)
    bank = ClassBank(("first",), unit(rng.standard_normal((1, dim))), 7.5, None, {"added": []})
    embeddings = unit(rng.standard_normal((batch, dim)))
    before = bank.logits(embeddings)
    for number in range(40):
        vector = rng.standard_normal(dim).astype(np.float32)
        bank = bank.with_class(f"new {number}", vector, {"by": "test"})
        now = bank.logits(embeddings)
        np.testing.assert_array_equal(now[:, :-1], before)
        np.testing.assert_allclose(now, 7.5 * embeddings @ bank.vectors.T, atol=1e-4)
        before = now


def test_a_text_goes_the_way_of_the_training() -> None:
    mean = np.array([0.0, 0.0, 0.5], dtype=np.float32)
    prompts = np.array([[3.0, 0.0, 4.0], [0.0, 2.0, 0.0]], dtype=np.float32)
    # Of the unit vectors (.6, 0, .8) and (0, 1, 0), at length 1.
    average = np.array([0.6, 1.0, 0.8]) / np.sqrt(2.0)
    np.testing.assert_allclose(red_and_green().of_text(prompts), average, atol=1e-6)
    centred = unit(average - mean)
    np.testing.assert_allclose(red_and_green(mean).of_text(prompts), centred, atol=1e-6)


def test_file_keeps_everything_and_needs_numpy_alone(tmp_path: Path) -> None:
    mean, vector = np.array([[0.1, 0.2, 0.3], [0, 3, 4]], dtype=np.float32)
    bank = red_and_green(mean).with_class("élan", vector, {"by": "test"})
    (tmp_path / "bank.npz").write_bytes(bank.to_bytes())
    again = read_bank(tmp_path / "bank.npz")
    assert again.classes == ("red", "green", "élan")
    np.testing.assert_array_equal(again.vectors, bank.vectors)
    assert (again.logit_scale, again.facts) == (10.0, bank.facts)
    np.testing.assert_array_equal(again.text_mean, bank.text_mean)
    assert again.to_bytes() == bank.to_bytes()
    with np.load(tmp_path / "bank.npz") as plain:  # as somebody without edgekd reads it
        logits = plain["logit_scale"] * plain["vectors"] @ [0, 0.6, 0.8]
        np.testing.assert_allclose(logits, [0, 6, 10 * 0.6**2 + 6.4])


def test_names_and_vectors_that_do_not_fit_are_refused() -> None:
    bank, vector = red_and_green(), np.ones(3, dtype=np.float32)
    for name in ("", "  ", "two\nlines"):
        with pytest.raises(EdgekdError, match="needs a name"):
            bank.with_class(name, vector, {})
    with pytest.raises(EdgekdError, match='has the class "Red"'):
        bank.with_class("Red", vector, {})
    with pytest.raises(EdgekdError, match="do not fit into a space of 3 dimensions"):
        bank.of_text(np.ones(4))
    for broken in (np.zeros(3), np.array([np.nan, 1, 1])):
        with pytest.raises(EdgekdError, match="zero or not finite"):
            bank.of_text(broken)
    with pytest.raises(EdgekdError, match='"red" is no class that was added'):
        bank.without_class("red")
    assert add_blue(bank).without_class("blue").to_bytes() == bank.to_bytes()


def add_blue(bank: ClassBank) -> ClassBank:
    return bank.with_class("blue", np.array([0, 0, 1], dtype=np.float32), {"by": "test"})


def test_changing_keeps_the_artifact_whole(tmp_path: Path) -> None:
    folder = write_colours(tmp_path / "a")

    def slow(bank: ClassBank) -> ClassBank:
        change_bank(folder, add_blue)
        return bank.with_class("grey", np.ones(3, dtype=np.float32), {"by": "test"})

    with pytest.raises(EdgekdError, match="Somebody else changed"):
        change_bank(folder, slow)
    artifact = read_artifact(folder)  # checks every hash
    assert artifact.classes == ("red", "green", "blue")
    assert artifact.bank is not None
    names = {path.name for path in folder.iterdir()}
    assert names == {"artifact.json", "labels.txt", "model.onnx", artifact.bank}
    assert (folder / "labels.txt").read_text().splitlines() == ["red", "green", "blue"]
    [entry] = read_bank(folder / artifact.bank).facts["added"]
    assert entry["class"] == "blue"
    (folder / artifact.bank).write_bytes(red_and_green().to_bytes())
    with pytest.raises(EdgekdError, match="is not the file that artifact"):
        change_bank(folder, add_blue)
    manifest = json.loads((folder / "artifact.json").read_text())
    (folder / "artifact.json").write_text(json.dumps({**manifest, "bank": None}))
    with pytest.raises(EdgekdError, match="ends in the logits of fixed classes"):
        change_bank(folder, add_blue)
    with pytest.raises(EdgekdError, match="There is no artifact"):
        change_bank(tmp_path / "nowhere", add_blue)


def test_a_change_that_is_cut_off_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_colours(tmp_path / "a")
    before = (folder / "artifact.json").read_bytes()

    def replace(source: Path, target: Path) -> None:
        assert Path(target).name.startswith("bank-"), "the manifest must come last"
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="power cut"):
        change_bank(folder, add_blue)
    assert (folder / "artifact.json").read_bytes() == before
    assert read_artifact(folder).classes == ("red", "green")
    assert not list(folder.glob(".tmp-*"))


IMAGE = np.zeros((1, 16, 16, 3), dtype=np.uint8)

OPERATORS = {"Cast": 1, "ReduceMean": 1, "Mul": 1}

AZURE, CPU = "AzureExecutionProvider", "CPUExecutionProvider"


def test_nodes_are_named_and_a_fallback_is_refused(tmp_path: Path) -> None:
    session = open_session(write_artifact(tmp_path / "fp32"))
    placement = session.placement()
    assert placement is not None
    assert (placement.provider, placement.nodes) == (CPU, {CPU: OPERATORS})
    refuse_fallback("fp32", placement)
    assert not list(tmp_path.glob("**/*.json.*"))  # the profile itself does not stay
    mixed = Placement("CUDA", {"CPU": {"Resize": 1}, "CUDA": {"Conv": 3}}, "a test")
    with pytest.raises(EdgekdError, match=r"1 of 4 nodes on CPU \(Resize\)"):
        refuse_fallback("x", mixed)
    with pytest.raises(EdgekdError, match="no node"):
        refuse_fallback("x", Placement("CPU", {}, "a test"))
    if AZURE in onnxruntime.get_available_providers():
        # Azure's provider takes no plain operator, so ONNX Runtime hands all of them to the CPU without a word.
        model, options = tmp_path / "fp32" / "model.onnx", onnxruntime.SessionOptions()
        nodes = profiled_nodes(model, IMAGE, [AZURE, CPU], options)
        assert nodes == {CPU: OPERATORS}
        with pytest.raises(EdgekdError, match=r"3 of 3 nodes on CPU.*Cast, Mul, ReduceMean"):
            refuse_fallback("r/fp32", Placement(AZURE, nodes, "ONNX Runtime's profile"))


def test_the_report_states_where_nodes_ran_and_none_is_written_of_a_fallback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_measurements(monkeypatch, {"r/onnxruntime-fp32": 2.0, "r/onnxruntime-int8": 3.0})
    _, _, fp32, int8 = four_subjects(tmp_path)

    def placed(placement: Placement) -> Report:
        subjects = [dataclasses.replace(fp32, placement=lambda: placement), int8]
        suites = id_and_ood(paint_images())
        return run_benchmark(subjects, suites, tmp_path / "out", speed=SHORT)

    with pytest.raises(EdgekdError, match="fell back: 1 of 2 nodes on CPUExecutionProvider"):
        placed(Placement("CUDA", {"CUDA": {"Conv": 1}, CPU: {"Resize": 1}}, "a test"))
    assert not (tmp_path / "out").exists()
    told = Placement(CPU, {CPU: {"Conv": 12, "Add": 3}}, "ONNX Runtime's profile")
    rows = {row.subject: row for row in placed(told).placements}
    assert rows["onnxruntime-fp32"].nodes == told.nodes
    assert rows["onnxruntime-int8"].nodes is None


def test_openvino_names_operators_with_their_precision(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    folder = write_artifact(tmp_path / "ov")
    model = openvino.convert_model(folder / "model.onnx")
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
    data = json.loads((folder / "artifact.json").read_text())
    data |= {"format": "openvino", "files": {"model.xml": "0" * 64}}
    placement = open_file(data, folder, RuntimeOptions(threads=1)).placement()
    assert placement is not None
    assert (placement.provider, list(placement.nodes)) == ("CPU", ["CPU"])
    assert all(kind.split()[-1] in ("f32", "u8") for kind in placement.nodes["CPU"])
    refuse_fallback("ov", placement)


def test_no_other_module_names_a_target() -> None:
    """A target is its entry in the registry, its writer and its opener, and the modules that belong to these alone."""
    root = Path(__file__).parents[2]
    own = re.compile(
        rf"targets/registry\.py|export/mil/\w+\.py|targets/trt/\w+\.py|"
        rf"(targets|export|export/quantize)/({'|'.join(TARGETS)})\w*\.py"
    )
    # Names of packages whose versions are listed, the Hub's own folder `onnx/`, and an example that calls ONNX Runtime.
    packages = re.compile(
        r"(src/edgekd/(cli/doctor|core/machine|artifacts/hub_layout)|export/artifact|benchmark/report/modelcard)\.py"
    )
    words = {*TARGETS, *(target.format for target in TARGETS.values())}
    found = [
        f"{path.relative_to(root)}:{node.lineno}"
        for room in ("distill", "export", "benchmark", "targets", "src/edgekd")
        for path in sorted((root / room).rglob("*.py"))
        if not own.fullmatch(place := str(path.relative_to(root))) and not packages.fullmatch(place)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in words
    ]
    assert not found


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_has_its_two_modules(name: str) -> None:
    """A writer and an opener exist under the names that the entry gives them."""
    target = get_target(name)
    assert target_of(target.format) is target
    for module in (target.writer, target.opener):
        assert importlib.util.find_spec(module) is not None
    opener = Path(edgekd.targets.__file__).parent / f"{name}.py"
    assert "def open_file(" in opener.read_text(encoding="utf-8")
