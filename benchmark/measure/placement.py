"""Where every node of every artifact ran; a fallback ends the benchmark before anything is measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgekd.benchmark.report.timings import PlacementRow
from edgekd.benchmark.subjects import Subject
from edgekd.targets.session import refuse_fallback

UNTOLD = "the runtime does not say"


def placement_rows(subjects: Sequence[Subject]) -> Iterator[PlacementRow]:
    """A row for each artifact.

    Raises:
        EdgekdError: a part of one runs on another provider than the one that was asked for.
    """
    for subject in {
        subject.key: subject for subject in subjects if subject.folder is not None
    }.values():
        name = f"{subject.run}/{subject.name}"
        if subject.measured is None:
            placement, asked = subject.placement(), ""
        else:
            placement, asked = subject.measured.placement, subject.measured.model[0].provider
        if placement is not None:
            refuse_fallback(name, placement)
        yield PlacementRow(
            run=subject.run,
            subject=subject.name,
            provider=asked if placement is None else placement.asked,
            nodes=None if placement is None else placement.nodes,
            source=UNTOLD if placement is None else placement.told_by,
            device=subject.device,
        )
