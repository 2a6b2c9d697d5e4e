"""Write constraints/tested.txt: the versions that `pip install` resolves for edgekd and its extras.

    python scripts/refresh_constraints.py             # about 3 minutes, 7 GB in a temporary folder
    python scripts/refresh_constraints.py --lowest    # constraints/lowest.txt: the lower bounds of pyproject.toml

Run all tests in an environment with the new file before committing it. The lower bounds are written only if pip can
resolve all other packages with them, so contradictory bounds are found here and not in CI.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTED = ROOT / "constraints" / "tested.txt"
LOWEST = ROOT / "constraints" / "lowest.txt"
EXTRAS = ("coreml", "dev", "docs", "openvino", "siglip", "vqa")
"""Extras that CI can test, without those that need an NVIDIA GPU, a service, or a separate environment."""


LOWEST_EXTRAS = ("dev",)
"""Extras that CI installs with the lower bounds."""


def wanted(extras: Iterable[str]) -> list[str]:
    """Return the direct dependencies and those in `extras`, as in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own: list[str] = list(project["dependencies"])
    for extra in extras:
        own += project["optional-dependencies"][extra]
    return own


def lowest(extras: Iterable[str]) -> list[str]:
    """Return the lower bounds of the direct dependencies and of those in `extras`, as `name==version`."""
    bounds = (re.match(r"([A-Za-z0-9_.-]+)[>=]=([^,;\s]+)", one) for one in wanted(extras))
    return sorted({f"{bound[1]}=={bound[2]}" for bound in bounds if bound})


def resolved() -> list[str]:
    """Return the versions in a new environment with all of `EXTRAS`, as `name==version`."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [str(Path(folder) / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", f"{ROOT}[{','.join(EXTRAS)}]"], check=True)
        frozen = subprocess.run(
            [*pip, "freeze", "--all", "--exclude", "pip"],
            check=True,
            capture_output=True,
            text=True,
        )
    # Only packages of an index: neither edgekd itself nor local builds (`+cpu`).
    lines = (re.match(r"[A-Za-z0-9_.-]+==[^+@\s]+", line) for line in frozen.stdout.splitlines())
    return sorted((line[0] for line in lines if line), key=str.lower)


def check(constraints: Path) -> None:
    """Resolve edgekd with these constraints, without installing; pip fails if they contradict each other."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--dry-run"]
    requirements = wanted(LOWEST_EXTRAS)
    options = ["--quiet", "--ignore-installed", "-c", str(constraints)]
    subprocess.run([*pip, *options, *requirements], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lowest", action="store_true", help="write the lower bounds instead")
    if parser.parse_args().lowest:
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / LOWEST.name
            found.write_text("".join(f"{line}\n" for line in lowest(LOWEST_EXTRAS)))
            check(found)
            LOWEST.write_text(
                "# Written by scripts/refresh_constraints.py --lowest; pip resolves edgekd with these.\n"
                + found.read_text()
            )
        return
    versions = resolved()
    TESTED.parent.mkdir(exist_ok=True)
    TESTED.write_text(
        f"# Written by scripts/refresh_constraints.py: Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}, extras {', '.join(EXTRAS)}.\n"
        + "".join(f"{line}\n" for line in versions),
        encoding="utf-8",
    )
    print(f"{TESTED.relative_to(ROOT)}: {len(versions)} packages")


if __name__ == "__main__":
    main()
