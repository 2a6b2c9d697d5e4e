from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.distill.classification.setup import cached_view_counts
from edgekd.distill.classification.text_targets import (
    TextTargets,
    mean_centred,
    near_chance,
    report_zero_shot,
)
from edgekd.distill.inputs.batches import BalancedSampler, Sampler
from edgekd.distill.text_bank import (
    TextBank,
    ensemble,
    read_text_bank,
    templates_for,
    warn_of_indistinct_classes,
)
from edgekd.distill.text_files import (
    QUESTION,
    descriptions_for,
    read_captions,
    read_vocabulary,
    stored_descriptions,
    write_descriptions,
)


def test_template_sets(tmp_path: Path) -> None:
    assert templates_for("photo") == ("a photo of a {}",)
    seven, eighty = templates_for("imagenet7"), templates_for("imagenet80")
    assert (len(seven), len(eighty)) == (7, 80)
    assert "itap of a {}." in seven
    assert "a bad photo of a {}." in eighty
    assert all(template.count("{}") == 1 for template in (*seven, *eighty))
    named = ("a art painting of a {}", "a photo of a {}")
    assert templates_for("domain", ["art_painting", "photo"]) == named
    for domains in ((), ("all",)):
        with pytest.raises(EdgekdError, match="sorted by domain"):
            templates_for("domain", domains)
    (tmp_path / "mine.txt").write_text("a scan of a {}\n\n  {} on a belt \n")
    assert templates_for(str(tmp_path / "mine.txt")) == ("a scan of a {}", "{} on a belt")
    (tmp_path / "v.txt").write_text("# fruit\napple\n\n  pear tree \n")
    assert read_vocabulary(tmp_path / "v.txt") == ("apple", "pear tree")


def test_an_ensemble_is_the_normalised_mean_of_normalised_prompts() -> None:
    vectors = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 10.0], [0.0, 2.0]]])  # [T, C, D]
    # Class 0: (0.6, 0.8) and (0, 1) have the mean (0.3, 0.9); class 1: (0.5, 0.5).
    expected = torch.tensor([[0.3, 0.9], [0.5, 0.5]])
    expected = expected / expected.square().sum(dim=1, keepdim=True).sqrt()
    assert torch.allclose(ensemble(vectors), expected)


def test_a_bank_of_an_earlier_edgekd_is_read(tmp_path: Path) -> None:
    header = {
        "classes": "sea lion\nBär", "templates": "a {}", "teacher_id": "0123",
        "logit_scale": repr(1 / 0.07), "described": "1",
    }  # fmt: skip
    save_file({"vectors": torch.eye(2)}, tmp_path / "bank.safetensors", metadata=header)
    back = read_text_bank(tmp_path / "bank.safetensors")
    assert (back.classes, back.templates) == (("sea lion", "Bär"), ("a {}",))
    assert (back.logit_scale, back.described) == (1 / 0.07, True)


def test_a_centred_bank_goes_round_and_leaves_out_the_common_part(tmp_path: Path) -> None:
    vectors = torch.tensor([[0.8, 0.6], [0.8, -0.6]])
    image_centre, text_centre = torch.tensor([0.0, 0.5]), torch.tensor([0.8, 0.0])
    plain = TextBank(("sea lion", "Bär"), ("a {}", "the {}."), vectors, "0123", 1 / 0.07)
    plain.write(tmp_path / "plain.safetensors")
    back = read_text_bank(tmp_path / "plain.safetensors")
    assert back.head is back.vectors
    assert torch.equal(back.vectors, vectors)
    assert replace(back, vectors=vectors) == plain
    centred = replace(plain, image_centre=image_centre, text_centre=text_centre, logit_scale=10.0)
    centred.write(tmp_path / "bank.safetensors")
    bank = read_text_bank(tmp_path / "bank.safetensors")
    assert torch.allclose(bank.head, torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
    # (0, 3) is the unit vector (0, 1), less (0, 0.5) gives (0, 1); (2, 0): (1, -0.5) made unit.
    found = bank.image_target(torch.tensor([[0.0, 3.0], [2.0, 0.0]]))
    assert torch.allclose(found, torch.tensor([[0.0, 1.0], [0.894427, -0.447214]]))
    # The teacher's own predictions do not change.
    assert torch.allclose(bank.zero_shot(torch.tensor([[0.0, 3.0]])), torch.tensor([[6.0, -6.0]]))


CLASSES = ("dog", "dining_table")


def test_descriptions_come_from_json_text_functions_and_commands(tmp_path: Path) -> None:
    told = {"dog": ["It has four legs.", "It barks."], "dining table": "A flat top.", "x": "y"}
    (tmp_path / "d.json").write_text(json.dumps(told))
    write_descriptions(tmp_path / "made.json", CLASSES, lambda name: told[name.replace("_", " ")])
    expected = {"dog": ("It has four legs.", "It barks."), "dining_table": ("A flat top.",)}
    for name in ("d.json", "made.json"):
        assert descriptions_for(str(tmp_path / name), CLASSES) == expected
    (tmp_path / "d.txt").write_text("dog: It has four legs.\n\ndining_table: A flat top.\n")
    expected["dog"] = ("It has four legs.",)
    assert descriptions_for(str(tmp_path / "d.txt"), CLASSES) == expected
    echo = "printf 'Answer:\\n%s'"
    assert descriptions_for(f"command:{echo}", CLASSES) == {
        "dog": ("Answer: " + QUESTION.format("dog"),),
        "dining_table": ("Answer: " + QUESTION.format("dining table"),),
    }


def captions_of_two(path: str) -> list[str]:
    return read_captions(Path(path), ["a", "b"])


def descriptions_of_two(spec: str) -> dict[str, tuple[str, ...]]:
    return descriptions_for(spec, CLASSES)


def vocabulary(path: str) -> tuple[str, ...]:
    return read_vocabulary(Path(path))


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("d.json", '{"dog": "a", "dining_table": "  "}', descriptions_of_two),
        ("d.json", '{"dog": "a", "dog": "b", "dining_table": "c"}', descriptions_of_two),
        ("d.json", '{"dog": "a", "dining_table": "c", "dining table": "d"}', descriptions_of_two),
        ("d.json", '{"dog": 3, "dining_table": "b"}', descriptions_of_two),
        ("d.json", "{", descriptions_of_two),
        ("d.txt", "dog: a\ndining table b\n", descriptions_of_two),
        ("d.txt", "dog: a\ndog: b\ndining_table: c\n", descriptions_of_two),
        ("absent.json", None, descriptions_of_two),
        ("command:false", None, descriptions_of_two),
        ("command:no-such-program-here", None, descriptions_of_two),
        ('command:ask "never closed', None, descriptions_of_two),
        ("t.txt", "", templates_for),
        ("t.txt", "no place\n", templates_for),
        ("t.txt", "fine {}\n{} and {}\n", templates_for),
        ("v.txt", "apple\nPear tree\npear_tree\n", vocabulary),
        ("v.txt", "apple\n", vocabulary),
        ("v.txt", None, vocabulary),
        ("c.json", '{"a": "one"}', captions_of_two),
        ("c.json", '{"a": "one", "b": ""}', captions_of_two),
        ("c.json", '{"a": "one", "a": "two", "b": "x"}', captions_of_two),
        ("c.json", "[", captions_of_two),
        ("c.csv", "file,text\na,b\n", captions_of_two),
    ],
)
def test_files_of_text_that_are_incomplete_or_ambiguous_are_refused(
    tmp_path: Path, name: str, text: str | None, read: Callable[[str], object]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(EdgekdError) as caught:
        read(name if name.startswith("command:") else str(tmp_path / name))
    assert caught.value.hint


def test_what_was_written_down_stays_and_a_stored_command_never_runs(tmp_path: Path) -> None:
    kept, now = tmp_path / "kept.json", str(tmp_path / "now.json")
    kept.write_text('{"dog": ["It barked then."]}')
    Path(now).write_text('{"dog": "It barks now.", "dining table": "A flat top."}')
    assert stored_descriptions(kept, now, CLASSES, may_run=False) == {
        "dog": ("It barked then.",),
        "dining_table": ("A flat top.",),
    }
    for nothing in (None, tmp_path / "none.json"):
        found = stored_descriptions(nothing, now, ("dog",), may_run=False)
        assert found == {"dog": ("It barks now.",)}
    command = f"command:touch {tmp_path / 'ran'}"
    found = stored_descriptions(kept, command, ("dog",), may_run=False)
    assert found == {"dog": ("It barked then.",)}
    with pytest.raises(EdgekdError, match="dining_table"):
        stored_descriptions(kept, command, CLASSES, may_run=False)
    (tmp_path / "run.toml").write_text(f'descriptions = "{command}"')
    with pytest.raises(EdgekdError, match="command line"):
        TrainConfig.load(config=tmp_path / "run.toml")
    assert not (tmp_path / "ran").exists()
    assert TrainConfig.load(descriptions=command).descriptions == command


def test_captions_come_from_json_and_csv_in_the_order_of_the_images(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"a/1.jpg": "one", "b.jpg": " two, and more "}))
    (tmp_path / "c.csv").write_text('image,caption,score\na/1.jpg,one,3\nb.jpg,"two, and more",4\n')
    for name in ("c.json", "c.csv"):
        assert read_captions(tmp_path / name, ["b.jpg", "a/1.jpg"]) == ["two, and more", "one"]


BANK = TextBank(("a", "b"), ("{}",), torch.tensor([[0.6, 0.8], [0.8, -0.6]]), "0123", 10.0)

ANISOTROPIC = torch.tensor([[2.0, 0.0], [3.0, 4.0], [1.0, 0.0]])

SPREAD = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])


def test_anisotropic_embeddings_are_centred_on_their_mean_others_on_request_alone() -> None:
    bank = mean_centred(BANK, ANISOTROPIC, always=False)
    assert bank.image_centre.tolist() == pytest.approx([2.6 / 3, 0.8 / 3])
    assert bank.text_centre.tolist() == pytest.approx([0.7, 0.1])
    # (0.6, 0.8) − (0.7, 0.1) = (−0.1, 0.7), of length √0.5.
    assert bank.head[0].tolist() == pytest.approx([-0.1 / 0.5**0.5, 0.7 / 0.5**0.5])
    assert mean_centred(BANK, SPREAD, always=False) is BANK
    assert mean_centred(BANK, None, always=False) is BANK
    assert mean_centred(BANK, SPREAD, always=True).image_centre is not None
    texts = mean_centred(BANK, None, always=True)
    assert (texts.image_centre, texts.text_centre is None) == (None, False)


def test_all_targets_follow_the_centre_of_the_classes() -> None:
    bank = mean_centred(BANK, ANISOTROPIC, always=True)
    vocabulary = replace(BANK, classes=("x", "y"), vectors=torch.eye(2))
    made = TextTargets(vocabulary, None, torch.ones(1, 2, 2), 2 * torch.eye(2))
    moved = made.centred_like(bank)
    assert torch.allclose(moved.bank.head, torch.tensor([[0.5, -0.5], [-0.5, 0.5]]) * 2**0.5)
    assert moved.bank.image_centre is bank.image_centre
    assert torch.allclose(moved.captions, torch.eye(2) - torch.tensor([0.7, 0.1]))
    assert made.centred_like(BANK) is made


def test_warnings_of_a_teacher_that_cannot_tell_classes(capsys: pytest.CaptureFixture[str]) -> None:
    labels, eye = np.array([0] * 30 + list(range(1, 10))), torch.eye(10)
    assert report_zero_shot(eye[labels], labels, "images") == 1
    assert "warning" not in capsys.readouterr().err
    # Always the most frequent class: 77 % of the images, and chance as a mean over classes.
    assert report_zero_shot(eye[[0] * 39], labels, "images") == pytest.approx(0.1)
    assert "warning" in capsys.readouterr().err
    assert near_chance(0.2, 1 / 7)
    assert not near_chance(0.3, 1 / 7)
    # Cosines of 0.999, and of 0.99 and 0.995.
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.999, 0.0447], [0.99, 0.141]])
    classes = ("fire hydrant", "cat", "fire_hydrant", "hose")
    warn_of_indistinct_classes(TextBank(classes, ("{}",), vectors, "0", 10.0))
    said = capsys.readouterr().err
    assert {name for name in classes if f'"{name}"' in said} == {"fire hydrant", "fire_hydrant"}


@pytest.mark.parametrize(
    ("unlabelled", "steps", "expected"),
    [
        (10, 100, 12),  # 40 labelled × 3 views, spread over 10
        (80, 100, 3),  # never fewer than a labelled image has
        (10, 9, 5),  # 9 steps of 5 places visit each 4.5 times
        (2, 1000, 32),
    ],
)
def test_cached_views_of_few_unlabelled_images(unlabelled: int, steps: int, expected: int) -> None:
    train, others = np.arange(40), np.arange(40, 40 + unlabelled)
    places = min(5, unlabelled)
    labelled = BalancedSampler((train,), 10 - places, 0)
    task: Any = SimpleNamespace(
        config=SimpleNamespace(views=3), images=range(40 + unlabelled), split=SimpleNamespace(train=train),
        unlabelled=others, steps=steps, sampler=Sampler((labelled,), (BalancedSampler((others,), places, 0),)),
    )  # fmt: skip
    assert cached_view_counts(task).tolist() == [3] * 40 + [expected] * unlabelled
