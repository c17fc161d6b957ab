"""How much each branch of an Interflow head contributes to the logits."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from interflow_kernels import InterflowHead, reference


def branch_terms(head: InterflowHead, branches: Tensor) -> Tensor:
    """The term of each branch in y: A_ik Z_bik; for "gated" softmax_i(sum_j M_ij Z_bjk + c_i) Z_bik.

    branches: Z [B, n, K] -> [B, n, K], whose sum over the branches is y without the attention's constant.
    """
    if head.attention == "gated":
        assert head.attention_bias is not None
        return reference.gates(branches, _whole(head.attention_weight), _whole(head.attention_bias)) * branches
    return _whole(head.stage_weights()) * branches


def _whole(tensor: Tensor) -> Tensor:
    """The tensor of which processes have parts; all must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Contribution:
    """The std over samples of each branch's term in y, averaged over the classes, gathered batch by batch.

        contribution_i = mean_k std_b(term[b, i, k])

    In units of a logit. The raw attention weights say nothing of the kind: they trade against the scale of W_i.
    Sums are kept in fp64 (fp32 on devices without), of the terms less the first sample's, which loses no digits.
    """

    def __init__(self) -> None:
        self.count = 0
        self.origin: Tensor | None = None  # [n, K]
        self.sums: Tensor | None = None  # [2, n, K]: of the differences, of their squares

    def update(self, terms: Tensor) -> None:
        """Adds the terms of a batch, [B, n, K]."""
        terms = terms.detach().to(torch.float32 if terms.device.type == "mps" else torch.float64)
        if self.origin is None or self.sums is None:
            self.origin = terms[0].clone()  # a view would keep the whole batch
            self.sums = torch.zeros(2, *terms.shape[1:], dtype=terms.dtype, device=terms.device)
        difference = terms - self.origin
        self.count += len(terms)
        self.sums += torch.stack([difference.sum(0), difference.square().sum(0)])

    def compute(self) -> Tensor:
        """[n]; as torch.std, with the divisor N - 1, so at least two samples are needed (one gives zeros)."""
        return self.by_class().mean(1)

    def by_class(self) -> Tensor:
        """The same before the mean over classes: [n, K]."""
        if self.sums is None:
            raise ValueError("no batch was added yet")
        total, squares = self.sums
        variance = (squares - total.square() / self.count) / max(self.count - 1, 1)
        return variance.clamp(min=0).sqrt()
