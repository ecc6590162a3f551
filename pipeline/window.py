"""The network over a volume of any size, window by window, blended by a Gaussian."""

from __future__ import annotations

from monai.inferers import Inferer, SliceInferer, SlidingWindowInferer

from pipeline.errors import ConfigError
from pipeline.rotate import rotations
from pipeline.spec import Spec
from pipeline.tile import BackgroundInferer, tile_inferer


def inferer(spec: Spec, overlap: float | None = None, sw_batch_size: int | None = None) -> Inferer:
    """The inferer of a spec: volumes by 3D windows, or slice by slice where roi_size has two numbers.

    A network without padding gets mirror-extended tiles whose outputs abut; one with a sigmoid output gets a background before
    its structures; rotated versions are averaged where asked for.

    Args:
        spec: gives roi_size, overlap and the axis of slices.
        overlap: of neighbouring windows, a fraction of roi_size, instead of the spec's.
        sw_batch_size: windows that go through the network together; 1 in 3D and 16 in 2D by default.

    Shapes: (B, C, X, Y, Z) of any size, (padded where smaller than the window) → logits (B, labels, X, Y, Z).

    Raises:
        ConfigError: an overlap that is not 0 ≤ overlap < 1.
    """
    overlap = spec.overlap if overlap is None else overlap
    if not 0 <= overlap < 1:
        raise ConfigError(f"overlap: expected a fraction, 0 ≤ overlap < 1, got {overlap}")
    plain = _plain(spec, overlap, sw_batch_size)
    return rotations(spec, BackgroundInferer(plain) if spec.output == "sigmoid" else plain)


def _plain(spec: Spec, overlap: float, sw_batch_size: int | None) -> Inferer:
    if not spec.network.padding:
        if overlap:
            raise ConfigError(f"overlap: expected 0 for a network without padding, whose tiles abut, got {overlap}")
        return tile_inferer(spec, sw_batch_size)
    if spec.slice_dim is None:
        return SlidingWindowInferer(spec.roi_size, sw_batch_size or 1, overlap, mode="gaussian")
    return SliceInferer(
        spatial_dim=spec.slice_dim, roi_size=spec.roi_size, sw_batch_size=sw_batch_size or 16, overlap=overlap, mode="gaussian"
    )
