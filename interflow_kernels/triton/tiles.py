"""Sizes of tiles and parts by the shape of a map, never by the batch: they fix the order of sums, and so the bits."""

KILOBYTE = 1024
TILE = 1024  # windows (or pixels of a pixel run, twice as many) times channels that a program holds: a window for eight channels a thread
WARPS = 4
STAGES = 3  # tiles that a product reads ahead


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def tap_pixels(channels: int, height: int, width: int, element: int, max_pool: bool) -> tuple[int, int, int, int]:
    """PARTS, PART, ROWS, COLS of an NHWC map: a part is what one program sums.

    Up to 160 KB of a channel block go to one program; more is cut into parts of about 64 KB, which meet in partial sums.
    """
    count = ((height + 1) // 2) * ((width + 1) // 2) if max_pool else height * width
    cols = max(8, min(64, power_of_two(channels)))
    rows = min((TILE if max_pool else 2 * TILE) // cols, power_of_two(count))
    each = cols * element * (4 if max_pool else 1)
    part = count if count * each <= 160 * KILOBYTE else 64 * KILOBYTE // each
    part = -(-part // rows) * rows
    return -(-count // part), part, rows, cols


def tap_planes(channels: int, height: int, width: int, max_pool: bool) -> tuple[int, int]:
    """ROWS, COLS of a tile of planes: a program sums whole planes."""
    count = ((height + 1) // 2) * ((width + 1) // 2) if max_pool else height * width
    tile = TILE if max_pool else 2 * TILE
    cols = max(8, min(tile, power_of_two(count)))
    if count > 64 and cols > count * 5 // 4:  # less idle at the end
        cols //= 4
    return max(1, min(tile // cols, power_of_two(channels))), cols


def pool(channels: int, height: int, width: int, element: int, channels_last: bool, largest_window: int | None) -> tuple[int, int, int, int]:
    """PARTS, PART, ROWS, COLS of a map that the head pools; `largest_window`: pixels of a bin where there are several bins.

    As for the tap: up to 160 KB of a channel block go to one program, more is cut into parts of about 64 KB.
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
    if largest_window is not None:
        return 1, pixels, rows, cols
    each = cols * element
    part = pixels if pixels * each <= 160 * KILOBYTE else max(1, 64 * KILOBYTE // each)
    part = -(-part // rows) * rows
    return -(-pixels // part), part, rows, cols


IMAGES = 16  # of a product's tile: the least that matrix units take
STEP = 32  # columns of a product's tile that are multiplied at a time


def classes(count: int) -> int:
    """Classes of a product's tile."""
    return 16 if count <= 16 else 32


COLUMNS = 64  # of pooled, in a tile of the head's gradients
IMAGES_SUMMED = 32  # at a time, where a gradient sums over images
