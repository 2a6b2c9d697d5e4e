"""Predictions of teachers and students with the preprocessing of artifacts, and probes of features."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from edgekd.core.predictor import Predictor
from edgekd.core.preprocess import Preprocess
from edgekd.data.image_set import ImageSet
from edgekd.distill.inputs.batches import pixel_batches
from edgekd.distill.inputs.views import plain
from edgekd.distill.models.students import Student
from edgekd.distill.models.teachers import ClipTeacher
from edgekd.distill.text_bank import TextBank

KNN_K = 20
KNN_TAU = 0.07
PROBE_DECAY = 1e-4
TIP_ALPHA = 1.0
TIP_BETA = 5.5
"""Values of the published program (Li et al., ICCV 2023; Zhang et al., ECCV 2022 start from the same)."""


def student_predict(student: Student, bank: Tensor | None) -> Predictor:
    """Return the torch student as a predictor on its device, in evaluation mode."""
    student.eval()
    vectors = bank.to(student.mean.device) if bank is not None else None

    @torch.inference_mode()
    def predict(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        views = plain(torch.from_numpy(pixels).to(student.mean.device))
        return student.scores(views, vectors).float().cpu().numpy()

    return predict


def teacher_predict(teacher: ClipTeacher, bank: TextBank) -> Predictor:
    """Return the teacher's zero-shot classifier, `logit_scale · cos`, as a predictor."""

    @torch.inference_mode()
    def predict(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return bank.zero_shot(teacher.embed_images(plain(torch.from_numpy(pixels)))).cpu().numpy()

    return predict


def predict_all(
    predict: Predictor, images: ImageSet, indices: NDArray[np.int64], preprocess: Preprocess
) -> NDArray[np.float32]:
    """Return the scores of all images at `indices`, float32 `[len(indices), C]`."""
    batches = pixel_batches(images, indices, preprocess)
    return np.concatenate([predict(pixels) for pixels in batches])


def domain_mean(values: NDArray[np.floating | np.bool_], domains: NDArray[np.int64]) -> float:
    """Return the unweighted mean over domains of the mean of `values` `[N]` in each."""
    return float(np.mean([values[domains == domain].mean() for domain in np.unique(domains)]))


def source_accuracy(
    student: Student, bank: TextBank | None, images: ImageSet, indices: NDArray[np.int64]
) -> float:
    """Return the unweighted mean over domains of the top-1 accuracy, 0–1."""
    predict = student_predict(student, bank.head if bank else None)
    scores = predict_all(predict, images, indices, student.preprocess)
    right = scores.argmax(axis=1) == images.labels[indices]
    return domain_mean(right, images.domain_of[indices])


@torch.inference_mode()
def source_loss(
    student: Student, bank: TextBank | None, images: ImageSet, indices: NDArray[np.int64]
) -> float:
    """Return the cross-entropy with the label, averaged over domains without weights (SWAD's loss).

    A text head is scored like its teacher: `logit_scale · cos`.
    """
    device = student.mean.device
    was_training = student.training
    student.eval()

    def predict(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        out = student(plain(torch.from_numpy(pixels).to(device))).float()
        if bank is not None and student.embeds and student.head is None:
            out = bank.logit_scale * normalize(out, dim=-1) @ bank.head.to(device).T
        else:
            out = student.classify(out)
        return out.cpu().numpy()

    scores = torch.from_numpy(predict_all(predict, images, indices, student.preprocess))
    student.train(was_training)
    labels = torch.from_numpy(images.labels[indices])
    losses = cross_entropy(scores, labels, reduction="none").numpy()
    return domain_mean(losses, images.domain_of[indices])


# --- classifiers on features


@torch.inference_mode()
def student_vectors(
    student: Student, images: ImageSet, indices: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Return the backbone's features `[N, d]` and the student's output `[N, D]` for plain images, float32, CPU."""
    student.eval()
    features, outputs = [], []
    for pixels in pixel_batches(images, indices, student.preprocess):
        views = plain(torch.from_numpy(pixels).to(student.mean.device))
        found = student.backbone(student.normalised(views))
        features.append(found.float().cpu())
        outputs.append(student.above(found).float().cpu())
    return torch.cat(features), torch.cat(outputs)


def knn_scores(train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int = KNN_K) -> Tensor:
    """Return the votes of the `k` nearest training features, weighted by `exp(cos/τ)`, τ = 0.07 (Wu et al., CVPR 2018).

    Args:
        train: float `[N, d]`. labels: int64 `[N]`. test: float `[M, d]`.

    Returns:
        Float `[M, C]`, rows that add up to 1.
    """
    cosines = normalize(test, dim=-1) @ normalize(train, dim=-1).T
    nearest, places = cosines.topk(min(k, len(train)), dim=-1)
    weights = torch.softmax(nearest / KNN_TAU, dim=-1)  # [M, k]
    return torch.zeros(len(test), classes).scatter_add_(1, labels[places], weights)


def linear_probe(
    train: Tensor, labels: Tensor, classes: int, decay: float = PROBE_DECAY
) -> nn.Linear:
    """Fit a linear classifier on frozen, standardised features: logistic regression by L-BFGS to convergence.

    The published probe uses 100 epochs of SGD on augmented images. On fixed features the problem is convex, so the
    optimum needs no schedule or learning rate. `decay` is the factor of `½ decay ‖W‖²` per image.
    """
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0).clamp(min=1e-6)
    layer = nn.Linear(train.shape[1], classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    inputs = (train - mean) / std
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(layer(inputs), labels) + decay / 2 * layer.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():  # fold the standardisation into the layer
        layer.weight.div_(std)
        layer.bias.sub_(layer.weight @ mean)
    return layer.requires_grad_(False)


def probe_scores(
    student: Student, images: ImageSet, train: NDArray[np.int64], test: NDArray[np.int64]
) -> dict[str, NDArray[np.float32]]:
    """Return the scores `[len(test), C]` of a `linear` and a `knn` classifier fitted on the images at `train`."""
    known, _ = student_vectors(student, images, train)
    queries, _ = student_vectors(student, images, test)
    labels, classes = torch.from_numpy(images.labels[train]), len(images.classes)
    return {
        "linear": linear_probe(known, labels, classes)(queries).numpy(),
        "knn": knn_scores(known, labels, queries, classes).numpy(),
    }


def retrieval_scores(
    queries: Tensor,
    keys: Tensor,
    labels: Tensor,
    classes: int,
    texts: Tensor | None,
    alpha: float = TIP_ALPHA,
    beta: float = TIP_BETA,
) -> Tensor:
    """Classify with a few images per class without training (Tip-Adapter): a text head plus a cache of embeddings.

    `cos(ŝ, T_c) + α Σ_m exp(−β (1 − cos(ŝ, f_m))) [y_m = c]`, float `[N, classes]`; only the sum without `texts`.

    Args:
        queries: embeddings of the images to classify, float `[N, D]`.
        keys: embeddings of the cached images, float `[M, D]`. labels: their classes, int64 `[M]`.
        texts: class vectors, float `[classes, D]`, or None.
    """
    queries, keys = normalize(queries, dim=-1), normalize(keys, dim=-1)
    near = (-beta * (1 - queries @ keys.T)).exp()  # [N, M]
    scores = alpha * near @ one_hot(labels, classes).to(near)
    return scores if texts is None else queries @ normalize(texts, dim=-1).T + scores
