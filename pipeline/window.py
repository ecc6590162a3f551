"""The network over a volume of any size, window by window, blended by a Gaussian."""

from __future__ import annotations

from monai.inferers import Inferer, SliceInferer, SlidingWindowInferer

from pipeline.errors import ConfigError
from pipeline.spec import Spec


def inferer(spec: Spec, overlap: float | None = None, sw_batch_size: int | None = None) -> Inferer:
    """The inferer of a spec: volumes by 3D windows, or slice by slice where roi_size has two numbers.

    Args:
        spec: gives roi_size, overlap and the axis of slices.
        overlap: of neighbouring windows, a fraction of roi_size, instead of the spec's.
        sw_batch_size: windows that go through the network together; 1 in 3D and 16 in 2D by default.

    Shapes: (B, C, X, Y, Z) of any size, (padded where smaller than the window) → logits (B, classes, X, Y, Z).

    Raises:
        ConfigError: an overlap that is not 0 ≤ overlap < 1.
    """
    overlap = spec.overlap if overlap is None else overlap
    if not 0 <= overlap < 1:
        raise ConfigError(f"overlap: expected a fraction, 0 ≤ overlap < 1, got {overlap}")
    if spec.slice_dim is None:
        return SlidingWindowInferer(spec.roi_size, sw_batch_size or 1, overlap, mode="gaussian")
    return SliceInferer(
        spatial_dim=spec.slice_dim, roi_size=spec.roi_size, sw_batch_size=sw_batch_size or 16, overlap=overlap, mode="gaussian"
    )
