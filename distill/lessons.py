"""What the teacher has to say besides its image embeddings: the banks and captions that a run's terms look at."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from edgekd.configs.train import TrainConfig
from edgekd.core.console import say
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import ImageSet
from edgekd.data.split import Split
from edgekd.distill.cache import EmbeddingCache, fill
from edgekd.distill.descriptions import DESCRIPTIONS_FILE, Descriptions, kept_descriptions
from edgekd.distill.launch import Fabric
from edgekd.distill.prompts import TextBank, templates_for, warn_of_like_classes
from edgekd.distill.recipes import Recipe
from edgekd.distill.teacher import ClipTeacher, Teacher
from edgekd.distill.visual_bank import VisualBank
from edgekd.distill.vocabulary import read_captions, read_vocabulary


@dataclass(frozen=True, eq=False)
class Lessons:
    """Everything a step needs from the text side; fields that the recipe does not need are None."""

    bank: TextBank | None
    """What the terms compare with: the classes, or the vocabulary."""
    visual: VisualBank | None = None
    domains: Tensor | None = None
    """Float `[domains, C, D]`."""
    captions: Tensor | None = None
    """Float `[images, D]`, zeros for images that do not train."""

    def fields(self, indices: NDArray[np.int64], device: torch.device) -> dict[str, Tensor]:
        """The `Batch` fields of these images."""
        found: dict[str, Tensor | None] = {
            "visual_bank": self.visual.to(device).vectors.clone() if self.visual else None,
            "domain_bank": self.domains,
            "captions": self.captions[indices] if self.captions is not None else None,
        }
        return {name: value.to(device) for name, value in found.items() if value is not None}

    def in_space_of(self, bank: TextBank) -> Lessons:
        """The same in the space of the classes' bank, which may have been centred since (`teaching.centred`)."""
        if self.bank is None or bank.text_centre is None:
            return self
        centre = bank.text_centre
        own = centre if self.bank.classes == bank.classes else self.bank.vectors.mean(dim=0)
        lesson = dataclasses.replace(self.bank, image_centre=bank.image_centre, text_centre=own)
        domains = normalize(self.domains - centre, dim=-1) if self.domains is not None else None
        captions = normalize(self.captions, dim=-1) - centre if self.captions is not None else None
        return dataclasses.replace(self, bank=lesson, domains=domains, captions=captions)

    def learn(self, fabric: Fabric, teacher: Tensor | None) -> None:
        """Update what follows the teacher's embeddings of a step, float `[b, D]`, over all processes."""
        if self.visual is None or teacher is None:
            return
        whole = fabric.all_gather(teacher) if fabric.world_size > 1 else teacher
        assert isinstance(whole, Tensor)
        self.visual.update(whole.reshape(-1, teacher.shape[-1]))


def class_bank(
    fabric: Fabric,
    config: TrainConfig,
    recipe: Recipe,
    teacher: Teacher,
    classes: Sequence[str],
    sources: Sequence[str],
) -> tuple[TextBank, Descriptions | None]:
    """The bank that the text head predicts with, and the descriptions of all that the run names, a vocabulary too.

    One process asks: a language model gives every asker another answer.
    """
    described = run_descriptions(config, classes) if fabric.is_global_zero else None
    if config.descriptions and fabric.world_size > 1:
        described = fabric.broadcast(described)
    bank = teacher.text_bank(
        classes, templates_for(config.prompts or recipe.prompts, sources), described
    )
    warn_of_like_classes(bank)
    return bank, described


def run_descriptions(config: TrainConfig, classes: Sequence[str]) -> Descriptions | None:
    """Sentences about the classes and the vocabulary, where there are any; a run that goes on has written them down."""
    if not config.descriptions:
        return None
    assert config.out is not None
    more = read_vocabulary(config.vocabulary) if config.vocabulary else ()
    kept = config.out / DESCRIPTIONS_FILE if config.resume else None
    names = tuple(dict.fromkeys((*classes, *more)))
    return kept_descriptions(kept, config.descriptions, names, may_run=not config.resume)


def make_lessons(
    fabric: Fabric,
    config: TrainConfig,
    recipe: Recipe,
    images: ImageSet,
    split: Split,
    teacher: Teacher | None,
    bank: TextBank | None,
    described: Descriptions | None,
) -> Lessons:
    """Build what the recipe's terms need; `bank` is the bank of the classes, `described` what its prompts end in.

    Raises:
        EdgekdError: captions or domains that a term needs are not there.
    """
    if teacher is None or bank is None:
        return Lessons(None)
    sources = [name for name in images.domains if name != split.test_domain]
    prompts = templates_for(config.prompts or recipe.prompts, sources)
    lesson = (
        teacher.text_bank(read_vocabulary(config.vocabulary), prompts, described)
        if config.vocabulary
        else bank
    )
    visual = (
        VisualBank(lesson.vectors, recipe.momentum, config.seed)
        if "visual_bank" in recipe.needs
        else None
    )
    domains = captions = None
    if "domain_bank" in recipe.needs:
        if len(sources) < 2:
            raise EdgekdError(
                f"The recipe {recipe.name} compares source domains, and there is {len(sources)}.",
                "Use a domain/class/image folder, or drop the term: --set stages.train.terms.domain_rel=0.",
            )
        banks = [
            teacher.text_bank(
                images.classes, templates_for("domain", [name]), described, warns=False
            )
            for name in sources
        ]
        domains = torch.stack([each.vectors for each in banks])
    if "captions" in recipe.needs:
        assert config.captions is not None
        captions = torch.zeros(len(images), teacher.dim)
        told = read_captions(config.captions, [images.ids[i] for i in split.train])
        assert isinstance(teacher, ClipTeacher)
        captions[split.train] = _embed_captions(fabric, teacher, told)
    return Lessons(lesson, visual, domains, captions)


def _embed_captions(fabric: Fabric, teacher: ClipTeacher, captions: Sequence[str]) -> Tensor:
    """Float `[len(captions), D]`, cached like image embeddings."""
    cache = EmbeddingCache(teacher.id, "captions", teacher.dim)
    keys = [hashlib.sha256(caption.encode()).hexdigest()[:32] for caption in captions]
    if fabric.is_global_zero:
        with cache.filling():
            first = {key: place for place, key in reversed(list(enumerate(keys)))}
            work = [(first[key], 0) for key in first if cache.missing([key], [0])]
            if work:
                say(f"teacher's text embeddings of {len(work):,} captions")

            def embed(positions: NDArray[np.int64], _: NDArray[np.int64]) -> NDArray[np.float32]:
                return teacher.embed_texts([captions[i] for i in positions]).numpy()

            fill(cache, work, keys, embed)
    fabric.barrier()
    cache.refresh()
    return torch.from_numpy(cache.lookup(keys, [0] * len(keys)))
