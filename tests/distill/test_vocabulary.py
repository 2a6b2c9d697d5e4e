from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgekd.core.errors import EdgekdError
from edgekd.distill.text_bank import read_captions, read_vocabulary


def test_a_vocabulary_is_a_list_of_names(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("# fruit\napple\n\n  pear tree \n")
    assert read_vocabulary(tmp_path / "v.txt") == ("apple", "pear tree")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("apple\nPear tree\npear_tree\n", "more than once: pear tree"),
        ("apple\n", "fewer than two names"),
    ],
)
def test_duplicates_and_too_few_names_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "v.txt").write_text(text)
    with pytest.raises(EdgekdError, match=said):
        read_vocabulary(tmp_path / "v.txt")
    with pytest.raises(EdgekdError, match="There is no vocabulary at"):
        read_vocabulary(tmp_path / "none.txt")


def test_captions_come_from_json_and_csv_in_the_order_of_the_images(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"a/1.jpg": "one", "b.jpg": " two, and more "}))
    (tmp_path / "c.csv").write_text('image,caption,score\na/1.jpg,one,3\nb.jpg,"two, and more",4\n')
    for name in ("c.json", "c.csv"):
        assert read_captions(tmp_path / name, ["b.jpg", "a/1.jpg"]) == ["two, and more", "one"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("c.json", '{"a": "one"}', "no caption for 1 of 2 training images, for example b"),
        ("c.json", '{"a": "one", "b": ""}', "no caption for 1"),
        ("c.json", '{"a": "one", "a": "two", "b": "x"}', "two captions for a"),
        ("c.json", "[", "not valid JSON"),
        ("c.csv", "file,text\na,b\n", "lacks a column"),
    ],
)
def test_incomplete_captions_are_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(EdgekdError, match=said):
        read_captions(tmp_path / name, ["a", "b"])
