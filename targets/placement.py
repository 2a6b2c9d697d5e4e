"""Which part of a graph ran where, as the runtime reports it (the device agent carries this file)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgekd.core.errors import EdgekdError

Nodes = dict[str, dict[str, int]]
"""Execution provider or device → kind of operator → how many of them it ran."""


@dataclass(frozen=True)
class Placement:
    """Where the nodes of one loaded artifact ran."""

    asked: str
    """The provider or device that was to run all of them."""
    nodes: Nodes
    told_by: str
    """Where the placement comes from."""

    def counts(self) -> dict[str, int]:
        """Return provider → nodes, the requested one first."""
        order = sorted(self.nodes, key=lambda name: (name != self.asked, name))
        return {name: sum(self.nodes[name].values()) for name in order}


def refuse_fallback(name: str, placement: Placement) -> None:
    """Check that every node ran on the requested provider.

    Raises:
        EdgekdError: a node ran elsewhere, or no node is known to have run at all.
    """
    here = placement.nodes.get(placement.asked, {})
    elsewhere: Mapping[str, int] = {
        who: n for who, n in placement.counts().items() if who != placement.asked
    }
    if elsewhere:
        total = sum(placement.counts().values())
        kinds = sorted({kind for who in elsewhere for kind in placement.nodes[who]})
        told = ", ".join(f"{n} of {total} nodes on {who}" for who, n in elsewhere.items())
        raise EdgekdError(
            f"{name} was to run on {placement.asked}, but fell back: {told} ({', '.join(kinds[:5])}).",
            "No report is written of that. Export for a target whose runtime takes every operator.",
        )
    if not here:
        raise EdgekdError(
            f"{placement.told_by} names no node of {name}, so nothing shows where it ran.",
            "Report this to edgekd.",
        )
