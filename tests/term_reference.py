"""An independent reference for every loss term: loops over Python floats, written from the formulas.

Gradients are checked against this by finite differences, so neither torch's operations nor autograd check themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edgekd.distill.losses import Batch

B, C, D, DOMAINS = 6, 4, 5, 3
Rows = list[list[float]]


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def draw(seed: int = 0, *, batch: int = B) -> Batch:
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    return Batch(
        labels=torch.randint(0, C, (batch,), generator=make),
        embedding=normal(batch, D).requires_grad_(),
        logits=normal(batch, C).requires_grad_(),
        teacher=3 * normal(batch, D),
        bank=unit(normal(C, D)),
        visual_bank=0.7 * unit(normal(C, D)),
        domain_bank=unit(normal(DOMAINS, C, D)),
        captions=2 * normal(batch, D),
        logit_scale=20.0,
    )


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: list[float], b: list[float]) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / sum(powers) for power in powers]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


@dataclass(frozen=True)
class Reference:
    """`value(name, i)` is the loss of image `i`."""

    s: Rows
    z: Rows
    batch: Batch
    params: dict[str, Any] = field(default_factory=dict)

    def rows(self, name: str) -> Any:
        return getattr(self.batch, name).tolist()

    def value(self, name: str, i: int) -> float:
        return float(
            getattr(self, name)(self.s[i], self.rows("teacher")[i], self.rows("labels")[i], i)
        )

    def ce(self, s: list[float], t: list[float], y: int, i: int) -> float:
        return -math.log(softmax(self.z[i])[y])

    def cos_img(self, s: list[float], t: list[float], y: int, i: int) -> float:
        return 1 - cosine(s, t)

    def cos_text(self, s: list[float], t: list[float], y: int, i: int) -> float:
        return 1 - cosine(s, self.rows("bank")[y])

    def text_ce(self, s: list[float], t: list[float], y: int, i: int) -> float:
        return -math.log(
            softmax([cosine(s, row) / self.params.get("tau", 0.07) for row in self.rows("bank")])[y]
        )

    def logit_kd(self, s: list[float], t: list[float], y: int, i: int) -> float:
        temperature = self.params.get("temperature", 4.0)
        p = softmax(
            [self.batch.logit_scale * cosine(t, row) / temperature for row in self.rows("bank")]
        )
        return float(
            temperature**2 * divergence(p, softmax([value / temperature for value in self.z[i]]))
        )

    def pseudo_ce(self, s: list[float], t: list[float], y: int, i: int) -> float:
        best = max(softmax(self.z[i]))
        return -math.log(best) if best >= self.params.get("threshold", 0.95) else 0.0

    def feat_mse(self, s: list[float], t: list[float], y: int, i: int) -> float:
        if self.params.get("normed"):
            return 2 - 2 * cosine(s, t)
        return sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)

    def im_nce(self, s: list[float], t: list[float], y: int, i: int) -> float:
        tau, teachers = self.params.get("tau", 0.07), self.rows("teacher")

        def score(a: list[float], b: list[float]) -> float:
            if self.params.get("metric") == "distance":
                lengths = math.sqrt(dot(a, a)), math.sqrt(dot(b, b))
                return (
                    -sum((x / lengths[0] - v / lengths[1]) ** 2 for x, v in zip(a, b, strict=True))
                    / tau
                )
            return cosine(a, b) / tau

        there = -math.log(softmax([score(s, other) for other in teachers])[i])
        back = -math.log(softmax([score(other, t) for other in self.s])[i])
        return (there + back) / 2 if self.params.get("both_ways", True) else there

    def caption_nce(self, s: list[float], t: list[float], y: int, i: int) -> float:
        tau, labels = self.params.get("tau", 0.07), self.rows("labels")
        masked = self.params.get("same_class_mask", True)
        rivals = [j for j in range(len(labels)) if j == i or not masked or labels[j] != y]
        captions = self.rows("captions")
        return -math.log(softmax([cosine(s, captions[j]) / tau for j in rivals])[rivals.index(i)])

    def vlprox(self, s: list[float], t: list[float], y: int, i: int) -> float:
        tau, bank = self.params.get("tau", 0.07), self.rows("bank")
        best = sorted(range(len(bank)), key=lambda c: -cosine(t, bank[c]))[
            : self.params.get("k", 256)
        ]
        p, q = (softmax([cosine(vector, bank[c]) / tau for c in best]) for vector in (t, s))
        return divergence(p, q)

    def text_soft_ce(self, s: list[float], t: list[float], y: int, i: int) -> float:
        return self._soft(
            *([cosine(vector, row) for row in self.rows("bank")] for vector in (s, t))
        )

    def visual_soft_ce(self, s: list[float], t: list[float], y: int, i: int) -> float:
        said, told = (
            [dot(unit_list(vector), row) for row in self.rows("visual_bank")] for vector in (s, t)
        )
        if self.params.get("self_slot", True):
            said, told = [cosine(s, t), *said], [1.0, *told]
        return self._soft(said, told)

    def _soft(self, said: list[float], told: list[float]) -> float:
        q = softmax([value / self.params.get("tau_student", 0.2) for value in said])
        p = softmax([value / self.params.get("tau_teacher", 0.01) for value in told])
        return -sum(a * math.log(b) for a, b in zip(p, q, strict=True))

    def domain_rel(self, s: list[float], t: list[float], y: int, i: int) -> float:
        anchors = [domain[y] for domain in self.rows("domain_bank")]
        said, told = (
            softmax([cosine(v, anchor) for anchor in anchors]) for v in (s, self.rows("bank")[y])
        )
        squares = [(a - b) ** 2 for a, b in zip(said, told, strict=True)]
        return float(self.params.get("factor", 10.0) * sum(squares) / len(squares))


def unit_list(vector: list[float]) -> list[float]:
    length = math.sqrt(dot(vector, vector))
    return [value / length for value in vector]


def by_hand(name: str, s: Rows, z: Rows, batch: Batch, **params: Any) -> list[float]:
    """One value per image."""
    reference = Reference(s, z, batch, params)
    return [reference.value(name, i) for i in range(len(s))]


CASES: list[tuple[str, dict[str, Any]]] = [
    ("ce", {}),
    ("cos_img", {}),
    ("cos_text", {}),
    ("text_ce", {}),
    ("text_ce", {"tau": 0.5}),
    ("logit_kd", {}),
    ("logit_kd", {"temperature": 1.5}),
    ("pseudo_ce", {"threshold": 0.0}),
    ("pseudo_ce", {"threshold": 0.5}),
    ("feat_mse", {}),
    ("feat_mse", {"normed": True}),
    ("im_nce", {}),
    ("im_nce", {"tau": 0.3, "both_ways": False}),
    ("im_nce", {"metric": "distance"}),
    ("caption_nce", {}),
    ("caption_nce", {"tau": 1.0, "same_class_mask": False}),
    ("vlprox", {}),
    ("vlprox", {"k": 2, "tau": 0.4}),
    ("text_soft_ce", {}),
    ("text_soft_ce", {"tau_student": 0.5, "tau_teacher": 0.3}),
    ("visual_soft_ce", {}),
    ("visual_soft_ce", {"self_slot": False, "tau_teacher": 0.2}),
    ("domain_rel", {}),
    ("domain_rel", {"factor": 1.0}),
]
