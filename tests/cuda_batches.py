"""Which loads of each kernel's main loops are on their way together: the table that machine code is held to on every architecture."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cuda_code import Kernel


@dataclass(frozen=True)
class Batch:
    """Of every kernel whose demangled name matches `kernel`: in `places` places at least, `count` loads that match `loads` are issued before the
    first of them is waited for. See cuda_sass.py."""

    kernel: str
    loads: str
    count: int
    places: int
    what: str


STREAM = r"LDG(\.\w+)*\.NA(\.\w+)*"  # load_stream and load_stream_if: no other load passes L1 like this
STREAM_128 = r"LDG(\.\w+)*\.NA(\.\w+)*\.128(\.\w+)*"
STREAM_64 = r"LDG(\.\w+)*\.NA(\.\w+)*\.64(\.\w+)*"
STREAM_BYTE = r"LDG(\.\w+)*\.NA(\.\w+)*\.U8(\.\w+)*"
PLAIN_128 = r"LDG(?!(\.\w+)*\.NA)(\.\w+)*\.128(\.\w+)*"
PLAIN = r"LDG(?!(\.\w+)*\.NA)(\.\w+)*"
PATH = r"\(interflow::TapPath\)"
BATCHES = (
    Batch("interflow_head_forward_kernel", STREAM, 16, 11, "a unit's steps: bf16 and fp16 by 16, 8, 4 and 2 bytes, fp32 by 16, 8 and 4"),
    Batch("interflow_head_forward_kernel<__", PLAIN_128, 10, 2, "two blocks of pooled and 16-bit weights, 8 classes, with branches and without"),
    Batch("interflow_head_forward_kernel<__", PLAIN_128, 6, 3, "and one block, 16 classes"),
    Batch("interflow_head_forward_kernel<float>", PLAIN_128, 12, 2, "two blocks of pooled and fp32 weights, 8 classes, with branches and without"),
    Batch("interflow_head_forward_kernel<float>", PLAIN_128, 8, 3, "and one block, 16 classes"),
    Batch("interflow_pool_kernel", STREAM, 16, 11, "a unit's steps, as the head's own"),
    Batch("interflow_head_scores_kernel", PLAIN_128, 10, 3, "two blocks of pooled and weights of each dtype"),
    Batch("interflow_head_products_kernel", STREAM_64, 8, 4, "dp and dW . W: 16-bit weights of 64 classes, half of them at a time"),
    Batch("interflow_head_products_kernel", STREAM_128, 8, 3, "dp and dW . W: fp32 weights; dW: pooled values of 8 images"),
    Batch("interflow_head_products_kernel", STREAM, 16, 12, "ds of 16 images"),
    Batch("interflow_head_epilogue_kernel", STREAM, 8, 9, "ds, dy and dA's terms, eight at a time"),
    Batch("interflow_head_epilogue_kernel", PLAIN, 8, 2, "the gates' terms, and all blocks' shares"),
    Batch(r"tap_pixels<\w+, \w+, true, \w+>", STREAM_128, 4, 1, "the places of a window; four pixels, or two of 32 bytes"),
    Batch(rf"tap_planes<\w+, \w+, {PATH}0, \w+>", STREAM_128, 4, 1, "the rows of two tiles; four pieces, or two of 32 bytes"),
    Batch(r"tap_pixels_backward<\w+, true, true>", STREAM, 2, 1, "mask and dm of a window"),
    Batch(r"tap_pixels_backward<\w+, false, true>", STREAM_BYTE, 4, 1, "the mask of four pixels"),
    Batch(rf"tap_planes_backward<\w+, true, {PATH}0>", STREAM, 4, 1, "mask and dm of two tiles"),
    Batch(rf"tap_planes_backward<\w+, false, {PATH}0>", STREAM_BYTE, 4, 1, "the mask of four pieces"),
    Batch(r"end_(pixels|planes)(_backward)?<\w+, true, true>", STREAM_128, 8, 1, "four pixels or chunks of u and the residual, or of dv and v"),
    Batch(r"end_(pixels|planes)(_backward)?<\w+, false, true>", STREAM_128, 4, 1, "four pixels or chunks"),
)


def broken(kernel: Kernel, rows: Sequence[Batch] = BATCHES) -> list[str]:
    """What the rows say of `kernel` and its machine code does not do."""
    found = []
    for row in rows:
        if not re.search(row.kernel, kernel.name):
            continue
        batches = kernel.batches[row.loads]
        places = sum(times for size, times in batches.items() if size >= row.count)
        if places < row.places:
            found.append(
                f"{kernel.name} for sm_{kernel.architecture}: {row.what}: {places} batches of {row.count} loads, {row.places} expected;"
                f" found {dict(sorted(batches.items(), reverse=True))} (loads: places)"
            )
    return found
