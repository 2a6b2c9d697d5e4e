"""What a backbone's features are worth: a linear probe and nearest neighbours."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from edgekd.data.image_set import ImageSet
from edgekd.distill.predict import pixel_batches
from edgekd.distill.students import Student
from edgekd.distill.views import plain

KNN_K = 20
KNN_TAU = 0.07
PROBE_DECAY = 1e-4


@torch.inference_mode()
def student_vectors(
    student: Student, images: ImageSet, indices: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """The backbone's features `[N, d]` and the student's output `[N, D]` for plain images, float32 on the CPU."""
    student.eval()
    features, outputs = [], []
    for pixels in pixel_batches(images, indices, student.preprocess):
        views = plain(torch.from_numpy(pixels).to(student.mean.device))
        found = student.backbone(student.normalised(views))
        features.append(found.float().cpu())
        outputs.append(student.above(found).float().cpu())
    return torch.cat(features), torch.cat(outputs)


def knn_scores(train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int = KNN_K) -> Tensor:
    """Votes of the `k` nearest training features, weighted by `exp(cos/τ)`, τ = 0.07 (Wu et al., CVPR 2018).

    Args:
        train: float `[N, d]`. labels: int64 `[N]`. test: float `[M, d]`.

    Returns:
        Float `[M, C]`, rows that add up to 1.
    """
    nearest, places = (normalize(test, dim=-1) @ normalize(train, dim=-1).T).topk(
        min(k, len(train)), dim=-1
    )
    weights = torch.softmax(nearest / KNN_TAU, dim=-1)  # [M, k]
    return torch.zeros(len(test), classes).scatter_add_(1, labels[places], weights)


def linear_probe(
    train: Tensor, labels: Tensor, classes: int, decay: float = PROBE_DECAY
) -> nn.Linear:
    """A linear classifier on frozen, standardised features: logistic regression by L-BFGS until it settles.

    The published probe is 100 epochs of SGD on augmented images; on features that are computed once the problem is
    convex, so its optimum needs neither schedule nor learning rate. `decay` is of `½ decay ‖W‖²` per image.
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
    with torch.no_grad():  # the standardisation folds in
        layer.weight.div_(std)
        layer.bias.sub_(layer.weight @ mean)
    return layer.requires_grad_(False)


def probe_scores(
    student: Student, images: ImageSet, train: NDArray[np.int64], test: NDArray[np.int64]
) -> dict[str, NDArray[np.float32]]:
    """Scores `[len(test), C]` of a `linear` and a `knn` classifier on the features of the images at `train`."""
    known, _ = student_vectors(student, images, train)
    asked, _ = student_vectors(student, images, test)
    labels, classes = torch.from_numpy(images.labels[train]), len(images.classes)
    return {
        "linear": linear_probe(known, labels, classes)(asked).numpy(),
        "knn": knn_scores(known, labels, asked, classes).numpy(),
    }
