"""Sizes of tiles and parts by the class of a shape, never by the batch: a rule, and a table that overrides it where one is given.

They are part of the order of sums. Another table may change the last bits of a result; the same table never does. An image's bits
do not depend on its batch under any table, since a class does not contain the batch.

A class is a kernel's name and what its sizes depend on, numbers rounded up to a power of two: "tap_pixels channels=128 count=4096
bytes=2 max_pool=1" is of 65 to 128 channels and 2049 to 4096 windows. `python -m interflow_kernels.triton.tune` measures and writes a
table; the environment variable INTERFLOW_TRITON_TILES names the file to use:

    {"tiles": {"tap_pixels channels=128 count=4096 bytes=2 max_pool=1": {"rows": 16, "cols": 64, "part": 128, "num_warps": 4, "num_stages": 1}},
     "environment": {anything}}

num_warps counts 32 threads, as on NVIDIA. One launch pools all maps of a head, with the most warps and stages that any of them asks for.
"""

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

KILOBYTE = 1024
TILE = 1024  # windows (or pixels of a pixel run, twice as many) times channels that a program holds: a window for eight channels a thread
WARPS = 4  # of 32 threads, on every GPU
STAGES = 3  # tiles that a product reads ahead
IMAGES = 16  # of a product's tile: the least that matrix units take
STEP = 32  # columns of a product's tile that are multiplied at a time
COLUMNS = 64  # of pooled, in a tile of the head's gradients
IMAGES_SUMMED = 32  # at a time, where a gradient sums over images
LARGEST_TILE = 32768  # numbers of rows x cols: more is beyond any register file

Sizes = Mapping[str, int]
Table = Mapping[str, Sizes]

# By kernel: what a class of shapes names, and the sizes of an entry, each from its least to its most.
_PIXELS = dict(rows=(1, 1024), cols=(8, 256), part=(1, 2**30))
_PLANES = dict(rows=(1, 1024), cols=(8, 4096))
_POOL = dict(rows=(1, 4096), cols=(1, 1024), part=(1, 2**30))
_PRODUCT = dict(images=(16, 128), classes=(16, 128), step=(16, 128))
_GRADIENTS = dict(images=(16, 128), classes=(16, 128), columns=(16, 128))
_RUN = dict(num_warps=(1, 16), num_stages=(1, 8))
KERNELS: dict[str, tuple[tuple[str, ...], dict[str, tuple[int, int]]]] = {
    "tap_pixels": (("channels", "count", "bytes", "max_pool"), _PIXELS | _RUN),
    "tap_pixels_backward": (("channels", "count", "bytes", "max_pool"), _PIXELS | _RUN),
    "tap_planes": (("channels", "count", "bytes", "max_pool"), _PLANES | _RUN),
    "tap_planes_backward": (("channels", "count", "bytes", "max_pool"), _PLANES | _RUN),
    "end_pixels": (("channels", "count", "bytes"), _PIXELS | _RUN),
    "end_pixels_backward": (("channels", "count", "bytes"), _PIXELS | _RUN),
    "end_planes": (("channels", "count", "bytes"), _PLANES | _RUN),
    "end_planes_backward": (("channels", "count", "bytes"), _PLANES | _RUN),
    "head_pool": (("channels", "count", "bytes", "channels_last"), _POOL | _RUN),
    "head_tail": (("classes", "columns", "dtype", "gated"), _PRODUCT | _RUN),
    "head_scores": (("classes", "columns", "dtype", "gated"), _PRODUCT | _RUN),
    "head_gradients": (("classes", "columns", "dtype"), _GRADIENTS | _RUN),
}
_VALUES: dict[str, tuple[str, ...]] = {
    "bytes": ("2", "4"),
    "max_pool": ("0", "1"),
    "channels_last": ("0", "1"),
    "gated": ("0", "1"),
    "dtype": ("float32", "bfloat16", "float16"),
}


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


# --- the table ------------------------------------------------------------------------------------------------------------
VARIABLE = "INTERFLOW_TRITON_TILES"
_table: Table | None = None  # None: not read yet
_asked: dict[str, Sizes] | None = None  # inside `replaced`: each class that was looked up, with the rule's sizes
_caches: list[Any] = []


def _is_power(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def mistake(key: Any, sizes: Any) -> str | None:
    """What is wrong with an entry of a table, in one sentence; None where nothing is."""
    kernel, *fields = key.split(" ")
    if kernel not in KERNELS:
        return f"unknown key {key!r}: it must begin with one of {', '.join(KERNELS)}"
    names, limits = KERNELS[kernel]
    values = [field.partition("=")[2] for field in fields]
    if [field.partition("=")[0] for field in fields] != list(names):
        return f"unknown key {key!r}: behind {kernel!r} it must name {', '.join(f'{name}=...' for name in names)}"
    for name, value in zip(names, values, strict=True):
        if name in _VALUES and value not in _VALUES[name]:
            return f"unknown key {key!r}: {name} must be one of {', '.join(_VALUES[name])}, got {value!r}"
        if name not in _VALUES and not (value.isascii() and value.isdigit() and len(value) < 12 and str(int(value)) == value and _is_power(int(value))):
            return f"unknown key {key!r}: {name} must be a power of two, got {value!r}"
    if not isinstance(sizes, dict) or set(sizes) != set(limits):
        got = ", ".join(map(str, sizes)) if isinstance(sizes, dict) else repr(sizes)
        return f"{key!r} must give {', '.join(limits)} and nothing else, got {got or 'nothing'}"
    for name, (least, most) in limits.items():
        size, power = sizes[name], name != "num_stages"
        if type(size) is not int or not least <= size <= most or (power and not _is_power(size)):
            return f"{key!r}: {name} must be {'a power of two' if power else 'a whole number'} from {least} to {most}, got {size!r}"
    if "rows" in sizes and sizes["rows"] * sizes["cols"] > LARGEST_TILE:
        return f"{key!r}: rows times cols must be at most {LARGEST_TILE}, got {sizes['rows'] * sizes['cols']}"
    return None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands in it twice")
    return found


def read(path: str, where: str = "the table of tiles") -> Table:
    """The table in a JSON file. Raises ValueError with one sentence that says what is wrong with it; `where`: who named the file."""

    def fail(sentence: str) -> NoReturn:
        raise ValueError(f"{where}, {path!r}: {sentence}")

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        fail(f"cannot be read ({reason}); python -m interflow_kernels.triton.tune --out FILE writes one")
    try:
        whole = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        fail(f"is no valid JSON ({error})")
    if not isinstance(whole, dict) or not isinstance(whole.get("tiles"), dict):
        fail('must be an object {"tiles": {...}, "environment": {...}}')
    for name in whole:
        if name not in ("tiles", "environment"):
            fail(f"unknown key {name!r}: it must be one of tiles, environment")
    for key, sizes in whole["tiles"].items():
        sentence = mistake(key, sizes)
        if sentence is not None:
            fail(sentence)
    return whole["tiles"]


def table() -> Table:
    """The entries in use, read once from the file that INTERFLOW_TRITON_TILES names; without it, or where it is empty, none."""
    global _table
    if _table is None:
        path = os.environ.get(VARIABLE)
        _table = read(path, f"the environment variable {VARIABLE}") if path else {}
    return _table


def described() -> str:
    """Where the sizes come from, for the report."""
    try:
        entries = table()
    except ValueError as error:
        return str(error)
    return f"the rule, and those of {os.environ.get(VARIABLE)} (classes: {len(entries)})" if entries else "the rule"


@contextmanager
def replaced(entries: Table) -> Iterator[dict[str, Sizes]]:
    """Inside it `entries` are the table, for the whole process. Gives each class that is looked up meanwhile, with the rule's sizes."""
    global _table, _asked
    before = _table, _asked
    _table, _asked = entries, {}
    for cache in _caches:
        cache.cache_clear()
    try:
        yield _asked
    finally:
        _table, _asked = before
        for cache in _caches:
            cache.cache_clear()


def cached(function: Callable[..., Any]) -> Any:
    """lru_cache for what follows from the arguments and the table."""
    found = functools.lru_cache(maxsize=1024)(function)
    _caches.append(found)
    return found


def _sizes(kernel: str, fields: tuple[int | str, ...], rule: Sizes) -> Sizes:
    """The table's sizes for a class, or the rule's."""
    key = " ".join([kernel, *(f"{name}={value}" for name, value in zip(KERNELS[kernel][0], fields, strict=True))])
    if _asked is not None:
        _asked[key] = rule
    return table().get(key, rule)


def _run(sizes: Sizes) -> tuple[int, int]:
    return sizes["num_warps"], sizes["num_stages"]


def _in_parts(count: int, part: int, rows: int) -> tuple[int, int]:
    """PARTS, PART: parts of at most `part`, whole tiles of `rows`."""
    part = -(-min(part, count) // rows) * rows
    return -(-count // part), part


# --- the tap and the stage end --------------------------------------------------------------------------------------------
def _pixels(kernel: str, channels: int, count: int, element: int, form: tuple[int, ...], elements: int) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """count: positions of an NHWC map, each `elements` pixels; form: what else the class names."""
    cols = max(8, min(64, power_of_two(channels)))
    rows = min((TILE if elements > 1 else 2 * TILE) // cols, power_of_two(count))
    each = cols * element * elements
    part = power_of_two(count) if count * each <= 160 * KILOBYTE else 64 * KILOBYTE // each
    rule = dict(rows=rows, cols=cols, part=part, num_warps=WARPS, num_stages=1)
    sizes = _sizes(kernel, (power_of_two(channels), power_of_two(count), element, *form), rule)
    rows, cols = min(sizes["rows"], power_of_two(count)), min(sizes["cols"], max(8, power_of_two(channels)))
    return (*_in_parts(count, sizes["part"], rows), rows, cols), _run(sizes)


def _planes(kernel: str, channels: int, count: int, element: int, form: tuple[int, ...], tile: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """count: positions of a plane; tile: how many a program holds."""
    cols = max(8, min(tile, power_of_two(count)))
    if count > 64 and cols > count * 5 // 4:  # less idle at the end
        cols //= 4
    rule = dict(rows=max(1, min(tile // cols, power_of_two(channels))), cols=cols, num_warps=WARPS, num_stages=1)
    sizes = _sizes(kernel, (power_of_two(channels), power_of_two(count), element, *form), rule)
    return (min(sizes["rows"], power_of_two(channels)), min(sizes["cols"], max(8, power_of_two(count)))), _run(sizes)


@cached
def tap_pixels(kernel: str, channels: int, height: int, width: int, element: int, max_pool: bool) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """(PARTS, PART, ROWS, COLS), (warps, stages) of an NHWC map, for "tap_pixels" or its backward: a part is what one program sums.

    The rule: up to 160 KB of a channel block go to one program; more is cut into parts of about 64 KB, which meet in partial sums.
    """
    count = ((height + 1) // 2) * ((width + 1) // 2) if max_pool else height * width
    return _pixels(kernel, channels, count, element, (int(max_pool),), 4 if max_pool else 1)


@cached
def tap_planes(kernel: str, channels: int, height: int, width: int, element: int, max_pool: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """(ROWS, COLS), (warps, stages) of a tile of planes, for "tap_planes" or its backward: a program sums whole planes."""
    count = ((height + 1) // 2) * ((width + 1) // 2) if max_pool else height * width
    return _planes(kernel, channels, count, element, (int(max_pool),), TILE if max_pool else 2 * TILE)


@cached
def end_pixels(kernel: str, channels: int, height: int, width: int, element: int) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """As tap_pixels of the mean alone, for "end_pixels" or its backward."""
    return _pixels(kernel, channels, height * width, element, (), 1)


@cached
def end_planes(kernel: str, channels: int, height: int, width: int, element: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """As tap_planes of the mean alone, for "end_planes" or its backward."""
    return _planes(kernel, channels, height * width, element, (), 2 * TILE)


# --- the head -------------------------------------------------------------------------------------------------------------
@cached
def head_pool(
    channels: int, height: int, width: int, element: int, channels_last: bool, largest_window: int | None
) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """(PARTS, PART, ROWS, COLS), (warps, stages) of a map that the head pools; `largest_window`: pixels of a bin where there are several bins.

    The rule, as for the tap: up to 160 KB of a channel block go to one program, more is cut into parts of about 64 KB.
    """
    pixels = height * width if largest_window is None else largest_window
    tile = 4096
    if channels_last:
        cols = max(8, min(64, power_of_two(channels)))
        if pixels == 1:
            cols = min(1024, power_of_two(channels))
        rows = min(tile // cols, power_of_two(pixels))
    else:
        rows = min(1024, power_of_two(pixels))
        cols = max(1, min(tile // rows, power_of_two(channels)))
    each = cols * element
    part = power_of_two(pixels) if pixels * each <= 160 * KILOBYTE else max(1, 64 * KILOBYTE // each)
    rule = dict(rows=rows, cols=cols, part=part, num_warps=WARPS, num_stages=1)
    sizes = _sizes("head_pool", (power_of_two(channels), power_of_two(pixels), element, int(channels_last)), rule)
    rows, cols = min(sizes["rows"], power_of_two(pixels)), min(sizes["cols"], max(8, power_of_two(channels)))
    parts, part = (1, pixels) if largest_window is not None else _in_parts(pixels, sizes["part"], rows)
    return (parts, part, rows, cols), _run(sizes)


def _classes(count: int) -> int:
    """The rule for classes of a product's tile."""
    return 16 if count <= 16 else 32


@cached
def head_product(kernel: str, classes: int, columns: int, dtype: str, gated: bool) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """(IMAGES, CLASSES, STEP), (warps, stages) of a tile of branch scores, for "head_tail" or "head_scores"; dtype: the weight's, by name."""
    rule = dict(images=IMAGES, classes=_classes(classes), step=STEP, num_warps=WARPS, num_stages=STAGES)
    sizes = _sizes(kernel, (power_of_two(classes), power_of_two(columns), dtype, int(gated)), rule)
    return (sizes["images"], sizes["classes"], sizes["step"]), _run(sizes)


@cached
def head_gradients(classes: int, columns: int, dtype: str, multiply_adds: bool = False) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """(IMAGES, CLASSES, WIDE), (warps, stages) of a tile of the head's gradients; WIDE: columns of pooled.

    multiply_adds: of a GPU without matrix units for the product, where a thread holds its rows and columns of both factors: half as many of each.
    """
    images, most = (16, 16) if multiply_adds else (IMAGES_SUMMED, 32)
    wide = COLUMNS // 2 if dtype == "float16" else COLUMNS  # in two parts of bf16, with a rest: Triton 3.8 spills 48 bytes on sm_90 at 64 columns
    rule = dict(images=images, classes=min(most, _classes(classes)), columns=wide, num_warps=WARPS, num_stages=STAGES)
    sizes = _sizes("head_gradients", (power_of_two(classes), power_of_two(columns), dtype), rule)
    return (sizes["images"], sizes["classes"], sizes["columns"]), _run(sizes)
