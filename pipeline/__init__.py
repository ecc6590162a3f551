"""volseg: MRI volumes to label maps on their own grid, by 2D and 3D U-Nets, as MONAI bundles.

The public API is here; `pipeline.parts` is the stable surface for the wiring of bundles. The
packages, each of which may import those before it:

    config       YAML files as frozen dataclasses: spec, run, card; the paths inside a bundle
    io           readers, writers, grids, tables, cases in folders, datasets
    networks     the U-Net, losses, published weights
    transforms   preprocessing, input checks, resampling, augmentation, synthesis
    inference    predictor, sliding window, aggregator, test-time augmentation, runtimes, inversion
    bundle       MONAI bundles: opened, checked, exported, imported; their wiring
    batch        many cases: what is done, what failed, tables
    evaluation   metrics, comparison, figures
    report       pages for readers
    training     trainer, checkpoint, validation, cross-validation, planning
    cli          the command `volseg`
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import (
        Segmentation,
        SegmentedImage,
        evaluate,
        load,
        segment,
        segment_many,
        train,
    )
    from pipeline.defaults import DEFAULT_BUNDLE
    from pipeline.errors import PipelineError

__all__ = [
    "DEFAULT_BUNDLE",
    "PipelineError",
    "Segmentation",
    "SegmentedImage",
    "evaluate",
    "load",
    "segment",
    "segment_many",
    "train",
]


def __getattr__(name: str) -> Any:
    """The Python API, imported when it is asked for: `volseg --help` needs no torch."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    homes = {"PipelineError": "pipeline.errors", "DEFAULT_BUNDLE": "pipeline.defaults"}
    return getattr(import_module(homes.get(name, "pipeline.api")), name)
