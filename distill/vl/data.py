"""What a vision-language task hands to training: pictures, texts, answers, and statements for the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError, did_you_mean
from edgekd.data.image_set import ImageSet, load_images

Task = Literal["vqa", "ve", "choice"]
TASKS: dict[str, str] = {
    "vqa": "answer a question about the picture from a closed list of answers",
    "ve": "does the picture entail the sentence, contradict it, or leave it open",
    "choice": "which of several sentences describes the picture",
}


@dataclass(frozen=True, eq=False)
class VlData:
    """N examples over a set of pictures.

    Attributes:
        name: short name of the data, for reports; says "synthetic" where the texts were generated.
        task: what is asked.
        synthetic: the texts were generated from metadata, nobody wrote them about these pictures.
        images: the pictures; their `labels` and `domain_of` are the groups that a split keeps in proportion.
        image_of: int64 `[N]`, index into `images`.
        texts: every distinct text.
        text_of: int64 `[N]`, index into `texts`; `[N, K]` for `choice`, one column per candidate.
        labels: int64 `[N]`: index into `answers`, or the right candidate.
        answers: names of the outputs; `("candidate 1", …)` for `choice`.
        statements: groups of sentences of which exactly one is true of a picture, for the teacher's confidence.
        statements_of: int64 `[N]`, the example's group. truth: int64 `[N]`, which sentence of it is true.
    """

    name: str
    task: Task
    synthetic: bool
    images: ImageSet
    image_of: NDArray[np.int64]
    texts: tuple[str, ...]
    text_of: NDArray[np.int64]
    labels: NDArray[np.int64]
    answers: tuple[str, ...]
    statements: tuple[tuple[str, ...], ...]
    statements_of: NDArray[np.int64]
    truth: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


def check_task(task: str) -> Task:
    """`task` itself, or an error that names the known ones."""
    if task not in TASKS:
        raise EdgekdError(f'There is no vision-language task "{task}".', did_you_mean(task, TASKS))
    return task  # type: ignore[return-value]


def load_vl_data(task: str, data: str, *, shifted: bool = False) -> VlData:
    """The examples of a task.

    Args:
        task: `vqa`, `ve` or `choice`.
        data: `easy-vqa` for `vqa`; for the others any images that `edgekd train` takes, whose class and domain names
            become sentences.
        shifted: one domain (easy-VQA: some colour × shape combinations) will be left out; generated sentences then
            do not name domains, since the unseen one's name would be an unknown word.

    Raises:
        EdgekdError: unknown task, data that does not fit it, easy-vqa not installed.
    """
    from edgekd.distill.vl.easy_vqa import load_easy_vqa
    from edgekd.distill.vl.entailment import make_choice, make_entailment

    known = check_task(task)
    if known == "vqa":
        if data != "easy-vqa":
            raise EdgekdError(
                f'The task vqa needs questions and answers, and "{data}" holds none.',
                "Use --data easy-vqa, or --task ve with a folder of images.",
            )
        return load_easy_vqa(shifted=shifted)
    if data == "easy-vqa":
        raise EdgekdError(
            f"easy-vqa holds questions, and the task {known} generates its sentences from class folders.",
            "Use --task vqa, or give a folder of images.",
        )
    images = load_images(data)
    return (
        make_entailment(images, styles=not shifted)
        if known == "ve"
        else make_choice(images, styles=not shifted)
    )
