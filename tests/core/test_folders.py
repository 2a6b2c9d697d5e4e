from __future__ import annotations

import contextlib
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from edgekd.core import folders
from edgekd.core.errors import EdgekdError
from edgekd.core.folders import ARTIFACT, COMPARISON, REPORT, RUN, clear, growing, publishing

SETTINGS = json.dumps({"student": "a", "pretrained": None, "teacher": "toy"})


def make_run(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", *names):
        (folder / name).write_text(SETTINGS)
    return folder


def make_report(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"schema_version": 1, "summary": []}))
    (folder / "report.md").touch()
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def claim(hold: Any, out: Path, kind: folders.Kind, *, overwrite: bool) -> None:
    with hold(out, kind, overwrite=overwrite):
        pass


def test_a_new_folder_is_claimed_and_a_second_claim_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    with growing(out, RUN, overwrite=False):
        assert out.is_dir()
        with pytest.raises(EdgekdError, match="Another process"):
            claim(growing, out, RUN, overwrite=True)
        make = out / "config.json"
        make.write_text(SETTINGS)
        (out / "run.json").write_text("{}")
    assert names(out) == {"config.json", "run.json"}


def _hold(out: Path, taken: Any) -> None:
    with growing(out, RUN, overwrite=False):
        taken.set()
        multiprocessing.Event().wait()


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    taken = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "run", taken))
    process.start()
    assert taken.wait(60)
    with pytest.raises(EdgekdError):
        claim(growing, tmp_path / "run", RUN, overwrite=False)
    process.kill()
    process.join()
    claim(growing, tmp_path / "run", RUN, overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("held", ["thesis.txt", "config.json", "split.json"])
def test_what_is_not_a_run_is_never_claimed(tmp_path: Path, held: str, overwrite: bool) -> None:
    """A config.json may be that of any model hub's folder."""
    out = tmp_path / "mine"
    out.mkdir()
    (out / held).write_text('{"architectures": ["CLIP"]}')
    with pytest.raises(EdgekdError, match="not a run"):
        claim(growing, out, RUN, overwrite=overwrite)
    assert names(out) == {held}


def test_a_finished_run_needs_overwrite_and_a_run_without_checkpoint_none(tmp_path: Path) -> None:
    for name in ("run.json", "checkpoint.pt"):
        out = make_run(tmp_path / name, name)
        with pytest.raises(EdgekdError, match="exists already"):
            claim(growing, out, RUN, overwrite=False)
        claim(growing, out, RUN, overwrite=True)
        assert names(out) == {"config.json", name}, "a claim removes nothing"
    claim(growing, make_run(tmp_path / "killed", "split.json"), RUN, overwrite=False)


def test_a_run_that_fails_before_it_trains_leaves_no_obstacle(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "run"
    with contextlib.suppress(ZeroDivisionError), growing(out, RUN, overwrite=False):
        (out / "config.json").write_text(SETTINGS)
        (out / "split.json").write_text("{}")
        raise ZeroDivisionError
    assert not out.parent.exists()
    with contextlib.suppress(ZeroDivisionError), growing(out, RUN, overwrite=False):
        (out / "config.json").write_text(SETTINGS)
        (out / "notes.txt").write_text("mine")
        raise ZeroDivisionError
    assert names(out) == {"notes.txt"}


@pytest.mark.parametrize("used", ["csv", "tensorboard"])
def test_clearing_a_run_keeps_what_is_not_of_edgekd(tmp_path: Path, used: str) -> None:
    out = make_run(tmp_path / "run", "run.json", "student.safetensors", "notes.txt")
    # Its settings list no files to remove, and the folder of a logger goes only where the run used it.
    more = {"logger": [used], "files": ["notes.txt", 3]}
    (out / "config.json").write_text(json.dumps(json.loads(SETTINGS) | more))
    for name in ("artifacts/onnxruntime-fp32", "benchmark-2", "benchmark-of-mine", "csv", "wandb"):
        (out / name).mkdir(parents=True)
    kept = {"notes.txt", "benchmark-of-mine", "csv", "wandb"} - {used}
    clear(out, RUN)
    assert names(out) == kept
    with pytest.raises(EdgekdError):  # it is no run any more
        clear(out, RUN)
    assert names(out) == kept


def test_a_published_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "report"
    with contextlib.suppress(KeyError), publishing(out, REPORT, overwrite=False) as scratch:
        (scratch / "report.json").write_text("{}")
        raise KeyError
    assert names(tmp_path) == set()
    with publishing(out, REPORT, overwrite=False) as scratch:
        (scratch / "report.json").write_text("{}")
        with pytest.raises(EdgekdError, match="Another process"):
            claim(publishing, out, REPORT, overwrite=True)
        assert not out.exists()
    assert names(tmp_path) == {"report"}


@pytest.mark.parametrize("killed", [False, True], ids=["in place", "killed between two renames"])
def test_replacing_needs_overwrite_and_keeps_foreign_files(tmp_path: Path, killed: bool) -> None:
    out = tmp_path / "report"
    old = make_report(tmp_path / ".old-0123456789ab-report" if killed else out)
    (old / "notes.txt").write_text("mine")
    with pytest.raises(EdgekdError, match="exists already"):
        claim(publishing, out, REPORT, overwrite=False)
    assert names(out) == {"report.json", "report.md", "notes.txt"}
    with publishing(out, REPORT, overwrite=True) as scratch:
        (scratch / "report.json").write_text("new")
    assert names(out) == {"report.json", "notes.txt"}
    assert (out / "notes.txt").read_text() == "mine"
    assert names(tmp_path) == {"report"}


def test_an_artifact_owns_what_its_manifest_lists(tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    out.mkdir()
    files = {"model.mlpackage/Manifest.json": "0", "model.mlpackage/Data/a": "0", "parity.npz": "0"}
    (out / "artifact.json").write_text(json.dumps({"target": "coreml", "files": files}))
    (out / "model.mlpackage").mkdir()
    for name in ("parity.npz", "bank-0.npz", "model.onnx"):
        (out / name).write_text(name)
    assert ARTIFACT.owned(out) == ["artifact.json", "bank-0.npz", "model.mlpackage", "parity.npz"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_came_meanwhile_is_kept_and_the_result_lies_beside_it(
    tmp_path: Path, overwrite: bool
) -> None:
    out = tmp_path / "report"
    claim = publishing(out, REPORT, overwrite=overwrite)
    (claim.__enter__() / "report.json").write_text("{}")
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(EdgekdError, match="meanwhile") as caught:
        claim.__exit__(None, None, None)
    assert str(tmp_path / "report-2") in caught.value.hint
    assert names(out) == {"thesis.txt"}
    assert names(tmp_path / "report-2") == {"report.json"}


@pytest.mark.parametrize("kind", [RUN, ARTIFACT, REPORT, COMPARISON])
@pytest.mark.parametrize("as_file", [False, True])
def test_nothing_else_is_replaced_even_with_overwrite(
    tmp_path: Path, kind: folders.Kind, as_file: bool
) -> None:
    out = tmp_path / "mine"
    precious = out if as_file else out / ("comparison.html" if kind == COMPARISON else "a.txt")
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("mine")
    with pytest.raises(EdgekdError, match="not overwritten"):
        claim(publishing, out, kind, overwrite=True)
    assert precious.read_text() == "mine"


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    make_report(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with publishing(tmp_path / "link", REPORT, overwrite=True) as scratch:
        (scratch / "report.json").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == {"report.json"}
    (tmp_path / "run-link").symlink_to(tmp_path / "away")
    (tmp_path / "away").mkdir()
    make_run(tmp_path / "kept", "run.json")
    (tmp_path / "away" / "artifacts").symlink_to(tmp_path / "kept")
    (tmp_path / "away" / "config.json").write_text(SETTINGS)
    clear(tmp_path / "run-link", RUN)
    assert names(tmp_path / "kept") == {"config.json", "run.json"}, "a link is removed, not its end"
