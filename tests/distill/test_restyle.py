"""Views in other styles: what each kind does to a picture, and that a view is the same whoever renders it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from edgekd.data.image_set import ImageSet, load_images
from edgekd.distill.batches import BalancedSampler, BatchSource, Sampler, open_store
from edgekd.distill.views import (
    KINDS,
    Augmentation,
    Restyle,
    RestylePolicy,
    render,
    restyle,
    restyle_params,
)

Make = Callable[..., Path]
KEYS = tuple(f"{number:032x}" for number in range(64))


def of_kind(kind: str, draws: tuple[float, float, float, float], count: int = 1) -> Restyle:
    numbers = torch.tensor([(*draws, 1.0, 1.0)] * count)
    return Restyle(
        np.full(count, KINDS.index(kind)),
        numbers,
        torch.zeros(count if kind == "convolution" else 0, 3, 3, 7, 7),
        torch.zeros(0, dtype=torch.uint8),
    )


def noise(count: int, side: int = 24) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def images(make_domain_folder: Make, tmp_path: Path, own_cache: Path) -> ImageSet:
    return load_images(
        str(make_domain_folder(tmp_path / "data", domains=("art", "photo"), count=8))
    )


def test_about_half_of_the_views_are_restyled_in_all_ways() -> None:
    keys = [f"{number:032x}" for number in range(2000)]
    how, partners = restyle_params(keys, [0] * len(keys), RestylePolicy())
    counts = np.bincount(how.kinds + 1, minlength=len(KINDS) + 1)
    assert abs(counts[0] / len(keys) - 0.5) < 0.04
    assert counts[1:].min() > 150
    assert len(partners) == counts[1 + KINDS.index("fourier")]
    assert len(how.kernels) == counts[1 + KINDS.index("convolution")]


def test_a_restyled_view_is_a_function_of_content_visit_and_policy() -> None:
    views, partner = noise(len(KEYS)), torch.zeros(1, 28, 28, 3, dtype=torch.uint8)

    def drawn(visit: int, policy: RestylePolicy, rows: slice = slice(None)) -> Tensor:
        how, places = restyle_params(KEYS[rows], [visit] * len(KEYS[rows]), policy)
        how = how._replace(partners=partner.expand(len(places), -1, -1, -1))
        return restyle(views[rows].clone(), how)

    one = drawn(3, RestylePolicy())
    assert torch.equal(one, drawn(3, RestylePolicy()))
    assert torch.allclose(one[5:40], drawn(3, RestylePolicy(), slice(5, 40)), atol=1e-5)
    for other in (drawn(4, RestylePolicy()), drawn(3, RestylePolicy(weights=(1, 1, 2, 1, 1)))):
        assert not torch.allclose(one, other)
    assert ((one >= 0) & (one <= 1)).all()
    assert torch.equal(drawn(3, RestylePolicy(share=0.0)), views)


def test_the_processes_of_a_run_see_what_one_process_sees(images: ImageSet) -> None:
    groups = tuple(np.flatnonzero(images.domain_of == d) for d in range(2))
    source = BatchSource(
        open_store(images, 20),
        Sampler((BalancedSampler(groups, 16, 0),)),
        Augmentation(restyle=RestylePolicy(share=1.0, weights=(1, 0, 0, 0, 0))),
        np.full(len(images), 2),
    )

    def views(made: BatchSource) -> Tensor:
        raw = made(2)
        assert raw.restyle is not None
        return restyle(render(raw.pixels, raw.params, 16), raw.restyle)

    whole = views(source)
    for rank in range(2):
        assert torch.allclose(views(replace(source, rank=rank, world=2)), whole[rank::2], atol=1e-5)


def test_a_fourier_mixture_keeps_the_phase_and_takes_the_other_amplitude() -> None:
    own = noise(1, 16)
    partner = (255 * noise(2, 20)[1:]).permute(0, 2, 3, 1).byte()
    how = of_kind("fourier", (0.0, 0, 0, 0))._replace(partners=partner)
    assert torch.allclose(restyle(own.clone(), how), own, atol=1e-5)
    whole = restyle(
        own.clone() * 0.1 + 0.45, how._replace(draws=torch.tensor([[1.0, 0, 0, 0, 1, 1]]))
    )
    mean = (partner[0, 2:18, 2:18].float() / 255).mean(dim=(0, 1))  # the amplitude at frequency 0
    assert torch.allclose(whole.mean(dim=(2, 3))[0], mean, atol=0.05)


def test_a_convolution_keeps_mean_and_layout() -> None:
    own = torch.full((1, 3, 16, 16), 0.3)
    own[..., 8:] = 0.6
    kernels = torch.zeros(1, 3, 3, 7, 7)
    kernels[0, :, :, 3, 3] = torch.eye(3) * -2  # inverts
    how = of_kind("convolution", (0.0, 0.0, 0, 0))._replace(kernels=kernels)
    drawn = restyle(own.clone(), how)
    assert drawn.mean() == pytest.approx(0.45, abs=1e-4)
    assert (drawn[..., :8] > drawn[..., 8:].max()).all()


def test_lines_stand_where_the_picture_changes() -> None:
    own = torch.full((1, 3, 64, 64), 0.8)
    own[:, :, 24:40, 24:40] = 0.2
    drawn = restyle(own.clone(), of_kind("lines", (0.9, 0.9, 0.5, 0.9)))
    assert (drawn[..., :12, :12] > 0.99).all()  # paper
    assert (drawn[..., 30:34, 30:34] > 0.9).all()  # nor is the inside filled
    assert drawn[0, 0, 32, 25] < 0.3
    coloured = restyle(own.clone(), of_kind("lines", (0.9, 0.9, 0.5, 0.1)))
    assert torch.allclose(coloured[..., :12, :12], own[..., :12, :12], atol=0.01)


def test_paint_drops_texture_and_keeps_edges() -> None:
    own = noise(1, 64) * 0.1 + 0.2
    own[..., 32:] += 0.6
    flat = restyle(own.clone(), paint(posterised=0.9, contours=0.9))
    assert flat[..., :28].std() < own[..., :28].std() / 2
    assert (flat[..., 36:].mean() - flat[..., :28].mean()) > 0.5
    few = restyle(own.clone(), paint(posterised=0.1, contours=0.9))  # 5 levels
    assert set(few.unique().tolist()) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    inked = restyle(own.clone(), paint(posterised=0.9, contours=0.1))
    assert inked[..., 32].mean() < flat[..., 32].mean() - 0.2
    assert torch.allclose(inked[..., 40:], flat[..., 40:])


def paint(posterised: float, contours: float) -> Restyle:
    return of_kind("paint", (posterised, 0.0, 0.0, 0.0))._replace(
        draws=torch.tensor([[posterised, 0.0, 0.0, 0.9, contours, 0.9]])
    )


def test_the_teacher_sees_the_same_view_but_for_what_depends_on_the_batch() -> None:
    how, places = restyle_params(KEYS, [0] * len(KEYS), RestylePolicy())
    how = how._replace(partners=torch.zeros(len(places), 28, 28, 3, dtype=torch.uint8))
    views = noise(len(KEYS))
    students, teachers = restyle(views.clone(), how), restyle(views.clone(), how.for_teacher())
    mixed = torch.from_numpy(how.kinds == KINDS.index("fourier"))
    assert torch.equal(students[~mixed], teachers[~mixed])
    assert torch.equal(teachers[mixed], views[mixed])
    assert not torch.equal(students[mixed], views[mixed])


def test_solarisation_turns_what_is_bright() -> None:
    own = torch.tensor([0.1, 0.49, 0.5, 0.9]).expand(1, 3, 4, 4).contiguous()
    drawn = restyle(own, of_kind("solarise", (0.5, 0, 0, 0)))
    assert torch.allclose(drawn[0, 0, 0], torch.tensor([0.1, 0.49, 0.5, 0.1]))


def test_restyling_costs_little_beside_a_student() -> None:
    from edgekd.distill.students import make_student

    student = make_student("mobilenetv3", pretrained="scratch", size=48, classes=10)
    views = noise(64, 48)
    how, places = restyle_params(KEYS, [0] * len(KEYS), RestylePolicy())
    how = how._replace(partners=torch.zeros(len(places), 58, 58, 3, dtype=torch.uint8))
    plain, restyled = [], []
    for _ in range(4):
        started = time.process_time()
        student(views).square().mean().backward()
        between = time.process_time()
        restyle(views.clone(), how)
        plain.append(between - started)
        restyled.append(time.process_time() - between)
    assert min(restyled) < 0.15 * min(plain)
