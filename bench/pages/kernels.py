"""Names of kernels and operators: what kind of work each is, and a form that a table has room for. No table and no profiler here."""

import re
from collections.abc import Sequence

CONVOLUTION, BETWEEN, NORM, TAP, HEAD, LOSS, OPTIMIZER, OTHER = (
    "convolution",
    "bias, ReLU, pool, mean, add",
    "batch norm",
    "tap",
    "head",
    "loss",
    "optimizer",
    "other",
)
KINDS = (CONVOLUTION, BETWEEN, NORM, TAP, HEAD, LOSS, OPTIMIZER, OTHER)
"""TAP: the tap, and the stage end. BETWEEN: PyTorch's operators between convolutions, those that these take the place of and the bias and ReLU inside a
stage alike, their backward passes, the sums of bias gradients and of gradients from two consumers. HEAD: the fused head, or classifiers and attention in
plain PyTorch."""

OWNERS = (
    (OPTIMIZER, re.compile(r"Optimizer\.")),
    (TAP, re.compile(r"(_Tap|_End|Stage(Tap|End)(Backward)?Function)(Backward)?$|interflow_kernels::stage_(tap|end)")),
    (HEAD, re.compile(r"(_Head|_Pool|Interflow(Head|Pool)(Backward)?Function)(Backward)?$|interflow_kernels::interflow_(head|pool)")),
)
"""Everything in these operators and ranges is theirs."""

OPERATORS = (
    (LOSS, re.compile(r"softmax|nll_loss|cross_entropy|NllLoss", re.IGNORECASE)),
    (NORM, re.compile(r"batch_?norm", re.IGNORECASE)),
    (HEAD, re.compile(r"aten::(addmm|mm|bmm|linear|einsum|stack|unbind)$|(Addmm|Mm|Bmm|Stack|Unbind|Split\w*)Backward\d*$")),
    (BETWEEN, re.compile(r"relu|clamp_min|threshold|max_?pool|avg_?pool|aten::mean|MeanBackward", re.IGNORECASE)),
    (CONVOLUTION, re.compile(r"aten::\w*conv|ConvolutionBackward")),
)
ARITHMETIC = re.compile(r"aten::(add|sum|div|mul)_?$")
"""The bias that is added in a convolution and the sum of its gradient, where the operator around it is a convolution's."""

TRITON = re.compile(r"triton_(?P<how>[a-z]+)_fused_")
COMPILED = (
    (NORM, re.compile(r"batch_norm")),
    (LOSS, re.compile(r"softmax|nll_loss")),
    (BETWEEN, re.compile(r"convolution|relu|max_pool|threshold|mean|add|sum|div")),
)
"""Of what torch.compile fused into one kernel: convolution stands for its bias there, the product itself is a kernel of its own."""

# On a CPU "## Call CompiledFxGraph NAME ##" is the range of a compiled graph, whose own time is that of what was fused.
KERNELS = (
    (TAP, re.compile(r"\binterflow::.*\b(tap|end)_|^((tap|end)_(pixels|planes)|sum_rows)")),
    (HEAD, re.compile(r"\binterflow_(head|pool)_|^head_(pool|tail|scores|gradients|attention|gate)")),
    (NORM, re.compile(r"batch_norm|\bbn_(fw|bw)_")),
    (CONVOLUTION, re.compile(r"fprop|dgrad|wgrad|implicit_(gemm|convolve)|cudnn|winograd|nchwToNhwc|nhwcToNchw|nhwcAddPadding")),
    (LOSS, re.compile(r"softmax|nll_loss", re.IGNORECASE)),
    (HEAD, re.compile(r"gemm|gemv|nvjet|splitKreduce|cublas", re.IGNORECASE)),
    (OPTIMIZER, re.compile(r"multi_tensor_apply")),
    (BETWEEN, re.compile(r"^## Call |max_pool|threshold|clamp|relu|MeanOps|sum_functor|CUDAFunctor_add|CUDAFunctorOnSelf_add", re.IGNORECASE)),
)


def kind(name: str, operators: Sequence[str] = ()) -> str:
    """Which of KINDS a kernel (or a CPU's operator) is. operators: those it ran in, the innermost first; without them its name decides alone."""
    for owner, pattern in OWNERS:
        if any(pattern.match(operator) for operator in operators):
            return owner
    fused = TRITON.match(name)
    if fused:
        if fused["how"] == "tem":  # a product that torch.compile wrote itself
            return CONVOLUTION if "convolution" in name else HEAD
        return _first(COMPILED, name) or OTHER
    for i, operator in enumerate(operators):
        found = _first(OPERATORS, operator)
        if found == CONVOLUTION and any(ARITHMETIC.match(inner) for inner in operators[:i]):
            return BETWEEN
        if found:
            return found
    return _first(KERNELS, name) or (BETWEEN if any(ARITHMETIC.match(operator) for operator in operators) else OTHER)


def _first(rules: Sequence[tuple[str, re.Pattern[str]]], text: str) -> str | None:
    return next((found for found, pattern in rules if pattern.search(text)), None)


LONGEST = 96
FRAMES = {"Kernel", "Kernel2", "device_kernel", "kernel"}
"""Templates that say nothing themselves: their argument is the kernel."""


def short(name: str) -> str:
    """A kernel's own name, without its type, namespaces, template and arguments.

    At most LONGEST characters: what is left out lies behind the size of tiles and before the number at the end.
    """
    if name.startswith("## Call "):
        return name.split()[2]
    text = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    plain = _own(text)
    if plain in FRAMES and "<" in text:
        plain = _own(text.split("<", 1)[1].rsplit(">", 1)[0])
    return plain if len(plain) <= LONGEST else f"{plain[: LONGEST - 12]}...{plain[-9:]}"


def _own(text: str) -> str:
    """`a::b<c>::d<e>(f)` -> "d"; operators ("aten::add_"), ranges and other names that no C++ compiler made stay as they are."""
    if not re.match(r"[\w:]+[<(]", text):
        return text
    depth, kept = 0, []
    for character in text:
        depth += character == "<"
        if depth == 0:
            if character in "(,":
                break
            kept.append(character)
        depth -= character == ">"
    return "".join(kept).split("::")[-1].strip()
