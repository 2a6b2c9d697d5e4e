"""Set up a training: teacher, targets, student, run folder, cache and initial weights."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from edgekd.configs.train import TrainConfig
from edgekd.core.console import say
from edgekd.core.files import write_json
from edgekd.core.folders import RUN, clear
from edgekd.data.image_set import ImageSet
from edgekd.data.split import Split
from edgekd.data.subsets import class_places
from edgekd.distill.classification.checks import check_recipe
from edgekd.distill.classification.load_run import continue_from
from edgekd.distill.classification.task import Classification
from edgekd.distill.classification.text_targets import (
    class_bank,
    evenly_spread,
    make_targets,
    mean_centred,
    report_zero_shot,
    source_domains,
    without_outliers,
)
from edgekd.distill.inputs.batches import BatchSource, make_sampler, open_store, store_side
from edgekd.distill.inputs.cache import Embed, EmbeddingCache, caching_teacher, fill_views
from edgekd.distill.inputs.mixing import Mixing
from edgekd.distill.inputs.restyle import RestylePolicy
from edgekd.distill.inputs.views import Augmentation, render
from edgekd.distill.launch import Fabric, total
from edgekd.distill.models.fetch import hint_of
from edgekd.distill.models.students import TEACHER_ENCODER, Student, encoder_student, make_student
from edgekd.distill.models.teachers import EmbeddingsTeacher, Teacher, load_teacher
from edgekd.distill.recipes import Recipe, get_recipe
from edgekd.distill.text_bank import TextBank
from edgekd.distill.text_files import DESCRIPTIONS_FILE, Descriptions

_MOST_VIEWS = 32
"""Maximum number of cached views of an unlabelled image."""
_SAMPLE = 512
"""Number of training images for the zero-shot accuracy, and for means if nothing is cached."""


def build(fabric: Fabric, config: TrainConfig, images: ImageSet, split: Split) -> Classification:
    """Load the teacher, and build its text targets and the student, without writing anything."""
    recipe = get_recipe(config.recipe, config.stages)
    check_recipe(recipe, config)
    teacher = bank = described = targets = None
    if recipe.uses_texts or config.student == TEACHER_ENCODER:
        with hint_of(config):
            teacher = load_teacher(config.teacher)
    if teacher and recipe.uses_texts:
        sources = source_domains(images, split)
        bank, described = class_bank(fabric, config, recipe, teacher, images.classes, sources)
        if config.unlabelled_filter and not config.resume:
            images, split = without_outliers(fabric, images, split, teacher, bank)
        targets = make_targets(fabric, config, recipe, images, split, teacher, bank, described)
    fabric.seed_everything(config.seed, verbose=False)
    with hint_of(config):
        student = _student(config, recipe, teacher, len(images.classes))
    shots = class_places(images, config.unseen_classes if config.shots else ())
    groups = images.domain_of
    if config.balance == "classes":
        groups = groups * len(images.classes) + images.labels
    sampler = make_sampler(
        split.train,
        np.arange(len(images) - len(split.unlabelled), len(images)),
        groups,
        np.isin(images.labels, shots),
        share=config.unlabelled_share,
        batch=config.batch_size,
        seed=config.seed,
    )
    steps = config.steps or max(1, round((config.epochs or 0) * sampler.epoch_steps))
    return Classification(
        fabric,
        config,
        recipe,
        images,
        split,
        student,
        teacher,
        bank,
        targets,
        described,
        sampler,
        steps,
        class_weights(images.labels[split.train], len(images.classes))
        if config.balance == "weights"
        else None,
    )


def class_weights(labels: NDArray[np.int64], classes: int) -> Tensor:
    """Return a factor per class, float32 `[C]`, with equal totals of all classes and a mean of 1 over the images."""
    counts = np.bincount(labels, minlength=classes)
    weights = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.from_numpy(np.where(counts > 0, weights, 0.0)).float()


def mixing_of(config: TrainConfig, side: int) -> Mixing | None:
    """Return the mixing of a run's views of `side` pixels, or None."""
    if not (config.mixup or config.cutmix):
        return None
    return Mixing(config.mixup, config.cutmix, side, config.seed)


def prepare(task: Classification) -> None:
    """Create the run folder, fill the cache with the teacher's embeddings, and set the source of the batches."""
    if task.fabric.is_global_zero:
        _begin_folder(task.config, task.split, task.described)
    task.fabric.barrier()
    _say_plan(task)
    task.source = _source(task)


def _student(config: TrainConfig, recipe: Recipe, teacher: Teacher | None, classes: int) -> Student:
    trained = classes if recipe.head != "text" else None
    if config.student == TEACHER_ENCODER:
        return encoder_student(teacher, classes=trained, size=config.size)
    return make_student(
        config.student,
        pretrained=config.pretrained or "hub",
        weights=config.student_weights,
        options=config.student_options,
        size=config.size,
        dim=teacher.dim if teacher and recipe.head != "linear" else None,
        classes=trained,
        projector=config.projector or "linear",
    )


def _begin_folder(config: TrainConfig, split: Split, described: Descriptions | None) -> None:
    """Write the run's configuration, split and class descriptions.

    It is called after data, teacher and student are loaded, so that `overwrite` removes nothing if a run cannot start.
    """
    if not config.resume:
        clear(config.folder, RUN, marker=False)
        settings = config.model_dump(mode="json", exclude={"resume", "overwrite", "out", "plan"})
        write_json(config.folder / "config.json", settings)
    if not (config.folder / "split.json").exists():
        split.write(config.folder / "split.json")
    if described is not None and not (config.folder / DESCRIPTIONS_FILE).exists():
        sentences = {name: list(own) for name, own in described.items()}
        write_json(config.folder / DESCRIPTIONS_FILE, sentences)


def _say_plan(task: Classification) -> None:
    config, recipe, split = task.config, task.recipe, task.split
    unlabelled = f"{len(split.unlabelled):,} unlabelled, " if split.unlabelled else ""
    domain, tested = split.test_domain, len(split.ood_test)
    unseen = f"unseen domain {domain} ({tested:,})" if domain else "no unseen domain"
    say(
        f"data: {len(task.images.classes)} classes; {len(split.train):,} train, {unlabelled}{len(split.val):,} val, "
        f"{len(split.id_test):,} ID test; {unseen}"
    )
    stages = " → ".join(f"{stage.name} ({' + '.join(stage.terms)})" for stage in recipe.stages)
    averaged = f"EMA {config.ema:g}" if config.average == "ema" else f"average {config.average}"
    say(
        f"recipe: {recipe.name}: {stages}; lr {config.lr:g}, batch {config.batch_size}, BatchNorm {config.bn}, "
        f"{averaged}, {task.student.preprocess.size} px"
    )


def _source(task: Classification) -> BatchSource:
    """Return the run's batches, with teacher embeddings that are cached, precomputed, or computed at every step."""
    fabric, config, images, teacher = task.fabric, task.config, task.images, task.teacher
    augmentation = augmentation_of(config)
    store = open_store(images, store_side(task.student.preprocess.size))
    views = online = None
    embeddings: Embed | None = None
    if not task.needs_teacher:
        pass
    elif isinstance(teacher, EmbeddingsTeacher):
        embeddings = partial(teacher.embeddings, images.ids)
        embeddings(task.trained, task.trained)  # fail before training if an image is missing
    elif teacher and config.online_teacher:
        teacher.model.to(fabric.device)
        online = open_store(images, store_side(teacher.preprocess.size))
    elif teacher:
        teacher = caching_teacher(fabric, config, teacher, images, task.trained, augmentation.id)
        cache = EmbeddingCache(teacher.cache_id, augmentation.id, teacher.dim)
        views = cached_view_counts(task)
        for count in np.unique(views[task.trained]):
            some = task.trained[views[task.trained] == count]
            fill_views(fabric, cache, teacher, augmentation, images, some, int(count))
        embeddings = partial(cache.embeddings, images.keys)
    return BatchSource(
        store,
        task.sampler,
        augmentation,
        views,
        embeddings,
        online,
        fabric.global_rank,
        fabric.world_size,
        mixing_of(config, task.student.preprocess.size),
    )


def augmentation_of(config: TrainConfig) -> Augmentation:
    """Return the augmentation of a run."""
    return Augmentation(restyle=RestylePolicy() if config.augment == "restyle" else None)


def cached_view_counts(task: Classification) -> NDArray[np.int64]:
    """Return the number of cached views of each image, int64 `[N]`.

    Unlabelled images get more views if there are fewer of them: together as many as the labelled images, with at most
    `_MOST_VIEWS` each, and no more than the run uses.
    """
    config, count = task.config, len(task.unlabelled)
    views = np.full(len(task.images), config.views, dtype=np.int64)
    if task.sampler.labelled and task.sampler.unlabelled:
        visits = task.steps * task.sampler.unlabelled[0].batch / count
        level = config.views * len(task.split.train) / count
        more = min(math.ceil(visits), round(level), _MOST_VIEWS)
        views[task.unlabelled] = max(more, config.views)
    return views


def initialise(task: Classification, *, resumed: bool) -> None:
    """Check the teacher, mean-centre the targets, and set the first weights that depend on the teacher."""
    config, recipe, student, labels = task.config, task.recipe, task.student, task.images.labels
    if task.bank and task.targets:
        labelled = task.split.train[labels[task.split.train] >= 0]
        if not resumed and task.fabric.is_global_zero and len(labelled):
            some = evenly_spread(labelled, _SAMPLE)
            logits = task.bank.zero_shot(task.sample_embeddings(some))
            report_zero_shot(logits, labels[some], "images")
        # The teacher's own encoder is in the teacher's own space.
        by_default = recipe.centre and config.student != TEACHER_ENCODER
        if config.centre or (config.centre is None and by_default):
            embeddings = None
            if task.needs_teacher:
                cached = task.source.embeddings is not None
                some = task.trained if cached else evenly_spread(task.trained, _SAMPLE)
                embeddings = task.sample_embeddings(some)
            task.bank = mean_centred(task.bank, embeddings, always=bool(config.centre))
            task.targets = task.targets.centred_like(task.bank)
    if resumed:
        return
    if task.bank and student.embeds and student.head is not None:
        with torch.no_grad():
            student.head.weight.copy_(task.bank.head)
    if config.start is not None:
        continue_from(config.start, student, task.images.classes)
    elif task.bank and task.bank.text_centre is None and student.projector is not None:
        _centre_projector(task, task.bank, student.projector)


@torch.no_grad()
def _centre_projector(task: Classification, bank: TextBank, projector: nn.Linear) -> None:
    """Initialise the projector's bias with the mean of its targets over the first batch.

    The common part of all embeddings would otherwise take up the align stage, and the distill stage, whose projector
    is frozen, never makes up for it. Ours; the published code aligns for 5,001 steps instead.
    """
    fabric, stages, raw = task.fabric, task.recipe.stages, task.source(0)
    student = task.student.to(fabric.device).eval()
    labels, embedding = raw.labels.to(fabric.device), task.teacher_features(raw)
    # Views before restyling: the mean is of the content.
    views = render(raw.pixels.to(fabric.device), raw.params, student.preprocess.size)
    length = student.body(student.normalised(views)).norm(dim=-1).mean()
    # Unlabelled images have no text, and the rest of the batch stands for them.
    vectors = bank.vectors.to(fabric.device)
    targets = vectors[labels.clamp(min=0)] * (labels >= 0)[:, None]  # [B, D]
    if embedding is not None:
        if any("feat_mse" in stage.terms for stage in stages):
            length = embedding.norm(dim=-1).mean()
        with_text = "cos_text" in stages[-1].terms
        targets = targets + normalize(embedding, dim=-1) if with_text else embedding
    centre = normalize(total(fabric, normalize(targets, dim=-1).mean(dim=0)), dim=-1)
    projector.bias.copy_(total(fabric, length) / fabric.world_size * centre)
