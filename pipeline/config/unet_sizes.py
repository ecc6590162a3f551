"""Input and output sizes of a U-Net along one axis.

References:
    Ronneberger, Fischer, Brox: U-Net. MICCAI 2015, doi:10.1007/978-3-319-24574-4_28: 572 pixels in,
    388 out, with four poolings by 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from math import prod

BLOCK_LOSS = 4  # voxels: without padding, each of the two 3×3(×3) convolutions of a block loses 2


def output_size(size: int, strides: Sequence[int], *, padding: bool) -> int | None:
    """Return the output size of a U-Net along one axis, or None for an invalid input size.

    A size is valid if the size at each pooling is a multiple of its stride, and if the output has
    at least one voxel.

    Args:
        size: input size along the axis, voxels.
        strides: strides of the poolings along the axis, from the top level.
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
    """Return the smallest valid input size of a U-Net along one axis, voxels.

    All other valid sizes are larger by a multiple of the product of the strides.

    >>> smallest_size((2, 2, 2, 2), padding=False)
    188
    """
    return next(s for s in count(1) if output_size(s, strides, padding=padding) is not None)


def margin(strides: Sequence[int], *, padding: bool) -> int:
    """Return the difference of input and output size along one axis, both ends together, voxels.

    It is even, and the same for all valid input sizes.

    >>> margin((2, 2, 2, 2), padding=False)
    184
    """
    size = smallest_size(strides, padding=padding)
    return size - (output_size(size, strides, padding=padding) or 0)


def nearest_valid_sizes(size: int, strides: Sequence[int], *, padding: bool) -> str:
    """Return the valid input sizes below and above an invalid one, as text for an error message.

    >>> nearest_valid_sizes(13, (2, 2), padding=True)
    '12 or 16'
    """
    smallest, step = smallest_size(strides, padding=padding), prod(strides)
    if size <= smallest:
        return str(smallest)
    below = smallest + (size - smallest) // step * step
    return f"{below} or {below + step}"


def valid_size_near(strides: Sequence[int], near: int, *, padding: bool) -> int:
    """Return the largest valid input size that is not above `near`, voxels.

    It is never the smallest valid size: that may leave a single voxel at the bottleneck, over which
    instance norm has no variance. If `near` is too small, the second smallest size is returned.
    """
    smallest, step = smallest_size(strides, padding=padding), prod(strides)
    return smallest + step * max(1, (near - smallest) // step)
