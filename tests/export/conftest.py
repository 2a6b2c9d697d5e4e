from __future__ import annotations

from collections.abc import Iterator

import pytest
from device_fakes import BRIEF


@pytest.fixture(scope="session", autouse=True)
def _brief_timing() -> Iterator[None]:
    """Time files for a tenth of a second where an export takes several: what is measured is not tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgekd.targets.timing.speed.NOTE", BRIEF)
        yield
