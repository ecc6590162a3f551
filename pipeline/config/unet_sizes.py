"""Which sizes a U-Net takes along one axis, and what comes out.

References:
    Ronneberger, Fischer, Brox: U-Net. MICCAI 2015, doi:10.1007/978-3-319-24574-4_28: 572 in, 388 out, four poolings by 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

BLOCK_LOSS = 4  # two 3×3(×3) convolutions without padding take two voxels each


def output_size(size: int, strides: Sequence[int], *, padding: bool) -> int | None:
    """Voxels out of a U-Net along one axis; None for a size that it cannot take.

    Args:
        size: voxels in.
        strides: of each pooling along this axis, top first.
        padding: whether the convolutions are padded.

    >>> output_size(572, (2, 2, 2, 2), padding=False)
    388
    """
    loss = 0 if padding else BLOCK_LOSS
    for stride in strides:
        size -= loss
        if size <= 0 or size % stride:
            return None
        size //= stride
    size -= loss
    if size <= 0:
        return None
    for stride in reversed(strides):
        size = size * stride - loss
    return size if size > 0 else None


def smallest_size(strides: Sequence[int], *, padding: bool) -> int:
    """The fewest voxels that such a U-Net takes; every further size is this one and a multiple of the strides' product.

    >>> smallest_size((2, 2, 2, 2), padding=False)
    188
    """
    return next(
        size for size in range(1, 10**6) if output_size(size, strides, padding=padding) is not None
    )


def margin(strides: Sequence[int], *, padding: bool) -> int:
    """Voxels that the output is smaller than the input, both ends together (an even number).

    >>> margin((2, 2, 2, 2), padding=False)
    184
    """
    size = smallest_size(strides, padding=padding)
    return size - (output_size(size, strides, padding=padding) or 0)


def nearest_valid_sizes(size: int, strides: Sequence[int], *, padding: bool) -> str:
    """The sizes that work next to one that does not, in words for an error."""
    smallest, step = smallest_size(strides, padding=padding), prod(strides)
    if size <= smallest:
        return str(smallest)
    below = smallest + (size - smallest) // step * step
    return f"{below} or {below + step}"


def valid_size_near(strides: Sequence[int], near: int, *, padding: bool) -> int:
    """A size that works, near a wish, with two voxels or more at the bottleneck."""
    smallest, step = smallest_size(strides, padding=padding), prod(strides)
    return smallest + step * max(1, (near - smallest) // step)
