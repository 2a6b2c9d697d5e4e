"""Folders of pictures without labels: any depth, what is passed over, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from edgekd.errors import EdgekdError
from edgekd.unlabelled import NO_CLASS, load_unlabelled


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKD_CACHE", str(tmp_path_factory.mktemp("cache")))


def paint(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (number, 0, 0)).save(path)
    return root


def test_pictures_at_every_depth_are_found_and_have_no_class(tmp_path: Path) -> None:
    root = paint(
        tmp_path / "things", "b.png", "one/a.png", "1/2/3/4/5/6/deep.png", ".hidden/no.png"
    )
    (root / "again").symlink_to(root, target_is_directory=True)
    images = load_unlabelled(root)
    assert images.ids == ("1/2/3/4/5/6/deep.png", "b.png", "one/a.png")
    assert (images.name, images.classes, images.domains) == ("things", (), ("all",))
    assert images.labels.tolist() == [NO_CLASS] * 3
    assert images.read(1).getpixel((0, 0)) == (0, 0, 0)
    assert len(set(images.keys)) == 3


def test_what_is_no_image_is_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = paint(tmp_path, "a.png", "b.png")
    (root / "torn.jpg").write_text("no picture")
    (root / "notes.txt").write_text("as it comes")
    assert len(load_unlabelled(root)) == 2
    told = capsys.readouterr().err
    assert "1 × file ending .txt (for example notes.txt)" in told
    assert "for example torn.jpg" in told


def test_nothing_to_look_at_is_said(tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match="There is no folder of images at"):
        load_unlabelled(tmp_path / "nowhere")
    (tmp_path / "clip.mp4").write_text("")
    with pytest.raises(EdgekdError, match=r"holds no image \(1 × file ending \.mp4\)") as caught:
        load_unlabelled(tmp_path)
    assert ".jpg" in caught.value.hint
    (tmp_path / "torn.png").write_text("no picture")
    with pytest.raises(EdgekdError, match="None of the 1 images of"):
        load_unlabelled(tmp_path)
