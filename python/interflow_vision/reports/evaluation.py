"""What a trained network gets right and wrong, gathered batch by batch in memory that does not grow with the number of images."""

import heapq
import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .contribution import Contribution

BINS = 15
"""Of confidence, for calibration."""


@dataclass(order=True)
class Mistake:
    """A wrong answer. confidence: the probability of the wrong class; image: [C, H, W] in [0, 1]."""

    confidence: float
    number: int
    target: int = field(compare=False)
    answer: int = field(compare=False)
    image: Tensor = field(compare=False)


class Evaluation:
    """Confusion matrix, calibration, branches by class, contributions by class, and the most confident mistakes.

    Args:
        classes: K.
        branches: n; 0 for heads without.
        mistakes: how many are kept.

    Shapes: confusion [K, K] counts images of a class (row) by answer (column); right [n + 1, K] those of a class that each branch alone, and
    last the model, gets right; alone [n] those that one branch gets right and no other does; rescued [n] those that a branch gets right and
    the model wrong; calibration [3, BINS] has in each bin of confidence the images, the sum of confidences, and the right answers.
    """

    def __init__(self, classes: int, branches: int, mistakes: int = 24) -> None:
        self.classes, self.branches, self.kept = classes, branches, mistakes
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)
        self.right = torch.zeros(branches + 1, classes, dtype=torch.int64)
        self.alone = torch.zeros(branches, dtype=torch.int64)
        self.rescued = torch.zeros(branches, dtype=torch.int64)
        self.calibration = torch.zeros(3, BINS, dtype=torch.float64)
        self.top5 = 0
        self.contribution = Contribution()
        self._mistakes: list[Mistake] = []
        self._numbers = itertools.count()

    def update(self, logits: Tensor, target: Tensor, images: Tensor, branches: Tensor | None = None, terms: Tensor | None = None) -> None:
        """Adds a batch: logits [B, K], classes [B], images [B, C, H, W] in [0, 1]; Z and its terms in y [B, n, K] where the head has them."""
        target = target.cpu()
        probability, answer = (each.cpu() for each in logits.float().softmax(1).max(1))
        self.confusion += torch.bincount(target * self.classes + answer, minlength=self.classes**2).view(self.classes, self.classes)
        self.top5 += int((logits.topk(min(5, self.classes)).indices.cpu() == target[:, None]).sum())
        good = answer == target
        each = torch.stack([*([] if branches is None else (branches.argmax(2).cpu() == target[:, None]).unbind(1)), good])  # [n + 1, B]
        self.right.index_add_(1, target, each.long())
        if branches is not None:
            own = each[:-1]
            self.alone += (own & (own.sum(0) == 1)).sum(1)
            self.rescued += (own & ~good).sum(1)
        if terms is not None:
            self.contribution.update(terms)
        place = (probability * BINS).long().clamp(0, BINS - 1)
        for row, values in enumerate((torch.ones_like(probability), probability, good)):
            self.calibration[row].index_add_(0, place, values.double())
        self._keep(probability, answer, target, images)

    def _keep(self, probability: Tensor, answer: Tensor, target: Tensor, images: Tensor) -> None:
        wrong = (answer != target).nonzero().flatten()
        for i in wrong[probability[wrong].argsort(descending=True)][: self.kept].tolist():
            found = Mistake(float(probability[i]), -next(self._numbers), int(target[i]), int(answer[i]), images[i].detach().cpu().clone())
            if len(self._mistakes) < self.kept:
                heapq.heappush(self._mistakes, found)
            elif found > self._mistakes[0]:
                heapq.heapreplace(self._mistakes, found)

    @property
    def images(self) -> int:
        """How many were evaluated."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Fraction of right answers."""
        return int(self.confusion.diagonal().sum()) / max(1, self.images)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: sum over bins of n_bin / N |accuracy - confidence|. Source: Guo et al., arXiv 1706.04599."""
        _, confidence, good = self.calibration
        return float((good - confidence).abs().sum()) / max(1, self.images)

    def mistakes(self) -> list[Mistake]:
        """The most confident first."""
        return sorted(self._mistakes, reverse=True)

    def per_class(self) -> list[tuple[int, float, float, float]]:
        """Of each class its images, precision, recall and F1; NaN where nothing was to divide by."""
        counts, answered, good = self.confusion.sum(1), self.confusion.sum(0), self.confusion.diagonal()
        precision, recall = good / answered, good / counts
        return list(zip(counts.tolist(), precision.tolist(), recall.tolist(), (2 * good / (counts + answered)).tolist(), strict=True))

    def confused(self, most: int = 10) -> list[tuple[int, int, int]]:
        """The pairs (class, wrong answer, images) that come most often."""
        off = self.confusion.clone().fill_diagonal_(0).flatten()
        counts, places = off.topk(min(most, off.numel()))
        return [(place // self.classes, place % self.classes, count) for count, place in zip(counts.tolist(), places.tolist(), strict=True) if count]
