"""Text targets: banks of classes, vocabulary and domains, captions, and mean-centring."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize, softmax

from edgekd.configs.train import TrainConfig
from edgekd.core.console import say, warn
from edgekd.core.errors import EdgekdError
from edgekd.data.image_set import ImageSet
from edgekd.data.split import Split
from edgekd.data.unlabelled import keep_unlabelled
from edgekd.distill.inputs.cache import caption_embeddings, plain_embeddings
from edgekd.distill.launch import Fabric, gathered
from edgekd.distill.losses import unit
from edgekd.distill.models.teachers import ClipTeacher, Teacher
from edgekd.distill.recipes import Recipe
from edgekd.distill.text_bank import TextBank, templates_for, warn_of_indistinct_classes
from edgekd.distill.text_files import (
    DESCRIPTIONS_FILE,
    Descriptions,
    read_captions,
    read_vocabulary,
    stored_descriptions,
)

ANISOTROPIC = 0.5
"""Length of the mean unit embedding above which embeddings are mean-centred: a quarter of their energy is common."""
_REJECTED = 0.05
"""Quantile of the teacher's confidence on validation images below which an unlabelled image is left out."""


class VisualBank(nn.Module):
    """One visual prototype per text, moved by language-guided knowledge aggregation (LGKA; Li et al., T-MM 2024).

    An image belongs to the text nearest to its teacher embedding, `c_i = argmax_c t̂_i · T_c`, without labels. For each
    text in the batch, `m_c = mean t̂_i`. The first update is `V_c ← m_c`, later ones are `V_c ← μ V_c + (1 − μ) m_c`.
    Before its first update a prototype is a random unit vector. Prototypes are not normalised again.

    Args:
        texts: the text bank `T`, unit rows, float `[C, D]`.
        momentum: μ; the published script has 0.999.
    """

    texts: Tensor
    vectors: Tensor
    seen: Tensor

    def __init__(self, texts: Tensor, momentum: float = 0.999, seed: int = 0) -> None:
        super().__init__()
        self.momentum = momentum
        noise = torch.randn(texts.shape, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("texts", texts, persistent=False)
        self.register_buffer("vectors", normalize(noise, dim=-1))
        self.register_buffer("seen", torch.zeros(len(texts), dtype=torch.bool))

    @torch.no_grad()
    def update(self, teacher: Tensor) -> None:
        """Aggregate the teacher's image embeddings of a whole global batch, float `[B, D]`, in one step."""
        embeddings = unit(teacher)
        nearest = (embeddings @ self.texts.T).argmax(dim=-1)  # [B]
        counts = torch.bincount(nearest, minlength=len(self.texts))  # [C]
        sums = torch.zeros_like(self.vectors).index_add_(0, nearest, embeddings)
        means = sums / counts.clamp(min=1)[:, None]
        moved = torch.lerp(means, self.vectors, self.momentum)
        moved = torch.where(self.seen[:, None], moved, means)
        self.vectors.copy_(torch.where((counts > 0)[:, None], moved, self.vectors))
        self.seen |= counts > 0


@dataclass(frozen=True, eq=False)
class TextTargets:
    """Targets of a recipe besides the teacher's image embeddings; None if not needed."""

    bank: TextBank
    """Text bank of the classes or of the vocabulary."""
    visual: VisualBank | None = None
    domains: Tensor | None = None
    """Text vectors per domain, float `[domains, C, D]`."""
    captions: Tensor | None = None
    """Text embeddings of the captions, float `[images, D]`, zeros for images that do not train."""

    def fields(self, indices: NDArray[np.int64], device: torch.device) -> dict[str, Tensor]:
        """Return the fields of `losses.Batch` for these images."""
        found = {
            "visual_bank": self.visual.to(device).vectors.clone() if self.visual else None,
            "domain_bank": self.domains,
            "captions": self.captions[indices] if self.captions is not None else None,
        }
        return {name: value.to(device) for name, value in found.items() if value is not None}

    def centred_like(self, bank: TextBank) -> TextTargets:
        """Return the targets in the space of the class bank, which may be mean-centred."""
        centre = bank.text_centre
        if centre is None:
            return self
        own = centre if self.bank.classes == bank.classes else self.bank.vectors.mean(dim=0)
        moved = dataclasses.replace(self.bank, image_centre=bank.image_centre, text_centre=own)
        domains = normalize(self.domains - centre, dim=-1) if self.domains is not None else None
        captions = normalize(self.captions, dim=-1) - centre if self.captions is not None else None
        return dataclasses.replace(self, bank=moved, domains=domains, captions=captions)

    def update(self, fabric: Fabric, teacher: Tensor | None) -> None:
        """Update the visual bank with the teacher's embeddings of a step, float `[b, D]`, of all processes."""
        if self.visual is not None and teacher is not None:
            self.visual.update(gathered(fabric, teacher))


def class_bank(
    fabric: Fabric,
    config: TrainConfig,
    recipe: Recipe,
    teacher: Teacher,
    classes: Sequence[str],
    sources: Sequence[str],
) -> tuple[TextBank, Descriptions | None]:
    """Return the bank of the text head, and the descriptions of all names of the run.

    Only process 0 runs a description command, because a language model gives different output for every call. A
    resumed run uses the stored descriptions.

    Args:
        sources: names of the source domains.
    """
    described = None
    if config.descriptions and fabric.is_global_zero:
        vocabulary = read_vocabulary(config.vocabulary) if config.vocabulary else ()
        described = stored_descriptions(
            config.folder / DESCRIPTIONS_FILE if config.resume else None,
            config.descriptions,
            tuple(dict.fromkeys((*classes, *vocabulary))),
            may_run=not config.resume,
        )
    if config.descriptions and fabric.world_size > 1:
        described = fabric.broadcast(described)
    templates = templates_for(config.prompts or recipe.prompts, sources)
    bank = teacher.text_bank(classes, templates, described)
    warn_of_indistinct_classes(bank)
    return bank, described


def make_targets(
    fabric: Fabric,
    config: TrainConfig,
    recipe: Recipe,
    images: ImageSet,
    split: Split,
    teacher: Teacher,
    bank: TextBank,
    described: Descriptions | None,
) -> TextTargets:
    """Build the targets that the recipe's terms need; missing captions or domains are an `EdgekdError`.

    `bank` is the bank of the classes.
    """
    sources = source_domains(images, split)
    if config.vocabulary:
        templates = templates_for(config.prompts or recipe.prompts, sources)
        bank = teacher.text_bank(read_vocabulary(config.vocabulary), templates, described)
    visual = domains = captions = None
    if "visual_bank" in recipe.needs:
        visual = VisualBank(bank.vectors, recipe.momentum, config.seed)
    if "domain_bank" in recipe.needs:
        if len(sources) < 2:
            raise EdgekdError(
                f"The recipe {recipe.name} needs at least two source domains, but there is {len(sources)}.",
                "Use a domain/class/image folder, or drop the term: --set stages.train.terms.domain_rel=0.",
            )
        texts = [templates_for("domain", [name]) for name in sources]
        banks = [teacher.text_bank(images.classes, t, described, warns=False) for t in texts]
        domains = torch.stack([each.vectors for each in banks])
    if "captions" in recipe.needs:
        assert config.captions is not None
        assert isinstance(teacher, ClipTeacher)
        texts_of = read_captions(config.captions, [images.ids[i] for i in split.train])
        captions = torch.zeros(len(images), teacher.dim)
        captions[split.train] = caption_embeddings(fabric, teacher, texts_of)
    return TextTargets(bank, visual, domains, captions)


def source_domains(images: ImageSet, split: Split) -> list[str]:
    """Return the names of the training domains."""
    return [name for name in images.domains if name != split.test_domain]


def evenly_spread(indices: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return up to `count` of the indices, evenly spread."""
    places = np.linspace(0, len(indices) - 1, min(len(indices), count)).round().astype(np.int64)
    chosen: NDArray[np.int64] = indices[places]
    return chosen


def report_zero_shot(logits: Tensor, labels: NDArray[np.int64], what: str) -> float:
    """Print the teacher's zero-shot accuracy, as a mean over classes, and warn if it is near chance.

    Args:
        logits: logits of training examples, float `[N, C]`. labels: int64 `[N]`. what: noun for the examples.

    Returns:
        The accuracy, 0–1.
    """
    right = logits.numpy().argmax(axis=1) == labels
    present = np.unique(labels)
    accuracy = float(np.mean([right[labels == label].mean() for label in present]))
    chance = 1 / logits.shape[1]
    text = f"zero-shot accuracy {100 * accuracy:.1f} % on {len(labels):,} training {what}"
    say(f"teacher: {text} (mean over {len(present)} classes; chance is {100 * chance:.1f} %)")
    if near_chance(accuracy, chance):
        warn(
            f"THE TEACHER IS NEAR CHANCE ON THESE CLASSES: {text}, where chance is {100 * chance:.1f} %. A student "
            "learns little from it. Check the class names (classes.txt), --prompts, and --teacher."
        )
    return accuracy


def near_chance(accuracy: float, chance: float) -> bool:
    """Return whether an accuracy is below twice chance, and below a tenth of the way between chance and 1.

    Args:
        accuracy, chance: 0–1; means over classes, so that a constant prediction is at chance.
    """
    return accuracy < min(2 * chance, chance + 0.1 * (1 - chance))


def mean_centred(bank: TextBank, embeddings: Tensor | None, *, always: bool) -> TextBank:
    """Return the bank with the means of the teacher's image and text embeddings, which are subtracted from targets.

    CLIP's embeddings are anisotropic: images and texts each have a large common component, so cosines depend little on
    what separates classes (docs/measurements.md has the figures). The published systems do not mean-centre.

    Args:
        embeddings: embeddings of training images, never of the unseen domain, float `[N, D]`; None: only texts.
        always: if False, mean-centre only if the mean of the unit embeddings is longer than `ANISOTROPIC`.
    """
    centre = None if embeddings is None else normalize(embeddings, dim=-1).mean(dim=0).clone()
    if not always and (centre is None or centre.norm() <= ANISOTROPIC):
        return bank
    if centre is not None:
        length = f"{centre.norm():.2f}"
        say(
            f"teacher: the mean unit embedding has length {length}, so the targets are mean-centred"
        )
    return dataclasses.replace(bank, image_centre=centre, text_centre=bank.vectors.mean(dim=0))


def without_outliers(
    fabric: Fabric, images: ImageSet, split: Split, teacher: Teacher, bank: TextBank
) -> tuple[ImageSet, Split]:
    """Remove unlabelled images that are out-of-distribution inputs for the teacher.

    The score is the largest zero-shot probability (maximum concept matching, Ming et al., NeurIPS 2022). The threshold
    is the 5 % quantile of the labelled validation images.

    Args:
        images, split: as returned by `with_unlabelled`.

    Raises:
        EdgekdError: no image is left.
    """

    def confidence(indices: NDArray[np.int64]) -> NDArray[np.float32]:
        logits = bank.zero_shot(plain_embeddings(teacher, images, indices, fabric.device))
        return softmax(logits, dim=-1).amax(dim=-1).numpy()

    places = np.arange(len(images) - len(split.unlabelled), len(images))
    threshold = float(np.quantile(confidence(split.val), _REJECTED))
    kept = confidence(places) >= threshold
    say(
        f"unlabelled: {int((~kept).sum()):,} of {len(kept):,} images left out, on which the teacher's confidence is "
        f"at most {100 * threshold:.0f} %"
    )
    if not kept.any():
        raise EdgekdError(
            "The teacher does not recognise the classes in any of the unlabelled images.",
            "Check the folder, or leave out --unlabelled-filter.",
        )
    return keep_unlabelled(images, split, {images.keys[i] for i in places[kept]})
