from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from study_data import done

from edgekd.core.errors import EdgekdError
from edgekd.studies.store import Cell, Store

SETTINGS = {
    "protocol": "lodo",
    "images": "abc",
    "recipes": {"erm": {"steps": 2, "swad": {"ratio": 0.3}}},
}


def test_a_cell_comes_back_as_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path)
    cell = Cell("erm", 0, "a b/c")
    store.add(done(cell, id="10", ood="0111"))
    store.add(done(Cell("erm", 1, "a b/c"), id="11"))
    (found,) = store.done([Cell("kd", 0, "a b/c"), cell])
    assert found.cell == cell
    assert found.facts["seconds"] == 10
    assert np.array_equal(found.outcomes["ood"].correct, [False, True, True, True])
    assert np.array_equal(found.outcomes["ood"].labels, [0, 0, 1, 1])
    lines = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert [line["cell"]["seed"] for line in lines] == [0, 1]
    assert lines[0]["scores"]["ood"] == {"n": 4, "top1": 75.0, "macro": 75.0}
    assert cell.key != Cell("erm", 0, "a_b_c").key


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    store = Store(tmp_path / "study")
    store.claim(SETTINGS)
    store.claim(SETTINGS)
    grown = SETTINGS | {"recipes": {"kd": {"steps": 2}}}
    store.claim(grown)
    assert set(store.settings()["recipes"]) == {"erm", "kd"}
    other = {
        "protocol": "lodo",
        "images": "abd",
        "recipes": {"erm": {"steps": 3, "swad": {"ratio": 0.5}}},
    }
    with pytest.raises(
        EdgekdError, match=r"images are not the same.*erm.steps was 2, is 3; erm.swad.ratio was 0.3"
    ):
        store.claim(other)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    with pytest.raises(EdgekdError, match="not a study"):
        Store(tmp_path / "letters").check()
    with pytest.raises(EdgekdError, match="is a file"):
        Store(tmp_path / "letters" / "a.txt").check()


def test_damage_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    cell = Cell("erm", 0, "art")
    store.add(done(cell, ood="01"))
    (tmp_path / "cells" / f"{cell.key}.npz").write_bytes(b"PK")
    with pytest.raises(EdgekdError, match="not readable"):
        store.done([cell])
    (tmp_path / "cells.jsonl").write_text('{"cell": {"recipe"')
    with pytest.raises(EdgekdError, match=r"Line 1 of .* is damaged"):
        store.done([cell])


def test_one_study_at_a_time(tmp_path: Path) -> None:
    with (
        Store(tmp_path).running(),
        pytest.raises(EdgekdError, match="running in"),
        Store(tmp_path).running(),
    ):
        pass
