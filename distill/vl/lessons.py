"""Everything the teacher says about the training examples, asked once before the first step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from edgekd.distill.vl.data import VlData
from edgekd.distill.vl.examples import Reader
from edgekd.distill.vl.kept import kept
from edgekd.distill.vl.teacher_tokens import TokenTeacher
from edgekd.distill.vl.token_td import TeacherTokens
from edgekd.distill.vl.tokens import content_tokens


@dataclass(frozen=True, eq=False)
class Lessons:
    """The teacher's vectors of texts `[texts, …]`, of pictures `[n, …]` in the order of `place`, and its logits."""

    data: VlData
    tokens: Tensor
    content: Tensor
    text: Tensor
    pooled_text: Tensor
    patches: Tensor
    pooled_image: Tensor
    word_of: Tensor
    """int64 `[vocabulary]`, row of a token in `words`; 0 for tokens that are never chosen."""
    words: Tensor
    statements: tuple[Tensor, ...]
    """Unit vectors of every group of statements."""
    place: NDArray[np.int64]
    """Row of a picture; −1 for pictures that do not train."""
    logit_scale: float

    def tokens_of(self, indices: NDArray[np.int64], labels: Tensor) -> TeacherTokens:
        """The teacher's side of a batch; of a `choice` the right candidate's text."""
        text = torch.from_numpy(self.data.text_of[indices])  # [B] or [B, K]
        if text.ndim == 2:
            text = text.gather(1, labels[:, None]).squeeze(1)
        rows = torch.from_numpy(self.place[self.data.image_of[indices]])
        image = self.pooled_image[rows]  # [B, D]
        relevance = torch.einsum("bld,bd->bl", self.words[self.word_of[self.tokens[text]]], image)
        return TeacherTokens(
            text=self.text[text].float(),
            content=self.content[text],
            relevance=relevance,
            patches=self.patches[rows].float(),
            pooled_text=self.pooled_text[text],
            pooled_image=image,
        )

    def logits(self, indices: NDArray[np.int64]) -> Tensor:
        """`logit_scale · cos(v, statement)` over each example's statements, float `[B, M]`, padded with −∞."""
        rows = torch.from_numpy(self.place[self.data.image_of[indices]])
        groups = self.data.statements_of[indices]
        most = max(len(self.statements[g]) for g in groups)
        out = torch.full((len(indices), most), -torch.inf)
        for group in np.unique(groups):
            own = torch.from_numpy(np.flatnonzero(groups == group))
            vectors = self.statements[group]
            out[own, : len(vectors)] = self.logit_scale * self.pooled_image[rows[own]] @ vectors.T
        return out


def ask_teacher(
    teacher: TokenTeacher, reader: Reader, train: NDArray[np.int64], grid: tuple[int, int] | None
) -> Lessons:
    """Ask about the examples `train`.

    Args:
        grid: the student's patches as (height, width); None where no patches are taught.
    """
    data = reader.data
    pictures = np.unique(data.image_of[train])
    place = np.full(len(data.images), -1, dtype=np.int64)
    place[pictures] = np.arange(len(pictures))
    seen = _seen(teacher, data, pictures, grid or (1, 1))
    text, pooled_text = teacher.texts(data.texts, reader.tokens.shape[1])
    content = content_tokens(reader.tokens)
    known = torch.unique(reader.tokens[content])
    word_of = torch.zeros(int(reader.tokens.max()) + 1, dtype=torch.int64)
    word_of[known] = 1 + torch.arange(len(known))
    words = (
        torch.cat([torch.zeros(1, teacher.teacher.dim), teacher.words(known.tolist())])
        if len(known)
        else (torch.zeros(1, teacher.teacher.dim))
    )
    return Lessons(
        data=data,
        tokens=reader.tokens,
        content=content,
        text=text.half(),
        pooled_text=pooled_text,
        patches=seen["patches"] if grid else seen["patches"][:, :0],
        pooled_image=seen["pooled"],
        word_of=word_of,
        words=words,
        statements=_statements(teacher, data),
        place=place,
        logit_scale=teacher.teacher.logit_scale,
    )


def _seen(
    teacher: TokenTeacher, data: VlData, pictures: NDArray[np.int64], grid: tuple[int, int]
) -> dict[str, Tensor]:
    """The teacher's `patches` and `pooled` vectors of pictures, as `TokenTeacher.images`."""
    facts = (
        teacher.teacher.id,
        f"{grid[0]}x{grid[1]}",
        *(data.images.keys[int(i)] for i in pictures),
    )
    names = ("patches", "pooled")
    return kept(
        "seen-1",
        facts,
        lambda: dict(zip(names, teacher.images(data.images, pictures, grid), strict=True)),
    )


def _statements(teacher: TokenTeacher, data: VlData) -> tuple[Tensor, ...]:
    """Unit vectors of every group of statements."""
    texts = [text for group in data.statements for text in group]
    facts = (teacher.teacher.id, *texts)
    vectors = kept(
        "statements-1",
        facts,
        lambda: {"text": normalize(teacher.teacher.embed_texts(texts), dim=-1)},
    )
    return torch.split(vectors["text"], [len(group) for group in data.statements])
