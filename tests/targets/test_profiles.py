from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgekd.cli.doctor import target_lines
from edgekd.configs.benchmark import BenchmarkConfig
from edgekd.configs.export import ExportConfig
from edgekd.core.errors import EdgekdError
from edgekd.export.coreml import DEPLOYMENT
from edgekd.targets.profiles import follow_profile, load_profile, profile_names
from edgekd.targets.registry import get_target

OWN = """
name = "my-board"
summary = "A board of mine"
runtime = "ONNX Runtime, CPU"
precisions = ["int8"]
threads = 2

[because]
runtime = "page"
precisions = "page"
threads = "page"

[[cautions]]
text = "It gets hot."
source = "page"

[sources.page]
title = "The board's page"
url = "https://example.org/board"
"""


def test_every_shipped_profile_is_valid_and_listed() -> None:
    assert profile_names() == [
        "h100", "iphone-16", "jetson-orin-nano", "pixel-9", "raspberry-pi-5", "rtx-4090", "x86-avx2", "x86-vnni",
    ]  # fmt: skip
    listed = "\n".join(target_lines())
    for name in profile_names():
        profile = load_profile(name)
        assert profile.name == name
        assert profile.cautions
        assert name in listed
        for source in profile.sources.values():
            assert f"{source.url}, not checked" in listed or source.checked


def test_a_users_own_file_sets_threads_and_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(OWN)

    def threads(**given: int) -> int | None:
        config = BenchmarkConfig(profile=str(path), **given)
        return follow_profile(config, {"threads"}, cautions=True).threads

    assert threads() == 2
    assert threads(threads=7) == 7
    assert "It gets hot. (https://example.org/board, not checked)" in capsys.readouterr().err
    path.write_text(OWN + "checked = 2026-01-31\n")
    threads()
    assert "my-board: It gets hot. (https://example.org/board)" in capsys.readouterr().err


def test_a_profile_sets_the_switches_of_its_target(capsys: pytest.CaptureFixture[str]) -> None:
    iphone = load_profile("iphone-16")
    assert iphone.deployment_target in DEPLOYMENT
    assert "int8" in iphone.precisions

    def options(target: str, profile: str, **given: str) -> dict[str, Any]:
        config = ExportConfig(target=target, profile=profile, **given)
        return follow_profile(config, {"input", *get_target(target).options}).options

    assert options("coreml", "iphone-16") == {"deployment_target": "iOS18"}
    assert "iphone-16: deployment target iOS18 (https://" in capsys.readouterr().err
    assert options("tensorrt", "rtx-4090") == {"compute_capability": "8.9"}
    flag = {"deployment_target": "iOS26"}
    assert options("coreml", "iphone-16", **flag) == flag
    assert options("openvino", "x86-vnni") == {}
    assert options("coreml", "raspberry-pi-5") == {}
    assert "raspberry-pi-5: sets no deployment target or input" in capsys.readouterr().err


def test_a_claim_without_a_source_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for name in ("rasberry-pi-5", path):
        with pytest.raises(EdgekdError, match="There is no profile"):
            load_profile(name)
    for old, new, complaint in (
        ('threads = "page"\n', "", "threads has no source"),
        ('source = "page"', 'source = "rumour"', 'no source "rumour"'),
        ('["int8"]', '["int7"]', "precisions"),
        ("threads = 2", "treads = 2", "treads"),
        ("https://example.org/board", "hearsay", "url"),
        ("[because]", "[because", "not readable TOML"),
    ):
        assert old in OWN
        path.write_text(OWN.replace(old, new))
        with pytest.raises(EdgekdError, match=complaint):
            load_profile(path)
