"""Prepare the images for all programs: edgekd's split of PACS with one style held out, as links in `PART/CLASS/`.

    python benchmarks/peers/pictures.py --assets ASSETS --out DIR [--unseen sketch]

Run it in edgekd's environment. `train`, `val` and `test` have the other styles, and `unseen` the style held out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edgekd.data.image_set import load_images
from edgekd.data.split import make_split


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--unseen", default="sketch")
    given = parser.parse_args()
    data = given.assets / "pacs"
    split = make_split(load_images(str(data)), test_domain=given.unseen)
    for part, role in (("train",) * 2, ("val",) * 2, ("test", "id_test"), ("unseen", "ood_test")):
        for name in split.entries[role]:
            domain, label, file = Path(name).parts
            place = given.out / part / label / f"{domain}-{file}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to((data / name).resolve())
        print(f"{part}: {len(split.entries[role])} pictures")


if __name__ == "__main__":
    main()
