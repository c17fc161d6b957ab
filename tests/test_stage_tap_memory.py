"""What the stage tap keeps for backward, and what it allocates."""

import gc
import weakref

import pytest
import torch
from stage_tap_cases import FORMS, composed, raw_tap
from torch.utils._python_dispatch import TorchDispatchMode

from interflow_kernels import stage_tap
from interflow_kernels.testing import in_layout

pytestmark = pytest.mark.usefixtures("one_thread")  # small maps: the threads of PyTorch's own operators would mostly wait for each other


class SavedBytes:
    """Counts what autograd saves inside the block, each storage once."""

    def __enter__(self):
        self.storages = {}
        pack = lambda t: self.storages.setdefault(t.untyped_storage().data_ptr(), (t.untyped_storage().nbytes(), t)) and t  # noqa: E731
        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def total(self, without=()):
        kept = {key: size for key, (size, _) in self.storages.items()}
        return sum(size for key, size in kept.items() if key not in {t.untyped_storage().data_ptr() for t in without})


@FORMS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_mask_is_saved(dtype, layout, max_pool):
    for shape in ((2, 24, 10, 14), (3, 19, 9, 13)):
        u = in_layout(torch.randn(shape).to(dtype), layout).requires_grad_()
        shift = torch.randn(shape[1], requires_grad=True)
        with SavedBytes() as saved:
            stage_tap(u, shift, max_pool=max_pool)
        batch, channels, height, width = shape
        windows = batch * channels * ((height + 1) // 2) * ((width + 1) // 2)
        bits = channels * ((height * width + 7) // 8) if layout == "contiguous" else height * width * ((channels + 7) // 8)
        assert saved.total() == (windows if max_pool else batch * bits)
        assert len(saved.storages) == 1


@FORMS
def test_u_can_be_freed(max_pool):
    u = torch.randn(2, 8, 6, 6, requires_grad=True) * 1
    gone = weakref.ref(u)
    outputs = [t for t in stage_tap(u, torch.randn(8, requires_grad=True), max_pool=max_pool) if t is not None]
    del u
    gc.collect()
    assert gone() is None
    sum(t.sum() for t in outputs).backward()


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 14), (torch.float32, 20)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_memory_of_vgg16(dtype, share, layout):
    """All five boundaries of VGG-16 at 224 pixels, the last without max-pool; the pooled maps live on either way."""
    eager = fused = 0
    for channels, side in ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14)):
        x = in_layout(torch.randn(1, channels, side, side).to(dtype), layout).requires_grad_()
        u, shift, max_pool = x * 1, torch.randn(channels, requires_grad=True), side > 14
        with SavedBytes() as saved:
            v, m = composed(u, shift, max_pool)
            v.mean((2, 3), dtype=torch.float32)
        eager += saved.total(without=[m] if max_pool else [])
        with SavedBytes() as saved:
            m, _ = stage_tap(u, shift, max_pool=max_pool)
        fused += saved.total(without=[m] if max_pool else [])
    assert 0 < fused <= eager / share, (eager, fused, eager / fused)


class MaskBytes(TorchDispatchMode):
    """Sizes of the masks that the operator returns inside the block."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is raw_tap:
            self.sizes.append(result[2].numel())
        return result


@FORMS
def test_inference_writes_no_mask(max_pool):
    u, shift = torch.randn(2, 8, 6, 6), torch.randn(8)
    size = 2 * 8 * 9 if max_pool else 2 * 8 * 5

    def masks(u, shift):
        with MaskBytes() as seen:
            stage_tap(u, shift, max_pool=max_pool)
        return seen.sizes

    assert masks(u, shift) == [0]
    with torch.no_grad():
        assert masks(u.clone().requires_grad_(), shift) == [0]
    with torch.inference_mode():
        assert masks(u, shift) == [0]
    assert masks(u.clone().requires_grad_(), shift) == [size]
    assert masks(u, shift.clone().requires_grad_()) == [size]


def test_backward_allocates_nothing_beside_du():
    for layout in ("contiguous", "channels_last"):
        u = in_layout(torch.randn(2, 64, 64, 64), layout).requires_grad_()
        m, p = stage_tap(u, torch.randn(64, requires_grad=True))
        with torch.profiler.profile(profile_memory=True) as profile:
            torch.autograd.backward([m.sum(), p.sum()])
        sizes = [event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > u.nbytes / 50]
        assert sum(sizes) <= u.nbytes + 4096, sizes
