from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.distill.classification.load import load_run
from edgekd.distill.students import encoder_student, interpolate_with_teacher
from edgekd.distill.teachers import ClipTeacher, load_teacher
from edgekd.distill.train import train


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> ClipTeacher:
    found = load_teacher(f"local-dir:{tiny_teacher}")
    assert isinstance(found, ClipTeacher)
    return found


def test_the_student_starts_as_the_teacher(teacher: ClipTeacher) -> None:
    student = encoder_student(teacher).eval()
    views = torch.rand(2, 3, 32, 32)
    assert torch.allclose(student(views), teacher.embed_images(views), atol=1e-5)
    assert student.embeds
    assert student.preprocess == teacher.preprocess
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert encoder_student(teacher, classes=3)(views).shape == (2, 3)


def test_it_takes_no_other_size_and_no_file_of_embeddings(teacher: ClipTeacher) -> None:
    with pytest.raises(EdgekdError, match="takes 32 px, not 64"):
        encoder_student(teacher, size=64)
    with pytest.raises(EdgekdError, match="no such model"):
        encoder_student(None)


def test_wise_ft_lies_between_the_weights(teacher: ClipTeacher) -> None:
    student = encoder_student(teacher)
    start = {name: value.clone() for name, value in student.backbone.state_dict().items()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    interpolate_with_teacher(student, teacher, 0.25)
    for name, value in student.backbone.named_parameters():
        assert torch.allclose(value, start[name] + 0.25, atol=1e-6)


def test_a_self_distilled_run_reads_back_and_wise_ft_of_nothing_is_the_teacher(
    make_domain_folder: object, tmp_path: Path, tiny_teacher: Path, teacher: ClipTeacher
) -> None:
    data = make_domain_folder(tmp_path / "data", count=10)  # type: ignore[operator]
    settings = {
        "recipe": "vl2v-sd",
        "data": str(data),
        "teacher": f"local-dir:{tiny_teacher}",
        "accelerator": "cpu",
    }
    made = train(
        TrainConfig.model_validate(
            settings
            | {
                "steps": 2,
                "batch_size": 4,
                "views": 1,
                "average": "wise-ft",
                "wise_ft": 0.0,
                "out": tmp_path / "run",
            }
        )
    )
    assert made.student == "teacher"
    assert made.selection.startswith("WiSE-FT")
    assert made.folder is not None
    loaded = load_run(made.folder)
    views = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(loaded.student(views), teacher.embed_images(views), atol=1e-5)
    assert loaded.bank is not None
    assert loaded.vectors is loaded.bank.vectors
