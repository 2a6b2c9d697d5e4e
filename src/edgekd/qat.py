"""Quantization-aware training of a run's student: the distilling room's lessons for the exporting room's network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgekd.errors import EdgekdError

if TYPE_CHECKING:
    from torch import nn

    from edgekd.distill.load import LoadedRun
    from edgekd.export.graph import Deployable
    from edgekd.export.qat import Tuner
    from edgekd.export.replay import Replay
    from edgekd.targets.bank import ClassBank

STEPS, TOY_STEPS = 200, 60
VALIDATION_IMAGES = 512


def make_tuner(
    loaded: LoadedRun,
    data: str | None,
    steps: int | None,
    model: Deployable,
    bank: ClassBank | None = None,
) -> Tuner:
    """What trains the INT8 network of this run's student.

    Args:
        data: where the run's images lie now, if they have moved.
        steps: optimizer steps; None takes 200, or 60 on the toy images.
        model: what is exported.
        bank: the class vectors, where `model` ends in an embedding.

    Raises:
        EdgekdError: the run has no validation images, what it learned from is gone, or an embedding without a last
            layer.
    """
    from edgekd.api import _head, _pixels, _spread
    from edgekd.distill.tune import prepare, tune
    from edgekd.export.graph import UnitHead
    from edgekd.export.qat import Tuner

    if isinstance(model.head, UnitHead) and model.head.projector is None:
        raise EdgekdError(
            f"The embedding of {loaded.run.name} is its backbone's own, and training needs a last layer of ours.",
            "Leave out --head embedding, or --qat; --max-drop-id and --max-drop-ood go with an embedding.",
        )
    count = steps if steps is not None else TOY_STEPS if loaded.run.data == "toy" else STEPS
    images, split = loaded.data(data)
    chosen = _spread(split.val, VALIDATION_IMAGES, images)
    if len(chosen) == 0:
        raise EdgekdError(
            "The run has no validation images to choose the trained INT8 by.",
            "Export without --qat.",
        )
    tuning = prepare(loaded, data)
    trained = dataclasses.replace(loaded, student=tuning.student)

    def head() -> nn.Linear:
        if not isinstance(model.head, UnitHead):
            folded: nn.Linear = _head(trained)
            return folded
        projector = trained.student.projector
        assert projector is not None  # model.head has one
        return model.head.scaled(projector)

    def train(network: Replay, go_on: Callable[[int], bool]) -> None:
        tune(tuning, network, network.weights, network.factors, count, go_on)

    return Tuner(
        pixels=_pixels(loaded, images, chosen),
        labels=images.labels[chosen],
        domains=images.domain_of[chosen],
        train=train,
        head=head,
        facts={
            "recipe": loaded.run.recipe,
            "stage": tuning.stage.name,
            "terms": {name: term.weight for name, term in tuning.stage.terms.items()},
            "teacher": loaded.run.teacher,
            "steps": count,
            "batch_size": loaded.config.batch_size,
        },
        bank=bank,
    )
