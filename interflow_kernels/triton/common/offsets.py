"""How many bits offsets into a map need: the kernels count in 32, or in 64 where these do not reach."""


def is_wide(shape: tuple[int, ...], *strides: tuple[int, ...]) -> bool:
    """Whether an offset inside an image may leave 31 bits; the mask and the dense maps count with C * H * W, a tile's overhang with twice."""
    _, channels, height, width = shape
    spans = [(channels + 64) * s[1] + (height + 2) * s[2] + (width + 2) * s[3] for s in strides]
    return max(2 * (channels + 64) * (height + 2) * (width + 2), 2 * max(spans)) >= 2**31
