"""What else a user would run the same work with: torch.compile, TensorRT, ONNX Runtime, OpenVINO."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .case import Unavailable


def compiled(f: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """torch.compile for the shapes it sees, forgetting what it compiled before; `mode` as torch.compile's."""
    return torch.compile(f, dynamic=False, mode=mode)


def tensorrt(f: Callable[..., Any]) -> Callable[..., Any]:
    """TensorRT behind torch.compile, as torch_tensorrt brings it; never run here, so the gate alone speaks for it."""
    try:
        import torch_tensorrt  # noqa: F401
    except ImportError:
        raise Unavailable("torch_tensorrt is not installed (pip install torch-tensorrt)") from None
    return torch.compile(f, dynamic=False, backend="tensorrt")


def onnx_head(weight: torch.Tensor, bias: torch.Tensor, maps: Sequence[tuple[int, int, int]], batch: int) -> bytes:
    """The folded head as an ONNX model: a global average pool for each stage, their concatenation, one product.

    weight [K, D], bias [K], fp32; inputs x0, x1, ... [B, C_i, H_i, W_i], output y [B, K].
    """
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        raise Unavailable("onnx is not installed (pip install 'interflow-kernels[peers]')") from None
    nodes = []
    for i in range(len(maps)):
        nodes += [helper.make_node("GlobalAveragePool", [f"x{i}"], [f"a{i}"]), helper.make_node("Flatten", [f"a{i}"], [f"p{i}"])]
    nodes += [
        helper.make_node("Concat", [f"p{i}" for i in range(len(maps))], ["p"], axis=1),
        helper.make_node("Gemm", ["p", "weight", "bias"], ["y"], transB=1),
    ]
    inputs = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [batch, *m]) for i, m in enumerate(maps)]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, bias.shape[0]])
    constants = [numpy_helper.from_array(t.detach().numpy(), name) for name, t in (("weight", weight), ("bias", bias))]
    graph = helper.make_graph(nodes, "interflow_head", inputs, [output], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def onnxruntime_head(model: bytes, sets: Sequence[Sequence[torch.Tensor]]) -> Callable[[int], torch.Tensor]:
    """ONNX Runtime on the CPU, as many threads as torch has, inputs and output bound: nothing is copied."""
    try:
        import onnxruntime
    except ImportError:
        raise Unavailable("onnxruntime is not installed (pip install 'interflow-kernels[peers]')") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # threads that spin on would slow the next provider
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = [{f"x{i}": onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy()) for i, x in enumerate(maps)} for maps in sets]
    return lambda i: torch.from_numpy(session.run_with_ort_values(["y"], feeds[i])[0].numpy())


def openvino_head(model: bytes, sets: Sequence[Sequence[torch.Tensor]]) -> Callable[[int], torch.Tensor]:
    """OpenVINO on the CPU in fp32, as many threads as torch has; it shares memory with the inputs."""
    try:
        import openvino
    except ImportError:
        raise Unavailable("openvino is not installed (pip install 'interflow-kernels[peers]')") from None
    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(model), "CPU", options).create_infer_request()
    feeds = [{f"x{i}": openvino.Tensor(x.numpy(), shared_memory=True) for i, x in enumerate(maps)} for maps in sets]
    return lambda i: torch.from_numpy(request.infer(feeds[i], share_outputs=True)["y"])
