"""Losses and weights that are no longer finite: noticed by all processes at once, and told in one sentence."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..processes import EveryProcessError, gathered


class NotFiniteError(EveryProcessError):
    """A training whose losses or weights have stopped being finite."""


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first floating-point tensor that has an infinite or undefined value, or None."""
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point() and _local(tensor).numel()]
    if not names:
        return None
    good = torch.stack([torch.isfinite(_local(tensors[name])).all() for name in names]).tolist()
    return None if all(good) else names[good.index(False)]


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def require_finite_weights(module: LightningModule) -> None:
    """NotFiniteError where a process has a weight that is not finite: such a model is not saved."""
    broken = first_not_finite(dict(chain(module.named_parameters(), module.named_buffers())))
    found = next((name for name in gathered(broken) if name is not None), None)
    if found is not None:
        raise NotFiniteError(f"{found} is not finite after step {module.global_step}: no checkpoint of it is written, the one before stays; lower --model.lr")


class LossGuard:
    """Stops a training at the first loss that is not finite, or leaves out the batch.

    Every process learns of it before the optimiser's step, so all do the same. To stop, the verdict is read after
    backward has been queued: a GPU does not wait for it. To leave out, it is read before backward, and the running
    statistics of the norms are set back too; that costs a copy of them and a wait in each step.

    GradScaler's overflows are no errors: they are in the scaled gradients, this looks at the loss.

    Args:
        limit: how many batches in a row may be left out; 0 stops at the first.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"skip_nonfinite must be at least 0, got {limit}")
        self.limit = limit
        self.in_a_row = 0
        self.left_out = 0
        """Batches left out in this epoch."""
        self._buffers: list[Tensor] = []
        self._seen: tuple[Tensor, Tensor, int] | None = None  # images, loss, number of the batch
        self._verdict: Tensor | None = None  # 1-element, above 0 where a process has a bad loss
        self._arrived: torch.cuda.Event | None = None

    def before_step(self, module: LightningModule) -> None:
        """Call it before the model sees the batch."""
        if self.limit:
            self._buffers = [buffer.clone() for buffer in module.buffers()]

    def leaves_out(self, module: LightningModule, x: Tensor, loss: Tensor, batch_idx: int) -> bool:
        """Call it with the batch's loss; True where the batch must not be used."""
        self._note(module, x, loss, batch_idx)
        if not self.limit:
            return False
        if not self._bad():
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        self.left_out += 1
        if self.in_a_row > self.limit:
            self._stop(module, f"after {self.limit} batches in a row were left out, the training loss")
        with torch.no_grad():
            for buffer, old in zip(module.buffers(), self._buffers, strict=True):
                buffer.copy_(old)
        self._seen = self._verdict = None
        return True

    def after_backward(self, module: LightningModule) -> None:
        """Call it after backward; EveryProcessError where the loss was not finite."""
        if self._verdict is not None and self._bad():
            self._stop(module, "the training loss")
        self._seen = self._verdict = None

    def _note(self, module: LightningModule, x: Tensor, loss: Tensor, batch_idx: int) -> None:
        self._seen = (x, loss.detach(), batch_idx)
        verdict = (~torch.isfinite(loss.detach())).float().reshape(1)
        verdict = module.trainer.strategy.reduce(verdict, reduce_op="sum")
        if verdict.is_cuda:
            self._verdict = torch.empty(1, pin_memory=True).copy_(verdict, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._verdict, self._arrived = verdict, None

    def _bad(self) -> bool:
        assert self._verdict is not None
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._verdict.item() > 0

    def _stop(self, module: LightningModule, what: str) -> None:
        assert self._seen is not None
        x, loss, batch_idx = self._seen
        mine = (
            None
            if torch.isfinite(loss)
            else f"{loss.item():g} at step {module.global_step} (epoch {module.current_epoch}, batch {batch_idx}): {_cause(module, x)}"
        )
        found = next(story for story in gathered(mine) if story is not None)
        way_out = "lower --model.lr" if self.limit else "lower --model.lr, or leave such batches out with --model.skip_nonfinite 3"
        raise NotFiniteError(f"{what} is {found}; {way_out}")


@torch.no_grad()
def _cause(module: LightningModule, x: Tensor) -> str:
    """Where the values that are not finite come from, as far as the scores tell."""
    model: Any = module.model
    broken = first_not_finite(dict(model.named_parameters()))
    if broken is not None:
        why = f"the weight {broken} is not finite"
    elif not torch.isfinite(x).all():
        why = "the images are not finite"
    else:
        why = "weights and images are finite"
    if not model.has_branches:
        return why
    with module.trainer.precision_plugin.forward_context():
        branches = model.forward_branches(x)[1]
    bad = (~torch.isfinite(branches)).any(2).any(0).tolist()  # [n]
    if not any(bad):
        return f"the scores of all {len(bad)} branches are finite, {why}"
    return f"branch {bad.index(True) + 1} of {len(bad)} is the first with scores that are not finite, {why}"


class EvaluationGuard:
    """Finds the first batch of an evaluation whose loss or branches are not finite, without a wait in each step."""

    _NONE = float("inf")

    def __init__(self) -> None:
        self._first: Tensor | None = None  # [1 + n], number of the first bad batch for the loss and for each branch

    def update(self, batch_idx: int, loss: Tensor, branches: Tensor | None) -> None:
        """Takes in a batch: its loss, and Z [B, n, K] where the head has branches."""
        bad = ~torch.isfinite(loss.detach()).reshape(1)
        if branches is not None:
            bad = torch.cat([bad, (~torch.isfinite(branches.detach())).any(2).any(0)])
        if self._first is None:
            self._first = torch.full(bad.shape, self._NONE, device=loss.device)
        self._first = torch.minimum(self._first, torch.where(bad, float(batch_idx), self._NONE))

    def require_finite(self, module: LightningModule, part: str) -> None:
        """EveryProcessError, with batch and branch, where a process had a loss that was not finite."""
        if self._first is None:
            return
        first = torch.as_tensor(module.trainer.strategy.reduce(self._first, reduce_op="min")).tolist()
        if first[0] == self._NONE:
            return
        branches = [i for i, batch in enumerate(first[1:], 1) if batch <= first[0]]
        where = f", branch {branches[0]} of {len(first) - 1} is the first with scores that are not finite" if branches else ""
        when = "before training" if module.trainer.sanity_checking else f"after step {module.global_step} (epoch {module.current_epoch})"
        raise NotFiniteError(f"the {part} loss {when} is not finite in batch {int(first[0])}{where}; no checkpoint is written of it: lower --model.lr")
