"""The profile of whole networks: kinds and names of kernels, what is taken from the profiler's events, the page, and the command on a tiny network."""

import json
from types import SimpleNamespace

import pytest
import torch
from bench_modules import BENCH, CPU, room

kernels, page_of, profiler = room("pages.kernels"), room("pages.profile"), room("harness.profiler")
command, networks, pages = room("profile_networks"), room("networks"), room("pages.profile_page")
GPU = torch.device("cuda", 0)
ROOT = BENCH.parent

CONVOLUTION, BETWEEN, NORM, TAP, HEAD, LOSS, OPTIMIZER, OTHER = kernels.KINDS
FORWARD = ("aten::cudnn_convolution", "aten::_convolution", "aten::convolution", "aten::conv2d")
BACKWARD = ("aten::convolution_backward", "ConvolutionBackward0", "autograd::engine::evaluate_function: ConvolutionBackward0")
POOLED = ("aten::max_pool2d_with_indices_backward", "MaxPool2DWithIndicesBackward0", "autograd::engine::evaluate_function: MaxPool2DWithIndicesBackward0")
STEP = ("Optimizer.step#SGD.step",)
ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<4, {}, std::array<char*, 2ul> >(int, {}, std::array<char*, 2ul>)"
ADD = ELEMENTWISE.format(*["at::native::CUDAFunctor_add<c10::BFloat16>"] * 2)
MUL = ELEMENTWISE.format(*["at::native::BinaryFunctor<float, float, float, at::native::binary_internal::MulFunctor<float> >"] * 2)
FILL = ELEMENTWISE.format(*["at::native::FillFunctor<c10::BFloat16>"] * 2)
COPY = ELEMENTWISE.format(*["at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda(float)#1}"] * 2)
BROADCAST = (
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::CUDAFunctor_add<c10::BFloat16> >"
    "(at::TensorIteratorBase&, at::native::CUDAFunctor_add<c10::BFloat16> const&)::{lambda(int)#1}>(int, at::native::gpu_kernel_impl_nocast<...>)"
)
RELU = ELEMENTWISE.format(*["at::native::(anonymous namespace)::launch_clamp_scalar(at::TensorIteratorBase&, c10::Scalar)::{lambda(c10::BFloat16)#1}"] * 2)
THRESHOLD = ELEMENTWISE.format(*["at::native::(anonymous namespace)::threshold_kernel_impl<c10::BFloat16>::{lambda(c10::BFloat16, c10::BFloat16)#1}"] * 2)
MEAN = (
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<c10::BFloat16, at::native::MeanOps<c10::BFloat16, float, float, c10::BFloat16>, "
    "unsigned int, c10::BFloat16, 4, 4> >(at::native::ReduceOp<c10::BFloat16>)"
)
SUM = "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float, at::native::func_wrapper_t<float, at::native::sum_functor<float>::operator()> > >()"
POOL = "void at::native::(anonymous namespace)::max_pool_forward_nhwc<c10::BFloat16, int>(c10::BFloat16 const*, int, long, long, c10::BFloat16*, long*)"
POOL_NCHW = "void at::native::(anonymous namespace)::max_pool_forward_nchw<c10::BFloat16, c10::BFloat16>(int, c10::BFloat16 const*, long, long)"
POOL_BACKWARD = "void at::native::(anonymous namespace)::max_pool_backward_nhwc<c10::BFloat16, float>(c10::BFloat16 const*, long const*, int, long)"
FPROP = "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1_execute_segment_k_off_kernel__5x_cudnn"
DGRAD = "sm90_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x256x64_warpgroupsize1x2x1_g1_execute_segment_k_off_kernel__5x_cudnn"
CUTLASS = "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816wgrad_optimized_bf16_128x128_32x4_nhwc_align8>(cutlass_tensorop_bf16_s16816wgrad::Params)"
ENGINE = "void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true, (cudnnKernelDataType_t)2>(cudnn::params)"
NORMS = "void cudnn::bn_fw_tr_1C11_kernel_NCHW<__nv_bfloat16, float, int, 512, true, 1, true>(cudnnTensorStruct, __nv_bfloat16 const*)"
ATEN_NORM = "void at::native::batch_norm_transform_input_channels_last_kernel<c10::BFloat16, float, float, 4>(c10::BFloat16 const*, float const*)"
GEMM = "nvjet_tst_64x8_64x16_4x1_v_bz_TNT"
SPLIT = "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, true, true, false>(cublasLt::cublasSplitKParams)"
FOREACH = (
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::TensorListMetadata<2>, "
    "at::native::(anonymous namespace)::BinaryOpListAlphaFunctor<c10::BFloat16, 2, 2, 0>, std::plus<float>, float>(...)"
)
SOFTMAX = "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, c10::BFloat16, float, float, at::native::LogSoftMaxForwardEpilogue>(float*)"
OURS_TAP = "void interflow::(anonymous namespace)::tap_pixels<__nv_bfloat16, 8, true, true>(interflow::TapParams)"
OURS_TAP_BACKWARD = "void interflow::tap_planes_backward<__half, 8, false>(interflow::TapBackwardParams)"
OURS_HEAD = "void interflow::(anonymous namespace)::interflow_head_forward_kernel<__nv_bfloat16, 16>(interflow::HeadForward)"

KINDS = [
    # name, operators it ran in (innermost first), kind, short name
    (FPROP, FORWARD, CONVOLUTION, "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_..._5x_cudnn"),
    (DGRAD, BACKWARD, CONVOLUTION, "sm90_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x256x64_..._5x_cudnn"),
    (CUTLASS, BACKWARD, CONVOLUTION, "cutlass_tensorop_bf16_s16816wgrad_optimized_bf16_128x128_32x4_nhwc_align8"),
    (ENGINE, FORWARD, CONVOLUTION, "nchwToNhwcKernel"),
    (COPY, ("aten::copy_", "aten::clone", "aten::contiguous", *FORWARD), CONVOLUTION, "vectorized_elementwise_kernel"),
    (GEMM, FORWARD, CONVOLUTION, GEMM),  # a convolution that cuDNN left to a product
    (BROADCAST, ("aten::add_", *FORWARD[1:]), BETWEEN, "elementwise_kernel"),  # its bias
    (SUM, ("aten::sum", *BACKWARD), BETWEEN, "reduce_kernel"),  # and its gradient
    (RELU, ("aten::clamp_min_", "aten::relu_"), BETWEEN, "vectorized_elementwise_kernel"),
    (THRESHOLD, ("aten::threshold_backward", "ReluBackward0"), BETWEEN, "vectorized_elementwise_kernel"),
    (POOL, ("aten::max_pool2d_with_indices", "aten::max_pool2d"), BETWEEN, "max_pool_forward_nhwc"),
    (POOL_NCHW, ("aten::max_pool2d_with_indices", "aten::max_pool2d"), BETWEEN, "max_pool_forward_nchw"),
    (POOL_BACKWARD, POOLED, BETWEEN, "max_pool_backward_nhwc"),
    (FILL, ("aten::fill_", "aten::zero_", *POOLED), BETWEEN, "vectorized_elementwise_kernel"),
    ("Memset (Device)", ("aten::zero_", *POOLED), BETWEEN, "Memset (Device)"),
    (ADD, ("aten::add_", POOLED[2]), BETWEEN, "vectorized_elementwise_kernel"),  # two gradients of one map
    (MEAN, ("aten::mean", "aten::adaptive_avg_pool2d"), BETWEEN, "reduce_kernel"),
    (BROADCAST, ("aten::div", "MeanBackward1"), BETWEEN, "elementwise_kernel"),
    (NORMS, ("aten::cudnn_batch_norm", "aten::batch_norm"), NORM, "bn_fw_tr_1C11_kernel_NCHW"),
    (ATEN_NORM, ("aten::native_batch_norm",), NORM, "batch_norm_transform_input_channels_last_kernel"),
    (GEMM, ("aten::addmm", "aten::linear"), HEAD, GEMM),
    (SPLIT, ("aten::mm", "AddmmBackward0"), HEAD, "splitKreduce_kernel"),
    (SUM, ("aten::sum", "autograd::engine::evaluate_function: AddmmBackward0"), HEAD, "reduce_kernel"),
    (SOFTMAX, ("aten::_log_softmax", "aten::log_softmax", "aten::cross_entropy_loss"), LOSS, "cunn_SoftMaxForward"),
    ("Memset (Device)", ("aten::zero_", "aten::nll_loss_backward", "NllLossBackward0"), LOSS, "Memset (Device)"),
    (COPY, ("aten::copy_", "aten::native_batch_norm_backward", "NativeBatchNormBackward0"), NORM, "vectorized_elementwise_kernel"),
    (MUL, ("aten::mul",), BETWEEN, "vectorized_elementwise_kernel"),
    (FOREACH, ("aten::_foreach_add_", *STEP), OPTIMIZER, "multi_tensor_apply_kernel"),
    (ADD, ("aten::add_", *STEP), OPTIMIZER, "vectorized_elementwise_kernel"),
    (OURS_TAP, ("interflow_kernels::stage_tap", "_Tap"), TAP, "tap_pixels"),
    (FILL, ("aten::fill_", "interflow_kernels::stage_tap_backward", "_TapBackward"), TAP, "vectorized_elementwise_kernel"),
    (OURS_HEAD, ("interflow_kernels::interflow_head", "_Head"), HEAD, "interflow_head_forward_kernel"),
    (COPY, ("aten::copy_", "aten::_to_copy", "aten::to"), OTHER, "vectorized_elementwise_kernel"),
    ("Memcpy HtoD (Pinned -> Device)", ("aten::copy_",), OTHER, "Memcpy HtoD (Pinned -> Device)"),
    # launched by no operator that the profiler knows
    (OURS_TAP, (), TAP, "tap_pixels"),
    (OURS_TAP_BACKWARD, (), TAP, "tap_planes_backward"),
    (OURS_HEAD, (), HEAD, "interflow_head_forward_kernel"),
    ("tap_pixels_backward", (), TAP, "tap_pixels_backward"),
    ("end_planes", (), TAP, "end_planes"),
    (
        "void interflow::end_pixels_backward<__half, true, true>(interflow::EndBackwardParams)",
        ("interflow_kernels::stage_end_backward",),
        TAP,
        "end_pixels_backward",
    ),
    ("head_tail", (), HEAD, "head_tail"),
    (FPROP, (), CONVOLUTION, "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_..._5x_cudnn"),
    (CUTLASS, (), CONVOLUTION, "cutlass_tensorop_bf16_s16816wgrad_optimized_bf16_128x128_32x4_nhwc_align8"),
    (NORMS, (), NORM, "bn_fw_tr_1C11_kernel_NCHW"),
    ("ampere_bf16_s16816gemm_bf16_64x64_ldg8_f2f_stages_64x5_tn", (), HEAD, "ampere_bf16_s16816gemm_bf16_64x64_ldg8_f2f_stages_64x5_tn"),
    (RELU, (), BETWEEN, "vectorized_elementwise_kernel"),
    (MEAN, (), BETWEEN, "reduce_kernel"),
    (FOREACH, (), OPTIMIZER, "multi_tensor_apply_kernel"),
    (COPY, (), OTHER, "vectorized_elementwise_kernel"),
    (SOFTMAX, (), LOSS, "cunn_SoftMaxForward"),
    # torch.compile's own
    (
        "triton_poi_fused_convolution_relu_3",
        ("triton_poi_fused_convolution_relu_3", "## Call CompiledFxGraph f4x ##"),
        BETWEEN,
        "triton_poi_fused_convolution_relu_3",
    ),
    ("triton_poi_fused_convolution_max_pool2d_with_indices_relu_5", (), BETWEEN, "triton_poi_fused_convolution_max_pool2d_with_indices_relu_5"),
    (
        "triton_red_fused_convolution_backward_threshold_backward_9",
        ("CompiledFunctionBackward",),
        BETWEEN,
        "triton_red_fused_convolution_backward_threshold_backward_9",
    ),
    ("triton_red_fused_convolution_mean_relu_7", (), BETWEEN, "triton_red_fused_convolution_mean_relu_7"),
    (
        "triton_red_fused__native_batch_norm_legit_functional_convolution_relu_2",
        (),
        NORM,
        "triton_red_fused__native_batch_norm_legit_functional_convolution_relu_2",
    ),
    ("triton_per_fused__log_softmax_nll_loss_forward_11", (), LOSS, "triton_per_fused__log_softmax_nll_loss_forward_11"),
    ("triton_tem_fused_addmm_4", (), HEAD, "triton_tem_fused_addmm_4"),
    ("triton_tem_fused_convolution_1", (), CONVOLUTION, "triton_tem_fused_convolution_1"),
    ("triton_poi_fused__to_copy_0", (), OTHER, "triton_poi_fused__to_copy_0"),
    ("## Call CompiledFxGraph f4x ##", ("## Call CompiledFxGraph f4x ##", "CompiledFunction"), BETWEEN, "CompiledFxGraph"),
    # a CPU's operators are names and operators in one
    ("aten::mkldnn_convolution", ("aten::mkldnn_convolution", *FORWARD[1:]), CONVOLUTION, "aten::mkldnn_convolution"),
    ("aten::convolution_backward", BACKWARD, CONVOLUTION, "aten::convolution_backward"),
    ("aten::add_", ("aten::add_", *STEP), OPTIMIZER, "aten::add_"),
    ("aten::add_", ("aten::add_", POOLED[2]), BETWEEN, "aten::add_"),
    ("aten::empty", ("aten::empty", "_TapBackward"), TAP, "aten::empty"),
    ("_HeadBackward", ("_HeadBackward",), HEAD, "_HeadBackward"),
    (STEP[0], STEP, OPTIMIZER, STEP[0]),
    (BACKWARD[2], BACKWARD[2:], CONVOLUTION, BACKWARD[2]),
]


@pytest.mark.parametrize(("name", "operators", "kind", "short"), KINDS, ids=[f"{i}-{row[3]}" for i, row in enumerate(KINDS)])
def test_kinds_and_names(name, operators, kind, short):
    assert kernels.kind(name, operators) == kind
    assert kernels.short(name) == short and len(kernels.short(name)) <= kernels.LONGEST


# --- what is taken from the profiler -----------------------------------------------------------------------------------
def event(name, parent=None, launched=(), own=0.0):
    """An operator's event, as torch.profiler would make it."""
    made = [SimpleNamespace(name=kernel, duration=us) for kernel, us in launched]
    return SimpleNamespace(name=name, cpu_parent=parent, kernels=made, self_cpu_time_total=own, device_type=torch.autograd.DeviceType.CPU)


def on_gpu(name, us, annotation=False):
    span = SimpleNamespace(elapsed_us=lambda: us)
    return SimpleNamespace(name=name, time_range=span, is_user_annotation=annotation, kernels=[], device_type=torch.autograd.DeviceType.CUDA)


def test_every_kernel_counts_once_and_ranges_not_at_all():
    step = event(STEP[0], launched=[(STEP[0], 9.0)])
    foreach = event("aten::_foreach_add_", step, [(FOREACH, 4.0)])
    conv = event("aten::cudnn_convolution", event("aten::conv2d"), [(FPROP, 10.0), (FPROP, 12.0)])
    device = [
        on_gpu(STEP[0], 9.0),
        on_gpu("a range", 50.0, annotation=True),
        on_gpu(FOREACH, 4.0),
        on_gpu(FPROP, 10.0),
        on_gpu(FPROP, 12.0),
        on_gpu("tap_pixels", 3.0),
    ]
    events = [step, foreach, conv, *device]
    assert len(profiler.device_events(events)) == 4
    found = {(e["name"], tuple(e["operators"])): (e["calls"], e["us"]) for e in profiler.entries(events, GPU, calls=2)}
    assert found == {
        (FPROP, ("aten::cudnn_convolution", "aten::conv2d")): (1, 11.0),
        (FOREACH, ("aten::_foreach_add_", STEP[0])): (0.5, 2.0),
        ("tap_pixels", ()): (0.5, 1.5),
    }


def test_a_call_of_the_runtime_launches_no_kernel():
    """The profiler gives kernels to whatever has their operator's number: in torch.profiler a runtime call outside of all operators may have it too."""
    conv = event("aten::cudnn_convolution", None, [(FPROP, 10.0)])
    waiting, launch = event("cudaDeviceSynchronize", None, [(FPROP, 10.0)]), event("cuLaunchKernelEx", None, [("tap_pixels", 3.0)])
    events = [launch, waiting, conv, on_gpu(FPROP, 10.0), on_gpu("tap_pixels", 3.0)]
    found = [(e["name"], e["operators"], e["calls"]) for e in profiler.entries(events, GPU, calls=1)]
    assert found == [(FPROP, ["aten::cudnn_convolution"], 1), ("tap_pixels", [], 1)]
    twice = [conv, event("aten::another", None, [(FPROP, 10.0)]), on_gpu(FPROP, 10.0)]
    assert sum(e["calls"] for e in profiler.entries(twice, GPU, calls=1)) == 1  # whoever else claims it


def test_the_operators_of_a_cpu_add_up_to_the_call():
    x = torch.randn(64, 64)
    events = profiler.profiled(lambda _: torch.relu(x @ x).sum(), CPU, calls=3)
    found = profiler.entries(events, CPU, calls=3)
    assert {"aten::mm", "aten::relu", "aten::sum"} <= {e["name"] for e in found}
    assert next(e for e in found if e["name"] == "aten::mm")["operators"] == ["aten::mm", "aten::matmul"]
    assert sum(e["us"] for e in found) * 3 == pytest.approx(sum(e.self_cpu_time_total for e in events), rel=1e-3)
    assert profiler.kernel_count(lambda _: x @ x, CPU) is None


@pytest.mark.gpu
def test_kernels_of_a_fused_step_on_a_gpu():
    cell = networks.Cell("vgg16", "training step", 32, 4, width=0.25, layout="channels_last", dtype="bf16")
    network = networks.build(cell, ["Interflow fused"], GPU)["Interflow fused"]
    for _ in range(3):
        network.call()
    events = profiler.profiled(network.call, GPU)
    found = profiler.entries(events, GPU, calls=1)
    assert sum(entry["calls"] for entry in found) == len(profiler.device_events(events)) == profiler.kernel_count(network.call, GPU)
    calls = dict.fromkeys(kernels.KINDS, 0.0)
    for entry in found:
        calls[kernels.kind(entry["name"], entry["operators"])] += entry["calls"]
    assert calls[CONVOLUTION] >= 13 and calls[TAP] >= 10  # forward and backward of five taps
    assert min(calls[kind] for kind in (BETWEEN, HEAD, LOSS, OPTIMIZER)) > 0
    assert not [entry["name"] for entry in found if entry["name"].startswith(profiler.RANGES)]


# --- the page ----------------------------------------------------------------------------------------------------------
def made_up():
    """A GPU's file with round numbers."""

    def profile(network, boundary, tap, direction="training step"):
        given = [(FPROP, FORWARD, 13, 600.0), (POOL, ("aten::max_pool2d_with_indices",), 5, boundary), (OURS_TAP, ("interflow_kernels::stage_tap",), 5, tap)]
        entries = [{"name": n, "operators": list(o), "calls": c, "us": us} for n, o, c, us in given if us]
        entries.append({"name": "Memcpy DtoD (Device -> Device)", "operators": ["aten::copy_"], "calls": 1, "us": 0.5})
        return {"network": network, "direction": direction, "compiled": False, "clock_us": 1100.0, "launches": 24.0, "entries": entries}

    cuda = {"cuda": {"torch": "13.0", "cudnn": 91900}, "gpu": "a made-up GPU", "device": "cuda", "gpu_driver": "1.2"}
    machine = {"cpu": "a processor", "cores": 2, "threads": 2, "last_level_cache_mib": 32, "versions": {"torch": "2.13.0"}, **cuda}
    settings = {"model": "vgg16", "pixels": 224, "batch": 32, "width": 1.0, "layout": "channels_last", "dtype": "bf16", "classes": 1000, "calls": 5, "turns": 9}
    found = [profile("Interflow fused", 0, 100.0), profile("plain", 400.0, 0), profile("plain", 300.0, 0, "inference")]
    return {"machine": machine, "commit": "f" * 10, "date": "2026-01-01", "settings": settings, "others_cores": 0.0, "profiles": found}


def test_page_of_a_gpu():
    text = page_of.markdown(made_up(), "bench/results/x/profile.json")
    assert "a made-up GPU" in text and "vgg16, 224 pixels, B = 32, bf16, channels_last, K = 1000." in text and "cuDNN 91900" in text
    assert "| kind | plain | Interflow fused | Interflow fused - plain |" in text  # plain first, whatever ran first
    assert "| convolution | 600 (60.0%) | 600 (85.7%) | +0 |" in text
    assert "| bias, ReLU, pool, mean, add | 400 (40.0%) | 0 (0.0%) | -400 |" in text
    assert "| tap | 0 (0.0%) | 100 (14.3%) | +100 |" in text
    assert "| launches | 24 | 24 | +0 |" in text
    assert "| `max_pool_forward_nhwc` | aten::max_pool2d_with_indices | bias, ReLU, pool, mean, add | 5 | 400.0 | 40.0% |" in text
    assert "| 1 more | - | - | 1 | 0.5 | 0.1% |" in text.split("## Training step: Interflow fused")[1]
    assert "## Inference: plain" in text and "## Inference: Interflow fused" not in text
    busy = {**made_up(), "others_cores": 0.7}
    assert "not a quiet machine" in page_of.markdown(busy, "x") and "not a quiet machine" not in text


def test_the_command_on_a_tiny_network(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "TURNS", 1)
    monkeypatch.setattr(command.machine, "wait_for_quiet", lambda at_most: 0.0)
    assert command.main(["--out", str(tmp_path), "--width", "0.05", "--batch", "2"]) == 0
    data = json.loads((tmp_path / page_of.FILE).read_text())
    assert data["settings"]["width"] == 0.05 and data["settings"]["batch"] == 2 and data["machine"]["device"] == "cpu"
    ran = {(p["network"], p["direction"]): page_of.sums(p) for p in data["profiles"]}
    assert set(ran) == {(name, direction) for name in command.SHOWN for direction in ("training step", "inference")}
    for (name, direction), total in ran.items():
        assert total[CONVOLUTION] > 0 and (total[TAP] > 0) == (name == "Interflow fused")
        assert (total[OPTIMIZER] > 0) == (total[LOSS] > 0) == (direction == "training step")
        assert total[HEAD] > 0
    for naive in ("plain", "Interflow naive"):
        whole = ran[naive, "training step"]
        assert whole[OTHER] < 0.5 * sum(whole.values())
    assert (tmp_path / "profile.md").read_text() == page_of.markdown(data, page_of.FILE)


def test_a_network_that_fails_does_not_take_the_others_along(tmp_path, monkeypatch, capsys):
    def build(cell, names, device):
        if cell.training:
            raise RuntimeError("no such kernel")
        return original(cell, names, device)

    original = command.build
    monkeypatch.setattr(command, "build", build)
    monkeypatch.setattr(command, "TURNS", 1)
    monkeypatch.setattr(command.machine, "wait_for_quiet", lambda at_most: 0.0)
    assert command.main(["--out", str(tmp_path), "--width", "0.05", "--batch", "2"]) == 1
    assert {p["direction"] for p in json.loads((tmp_path / page_of.FILE).read_text())["profiles"]} == {"inference"}
    assert "FAILED vgg16, training step" in capsys.readouterr().out
    assert "Left out, it failed, see the log: vgg16, training step" in (tmp_path / "profile.md").read_text()


def test_a_spent_budget_leaves_networks_out_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.machine, "wait_for_quiet", lambda at_most: 0.0)
    assert command.main(["--out", str(tmp_path), "--compiled", "--budget", "0"]) == 0
    assert "left out, too little time was left: vgg16, inference, 32px fp32 nchw B=64 compiled" in capsys.readouterr().out
    page = (tmp_path / "profile.md").read_text()
    assert page.count("Left out, too little time was left: vgg16, ") == 4


def test_pages_in_docs_are_those_of_the_committed_profiles():
    committed = sorted((ROOT / "bench/results").glob(f"*/{page_of.FILE}"))
    made = dict(pages.page(file.parent) for file in committed)
    assert made and sorted(made) == sorted((ROOT / "docs").glob("profile-*.md"))
    for path, text in made.items():
        assert path.read_text() == text, f"run `make profile-page FROM=bench/results/{path.stem.removeprefix('profile-')}`"
