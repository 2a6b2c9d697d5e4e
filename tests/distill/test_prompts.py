from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edgekd.core.errors import EdgekdError
from edgekd.distill.text_bank import (
    TextBank,
    ensemble,
    read_text_bank,
    readable,
    templates_for,
    warn_of_indistinct_classes,
)


def test_published_template_sets() -> None:
    assert templates_for("photo") == ("a photo of a {}",)
    seven, eighty = templates_for("imagenet7"), templates_for("imagenet80")
    assert (len(seven), len(eighty)) == (7, 80)
    assert "itap of a {}." in seven
    assert "a bad photo of a {}." in eighty
    assert all(template.count("{}") == 1 for template in (*seven, *eighty))


def test_domain_templates_name_the_source_domains() -> None:
    assert templates_for("domain", ["art_painting", "photo"]) == (
        "a art painting of a {}",
        "a photo of a {}",
    )
    for domains in ((), ("all",)):
        with pytest.raises(EdgekdError, match="sorted by domain"):
            templates_for("domain", domains)


def test_classes_with_the_same_vector_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.999, 0.0447], [0.99, 0.141]])
    classes = ("fire hydrant", "cat", "fire_hydrant", "hose")
    warn_of_indistinct_classes(TextBank(classes, ("{}",), vectors, "0", 10.0))
    said = capsys.readouterr().err
    assert '"fire hydrant" and "fire_hydrant"' in said
    assert "cat" not in said
    assert "hose" not in said  # cosines of 0.99 and 0.995
    warn_of_indistinct_classes(TextBank(classes[:2], ("{}",), vectors[:2], "0", 10.0))
    assert capsys.readouterr().err == ""


def test_templates_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("a scan of a {}\n\n  {} on a belt \n")
    assert templates_for(str(path)) == ("a scan of a {}", "{} on a belt")


@pytest.mark.parametrize("content", ["", "no place\n", "{} and {}\n", "fine {}\nnot fine\n"])
def test_a_file_without_a_place_for_the_name_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(content)
    with pytest.raises(EdgekdError, match="templates"):
        templates_for(str(path))


def test_a_misspelt_set_is_answered_with_the_closest() -> None:
    with pytest.raises(EdgekdError) as caught:
        templates_for("imagenet08")
    assert '"imagenet80"' in caught.value.hint


def test_names_become_words() -> None:
    assert readable("dining_table ") == "dining table"


def test_an_ensemble_is_the_normalised_mean_of_normalised_prompts() -> None:
    vectors = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 10.0], [0.0, 2.0]]])  # [T, C, D]
    # Class 0: (0.6, 0.8) and (0, 1) have the mean (0.3, 0.9); class 1: (0.5, 0.5).
    expected = torch.tensor([[0.3, 0.9], [0.5, 0.5]])
    expected = expected / expected.square().sum(dim=1, keepdim=True).sqrt()
    assert torch.allclose(ensemble(vectors), expected)


def test_a_bank_goes_round(tmp_path: Path) -> None:
    bank = TextBank(("sea lion", "Bär"), ("a {}", "the {}."), torch.eye(2), "0123", 1 / 0.07)
    bank.write(tmp_path / "bank.safetensors")
    back = read_text_bank(tmp_path / "bank.safetensors")
    assert torch.equal(back.vectors, bank.vectors)
    assert (back.classes, back.templates, back.teacher_id) == (
        bank.classes,
        bank.templates,
        bank.teacher_id,
    )
    assert back.logit_scale == bank.logit_scale
    assert back.image_centre is None
    assert back.head is back.vectors


def test_a_bank_of_an_earlier_edgekd_is_read(tmp_path: Path) -> None:
    header = {
        "classes": "sea lion\nBär",
        "templates": "a {}",
        "teacher_id": "0123",
        "logit_scale": repr(1 / 0.07),
        "described": "1",
    }
    save_file({"vectors": torch.eye(2)}, tmp_path / "bank.safetensors", metadata=header)
    back = read_text_bank(tmp_path / "bank.safetensors")
    assert (back.classes, back.templates) == (("sea lion", "Bär"), ("a {}",))
    assert (back.logit_scale, back.described) == (1 / 0.07, True)


def test_a_centred_bank_goes_round_and_leaves_out_the_common_part(tmp_path: Path) -> None:
    vectors = torch.tensor([[0.8, 0.6], [0.8, -0.6]])
    image_centre, text_centre = torch.tensor([0.0, 0.5]), torch.tensor([0.8, 0.0])
    TextBank(("a", "b"), ("{}",), vectors, "0123", 10.0, image_centre, text_centre).write(
        tmp_path / "bank.safetensors"
    )
    bank = read_text_bank(tmp_path / "bank.safetensors")
    assert torch.allclose(bank.head, torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
    # (0, 3) is the unit vector (0, 1), less (0, 0.5) gives (0, 1); (2, 0): (1, -0.5) made unit.
    found = bank.image_target(torch.tensor([[0.0, 3.0], [2.0, 0.0]]))
    assert torch.allclose(found, torch.tensor([[0.0, 1.0], [0.894427, -0.447214]]))
    # What the teacher itself says does not change.
    assert torch.allclose(bank.zero_shot(torch.tensor([[0.0, 3.0]])), torch.tensor([[6.0, -6.0]]))
