"""AuxiliaryHeads: a classifier a stage, trained beside the last one; what Interflow is compared with."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _options, _validate, reference


class AuxiliaryHeads(nn.Module):
    """GoogLeNet's way, as the comparison: one classifier a stage, trained together, only the last one used afterwards.

        z_i = flatten(adaptive_avg_pool2d(x_i, 1)) W_i^T + b_i;   loss = CE(z_n) + weight * sum_{i<n} CE(z_i)

    Args:
        in_channels: C_i of each stage.
        num_classes: K.
        weight: of each auxiliary loss (GoogLeNet: 0.3).
        layout: as InterflowHead.

    Shapes: training, forward gives all scores [B, n, K]; in eval mode z_n [B, K].
    Source: Szegedy et al., "Going deeper with convolutions", 2015. Raises ValueError or TypeError on arguments that do not fit.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        weight: float = 0.3,
        *,
        layout: str | Sequence[str] = "NCHW",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = _options.positive_ints(in_channels, "in_channels")
        _options.stage_count(len(self.in_channels), "in_channels")
        self.num_classes = _options.class_count(num_classes)
        self.layout = _options.layouts(layout, len(self.in_channels))
        self.loss_weight = _options.loss_weight(weight)
        factory = _options.factory(device, dtype)
        _options.weight_size(self.in_channels, self.num_classes)
        self.classifiers = nn.ModuleList(nn.Linear(c, self.num_classes, **factory) for c in self.in_channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """n features -> Z [B, n, K] while training, z_n [B, K] in eval mode."""
        return self.forward_branches(features)[1] if self.training else self._scores(self._checked(features), -1)

    def forward_branches(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """n features -> z_n [B, K] and Z [B, n, K], in either mode."""
        checked = self._checked(features)
        branches = torch.stack([self._scores(checked, i) for i in range(len(checked))], 1)
        return branches[:, -1], branches

    def loss(self, branches: Tensor, target: Tensor) -> Tensor:
        """CE(z_n) + weight * sum over i < n of CE(z_i), from Z [B, n, K] and target [B] (class indices) or [B, K]; scalar."""
        _validate.scores(branches, target, len(self.in_channels), self.num_classes)
        losses = [F.cross_entropy(z, target) for z in branches.unbind(1)]
        return losses[-1] + self.loss_weight * sum(losses[:-1], losses[-1].new_zeros(()))

    def _checked(self, features: Sequence[Tensor]) -> list[Tensor]:
        return _validate.features(features, _first_parameter(self.classifiers[0]), len(self.in_channels), (1, 1), self.layout, self.in_channels)

    def _scores(self, features: list[Tensor], i: int) -> Tensor:
        classifier = self.classifiers[i]
        return classifier(reference.pooled_stage(features[i], (1, 1)).to(_first_parameter(classifier).dtype))

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, num_classes={self.num_classes}, weight={self.loss_weight}"


def _first_parameter(classifier: nn.Module) -> Tensor:
    """For dtype and device: an nn.Linear's weight, or whatever a wrapper holds first; a computed weight is not computed for it."""
    return next(classifier.parameters())
