from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from study_data import done, json_lines

from edgekd.benchmark.evaluate.statistics import paired_interval
from edgekd.core.errors import EdgekdError
from edgekd.studies.store import Cell, Store
from edgekd.studies.tables import recipe_rows, t_interval

DONE = [
    done(Cell("erm", 0, "art"), id="1110", ood="1100"),
    done(Cell("erm", 1, "art"), id="1111", ood="1000"),
    done(Cell("erm", 0, "sketch"), id="1100", ood="11110000"),
    done(Cell("erm", 1, "sketch"), id="1100", ood="11000000"),
    done(Cell("kd", 0, "art"), 30, id="1111", ood="1110"),
    done(Cell("kd", 1, "art"), 10, id="1111", ood="1111"),
    done(Cell("kd", 0, "sketch"), id="1111", ood="11110000"),
]


def test_t_interval_of_known_differences() -> None:
    # 1, 2, 6: mean 3, sample deviation √7, t(2; 0.975) = 4.302653.
    low, high = t_interval([1.0, 2.0, 6.0]) or (0, 0)
    half = 4.302653 * math.sqrt(7) / math.sqrt(3)
    assert (low, high) == pytest.approx((3 - half, 3 + half), rel=1e-6)
    assert t_interval([1.0]) is None


def test_rows_by_hand() -> None:
    erm, kd = recipe_rows(
        DONE, ("erm", "kd", "lgd"), ("art", "sketch"), ("ood",), "erm", macro=False
    )
    assert (erm.name, kd.name) == ("erm", "kd")  # lgd has no cell
    # ID per seed over both domains: (75 + 50) / 2, (100 + 50) / 2.
    assert (erm.id.mean, erm.id.error) == pytest.approx((68.75, 6.25 / math.sqrt(2)))
    assert erm.columns["art", "ood"].mean == pytest.approx(37.5)
    assert erm.columns["art", "ood"].error == pytest.approx(12.5 / math.sqrt(2))
    # OOD averages per seed: (50 + 50) / 2 and (25 + 25) / 2.
    assert (erm.average.mean, erm.average.error, erm.average.seeds) == pytest.approx(
        (37.5, 12.5 / math.sqrt(2), 2)
    )
    assert (erm.difference, erm.t_interval, erm.image_interval) == (None, None, None)
    # kd lacks seed 1 on sketch: its average and its difference are of seed 0 alone, (75 + 50) / 2 − 50.
    assert (kd.average.mean, kd.average.seeds) == (62.5, 1)
    assert kd.columns["art", "ood"].mean == pytest.approx(87.5)
    assert kd.difference == pytest.approx(12.5)
    assert kd.t_interval is None
    assert kd.image_interval[0] == 0  # kd is nowhere worse, and one image of four decides
    assert kd.seconds == pytest.approx(50 / 3)
    whole = [*DONE, done(Cell("kd", 1, "sketch"), id="1111", ood="11111111")]
    _, kd = recipe_rows(whole, ("erm", "kd"), ("art", "sketch"), ("ood",), "erm", macro=False)
    # Seed 0: 62.5 − 50; seed 1: 100 − 25.
    assert kd.difference == pytest.approx(43.75)
    assert kd.t_interval == pytest.approx(t_interval([12.5, 75.0]))


def test_macro_means_over_classes() -> None:
    one = done(Cell("erm", 0, "art"), ood="110000")
    assert one.outcomes["ood"].accuracy(macro=True) == pytest.approx(100 * (2 / 3 + 0) / 2)
    uneven = done(Cell("erm", 0, "art"), ood="1100")
    uneven.outcomes["ood"].labels[:] = [0, 1, 1, 1]
    assert uneven.outcomes["ood"].accuracy(macro=True) == pytest.approx(100 * (1 + 1 / 3) / 2)
    assert uneven.outcomes["ood"].accuracy(macro=False) == pytest.approx(50)


def test_image_interval_does_not_shrink_when_seeds_agree() -> None:
    """Three students that answer alike are worth one: resampling them apart would claim √3 times the precision."""
    rng = np.random.default_rng(1)
    first, second = rng.random((1, 300)) < 0.8, rng.random((1, 300)) < 0.7
    one = paired_interval([(first, second)])
    assert one == pytest.approx(paired_interval([(first[0], second[0])]), abs=0.003)
    three = paired_interval([(np.repeat(first, 3, axis=0), np.repeat(second, 3, axis=0))])
    assert three == pytest.approx(one)


def test_an_oracle_is_of_the_seeds_beside_it_or_of_none() -> None:
    cells = [
        done(Cell("erm", 0, "art"), ood="1100", oracle="1110"),
        done(Cell("erm", 1, "art"), ood="1000", oracle="1000"),
        done(Cell("erm", 0, "sketch"), ood="1100", oracle="1111"),
        done(Cell("erm", 1, "sketch"), ood="1100"),
        done(Cell("kd", 0, "art"), ood="1100", oracle="1100"),
        done(Cell("kd", 0, "sketch"), ood="1000", oracle="1110"),
    ]
    columns = ("art", "sketch")
    erm, kd = recipe_rows(cells, ("erm", "kd"), columns, ("ood", "oracle"), "erm", macro=False)
    assert erm.columns["art", "oracle"].mean == 50
    assert ("sketch", "oracle") not in erm.columns  # one seed of two
    assert erm.oracle is None
    assert kd.oracle.mean == 62.5
    assert kd.difference == pytest.approx(37.5 - 50)  # of what was selected
    (without,) = recipe_rows(cells, ("kd",), columns, ("ood",), "erm", macro=False)
    assert without.oracle is None
    assert set(without.columns) == {("art", "ood"), ("sketch", "ood")}


ERM = {"steps": 2, "swad": {"ratio": 0.3}}

SETTINGS = {"protocol": "lodo", "images": "abc", "recipes": {"erm": ERM}}


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
    lines = json_lines(tmp_path / "cells.jsonl")
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
    other = {"images": "abd", "recipes": {"erm": {"steps": 3, "swad": {"ratio": 0.5}}}}
    changes = r"images have changed.*erm.steps was 2, is 3; erm.swad.ratio was 0.3"
    with pytest.raises(EdgekdError, match=changes):
        store.claim(SETTINGS | other)
    with store.running(), pytest.raises(EdgekdError, match="running in"), store.running():
        pass
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    for path in (tmp_path / "letters", tmp_path / "letters" / "a.txt"):
        with pytest.raises(EdgekdError, match=r"not a study|is a file"):
            Store(path).check()


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
