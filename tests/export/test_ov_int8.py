"""INT8 for OpenVINO, and what is taken back of it; skipped where the extra is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from export_fakes import logits, pictures
from test_mixed import budget, spoilt

from edgekd.core.errors import EdgekdError
from edgekd.export.openvino_ir import read
from edgekd.export.quantize import openvino as ov_int8
from edgekd.export.quantize.search import quantize_within

openvino = pytest.importorskip("openvino", reason='needs pip install "edgekd[openvino]"')

SCHEME = ov_int8.OpenVinoInt8({"classes": "[]"})


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spoilt(tmp_path_factory.mktemp("ov") / "fp32.onnx")


@pytest.fixture(scope="module")
def rounded(fp32: Path) -> ov_int8.Rounded:
    return SCHEME.calibrate(fp32, pictures(24), "minmax")


def answers_with(rounded: ov_int8.Rounded, keep: list[str], out: Path) -> np.ndarray:
    SCHEME.write(rounded, out, in_float=keep)
    return SCHEME.open(out)(pictures(8))


def test_units_hold_everything_that_int8_changes(
    fp32: Path, rounded: ov_int8.Rounded, tmp_path: Path
) -> None:
    units = SCHEME.groups(rounded)
    layers = [unit.name for unit in units if unit.weighted]
    assert {"stem", "depthwise", "pointwise", "head"} <= set(layers)
    assert any(unit.name.startswith("Add after ") for unit in units)
    assert len({unit.nodes[0] for unit in units}) == len(units)
    everything = [name for unit in units for name in unit.nodes]
    described = SCHEME.write(rounded, tmp_path / "none.xml", in_float=everything)
    assert described["quantized_layers"] == 0
    kinds = {
        node.get_type_name()
        for node in openvino.Core().read_model(tmp_path / "none.xml").get_ordered_ops()
    }
    assert "FakeQuantize" not in kinds
    full = logits(fp32, pictures(8))
    # Its weights are stored in 16 bits, 11 of them for the digits.
    assert (
        np.abs(SCHEME.open(tmp_path / "none.xml")(pictures(8)) - full).max()
        < 2e-3 * np.abs(full).max()
    )


def test_what_is_taken_back_is_what_nncf_would_have_left_alone(
    fp32: Path, rounded: ov_int8.Rounded, tmp_path: Path
) -> None:
    nncf, images = ov_int8.import_nncf(), pictures(24)
    all_int8 = answers_with(rounded, [], tmp_path / "all.xml")
    for unit in SCHEME.groups(rounded):
        if unit.name not in ("pointwise", "head"):
            continue
        mine = answers_with(rounded, list(unit.nodes), tmp_path / "mine.xml")
        theirs = nncf.quantize(
            read(fp32),
            nncf.Dataset([images[i : i + 1] for i in range(24)], lambda image: image),
            preset=nncf.QuantizationPreset.MIXED,
            target_device=nncf.TargetDevice.CPU,
            subset_size=24,
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=(
                    nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX
                )
            ),
            ignored_scope=nncf.IgnoredScope(names=list(unit.nodes)),
        )
        openvino.save_model(theirs, tmp_path / "theirs.xml", compress_to_fp16=True)
        other = SCHEME.open(tmp_path / "theirs.xml")(pictures(8))
        assert np.abs(all_int8 - other).max() > 0
        assert np.abs(mine - other).max() <= 0.1 * np.abs(all_int8 - other).max()


def test_taking_nothing_back_changes_nothing(rounded: ov_int8.Rounded, tmp_path: Path) -> None:
    first = answers_with(rounded, [], tmp_path / "a.xml")
    answers_with(rounded, [unit.nodes[0] for unit in SCHEME.groups(rounded)], tmp_path / "b.xml")
    assert np.array_equal(answers_with(rounded, [], tmp_path / "c.xml"), first), (
        "the rounded model itself stays as it is"
    )


def test_rounding_is_that_of_int8_per_channel(fp32: Path, rounded: ov_int8.Rounded) -> None:
    errors = SCHEME.weight_errors(rounded)
    weighted = {unit.nodes[0]: unit.name for unit in SCHEME.groups(rounded) if unit.weighted}
    name = next(node for node, module in weighted.items() if module == "stem")
    weight = next(
        n for n in read(fp32).get_ordered_ops() if n.get_friendly_name().endswith("stem.weight")
    ).data
    lost = 0.0
    for row in weight:
        scale = np.abs(row).max() / 127
        lost += float(np.square(row - np.round(row / scale) * scale).sum())
    assert errors[name] == pytest.approx(lost / np.square(weight).sum(), rel=1e-4)


def test_the_search_keeps_what_the_gate_needs(
    fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loose = quantize_within(
        fp32,
        tmp_path / "loose.xml",
        pictures(24),
        budget(fp32, max_drop_id=100),
        scheme=SCHEME,
    )
    assert loose["mixed"]["kept_in_float"] == []
    lost = loose["mixed"]["drop_id_points"]
    assert lost > 0, "the model must be one that INT8 hurts"
    allowed = lost / 2
    tight = quantize_within(
        fp32,
        tmp_path / "tight.xml",
        pictures(24),
        budget(fp32, max_drop_id=allowed),
        scheme=SCHEME,
    )
    kept = tight["mixed"]["kept_in_float"]
    assert 1 <= len(kept) < len(SCHEME.groups(SCHEME.calibrate(fp32, pictures(24), "minmax")))
    images = budget(fp32)
    changed = (
        SCHEME.open(tmp_path / "tight.xml")(images.pixels).argmax(axis=1) != images.labels
    ).mean()
    assert tight["mixed"]["drop_id_points"] == pytest.approx(100 * changed, abs=1e-3)
    assert tight["mixed"]["drop_id_points"] <= allowed
    sizes = [
        sum(p.stat().st_size for p in tmp_path.glob(f"{name}.*")) / 1e6
        for name in ("loose", "tight")
    ]
    assert tight["mixed"]["cost_mb"] == pytest.approx(sizes[1] - sizes[0], abs=1e-3)
    assert tight["mixed"]["fp32_ms"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "loose.bin",
        "loose.xml",
        "tight.bin",
        "tight.xml",
    ]
    assert "stay in float" in capsys.readouterr().err


def test_a_disk_that_fills_up_in_the_search_is_called_by_the_users_folder(
    rounded: ov_int8.Rounded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")  # OpenVINO's words on a full disk

    monkeypatch.setattr(openvino, "save_model", full)
    with pytest.raises(EdgekdError, match=f"in {tmp_path} \\("):
        SCHEME.write(
            rounded, tmp_path / ".tmp-0123456789ab-openvino-int8" / "search-x" / "trial.xml"
        )


def test_without_nncf_the_extra_is_named(fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(EdgekdError) as caught:
        SCHEME.calibrate(fp32, pictures(2), "minmax")
    assert "edgekd[openvino]" in caught.value.hint
