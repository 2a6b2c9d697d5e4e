"""What a training run works with, gathered once its data, teacher and student are in hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from edgekd.configs.train import TrainConfig
from edgekd.data.image_set import ImageSet
from edgekd.data.split import Split
from edgekd.distill.launch import Fabric
from edgekd.distill.lessons import Lessons
from edgekd.distill.prompts import TextBank
from edgekd.distill.recipes import Recipe
from edgekd.distill.students import Student
from edgekd.distill.teacher import Teacher

Look = Callable[["Job", Student, int, tuple[int, ...]], None]
"""Called as `look(job, student, done, places)` on process 0, with the weights that would be kept after `done` steps;
`places` are all the steps of the run at which it is called. It may ask the student anything and changes nothing."""


@dataclass(frozen=True, eq=False)
class Job:
    """One process's view of a run. `teacher` and `bank` are None for recipes that need neither."""

    fabric: Fabric
    config: TrainConfig
    recipe: Recipe
    images: ImageSet
    split: Split
    student: Student
    teacher: Teacher | None
    bank: TextBank | None
    """Of the classes: what a text head predicts with."""
    lessons: Lessons
    look: Look | None = None
    """Who else is shown the weights on their way."""

    @property
    def unlabelled(self) -> NDArray[np.int64]:
        """Indices of the unlabelled images in `images`, whose last part they are."""
        return np.arange(len(self.images) - len(self.split.unlabelled), len(self.images))

    @property
    def trained(self) -> NDArray[np.int64]:
        """Indices of all images that train, labelled or not."""
        return np.concatenate([self.split.train, self.unlabelled])


def total(fabric: Fabric, value: Tensor) -> Tensor:
    """Sum of a tensor over all processes."""
    return cast(Tensor, fabric.all_reduce(value, reduce_op="sum"))
