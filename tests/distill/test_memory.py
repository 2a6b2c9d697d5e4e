"""Freed memory stays with the process."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import sys
from edgekd.distill.launch import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
size = 48 * 2**20
def touch():
    b"x" * size
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    touch()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> tuple[bool, int]:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True
    )
    kept, faults = run.stdout.split()
    return kept == "1", int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc takes this setting")
def test_large_blocks_are_not_mapped_again() -> None:
    kept, faults = page_faults("keep")
    if not kept:
        pytest.skip("this C library takes no such setting")
    _, before = page_faults("leave")
    pages = 48 * 2**20 // resource.getpagesize()
    # Huge pages would leave nothing to compare; without them every page is touched anew in each of ten rounds.
    if before < pages:
        pytest.skip("the kernel maps large pages here")
    assert faults < before / 10
