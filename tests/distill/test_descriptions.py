from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from edgekd.configs.train import TrainConfig
from edgekd.core.errors import EdgekdError
from edgekd.distill.text_bank import (
    QUESTION,
    descriptions_for,
    stored_descriptions,
    write_descriptions,
)

CLASSES = ("dog", "dining_table")


def test_json_and_text_files_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(
        json.dumps({"dog": "It has four legs.", "dining table": "A flat top.", "x": "y"})
    )
    (tmp_path / "d.txt").write_text("dog: It has four legs.\n\ndining_table: A flat top.\n")
    expected = {"dog": ("It has four legs.",), "dining_table": ("A flat top.",)}
    assert descriptions_for(str(tmp_path / "d.json"), CLASSES) == expected
    assert descriptions_for(str(tmp_path / "d.txt"), CLASSES) == expected


def test_a_class_may_have_several_sentences_and_any_function_may_write_them(tmp_path: Path) -> None:
    path = tmp_path / "made.json"
    write_descriptions(
        path, CLASSES, lambda name: [f"{name} one.", f"{name} two."] if name == "dog" else "One."
    )
    assert descriptions_for(str(path), CLASSES) == {
        "dog": ("dog one.", "dog two."),
        "dining_table": ("One.",),
    }


def test_a_command_is_asked_once_per_class(tmp_path: Path) -> None:
    script = tmp_path / "ask.py"
    script.write_text("import sys; print('Asked:\\n' + sys.argv[-1])")
    told = descriptions_for(f"command:{sys.executable} {script}", CLASSES)
    assert told == {
        "dog": ("Asked: " + QUESTION.format("dog"),),
        "dining_table": ("Asked: " + QUESTION.format("dining table"),),
    }


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("d.json", '{"dog": "a"}', "dining_table"),
        ("d.json", '{"dog": "a", "dining_table": "  "}', "dining_table"),
        ("d.json", '{"dog": "a", "dog": "b", "dining_table": "c"}', 'the class "dog" twice'),
        ("d.json", '{"dog": "a", "dining_table": "c", "dining table": "d"}', "twice"),
        ("d.json", '["dog"]', "does not map"),
        ("d.json", '{"dog": 3, "dining_table": "b"}', "does not map"),
        ("d.json", "{", "not valid JSON"),
        ("d.txt", "dog: a\ndining table b\n", "dining table b"),
        ("d.txt", "dog: a\ndog: b\ndining_table: c\n", "twice"),
    ],
)
def test_incomplete_or_ambiguous_descriptions_are_refused(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(EdgekdError, match=said) as caught:
        descriptions_for(str(tmp_path / name), CLASSES)
    assert caught.value.hint


@pytest.mark.parametrize("command", ["false", "true", "no-such-program-here"])
def test_a_command_that_fails_or_says_nothing_is_named_with_the_class(command: str) -> None:
    with pytest.raises(EdgekdError, match='the class "dog"'):
        descriptions_for(f"command:{command}", CLASSES)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match="no descriptions file"):
        descriptions_for(str(tmp_path / "none.json"), CLASSES)


@pytest.mark.parametrize(
    ("command", "said"), [('ask "never closed', "cannot be read"), ("  ", "is empty")]
)
def test_a_command_that_is_none_is_said(command: str, said: str) -> None:
    with pytest.raises(EdgekdError, match=said) as caught:
        descriptions_for(f"command:{command}", CLASSES)
    assert caught.value.hint


def test_a_class_that_is_there_with_nothing_said_about_it_is_not_mistaken_for_a_slip(
    tmp_path: Path,
) -> None:
    (tmp_path / "d.json").write_text('{"dog": " ", "dining table": "A flat top."}')
    with pytest.raises(EdgekdError, match="no description of 1 of 2") as caught:
        descriptions_for(str(tmp_path / "d.json"), CLASSES)
    assert '"dog" is empty' in caught.value.hint


def test_what_was_written_down_is_not_asked_again(tmp_path: Path) -> None:
    (tmp_path / "kept.json").write_text('{"dog": ["It barked then."]}')
    (tmp_path / "now.json").write_text('{"dog": "It barks now.", "dining table": "A flat top."}')
    spec = str(tmp_path / "now.json")
    assert stored_descriptions(tmp_path / "kept.json", spec, CLASSES, may_run=False) == {
        "dog": ("It barked then.",),
        "dining_table": ("A flat top.",),
    }
    for nothing in (None, tmp_path / "none.json"):
        found = stored_descriptions(nothing, spec, ("dog",), may_run=False)
        assert found == {"dog": ("It barks now.",)}


def test_a_stored_command_never_runs(tmp_path: Path) -> None:
    (tmp_path / "kept.json").write_text('{"dog": ["It barked then."]}')
    command = f"command:touch {tmp_path / 'ran'}"
    found = stored_descriptions(tmp_path / "kept.json", command, ("dog",), may_run=False)
    assert found == {"dog": ("It barked then.",)}
    with pytest.raises(EdgekdError, match="dining_table"):
        stored_descriptions(tmp_path / "kept.json", command, CLASSES, may_run=False)
    (tmp_path / "run.toml").write_text(f'descriptions = "{command}"')
    with pytest.raises(EdgekdError, match="from the command line only"):
        TrainConfig.load(config=tmp_path / "run.toml")
    assert not (tmp_path / "ran").exists()
    assert TrainConfig.load(descriptions=command).descriptions == command
