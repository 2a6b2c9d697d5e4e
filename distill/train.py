"""The training loop, top to bottom.

One process on a laptop, `--devices 2` here, or every process of `torchrun` runs `_train_process`; batches are a
function of the step, so any number of processes sees the same global batches and a resumed run the same numbers.
"""

from __future__ import annotations

import functools
import io
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.nn.functional import normalize

from edgekd.config import TrainConfig
from edgekd.console import say
from edgekd.data import ImageSet
from edgekd.distill.cache import UNAUGMENTED, EmbeddingCache, fill
from edgekd.distill.loader import BatchSource, Prefetcher, RawBatch, cached
from edgekd.distill.pixels import open_store, store_side
from edgekd.distill.plan import check_needs, claim_folder, load_data, settle, total_steps
from edgekd.distill.predict import predict_all, student_predict
from edgekd.distill.progress import Progress
from edgekd.distill.prompts import TextBank, templates_for
from edgekd.distill.recipes import Recipe, Stage, get_recipe
from edgekd.distill.sampling import BalancedSampler
from edgekd.distill.students import Student, fit_scale, make_student, save_student
from edgekd.distill.teacher import ClipTeacher, EmbeddingsTeacher, Teacher, load_teacher
from edgekd.distill.terms import Batch, objective
from edgekd.distill.views import ViewPolicy, plain, render, view_params
from edgekd.errors import EdgekdError
from edgekd.files import sha256_file, write_bytes
from edgekd.manifest import Run, read_run
from edgekd.split import Split
from edgekd.version import __version__


def train(config: TrainConfig) -> Run:
    """Train a student and write its run folder.

    Raises:
        EdgekdError: anything the user can mend, before training starts wherever possible.
    """
    config = settle(config)
    assert config.out is not None
    images, split = load_data(config)
    fabric = make_fabric(config)
    try:
        # Bound beforehand: Fabric walks through the arguments of a launch and stumbles over frozen dataclasses.
        fabric.launch(functools.partial(_train_process, config=config, images=images, split=split))
    except ProcessRaisedException as error:  # a child's EdgekdError arrives as text
        marker = "EdgekdError: "
        if marker in str(error):
            raise EdgekdError(str(error).rsplit(marker, 1)[1].strip()) from error
        raise
    return read_run(config.out)


def make_fabric(config: TrainConfig) -> Fabric:
    """One process, several here, or the ones that torchrun started: the same code."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        devices, nodes, strategy = local, world // local, "ddp"
    else:
        devices, nodes, strategy = config.devices, 1, "ddp_spawn" if config.devices > 1 else "auto"
    if config.batch_size % (devices * nodes):
        raise EdgekdError(
            f"The batch of {config.batch_size} does not divide by {devices * nodes} processes.", "Change --batch-size."
        )
    return Fabric(
        accelerator=config.accelerator, devices=devices, num_nodes=nodes, strategy=strategy, precision=config.precision
    )


def _train_process(fabric: Fabric, config: TrainConfig, images: ImageSet, split: Split) -> None:
    assert config.out is not None
    assert config.lr is not None
    out, recipe = config.out, get_recipe(config.recipe, config.stages)
    check_needs(recipe, config)
    if fabric.world_size > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // fabric.world_size))
    fabric.seed_everything(config.seed, verbose=False)

    teacher = load_teacher(config.teacher) if recipe.needs & {"teacher", "bank"} or recipe.head == "text" else None
    sources = [name for name in images.domains if name != split.test_domain]
    bank = teacher.text_bank(images.classes, templates_for(config.prompts, sources)) if teacher else None
    student = make_student(
        config.student,
        pretrained=config.pretrained or "hub",
        weights=config.student_weights,
        options=config.student_options,
        size=config.size,
        dim=teacher.dim if teacher and recipe.head == "text" else None,
        classes=len(images.classes) if recipe.head == "linear" else None,
    )
    if fabric.is_global_zero:
        claim_folder(config, split)
    fabric.barrier()
    _say_plan(config, recipe, images, split, student)

    groups = tuple(
        group for d in range(len(images.domains)) if len(group := split.train[images.domain_of[split.train] == d])
    )
    sampler = BalancedSampler(groups, config.batch_size, config.seed)
    steps = total_steps(config, sampler.epoch_steps)
    source = _batch_source(fabric, config, recipe, teacher, images, split, student.preprocess.size, sampler)

    state = _State(out, fabric)
    resume_at = state.restore(student) if config.resume else 0
    if resume_at == 0 and student.projector is not None and bank is not None:
        centre_projector(fabric, student, recipe, source(0), teacher, bank)
    started, first_step = time.perf_counter(), 0
    progress = Progress(out, steps, config, fabric, resume_at)
    with progress:
        for stage, stage_steps in zip(recipe.stages, share_out(recipe, steps), strict=True):
            last_step = first_step + stage_steps
            if resume_at < last_step:
                _run_stage(
                    fabric,
                    config,
                    stage,
                    range(first_step, last_step),
                    max(resume_at, first_step),
                    student,
                    teacher,
                    bank,
                    source,
                    state,
                    progress,
                    images,
                    split,
                    final=last_step == steps,
                )
            first_step = last_step
        seconds = state.seconds_before + time.perf_counter() - started
        if fabric.is_global_zero:
            _finish(config, recipe, images, split, student, teacher, bank, state, steps, seconds, progress)
    fabric.barrier()


def _run_stage(
    fabric: Fabric,
    config: TrainConfig,
    stage: Stage,
    span: range,
    start: int,
    student: Student,
    teacher: Teacher | None,
    bank: TextBank | None,
    source: BatchSource,
    state: _State,
    progress: Progress,
    images: ImageSet,
    split: Split,
    *,
    final: bool,
) -> None:
    assert config.lr is not None
    for name, part in (("backbone", student.backbone), ("projector", student.projector), ("head", student.head)):
        if part is not None:
            part.requires_grad_(name in stage.trains)
    if stage.trains == ("projector",) and student.projector is None:
        return
    raw_optimizer = torch.optim.AdamW(
        param_groups_weight_decay(student, config.weight_decay), lr=config.lr * stage.lr, fused=True
    )
    student.to(fabric.device).to(memory_format=torch.channels_last)
    model: Any = fabric.setup_module(cast(nn.Module, torch.compile(student)) if config.compile else student)
    optimizer: Any = fabric.setup_optimizers(raw_optimizer)
    ema = ModelEmaV3(student, decay=config.ema, use_warmup=True) if config.ema else None
    if start > span.start:
        state.restore_stage(raw_optimizer, ema)
    state.averaged = ema.module if ema else student

    batches = Prefetcher(source, range(start, span.stop))
    for step, raw in batches:
        _training_mode(model, student, frozen_bn=config.bn == "frozen")
        rate = config.lr * stage.lr * schedule((step - span.start) / len(span), config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        views = render(raw.pixels.to(fabric.device, non_blocking=True), raw.params, student.preprocess.size)
        loss, values = stage_loss(
            fabric, model, student, stage, views, raw.labels, _teacher_embedding(raw, teacher, fabric.device), bank
        )
        _stop_if_not_finite(loss, values, raw, images)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        if ema:
            ema.update(student, step=step - span.start)
        progress.step(step, stage.name, loss, values, rate, len(raw.indices) * fabric.world_size, batches)
        done = step + 1
        every = config.eval_every or (max(1, len(span) // 8) if config.select == "best" else None)
        if final and every and (done % every == 0 or done == span.stop):
            state.evaluate(config, images, split, bank, done, progress)
        if done % config.checkpoint_every == 0 and done < span.stop:
            state.save(done, student, ema, raw_optimizer, progress.seconds)
    # The stage boundary itself is a checkpoint: the next stage needs the weights and nothing else.
    if not final:
        state.save(span.stop, student, None, None, progress.seconds)


@torch.no_grad()
def centre_projector(
    fabric: Fabric, student: Student, recipe: Recipe, raw: RawBatch, teacher: Teacher | None, bank: TextBank
) -> None:
    """Start the projector's bias at the mean of its targets over the first batch.

    CLIP's embeddings share a large common part (the mean of unit vectors has length 0.96 for the miniature teacher of
    docs/results.md). With PyTorch's start the align stage spends its steps on that part, and the distill stage, whose
    projector is frozen, never makes up for it. Ours; the published code aligns for 5,001 steps instead.
    """
    assert student.projector is not None
    student.to(fabric.device).eval()
    views = render(raw.pixels.to(fabric.device), raw.params, student.preprocess.size)
    length = student.backbone((views - student.mean) / student.std).norm(dim=-1).mean()
    targets = bank.vectors.to(fabric.device)[raw.labels.to(fabric.device)]  # [B, D]
    embedding = _teacher_embedding(raw, teacher, fabric.device)
    if embedding is not None:
        if any("feat_mse" in stage.terms for stage in recipe.stages):
            length = embedding.norm(dim=-1).mean()
        targets = targets + normalize(embedding, dim=-1) if "cos_text" in recipe.stages[-1].terms else embedding
    centre = normalize(total(fabric, normalize(targets, dim=-1).mean(dim=0)), dim=-1)
    student.projector.bias.copy_(total(fabric, length) / fabric.world_size * centre)


def stage_loss(
    fabric: Fabric,
    model: nn.Module,
    student: Student,
    stage: Stage,
    views: Tensor,
    labels: Tensor,
    teacher: Tensor | None,
    bank: TextBank | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward pass and objective of one process's share of a batch.

    Args:
        model: `student`, wrapped for compilation or several processes.
        views: float `[B, 3, S, S]` in 0–1.
        labels: int64 `[B]`.
        teacher: teacher's embeddings of these views, float `[B, D]`.

    Returns:
        As `edgekd.distill.terms.objective`.
    """
    out = model(views)
    batch = Batch(
        labels=labels.to(fabric.device),
        embedding=out if student.projector is not None else None,
        logits=out if student.head is not None else None,
        teacher=teacher,
        bank=bank.vectors.to(fabric.device) if bank else None,
        logit_scale=bank.logit_scale if bank else 1.0,
    )
    return objective(batch, stage.terms, lambda count: total(fabric, count), fabric.world_size)


def total(fabric: Fabric, value: Tensor) -> Tensor:
    """Sum of a tensor over all processes."""
    return cast(Tensor, fabric.all_reduce(value, reduce_op="sum"))


def share_out(recipe: Recipe, steps: int) -> list[int]:
    """Whole steps of each stage; they add up to `steps`."""
    edges = np.rint(np.cumsum([0.0, *(stage.share for stage in recipe.stages)]) * steps).astype(int)
    return [int(part) for part in np.diff(edges)]


def schedule(part: float, warmup: float) -> float:
    """Factor on the learning rate at `part` (0–1) of a stage: a linear rise, then half a cosine down to 0."""
    if part < warmup:
        return (part + 1e-3) / warmup if warmup else 1.0
    return 0.5 * (1 + math.cos(math.pi * (part - warmup) / (1 - warmup)))


def _training_mode(model: nn.Module, student: Student, *, frozen_bn: bool) -> None:
    """Dropout and the like on; BatchNorm statistics as the policy says, also in parts that do not train."""
    model.train()
    if frozen_bn:
        for module in student.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _teacher_embedding(raw: RawBatch, teacher: Teacher | None, device: torch.device) -> Tensor | None:
    if raw.teacher is not None:
        return raw.teacher.to(device)
    if raw.teacher_pixels is None:
        return None
    assert isinstance(teacher, ClipTeacher)
    views = render(raw.teacher_pixels.to(device), raw.params, teacher.preprocess.size)
    return teacher.embed_images(views).clone()  # out of inference mode


def _stop_if_not_finite(loss: Tensor, values: Mapping[str, Tensor], raw: RawBatch, images: ImageSet) -> None:
    if torch.isfinite(loss):
        return
    term = next((name for name, value in values.items() if not torch.isfinite(value)), "the sum")
    files = ", ".join(images.ids[i] for i in raw.indices[:4])
    raise EdgekdError(
        f"The loss is not finite: {term}, on a batch with {files}, ….",
        "Lower --lr, or look at these images; nothing was saved from this step.",
    )


def _batch_source(
    fabric: Fabric,
    config: TrainConfig,
    recipe: Recipe,
    teacher: Teacher | None,
    images: ImageSet,
    split: Split,
    size: int,
    sampler: BalancedSampler,
) -> BatchSource:
    policy = ViewPolicy()
    store = open_store(images, store_side(size))
    asks_teacher = teacher is not None and "teacher" in recipe.needs
    embeddings: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]] | None = None
    teacher_store = None
    if asks_teacher and config.online_teacher:
        assert isinstance(teacher, ClipTeacher)
        teacher.model.to(fabric.device)
        teacher_store = open_store(images, store_side(teacher.preprocess.size))
    elif isinstance(teacher, EmbeddingsTeacher) and asks_teacher:
        black_box = teacher

        def by_id(indices: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.float32]:
            return black_box.lookup([images.ids[i] for i in indices]).numpy()

        by_id(split.train, split.train)  # every training image must be there, before training
        embeddings = by_id
    elif asks_teacher:
        assert isinstance(teacher, ClipTeacher)
        cache = EmbeddingCache(teacher.id, policy.id, teacher.dim)
        fill_cache(fabric, cache, teacher, policy, images, split.train, config.views)
        embeddings = cached(images.keys, cache, plain=False)
    fixed_views = config.views if embeddings and not isinstance(teacher, EmbeddingsTeacher) else None
    return BatchSource(
        store, sampler, policy, fixed_views, embeddings, teacher_store, fabric.global_rank, fabric.world_size
    )


def fill_cache(
    fabric: Fabric,
    cache: EmbeddingCache,
    teacher: ClipTeacher,
    policy: ViewPolicy,
    images: ImageSet,
    indices: NDArray[np.int64],
    views: int,
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
            params = view_params([images.keys[i] for i in rows], chosen.tolist(), policy)
            return teacher.embed_images(render(pixels, params, teacher.preprocess.size)).cpu().numpy()

        with Progress.counting(f"teacher passes ({teacher.spec})", len(missing), fabric) as advance:
            fill(cache, work, keys, embed, on_progress=lambda n: advance(n * fabric.world_size))
        fabric.barrier()
        cache.refresh()
    finally:
        if fabric.is_global_zero:
            lock.__exit__(None, None, None)


class _State:
    """What survives a kill: the last checkpoint, and the best weights so far."""

    def __init__(self, out: Path, fabric: Fabric) -> None:
        self.path = out / "checkpoint.pt"
        self.best_path = out / "best.pt"
        self.fabric = fabric
        self.averaged: nn.Module | None = None
        self.best_accuracy = -1.0
        self.best_step = 0
        self.seconds_before = 0.0
        self._loaded: dict[str, Any] = {}

    def save(
        self,
        done: int,
        student: Student,
        ema: ModelEmaV3 | None,
        optimizer: torch.optim.Optimizer | None,
        seconds: float,
    ) -> None:
        """Write the checkpoint after `done` steps, on process 0, by way of a temporary file."""
        if self.fabric.is_global_zero:
            state = {
                "done": done,
                "student": student.state_dict(),
                "ema": ema.module.state_dict() if ema else None,
                "optimizer": optimizer.state_dict() if optimizer else None,
                "rng": torch.get_rng_state(),
                "seconds": self.seconds_before + seconds,
                "best": (self.best_accuracy, self.best_step),
            }
            _write_torch(self.path, state)
        self.fabric.barrier()

    def restore(self, student: Student) -> int:
        """Load the checkpoint into `student`; returns the steps done, 0 without a checkpoint."""
        if not self.path.exists():
            say("no checkpoint was written yet; starting from the first step")
            return 0
        self._loaded = torch.load(self.path, map_location="cpu", weights_only=True)
        student.load_state_dict(self._loaded["student"])
        torch.set_rng_state(self._loaded["rng"])
        self.seconds_before = self._loaded["seconds"]
        self.best_accuracy, self.best_step = self._loaded["best"]
        say(f"resuming after step {self._loaded['done']}")
        return int(self._loaded["done"])

    def restore_stage(self, optimizer: torch.optim.Optimizer, ema: ModelEmaV3 | None) -> None:
        """Load what belongs to the stage that was interrupted."""
        optimizer.load_state_dict(self._loaded["optimizer"])
        if ema and self._loaded["ema"]:
            ema.module.load_state_dict(self._loaded["ema"])

    def evaluate(
        self, config: TrainConfig, images: ImageSet, split: Split, bank: TextBank | None, done: int, progress: Progress
    ) -> None:
        """Mean accuracy over the source domains' validation images; keeps the best weights."""
        if self.fabric.is_global_zero:
            assert isinstance(self.averaged, Student)
            accuracy = source_accuracy(self.averaged, bank, images, split.val)
            progress.evaluated(done, accuracy)
            if accuracy > self.best_accuracy:
                self.best_accuracy, self.best_step = accuracy, done
                if config.select == "best":
                    _write_torch(self.best_path, self.averaged.state_dict())
        self.fabric.barrier()


def _write_torch(path: Path, value: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getbuffer())


def source_accuracy(student: Student, bank: TextBank | None, images: ImageSet, indices: NDArray[np.int64]) -> float:
    """Unweighted mean over domains of the top-1 accuracy, 0–1."""
    vectors = bank.vectors.to(student.mean.device) if bank else None
    scores = predict_all(student_predict(student, vectors), images, indices, student.preprocess)
    return _domain_mean(scores, images, indices)


def _domain_mean(scores: NDArray[np.float32], images: ImageSet, indices: NDArray[np.int64]) -> float:
    right = scores.argmax(axis=1) == images.labels[indices]
    domains = images.domain_of[indices]
    return float(np.mean([right[domains == domain].mean() for domain in np.unique(domains)]))


def _finish(
    config: TrainConfig,
    recipe: Recipe,
    images: ImageSet,
    split: Split,
    student: Student,
    teacher: Teacher | None,
    bank: TextBank | None,
    state: _State,
    steps: int,
    seconds: float,
    progress: Progress,
) -> None:
    assert config.out is not None
    out = config.out
    averaged = state.averaged
    assert isinstance(averaged, Student)
    final = averaged.cpu()
    averaging = f"EMA {config.ema:g}" if config.ema else "weights"
    selection = f"last {averaging}"
    if config.select == "best":
        final.load_state_dict(torch.load(state.best_path, map_location="cpu", weights_only=True))
        selection = f"best mean source-validation accuracy of the {averaging} (step {state.best_step})"
    vectors = bank.vectors if bank else None
    scores = predict_all(student_predict(final, vectors), images, split.val, final.preprocess)
    final.scale.fill_(fit_scale(torch.from_numpy(scores), torch.from_numpy(images.labels[split.val])))
    progress.evaluated(steps, _domain_mean(scores, images, split.val), final=True)
    save_student(final, out / "student.safetensors", {"student": config.student, "recipe": recipe.name})
    if bank:
        bank.write(out / "text_bank.safetensors")
    Run(
        name=out.name,
        student=config.student,
        recipe=recipe.name,
        data=config.data,
        teacher=config.teacher if teacher else "none",
        teacher_id=teacher.id if teacher else "none",
        classes=images.classes,
        preprocess=final.preprocess,
        split_hash=split.hash,
        test_domain=split.test_domain,
        seed=config.seed,
        steps=steps,
        train_seconds=round(seconds, 2),
        images_per_second=round(progress.images_per_second, 1),
        data_wait_percent=round(progress.data_wait_percent, 1),
        selection=selection,
        student_sha256=sha256_file(out / "student.safetensors"),
        versions={"edgekd": __version__, "torch": torch.__version__, "python": platform.python_version()},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    ).write(out)
    for path in (state.path, state.best_path):
        path.unlink(missing_ok=True)


def _say_plan(config: TrainConfig, recipe: Recipe, images: ImageSet, split: Split, student: Student) -> None:
    unseen = f"unseen domain {split.test_domain} ({len(split.ood_test):,})" if split.test_domain else "no unseen domain"
    say(
        f"data: {len(images.classes)} classes; {len(split.train):,} train, {len(split.val):,} val, "
        f"{len(split.id_test):,} ID test; {unseen}"
    )
    stages = " → ".join(f"{stage.name} ({' + '.join(stage.terms)})" for stage in recipe.stages)
    say(
        f"recipe: {recipe.name}: {stages}; lr {config.lr:g}, batch {config.batch_size}, BatchNorm {config.bn}, "
        f"EMA {config.ema:g}, {student.preprocess.size} px"
    )
