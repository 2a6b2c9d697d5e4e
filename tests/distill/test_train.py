from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from study_data import after_step, json_lines, raised, same_weights, tiny_settings
from term_reference import unit
from torch.multiprocessing.spawn import ProcessExitedException

from edgekd.api import missing_embeddings
from edgekd.configs.benchmark import BenchmarkConfig
from edgekd.configs.export import ExportConfig
from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError, Stopped
from edgekd.core.manifest import Run
from edgekd.data.image_set import ImageSet, load_images
from edgekd.distill import train as training
from edgekd.distill.classification import text_targets
from edgekd.distill.classification.load_run import load_run
from edgekd.distill.classification.plan import settle
from edgekd.distill.classification.predict import domain_mean
from edgekd.distill.classification.task import Classification
from edgekd.distill.models.teachers import ClipTeacher
from edgekd.distill.recipes import RECIPES
from edgekd.distill.train import train
from edgekd.evaluation.gather import gather
from edgekd.export.run import source_of

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> dict[str, Any]:
    """Settings of a training that takes about a second: 2 source domains, 2 classes, 48 training images."""
    root = tmp_path_factory.mktemp("data") / "domains"
    for seed, (domain, count) in enumerate((("art", 20), ("photo", 10), ("sketch", 3))):
        for tint, name in ((0, "cat"), (2, "dog")):
            (root / domain / name).mkdir(parents=True)
            for number in range(count):
                make = np.random.default_rng((seed, tint, number))
                pixels = make.integers(0, 160, (32, 40, 3), dtype=np.uint8)
                pixels[..., tint] += 90
                Image.fromarray(pixels).save(root / domain / name / f"{number:02d}.png")
    settings = {"batch_size": 8, "steps": STEPS, "views": 2, "log_every": 1, "checkpoint_every": 3}
    # Curves of one and several processes are compared, hence the precision.
    return (
        tiny_settings(root, tiny_teacher)
        | settings
        | {"precision": "32-true", "recipe": "vl2v-adip"}
    )


Trainer = Callable[..., Run]


@pytest.fixture
def run(base: dict[str, Any], tmp_path: Path) -> Trainer:
    """`run(**settings)` trains into `tmp_path/run`."""

    def start(**settings: Any) -> Run:
        return train(TrainConfig.model_validate(base | {"out": tmp_path / "run"} | settings))

    return start


def metrics(folder: Path) -> list[dict[str, Any]]:
    return json_lines(folder / "metrics.jsonl")


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(folder) if "loss" in line]


def assert_same_run(one: Path, two: Path) -> None:
    """Assert what several processes keep: the curve and the weights up to rounding."""
    assert [step for step, _ in losses(two)] == [step for step, _ in losses(one)]
    np.testing.assert_allclose(losses(two), losses(one), atol=1e-4)
    left, right = weights(two), weights(one)
    assert all(torch.allclose(left[name], right[name], atol=1e-3) for name in left)


def validations(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["val_top1"]) for line in metrics(folder) if "val_top1" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student.safetensors")


def board(folder: Path) -> dict[str, list[int]]:
    """Tag → steps, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_and_leaves_a_complete_run(run: Trainer, recipe: str) -> None:
    encoder = {"student": "teacher", "pretrained": None} if recipe == "vl2v-sd" else {}
    made = run(recipe=recipe, bn="frozen", steps=4, **encoder)
    labels_alone = recipe in ("erm", "lp-ft", "pseudo-label")
    expected = "config.json split.json run.json metrics.jsonl student.safetensors tensorboard"
    bank = set() if labels_alone else {"text_bank.safetensors"}
    assert {path.name for path in made.folder.iterdir()} == {*expected.split(), *bank}
    assert (made.steps, made.test_domain, made.selection[:8]) == (4, "sketch", "last EMA")
    assert (made.teacher == "none") == labels_alone
    assert [step for step, _ in losses(made.folder)] == [1, 2, 3, 4]
    ((step, accuracy),) = validations(made.folder)
    assert step == 4
    assert 0 <= accuracy <= 1
    for line in metrics(made.folder)[:4]:
        stage = next(stage for stage in RECIPES[recipe].stages if stage.name == line["stage"])
        total = sum(spec.weight * line["terms"][term] for term, spec in stage.terms.items())
        assert line["loss"] == pytest.approx(total, rel=1e-5)


def test_the_loss_goes_down(run: Trainer) -> None:
    made = run(recipe="vl2v-adip", steps=24, batch_size=16, lr=3e-3)
    curve = [loss for _, loss in losses(made.folder)]
    assert np.mean(curve[-5:]) < 0.93 * np.mean(curve[:3])


def test_stages_train_only_their_own_part(run: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    saved_steps(monkeypatch, lambda _, task: seen.append(copy.deepcopy(task.model.state_dict())))
    stages = {"align": {"share": 0.2}, "distill": {"share": 0.8}}
    run(steps=10, stages=stages, checkpoint_every=1, ema=0, bn="frozen")
    # Two steps of align (the second saved at the boundary), then eight of distill, the last of them not saved.
    first, boundary, later = seen[0], seen[1], seen[-1]

    def changed(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
        return {name.split(".")[0] for name in a if not torch.equal(a[name], b[name])}

    assert changed(first, boundary) == {"projector"}
    assert changed(boundary, later) == {"backbone"}


def test_one_seed_gives_one_result_and_another_seed_another(
    run: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = (run(out=tmp_path / name, seed=1, steps=3).folder for name in "ab")
    # The views of another seed are the same, so that the cache holds them.
    monkeypatch.setattr(ClipTeacher, "embed_images", lambda *_: pytest.fail("embedded again"))
    other = run(out=tmp_path / "c", seed=2, steps=3).folder
    for name in ("student.safetensors", "text_bank.safetensors", "split.json", "config.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    assert losses(again) == losses(first) != losses(other)
    assert (other / "split.json").read_text() == (first / "split.json").read_text()


UNSTEADY = {
    "stages": {"align": {"share": 0.5}, "distill": {"share": 0.5}},
    "eval_every": 2,
    "bn": "train",
    "student_options": {"drop_rate": 0.2, "drop_path_rate": 0.2},
}


def kill_after(step: int, settings: dict[str, Any], out: Path) -> Path:
    """Train to `out` in a forked child that SIGKILLs itself right after a step."""
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            after_step(step, patch, lambda: os.kill(os.getpid(), signal.SIGKILL))
            train(TrainConfig.model_validate(settings | {"out": out}))
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    time.sleep(1.01)  # TensorBoard orders event files of one second by their process number
    return out


@pytest.fixture(scope="module")
def uninterrupted(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    settings = {"out": out, "steps": 12, **UNSTEADY}
    train(TrainConfig.model_validate(base | settings))
    return out


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("step", [1, 5])  # before any checkpoint, and in stage 1
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_killed_run_resumes_to_the_very_same_numbers(
    base: dict[str, Any], step: int, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = kill_after(step, base | {"steps": 12, **UNSTEADY}, tmp_path / "run")
    assert not (folder / "run.json").exists()
    assert (folder / "checkpoint.pt").exists() == (step > 3)
    made = train(TrainConfig(out=folder, resume=True))
    assert losses(folder) == losses(uninterrupted)
    assert same_weights(folder, uninterrupted)
    assert validations(folder) == validations(uninterrupted)
    assert board(folder) == board(uninterrupted)
    assert made.steps == 12
    assert not (folder / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"recipe": "lgd"},  # its visual bank is a state
        {"recipe": "erm", "average": "swad", "eval_every": 1, "bn": "train"},
    ],
    ids=["lgd", "swad"],
)
def test_what_else_has_a_state_resumes_too(
    run: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    whole = run(out=tmp_path / "whole", steps=6, **settings)
    with monkeypatch.context() as patch:
        after_step(4, patch, raised(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(steps=6, **settings)
    made = run(resume=True)
    assert losses(made.folder) == losses(whole.folder)
    assert same_weights(made.folder, whole.folder)
    assert made.selection == whole.selection
    assert not (made.folder / "swad").exists()


@pytest.mark.parametrize(
    ("number", "code", "step"), [(signal.SIGINT, 130, 7), (signal.SIGTERM, 143, 11)]
)
def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(
    request: pytest.FixtureRequest, run: Trainer, uninterrupted: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, number: int, code: int, step: int,
) -> None:  # fmt: skip
    # A background job of a shell inherits SIGINT ignored, and edgekd leaves ignored signals alone.
    before = signal.signal(number, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(number, before))
    with monkeypatch.context() as patch:
        after_step(step - 1, patch, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Stopped) as caught:
            run(steps=12, checkpoint_every=1000, **UNSTEADY)
    assert caught.value.exit_code == code
    assert f"--resume --out {tmp_path / 'run'}" in caught.value.hint
    made = train(TrainConfig(out=tmp_path / "run", resume=True))
    assert losses(made.folder) == losses(uninterrupted)
    assert same_weights(made.folder, uninterrupted)
    assert made.images_per_second > 0


def saved_steps(monkeypatch: pytest.MonkeyPatch, note: Callable[[int, Any], object]) -> None:
    """Call `note` with the step and the task before every checkpoint."""
    save = training.Checkpoint.save

    def watch(self: Any, done: int, task: Any, *rest: Any) -> None:
        note(done, task)
        save(self, done, task, *rest)

    monkeypatch.setattr(training.Checkpoint, "save", watch)


def test_the_clock_makes_a_checkpoint_due(run: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    saved_steps(monkeypatch, lambda done, _: saved.append(done))
    run(recipe="erm", steps=3, checkpoint_every=1000, checkpoint_minutes=1e-9)
    assert saved == [1, 2, 3]


def test_a_run_killed_while_it_finishes_needs_no_step_again(
    run: Trainer, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(training, "finish", raised(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(steps=12, **UNSTEADY)
    monkeypatch.setattr(Classification, "views", raised(KeyboardInterrupt))
    made = run(resume=True)
    assert same_weights(made.folder, uninterrupted)
    assert made.images_per_second > 0


def command(path: Path, settings: dict[str, Any]) -> list[str]:
    """Write settings to a file, and return the words behind `python -m` that train with it."""
    path.write_text(json.dumps({"train": settings}))
    return ["edgekd.cli", "train", "--config", str(path)]


@pytest.mark.slow
def test_a_signal_reaches_all_processes(base: dict[str, Any], tmp_path: Path) -> None:
    settings = base | {"out": str(tmp_path / "run"), "steps": 5000, "devices": 2, "bn": "frozen"}
    words = [sys.executable, "-m", *command(tmp_path / "run.yaml", settings)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    lines, until = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
    while not (lines.exists() and lines.read_text().count("\n") > 3):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=200)
    assert process.returncode == 143, told
    done = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["done"]
    assert f"after step {done} " in told


def test_a_dead_process(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fabric:
        def launch(self, work: Any) -> None:
            raise ProcessExitedException("killed", 1, 99, -signal.SIGKILL, "SIGKILL")

    monkeypatch.setattr(training, "make_fabric", lambda *_: Fabric())
    settings = base | {"out": tmp_path / "run", "devices": 2}
    with pytest.raises(EdgekdError, match=r"1 of 2 .*SIGKILL") as caught:
        train(TrainConfig(**settings))
    assert "--resume" in caught.value.hint


def test_a_run_is_resumed_on_other_devices(base: dict[str, Any], tmp_path: Path) -> None:
    stored = settle(TrainConfig(**base | {"out": tmp_path / "run", "devices": 2}))
    (tmp_path / "run").mkdir()
    written = stored.model_dump_json(exclude={"resume", "overwrite", "out", "plan"})
    (tmp_path / "run" / "config.json").write_text(written)
    same = settle(TrainConfig(out=tmp_path / "run", resume=True))
    other = settle(TrainConfig(out=tmp_path / "run", resume=True, devices=4, steps=7))
    assert (same.devices, other.devices) == (2, 4)
    assert other.steps == same.steps == stored.steps


WHOLE_BATCH = {
    "train": {"terms": {"im_nce": 1.0, "vlprox": {"weight": 1.0, "mask": "teacher_correct"}}}
}


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "stages"), [("lgd", WHOLE_BATCH), ("rise", {})])
def test_what_looks_at_the_whole_batch_sees_all_processes(
    run: Trainer, tmp_path: Path, recipe: str, stages: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {"recipe": recipe, "bn": "frozen", "steps": 4, "stages": stages}
    assert_same_run(*(run(out=tmp_path / str(n), devices=n, **settings).folder for n in (1, 2)))


def test_statistics_of_averaged_weights_are_recomputed(run: Trainer, tmp_path: Path) -> None:
    swad = {"recipe": "erm", "average": "swad", "eval_every": 2}
    frozen, trained = (run(out=tmp_path / bn, bn=bn, **swad) for bn in ("frozen", "train"))
    assert ("recomputed" in frozen.selection, "recomputed" in trained.selection) == (False, True)
    for name, value in weights(frozen.folder).items():
        assert not name.endswith("running_var") or (value == 1).all()  # as they were from scratch


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(
    run: Trainer, base: dict[str, Any], tmp_path: Path, own_cache: Path, capfd: Any
) -> None:
    settings: dict[str, Any] = {"bn": "frozen", "steps": 6}
    two = run(out=tmp_path / "two", devices=2, **settings).folder
    printed = capfd.readouterr().err
    shards = [np.load(path) for path in (own_cache / "embeddings").glob("*/*.keys.npy")]
    assert [len(rows) for rows in shards] == [48, 48]  # both processes filled the cache
    assert len({tuple(row) for rows in shards for row in rows.tolist()}) == 48 * 2
    one = run(out=tmp_path / "one", **settings).folder
    assert_same_run(one, two)
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert printed.count("recipe: ") == 1  # only process 0 prints
    words = command(tmp_path / "run.yaml", base | settings | {"out": str(tmp_path / "torchrun")})
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "-m", *words]
    subprocess.run([sys.executable, "-m", *launcher], check=True, timeout=240)
    assert_same_run(one, tmp_path / "torchrun")


@pytest.mark.slow
def test_a_mistake_in_several_processes_is_still_one_sentence(run: Trainer) -> None:
    with pytest.raises(EdgekdError, match="loss is not finite") as caught:
        run(devices=2, recipe="erm", lr=1e30)
    assert "Traceback" not in str(caught.value)


def test_an_existing_folder_is_kept_unless_told_otherwise(run: Trainer, tmp_path: Path) -> None:
    folder = run(steps=1).folder
    (folder / "notes.txt").write_text("mine")
    (folder / "artifacts" / "onnxruntime-fp32").mkdir(parents=True)
    before = (folder / "run.json").read_bytes()
    for change in ({}, {"resume": True}, {"data": str(tmp_path / "absent"), "overwrite": True}):
        with pytest.raises(EdgekdError):
            run(**{"steps": 1} | change)
    assert (folder / "run.json").read_bytes() == before  # a run that cannot start removes nothing
    assert run(recipe="erm", steps=2, overwrite=True).steps == 2
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "artifacts").exists()
    assert not (folder / "text_bank.safetensors").exists(), "it belonged to the earlier run"


def test_two_trainings_to_one_folder(run: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []

    def second() -> None:
        for again in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(EdgekdError, match="Another process") as caught:
                run(recipe="erm", steps=1, **again)
            refused.append(caught)

    with monkeypatch.context() as patch:
        after_step(1, patch, second)
        made = run(recipe="erm", steps=1)
    assert (len(refused), made.steps) == (3, 1)
    assert {path.name for path in made.folder.iterdir()} >= {"run.json", "config.json"}


def test_files_that_come_late(
    run: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = training.load_data

    def meanwhile(config: TrainConfig) -> Any:
        (tmp_path / "run" / "config.json").write_text("mine")
        return load(config)

    monkeypatch.setattr(training, "load_data", meanwhile)
    with pytest.raises(EdgekdError, match="not a run"):
        run(recipe="erm", steps=1)
    assert (tmp_path / "run" / "config.json").read_text() == "mine"


def full_disk_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the temporary files of every file called `name` lie on /dev/full, where each write fails with ENOSPC."""
    write = Path.write_bytes

    def to_full_disk(self: Path, data: Any) -> int:
        if self.name.endswith(name):
            self.symlink_to("/dev/full")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", to_full_disk)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_keeps_the_earlier_checkpoint_and_one_of_something_else_is_refused(
    run: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run" / "checkpoint.pt"
    with monkeypatch.context() as patch:
        after_step(4, patch, lambda: full_disk_for("checkpoint.pt", patch))
        with pytest.raises(EdgekdError, match="full"):
            run(recipe="erm")
    whole = torch.load(path, weights_only=True)
    assert whole["done"] == 3
    assert not list((tmp_path / "run").glob(".tmp*"))
    of_another = copy.deepcopy(whole)
    of_another["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2, 3)
    fields = ("student", "rng", "seconds", "speed", "best", "done", "optimizer", "average")
    wrong = [whole | {field: value} for field in fields for value in (None, torch.zeros(4))]
    for content in (*wrong, whole | {"rng": "x"}, torch.zeros(3), of_another):
        torch.save(content, path)
        with pytest.raises(EdgekdError, match="checkpoint"):
            run(resume=True)
    torch.save(whole, path)
    assert run(resume=True).steps == STEPS
    full_disk_for("1.pt", monkeypatch)  # of SWAD's segments
    with pytest.raises(EdgekdError, match="full"):
        run(recipe="erm", average="swad", eval_every=2, out=tmp_path / "swad")


@pytest.mark.parametrize("steps", [STEPS, 1], ids=["loss", "scores"])
def test_numbers_that_are_not_finite_stop_a_run(run: Trainer, tmp_path: Path, steps: int) -> None:
    with pytest.raises(EdgekdError, match="not finite"):
        run(recipe="erm", lr=1e30, steps=steps)
    assert not {"run.json", "student.safetensors"} & {p.name for p in (tmp_path / "run").iterdir()}


def test_best_keeps_the_best_weights(run: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    right, domains = np.array([False, True, True, True]), np.array([0, 0, 0, 1])
    assert domain_mean(right, domains) == pytest.approx((2 / 3 + 1) / 2)  # every domain alike
    accuracies = iter([0.25, 0.75, 0.5, 0.75])
    kept: list[dict[str, torch.Tensor]] = []

    def judge(student: Any, *rest: Any) -> float:
        kept.append({name: value.clone() for name, value in student.state_dict().items()})
        return next(accuracies)

    monkeypatch.setattr("edgekd.distill.classification.task.source_accuracy", judge)
    made = run(recipe="erm", select="best", eval_every=2, ema=0)
    assert "step 4" in made.selection
    best = {name: value for name, value in weights(made.folder).items() if name != "scale"}
    assert all(torch.equal(value, kept[1][name]) for name, value in best.items())
    assert any(not torch.equal(value, kept[3][name]) for name, value in best.items())


def test_mixed_precision_stays_close_to_full(run: Trainer, tmp_path: Path) -> None:
    full, mixed = (
        losses(run(out=tmp_path / kind, steps=2, recipe="kd", precision=kind).folder)
        for kind in ("32-true", "bf16-mixed")
    )
    assert mixed != full
    np.testing.assert_allclose(mixed, full, rtol=0.05)


def black_box(path: Path, ids: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """A file of embeddings for `ids` and the classes dog and cat."""
    make = np.random.default_rng(0)
    arrays = {
        "image_ids": np.array(ids),
        "image_vectors": make.normal(size=(len(ids), 6)).astype(np.float32),
        "class_names": np.array(["dog", "cat"]),
        "text_vectors": make.normal(size=(2, 6)).astype(np.float32),
    }
    np.savez(path, **arrays)
    return f"embeddings:{path}", arrays


def test_a_black_box_trains(run: Trainer, base: dict[str, Any], tmp_path: Path) -> None:
    names = load_images(base["data"]).ids
    teacher, arrays = black_box(tmp_path / "teacher.npz", names)
    loaded = load_run(run(teacher=teacher, centre=True, steps=1).folder)
    expected = arrays["text_vectors"][[1, 0]]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(loaded.bank.vectors, expected, atol=1e-6)
    # The image centre is the mean of the unit vectors of the training images, and of no others.
    rows = arrays["image_vectors"][loaded.data()[1].train]
    centre = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(loaded.bank.image_centre, centre, atol=1e-6)
    with pytest.raises(EdgekdError, match="new views"):
        run(teacher=teacher, online_teacher=True, out=tmp_path / "online")
    assert not (tmp_path / "online").exists()


@pytest.fixture
def camera(tmp_path: Path, make_image: Callable[..., Path]) -> Path:
    """Six images without labels."""
    for number in range(6):
        make_image(tmp_path / "camera" / f"{number}.png", seed=77 + number)
    return tmp_path / "camera"


def test_unlabelled_images_train_beside_labelled_ones(run: Trainer, camera: Path) -> None:
    settings: dict[str, Any] = {"unlabelled": [str(camera)], "augment": "restyle", "steps": 3}
    made = run(recipe="lgd", **settings)
    stored = json.loads((made.folder / "split.json").read_text())
    assert sorted(stored["roles"]["unlabelled"]) == [f"{number}.png" for number in range(6)]
    assert stored["unlabelled_domains"] == ["camera"]
    assert made.split_hash == stored["hash"]
    with pytest.raises(EdgekdError, match="unlabelled images"):
        run(recipe="erm", overwrite=True, **settings)


def test_images_of_no_class(run: Trainer, camera: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = text_targets.plain_embeddings

    def clear_cut(teacher: Any, images: ImageSet, indices: np.ndarray, *rest: Any) -> torch.Tensor:
        """Every labelled image and two of the unlabelled ones lie at a text, the others between two."""
        found = original(teacher, images, indices, *rest)
        texts = unit(teacher.embed_texts(["a photo of a cat", "a photo of a dog"]))
        for row, index in enumerate(indices):
            known = images.labels[index] >= 0 or images.ids[index] in ("1.png", "4.png")
            found[row] = texts[index % 2] if known else texts.sum(dim=0)
        return found

    monkeypatch.setattr(text_targets, "plain_embeddings", clear_cut)
    settings: dict[str, Any] = {"unlabelled": [str(camera)], "unlabelled_filter": True}
    made = run(recipe="kd", steps=1, prompts="photo", **settings)
    assert set(load_run(made.folder).data()[1].unlabelled) == {"1.png", "4.png"}


def test_images_a_black_box_lacks(
    run: Trainer, base: dict[str, Any], camera: Path, tmp_path: Path
) -> None:
    unlabelled, ids = [str(camera)], load_images(base["data"]).ids
    spec, _ = black_box(tmp_path / "box.npz", (*ids, "0.png", "1.png"))
    with pytest.raises(EdgekdError, match="4 of 54 images") as caught:
        run(recipe="kd", unlabelled=unlabelled, teacher=spec)
    assert "edgekd list missing" in str(caught.value.hint)
    missing = missing_embeddings(spec, data=base["data"], unlabelled=unlabelled)
    assert missing == [f"{number}.png" for number in range(2, 6)]


def test_distillation_for_names_without_labels(base: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\nhorse\n")
    settings = {name: value for name, value in base.items() if name != "data"} | {
        "unlabelled": [base["data"]], "vocabulary": tmp_path / "names.txt", "recipe": "lgd",
        "steps": 3, "out": tmp_path / "run",
    }  # fmt: skip
    for change in ({"select": "best"}, {"average": "swad"}, {"eval_every": 2}):
        with pytest.raises(EdgekdError, match="needs labelled validation images"):
            train(TrainConfig.model_validate(settings | change))
    made = train(TrainConfig.model_validate(settings))
    assert (made.data, made.classes) == ("none", ("cat", "dog", "horse"))
    assert not validations(tmp_path / "run")
    loaded = load_run(tmp_path / "run")
    images, split = loaded.data()
    assert (len(split.val), len(split.unlabelled)) == (6, 60)
    assert not set(split.unlabelled.values()) & {images.keys[i] for i in split.val}
    assert len(source_of(loaded, ExportConfig(precision="int8")).calibration) == 60
    for ood in ({}, {"ood": f"photos={base['data']}"}):
        with pytest.raises(EdgekdError):
            gather(BenchmarkConfig(paths=tmp_path / "run", **ood))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_what_is_killed_and_goes_on_gives_the_same_files() -> None:
    """The short version of scripts/kill_test.py; docs/train.md has the figures of the long one."""
    script = Path(__file__).parents[2] / "scripts" / "kill_test.py"
    words = [sys.executable, str(script), "--moments", "1"]
    subprocess.run(words, check=True, timeout=1800)
