"""How the teacher's knowledge reaches the loop: the filled cache, the batches, and the centre of its space."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, softmax

from edgekd.configs.train import TrainConfig
from edgekd.core.console import say, warn
from edgekd.core.errors import EdgekdError
from edgekd.core.files import short_hash
from edgekd.data.image_set import ImageSet
from edgekd.data.split import Split
from edgekd.data.subsets import class_places
from edgekd.data.unlabelled import keep_unlabelled
from edgekd.distill.cache import UNAUGMENTED, EmbeddingCache, fill
from edgekd.distill.job import Job, total
from edgekd.distill.launch import Fabric
from edgekd.distill.loader import BatchSource, RawBatch, cached
from edgekd.distill.pixels import open_store, store_side
from edgekd.distill.plan import total_steps
from edgekd.distill.predict import pixel_batches
from edgekd.distill.progress import Progress
from edgekd.distill.prompts import TextBank
from edgekd.distill.restyle import RestylePolicy, restyle, restyle_params
from edgekd.distill.sampling import BalancedSampler, MixedSampler, Sampler, make_sampler, mix
from edgekd.distill.students import TEACHERS_TOWER
from edgekd.distill.teacher import ClipTeacher, EmbeddingsTeacher, Teacher, has_bfloat16
from edgekd.distill.views import ViewPolicy, plain, render, view_params

CONE = 0.5
"""Length of the mean of unit vectors from which on they lie in a cone: a quarter of their energy is common."""
LEAST_COSINE = 0.999
"""Between embeddings in bfloat16 and in float32, for bfloat16 to be used."""
_CHECKED_IMAGES = 16
_MOST_VIEWS = 32
"""Cached views of an unlabelled image."""
_STRANGERS = 0.05
"""Part of the validation images that the teacher may be less sure of than of an unlabelled image that trains."""
_CENTRE_IMAGES = 512
"""Enough for a mean, where asking the teacher costs."""
_ZERO_SHOT_IMAGES = 512
"""Training images that the teacher's zero-shot accuracy is taken on."""


def run_sampler(job: Job) -> Sampler:
    """Return what deals the batches: as many of every domain, shots of unseen classes and unlabelled images apart."""
    config, images, split = job.config, job.images, job.split
    is_shot = np.isin(
        images.labels, class_places(images, config.unseen_classes if config.shots else ())
    )
    batch, others = mix(job.unlabelled, config.unlabelled_share, config.batch_size, config.seed)
    wanted = round(config.unlabelled_share * config.batch_size)
    if others is not None and others.batch < wanted:
        say(
            f"unlabelled: {len(job.unlabelled)} images for the {wanted} places that they may take in a batch; each "
            "batch holds all of them"
        )
    if not len(split.train):
        return BalancedSampler((job.unlabelled,), config.batch_size, config.seed)
    labelled = make_sampler(split.train, images.domain_of, is_shot, batch, config.seed)
    return labelled if others is None else MixedSampler(labelled, others)


def batch_source(job: Job, sampler: Sampler) -> BatchSource:
    """The run's batches, with the teacher's embeddings cached, looked up by image, or asked for at every step."""
    fabric, config, images, teacher = job.fabric, job.config, job.images, job.teacher
    policy = ViewPolicy()
    restyling = RestylePolicy() if config.augment == "restyle" else None
    store = open_store(images, store_side(job.student.preprocess.size))
    asks_teacher = teacher is not None and "teacher" in job.recipe.needs
    embeddings: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]] | None = None
    teacher_store = None
    fixed_views: NDArray[np.int64] | None = None
    if asks_teacher and config.online_teacher:
        assert isinstance(teacher, ClipTeacher)
        teacher.model.to(fabric.device)
        teacher_store = open_store(images, store_side(teacher.preprocess.size))
    elif isinstance(teacher, EmbeddingsTeacher) and asks_teacher:
        black_box = teacher

        def by_id(indices: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.float32]:
            return black_box.lookup([images.ids[i] for i in indices]).numpy()

        by_id(job.trained, job.trained)  # every training image must be there, before training
        embeddings = by_id
    elif asks_teacher:
        assert isinstance(teacher, ClipTeacher)
        seen = cached_views(policy, restyling)
        teacher = caching_teacher(fabric, config, teacher, images, job.trained, seen)
        cache = EmbeddingCache(teacher.cache_id, seen, teacher.dim)
        fixed_views = cached_view_counts(job, sampler)
        for count in np.unique(fixed_views[job.trained]):
            some = job.trained[fixed_views[job.trained] == count]
            fill_cache(fabric, cache, teacher, policy, images, some, int(count), restyling)
        embeddings = cached(images.keys, cache, plain=False)
    return BatchSource(
        store,
        sampler,
        policy,
        fixed_views,
        embeddings,
        teacher_store,
        fabric.global_rank,
        fabric.world_size,
        restyling,
    )


def cached_view_counts(job: Job, sampler: Sampler) -> NDArray[np.int64]:
    """Return the number of cached views of each image, int64 `[N]`.

    The fewer unlabelled images there are, the more views each has: together as many as the labelled images, at most
    `_MOST_VIEWS` each and no more than the run visits.
    """
    config, count = job.config, len(job.unlabelled)
    views = np.full(len(job.images), config.views, dtype=np.int64)
    if isinstance(sampler, MixedSampler):
        visits = total_steps(config, sampler.epoch_steps) * sampler.unlabelled.batch / count
        level = config.views * len(job.split.train) / count
        more = min(math.ceil(visits), round(level), _MOST_VIEWS)
        views[job.unlabelled] = max(more, config.views)
    return views


def cached_views(policy: ViewPolicy, restyling: RestylePolicy | None) -> str:
    """Identity of the views whose embeddings are cached together."""
    return policy.id if restyling is None else short_hash(policy.id, restyling.id)


def caching_teacher(
    fabric: Fabric,
    config: TrainConfig,
    teacher: ClipTeacher,
    images: ImageSet,
    indices: NDArray[np.int64],
    seen: str,
) -> ClipTeacher:
    """Return the teacher that fills the cache: in bfloat16 where the processor has it and the embeddings stay the same.

    What is cached in float32 already is used as it is. The check is the smallest cosine between the two precisions on
    the first images; less than `LEAST_COSINE` keeps float32.

    Args:
        seen: identity of the views, from `cached_views`.
    """
    wanted = config.teacher_precision
    if wanted == "fp32" or (
        wanted == "auto" and not (fabric.device.type == "cpu" and has_bfloat16())
    ):
        return teacher
    keys = [images.keys[i] for i in indices]
    before = EmbeddingCache(teacher.cache_id, seen, teacher.dim)
    if wanted == "auto" and not fabric.broadcast(bool(before.missing(keys, range(config.views)))):
        return teacher
    half = teacher.in_bfloat16()
    if wanted == "bf16" or len(EmbeddingCache(half.cache_id, seen, teacher.dim)):
        return half
    some = indices[:_CHECKED_IMAGES]
    pixels = next(pixel_batches(images, some, teacher.preprocess, batch=len(some)))
    views = plain(torch.from_numpy(pixels))
    cosine = float(
        cosine_similarity(teacher.embed_images(views), half.embed_images(views), dim=-1).min()
    )
    fits = fabric.broadcast(cosine >= LEAST_COSINE)
    shown = f"smallest cosine to float32 {cosine:.5f} on {len(some)} images"
    say(f"teacher: embeds in {'bfloat16' if fits else 'float32, not bfloat16'} ({shown})")
    return half if fits else teacher


def fill_cache(
    fabric: Fabric,
    cache: EmbeddingCache,
    teacher: ClipTeacher,
    policy: ViewPolicy,
    images: ImageSet,
    indices: NDArray[np.int64],
    views: int,
    restyling: RestylePolicy | None = None,
) -> None:
    """Make sure that `views` views of every image at `indices` are stored; processes share the work."""
    keys = [images.keys[i] for i in indices]
    # Process 0 decides: another run may add a shard between two processes' looks at the folder.
    if not fabric.broadcast(bool(cache.missing(keys, range(views)))):
        cache.refresh()
        say(f"teacher cache: all {len(keys) * views:,} views are there, no teacher pass needed")
        return
    lock = cache.filling()
    if fabric.is_global_zero:
        lock.__enter__()
    try:
        fabric.barrier()
        cache.refresh()
        missing = cache.missing(keys, range(views))
        fabric.barrier()  # nobody may add a shard before everybody has counted
        work = missing[fabric.global_rank :: fabric.world_size]
        store = open_store(images, store_side(teacher.preprocess.size))
        teacher.model.to(fabric.device)

        def embed(positions: NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.float32]:
            rows = indices[positions]
            pixels = torch.from_numpy(store.batch(rows)).to(fabric.device)
            if (chosen == UNAUGMENTED).all():
                return teacher.embed_images(plain(pixels)).cpu().numpy()
            names = [images.keys[i] for i in rows]
            params = view_params(names, chosen.tolist(), policy)
            drawn = render(pixels, params, teacher.preprocess.size)
            if restyling is not None:
                how, _ = restyle_params(names, chosen.tolist(), restyling)
                drawn = restyle(drawn, how.for_teacher())
            return teacher.embed_images(drawn).cpu().numpy()

        with Progress.counting(f"teacher passes ({teacher.spec})", len(missing), fabric) as advance:
            fill(cache, work, keys, embed, on_progress=lambda n: advance(n * fabric.world_size))
        fabric.barrier()
        cache.refresh()
    finally:
        if fabric.is_global_zero:
            lock.__exit__(None, None, None)


def teacher_embedding(
    raw: RawBatch, teacher: Teacher | None, device: torch.device
) -> Tensor | None:
    """The teacher's embeddings of a batch's views, float32 `[b, D]`, or None where the recipe does not ask for them."""
    if raw.teacher is not None:
        return raw.teacher.to(device)
    if raw.teacher_pixels is None:
        return None
    assert isinstance(teacher, ClipTeacher)
    views = render(raw.teacher_pixels.to(device), raw.params, teacher.preprocess.size)
    if raw.restyle is not None:
        views = restyle(views, raw.restyle.for_teacher())
    return teacher.embed_images(views).clone()  # out of inference mode


def say_zero_shot(job: Job, source: BatchSource) -> None:
    """Print the teacher's zero-shot accuracy on labelled training images, and warn where it is near chance.

    Up to `_ZERO_SHOT_IMAGES` of them, spread over all; by their cached first view where there is one.
    """
    fabric, images, teacher, bank = job.fabric, job.images, job.teacher, job.bank
    labelled = job.split.train[images.labels[job.split.train] >= 0]
    if bank is None or teacher is None or not fabric.is_global_zero or not len(labelled):
        return
    some = _spread_over(labelled, _ZERO_SHOT_IMAGES)
    if source.embeddings is not None:
        found = torch.from_numpy(source.embeddings(some, np.zeros_like(some)))
    else:
        found = plain_embeddings(fabric, teacher, images, some)
    labels = images.labels[some]
    right = bank.zero_shot(found).numpy().argmax(axis=1) == labels
    shown = np.unique(labels)
    accuracy = float(np.mean([right[labels == label].mean() for label in shown]))
    chance = 1 / len(bank.classes)
    what = f"zero-shot accuracy {100 * accuracy:.1f} % on {len(some):,} training images"
    scale = f"mean over {len(shown)} classes; chance is {100 * chance:.1f} %"
    say(f"teacher: {what} ({scale})")
    if near_chance(accuracy, chance):
        warn(
            f"THE TEACHER HARDLY KNOWS THESE CLASSES: its {what} is near chance ({100 * chance:.1f} %). A student "
            "learns no more from it than noise. Check the class names (classes.txt), --prompts, and --teacher."
        )


def near_chance(accuracy: float, chance: float) -> bool:
    """Whether an accuracy says next to nothing: below twice chance, and a tenth of the way from chance to 1.

    Args:
        accuracy, chance: 0–1; means over classes, so that a constant answer has chance.
    """
    return accuracy < min(2 * chance, chance + 0.1 * (1 - chance))


def _spread_over(indices: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Up to `count` of the indices, evenly spread."""
    places = np.linspace(0, len(indices) - 1, min(len(indices), count)).round().astype(np.int64)
    chosen: NDArray[np.int64] = indices[places]
    return chosen


def plain_embeddings(
    fabric: Fabric, teacher: Teacher, images: ImageSet, indices: NDArray[np.int64]
) -> Tensor:
    """The teacher's embeddings of images without augmentation, float32 `[len(indices), D]`."""
    if isinstance(teacher, EmbeddingsTeacher):
        return teacher.lookup([images.ids[i] for i in indices])
    teacher.model.to(fabric.device)
    batches = pixel_batches(images, indices, teacher.preprocess)
    return torch.cat(
        [
            teacher.embed_images(plain(torch.from_numpy(batch).to(fabric.device))).cpu()
            for batch in batches
        ]
    )


def without_strangers(
    fabric: Fabric,
    teacher: Teacher | None,
    bank: TextBank | None,
    images: ImageSet,
    split: Split,
) -> tuple[ImageSet, Split]:
    """Drop unlabelled images that look like none of the classes to the teacher.

    The score is the largest zero-shot probability (maximum concept matching, Ming et al., NeurIPS 2022); the threshold
    is what a twentieth of the labelled validation images stays below.

    Args:
        images, split: as `with_unlabelled` returns them.

    Raises:
        EdgekdError: none is left.
    """
    assert teacher is not None
    assert bank is not None

    def sureness(indices: NDArray[np.int64]) -> NDArray[np.float32]:
        found = plain_embeddings(fabric, teacher, images, indices)
        return softmax(bank.zero_shot(found), dim=-1).amax(dim=-1).numpy()

    places = np.arange(len(images) - len(split.unlabelled), len(images))
    threshold = float(np.quantile(sureness(split.val), _STRANGERS))
    sure = sureness(places) >= threshold
    say(
        f"unlabelled: {int((~sure).sum()):,} of {len(sure):,} images left out; the teacher gives them no class with "
        f"more than {100 * threshold:.0f} %"
    )
    if not sure.any():
        raise EdgekdError(
            "The teacher recognises the classes in none of the unlabelled images.",
            "Check the folder, or leave unlabelled_filter out.",
        )
    return keep_unlabelled(images, split, {images.keys[i] for i in places[sure]})


def centred(job: Job, source: BatchSource) -> TextBank:
    """The bank with the common part of the teacher's space, which the student then need not learn.

    CLIP's embeddings lie in a narrow cone, images in one and texts in another. Where they do, a cosine is nearly blind
    to what tells classes apart (docs/measurements.md has the figures), so embeddings are compared without their mean.
    Ours; the published systems compare in the cone. The image centre is a mean over training images (their cached
    first view), never over the unseen domain.

    Returns:
        The bank with its centres, or as it is where the configuration says so, or where the recipe leaves it open and
        the image embeddings spread out: a mean of unit vectors no longer than `CONE`.
    """
    images, train, teacher, bank, wanted = (
        job.images,
        job.trained,
        job.teacher,
        job.bank,
        job.config.centre,
    )
    assert bank is not None
    # The teacher's own tower lives in the teacher's own space.
    by_itself = job.recipe.centre and job.config.student != TEACHERS_TOWER
    if wanted is False or (wanted is None and not by_itself):
        return bank
    found = None
    if "teacher" in job.recipe.needs:
        if source.embeddings is not None:
            found = torch.from_numpy(source.embeddings(train, np.zeros_like(train)))
        else:
            assert isinstance(teacher, ClipTeacher)
            some = _spread_over(train, _CENTRE_IMAGES)
            found = plain_embeddings(job.fabric, teacher, images, some)
    centre = None if found is None else normalize(found, dim=-1).mean(dim=0).clone()
    if wanted is None and (centre is None or centre.norm() <= CONE):
        return bank
    if centre is not None:
        length = f"{centre.norm():.2f}"
        say(
            f"teacher: the mean of its unit embeddings has length {length}; the student learns them without it"
        )
    return dataclasses.replace(bank, image_centre=centre, text_centre=bank.vectors.mean(dim=0))


@torch.no_grad()
def start_head_at_texts(job: Job) -> None:
    """Start class vectors that train at the teacher's text vectors."""
    if job.student.embeds and job.student.head is not None and job.bank is not None:
        job.student.head.weight.copy_(job.bank.head)


@torch.no_grad()
def centre_projector(job: Job, raw: RawBatch) -> None:
    """Start the projector's bias at the mean of its targets over the first batch, where they are not centred.

    What all embeddings share would otherwise take the align stage its steps, and the distill stage, whose projector is
    frozen, never makes up for it. Ours; the published code aligns for 5,001 steps instead.
    """
    fabric, student, bank = job.fabric, job.student, job.bank
    if student.projector is None or bank is None or bank.text_centre is not None:
        return
    student.to(fabric.device).eval()
    views = render(raw.pixels.to(fabric.device), raw.params, student.preprocess.size)
    length = student.body(student.normalised(views)).norm(dim=-1).mean()
    labels = raw.labels.to(fabric.device)
    # Unlabelled images have no text, and the rest of the batch stands for them.
    texts = bank.vectors.to(fabric.device)[labels.clamp(min=0)] * (labels >= 0)[:, None]  # [B, D]
    targets = texts
    embedding = teacher_embedding(raw, job.teacher, fabric.device)
    if embedding is not None:
        if any("feat_mse" in stage.terms for stage in job.recipe.stages):
            length = embedding.norm(dim=-1).mean()
        targets = (
            targets + normalize(embedding, dim=-1)
            if "cos_text" in job.recipe.stages[-1].terms
            else embedding
        )
    centre = normalize(total(fabric, normalize(targets, dim=-1).mean(dim=0)), dim=-1)
    student.projector.bias.copy_(total(fabric, length) / fabric.world_size * centre)
