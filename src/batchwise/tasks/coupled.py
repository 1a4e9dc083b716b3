"""Losses that couple the examples of a batch: the loss of an example depends on all others."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchwise.arguments import typed
from batchwise.ranges import PositiveFloat

Pairs = Tensor | tuple[Tensor, Tensor]
"""One loss per example [B], or the losses and their weights."""


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine similarity of each embedding [N, D] with each [M, D], [N, M]."""
    return F.normalize(first, dim=1) @ F.normalize(second, dim=1).T


def info_nce(first: Tensor, second: Tensor, scale: float | Tensor) -> Tensor:
    """Return the symmetric InfoNCE loss of each pair, [B]: each half must find the other among all B.

    With s_ij = scale * cos(first_i, second_j), the loss of pair i is

        -1/2 log( exp s_ii / sum_j exp s_ij ) - 1/2 log( exp s_ii / sum_j exp s_ji )

    van den Oord et al. 2018 (arXiv 1807.03748, equation 4); symmetric as in CLIP, Radford et al. 2021 (arXiv
    2103.00020, figure 3).

    Args:
        first: embeddings [B, D].
        second: embeddings [B, D]; row i belongs to row i of `first`.
        scale: 1 / temperature.
    """
    scores = scale * cosine(first, second)
    own = scores.diagonal()
    return (scores.logsumexp(1) + scores.logsumexp(0)) / 2 - own


def sup_con(embeddings: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the supervised contrastive loss of each anchor, and whether it counts, [M].

    With s_ij = cos(z_i, z_j) / temperature, and P(i) all others with the label of anchor i,

        L_i = -1 / |P(i)| sum_{p in P(i)} log( exp s_ip / sum_{a != i} exp s_ia )

    Khosla et al. 2020 (arXiv 2004.11362, equation 2, L_out). An anchor whose P(i) is empty has no loss and does not
    count. If each label has two rows, which are views of one example, this is NT-Xent of SimCLR, Chen et al. 2020
    (arXiv 2002.05709, equation 1).

    Args:
        embeddings: [M, D].
        labels: whole numbers [M].
        temperature: above 0.
    """
    scores = cosine(embeddings, embeddings) / temperature
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    positive = (labels[:, None] == labels) & ~own
    # A finite number, because the gradient of a sum that is empty would be nan.
    others = scores.masked_fill(own, torch.finfo(scores.dtype).min)
    logs = scores - others.logsumexp(1, keepdim=True)
    count = positive.sum(1)
    losses = -torch.where(positive, logs, 0).sum(1) / count.clamp(min=1)
    return losses, (count > 0).to(losses)


def batch_hard(embeddings: Tensor, labels: Tensor, margin: float | None) -> tuple[Tensor, Tensor]:
    """Return the batch-hard triplet loss of each anchor, and whether it counts, [M].

    With Euclidean distances d, the loss of anchor a is

        max(0, margin + max_p d(a, p) - min_n d(a, n))

    over all others p with its label and all n with another label. Without a margin it is log(1 + exp(max_p - min_n)).
    Hermans et al. 2017 (arXiv 1703.07737, equation 5 and section 2). An anchor without a p or without an n does not
    count.

    Args:
        embeddings: [M, D].
        labels: whole numbers [M].
        margin: in the unit of the distances; None: the soft margin.
    """
    distances = euclidean(embeddings, embeddings)
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    furthest = distances.masked_fill(~positive, 0).amax(1)
    nearest = distances.masked_fill(same, torch.finfo(distances.dtype).max).amin(1)
    difference = furthest - nearest
    losses = F.softplus(difference) if margin is None else (margin + difference).relu()
    return losses, (positive.any(1) & ~same.all(1)).to(losses)


def euclidean(first: Tensor, second: Tensor) -> Tensor:
    """Return the Euclidean distance of each embedding [N, D] to each [M, D], [N, M]."""
    # By differences: products of matrices are faster, and lose small distances in the rounding.
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def retrieved(
    embeddings: tuple[Tensor, ...],
    targets: Any,
    by_target: bool = False,
    similarity: Callable[[Tensor, Tensor], Tensor] = cosine,
) -> tuple[Tensor, Tensor]:
    """Return whether the most similar one is a right one, from 0 to 1, and the weight of the answer, [B].

    Of several embeddings of an example, the first must find the second among all B, and the second the first; the
    answer is the mean of both. By target, or with one embedding, the first embedding of another example must have the
    same target; an example whose target no other has does not count.

    Args:
        embeddings: [B, D] each.
        targets: class numbers [B]; of other targets, nothing counts.
        by_target: ask for the target, even if there are several embeddings.
        similarity: of each of [N, D] with each of [M, D].
    """
    first, count = embeddings[0], len(embeddings[0])
    if len(embeddings) > 1 and not by_target:
        scores, own = similarity(first, embeddings[1]), torch.arange(count, device=first.device)
        found = (scores.argmax(1) == own).to(scores) + (scores.argmax(0) == own).to(scores)
        return found / 2, torch.ones_like(found)
    if not isinstance(targets, Tensor) or targets.ndim != 1:
        return first.new_zeros(count), first.new_zeros(count)
    scores = similarity(first, first)
    scores.fill_diagonal_(-math.inf)
    others = (targets[:, None] == targets).sum(1) > 1
    return (targets[scores.argmax(1)] == targets).to(scores), others.to(scores)


class CoupledLoss(nn.Module, ABC):
    """A loss over the embeddings of a whole batch. A subclass gives one loss per example, in `forward`."""

    views = 1
    """Embeddings of each example that it needs at least."""
    by_target = False
    """Whether examples with the same target belong together; else only embeddings of the same example do."""

    @abstractmethod
    def forward(self, embeddings: tuple[Tensor, ...], targets: Any) -> Pairs:
        """Return one loss per example [B], or losses and weights, from embeddings [B, D] and the targets."""

    def similarity(self, first: Tensor, second: Tensor) -> Tensor:
        """Return how similar each embedding [N, D] is to each [M, D], [N, M]: what retrieval goes by."""
        return cosine(first, second)


class InfoNCE(CoupledLoss):
    """Two embeddings of each example must find one another: see `info_nce`. For pairs, such as image and text.

    Args:
        temperature: of the similarities; the first one, if it is learnt.
        learn_temperature: learn its logarithm, at most up to a scale of 100, as CLIP does.
    """

    views = 2

    @typed
    def __init__(self, temperature: PositiveFloat = 0.07, learn_temperature: bool = False) -> None:
        super().__init__()
        self.temperature = temperature
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learn_temperature else None

    def forward(self, embeddings: tuple[Tensor, ...], targets: Any) -> Tensor:
        """One loss per pair [B]."""
        if len(embeddings) != 2:
            raise ValueError(f"InfoNCE compares two embeddings of each example, but there are {len(embeddings)}")
        scale = 1 / self.temperature if self.log_scale is None else self.log_scale.exp().clamp(max=100)
        return info_nce(*embeddings, scale)


class SupCon(CoupledLoss):
    """Examples of the same class attract one another: see `sup_con`. All views of an example are anchors.

    The loss of an example is the mean over its views.

    Args:
        temperature: of the similarities.
        supervised: targets are class numbers [N]. False: each example is a class of its own, as in SimCLR.
    """

    @typed
    def __init__(self, temperature: PositiveFloat = 0.1, supervised: bool = True) -> None:
        super().__init__()
        self.temperature = temperature
        self.by_target, self.views = supervised, 1 if supervised else 2

    def forward(self, embeddings: tuple[Tensor, ...], targets: Any) -> tuple[Tensor, Tensor]:
        """One loss per example [B], and whether it counts."""
        labels = class_numbers(self, targets) if self.by_target else None
        return over_views(embeddings, labels, partial(sup_con, temperature=self.temperature))


class Triplet(CoupledLoss):
    """The furthest of its class must be nearer than the nearest of another: see `batch_hard`.

    Args:
        margin: by how much, in the unit of the embeddings; null: the soft margin.
    """

    by_target = True

    @typed
    def __init__(self, margin: PositiveFloat | None = None) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, embeddings: tuple[Tensor, ...], targets: Any) -> tuple[Tensor, Tensor]:
        """One loss per example [B], and whether it counts."""
        labels = class_numbers(self, targets)
        return over_views(embeddings, labels, partial(batch_hard, margin=self.margin))

    def similarity(self, first: Tensor, second: Tensor) -> Tensor:
        """Less is further."""
        return -euclidean(first, second)


def over_views(
    embeddings: tuple[Tensor, ...],
    labels: Tensor | None,
    losses: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Return the mean of the losses of an example's views, and whether they count, [B].

    Args:
        embeddings: a view each, [B, D].
        labels: class numbers [B]; None: each example is a class of its own.
        losses: gives losses and weights [M] for embeddings [M, D] and labels [M]. Views of an example count alike.
    """
    views, count = len(embeddings), len(embeddings[0])
    each = torch.arange(count, device=embeddings[0].device) if labels is None else labels
    each, weights = losses(torch.cat(embeddings), each.repeat(views))
    return each.view(views, count).mean(0), weights[:count]


def class_numbers(loss: nn.Module, targets: Any) -> Tensor:
    """Return the targets.

    Raises:
        ValueError: they are no class numbers [N].
    """
    if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
        kind = f"{targets.dtype} {list(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"{type(loss).__name__} goes by class, but the targets are {kind}: write class numbers [N]")
    return targets
