"""The same images in other words: what is asked of whom, and the rows of the report by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmark_fakes import (
    CLASSES,
    SHORT,
    fake_measurements,
    four_subjects,
    id_and_ood,
    model,
    paint_images,
    subject,
)

from edgekd.benchmark.benchmark import run_benchmark
from edgekd.benchmark.evaluate.logits import predict_suite
from edgekd.benchmark.evaluate.scores import FIXED
from edgekd.benchmark.report.document import document
from edgekd.benchmark.report.render import markdown
from edgekd.benchmark.rescore import rescore
from edgekd.benchmark.results.storage import read_report
from edgekd.benchmark.subjects import Suite
from edgekd.core.console import say
from edgekd.core.errors import EdgekdError
from edgekd.core.predictor import Predictor
from edgekd.distill.teacher import ClipTeacher, load_teacher
from edgekd.evaluation.prompt_variants import _bank, in_other_words, read_words


def words(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_lines_are_names_or_templates(tmp_path: Path) -> None:
    read = read_words("w", words(tmp_path / "w.txt", "a sketch of a {}\n\nfox\n fox \nwolf\n"))
    assert (read.added, read.templates) == (("fox", "wolf"), ("a sketch of a {}",))
    assert read_words("w", words(tmp_path / "n.txt", "fox\n")).templates is None


@pytest.mark.parametrize(("text", "said"), [("\n\n", "no words"), ("a {} or {}\n", "several")])
def test_files_that_say_nothing_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(EdgekdError, match=said):
        read_words("w", words(tmp_path / "w.txt", text))
    with pytest.raises(EdgekdError, match="not a readable"):
        read_words("w", tmp_path / "absent.txt")


@pytest.fixture(scope="module")
def teacher() -> ClipTeacher:
    found = load_teacher("toy")
    assert isinstance(found, ClipTeacher)
    return found


def test_own_vectors_stay_and_new_templates_make_new_ones(teacher: ClipTeacher) -> None:
    own = teacher.text_bank(("circle", "star"), ("a photo of a {}",))
    described = replace(own, vectors=own.vectors.flip(0), text_centre=own.vectors.mean(dim=0))
    longer = _bank(teacher, described, ("ring",), None)
    assert longer.classes == ("circle", "star", "ring")
    assert torch.equal(longer.vectors[:2], described.vectors)  # not made again from the names
    assert torch.allclose(longer.vectors[2:], teacher.text_bank(("ring",), own.templates).vectors)
    assert longer.text_centre is described.text_centre
    other = _bank(teacher, described, (), ("a drawing of a {}",))
    assert torch.allclose(
        other.vectors, teacher.text_bank(own.classes, ("a drawing of a {}",)).vectors
    )
    assert not torch.allclose(other.vectors, own.vectors)


def test_a_suites_name_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    say("accuracy on vocab:new: 3 images")
    assert "vocab:new: 3" in capsys.readouterr().err


class Embedding:
    """A student whose embedding of every image is `towards`."""

    embeds, head, mean = True, None, torch.zeros(1)

    def __init__(self, towards: torch.Tensor) -> None:
        self.towards = towards

    def eval(self) -> None:
        pass

    def scores(self, views: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        return self.towards.expand(len(views), -1) @ bank.T


def test_only_heads_of_text_are_asked_again(teacher: ClipTeacher, tmp_path: Path) -> None:
    bank = teacher.text_bank(CLASSES, ("a photo of a {}",))
    bird = teacher.text_bank(("bird",), bank.templates).vectors
    run = SimpleNamespace(name="r", teacher="toy")
    loaded = SimpleNamespace(run=run, bank=bank, student=Embedding(bird))
    suites = [*id_and_ood(paint_images()), Suite("val", paint_images(), np.arange(9))]
    subjects = [
        subject("torch", "torch", model(0)),
        subject("fp32", "artifact", model(0), folder=tmp_path),
    ]
    path = words(tmp_path / "w.txt", "Cat\nbird\n")
    spec = f"new={path}"
    found, again = in_other_words([loaded], subjects, suites, [spec])  # type: ignore[list-item]
    assert [suite.name for suite in again[4:]] == [
        "vocab:new",
        "vocab:new/photo",
        "vocab:new/sketch",
    ]
    assert again[4].images.classes == (*CLASSES, "bird")  # "Cat" is a class already
    assert again[4].kind == "vocabulary"
    assert again[4].remarks == ("the images of id, with 1 class name added that no image has.",)
    assert [again[4].holds(one) for one in found] == [True, False]
    assert [again[0].holds(one) for one in found] == [True, True]
    [logits] = predict_suite(found[:1], again[4])
    assert (logits.argmax(axis=1) == 3).all()  # every image looks like a bird to it

    def with_classes(classes: tuple[str, ...], vectors: np.ndarray) -> Predictor:
        np.testing.assert_allclose(vectors[classes.index("bird")], bird[0], atol=1e-6)
        return lambda pixels: np.repeat(bird.numpy() @ vectors.T, len(pixels), axis=0)

    embedding = replace(subjects[1], name="fp32-embedding", with_classes=with_classes)
    told_more = replace(embedding, name="with a class added", classes=(*CLASSES, "fish"))
    found, _ = in_other_words([loaded], [embedding, told_more], suites, [spec])  # type: ignore[list-item]
    assert [again[4].holds(one) for one in found] == [True, False]
    [logits] = predict_suite(found[:1], again[4])
    assert (logits.argmax(axis=1) == 3).all()
    trained = SimpleNamespace(run=run, bank=None, student=Embedding(bird))
    with pytest.raises(EdgekdError, match="None of these models"):
        in_other_words([trained], subjects, suites, [spec])  # type: ignore[list-item]


def test_the_report_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a name added the torch student calls every fifth image by it; it was wrong on every second before."""
    fake_measurements(monkeypatch, {"r/onnxruntime-fp32": 2.0, "r/onnxruntime-int8": 3.0})
    suites = id_and_ood(paint_images())
    longer = replace(suites[0].images, classes=(*CLASSES, "bird"))
    suites.append(
        replace(
            suites[0],
            name="vocab:new",
            images=longer,
            family="vocabulary",
            variant="vocab:new",
            base="id",
        )
    )

    def asked(pixels: np.ndarray) -> np.ndarray:
        logits = np.zeros((len(pixels), 4), dtype=np.float32)
        number = pixels[:, 0, 0, 1].astype(int)
        logits[np.arange(len(pixels)), np.where(number % 5 == 0, 3, pixels[:, 0, 0, 0])] = 4.0
        return logits

    subjects = four_subjects(tmp_path)
    subjects[1] = replace(subjects[1], variants={"vocab:new": (asked, (*CLASSES, "bird"))})
    report = run_benchmark(subjects, suites, tmp_path / "out", speed=SHORT)
    assert read_report(report.folder) == report
    rows = {row.subject: row for row in report.vocabularies}
    torch_row = rows["torch"]
    assert (torch_row.top1, torch_row.base_top1, torch_row.to_added, torch_row.added) == (
        0.8,
        0.5,
        0.2,
        1,
    )
    assert (rows["onnxruntime-int8"].top1, rows["onnxruntime-int8"].reason) == (
        None,
        FIXED["artifact"],
    )
    assert report.summary[1].ood_avg == pytest.approx(0.5)  # counts for nothing else
    text = markdown(document(report))
    told = [
        line
        for line in text.splitlines()
        if line.startswith("| torch student | vocab:new | 80.0 [")
    ]
    assert any(line.endswith(" | 50.0 | -30.0 | 20.0 | 1 | 60 |") for line in told), told
    assert "n/a: classes are in the file" in text
    assert "Other prompts" in (tmp_path / "out" / "report.html").read_text()
    assert rescore(tmp_path / "out").vocabularies == report.vocabularies
