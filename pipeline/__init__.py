"""volseg: MRI volumes in, segmentations on the same voxels out.

The path of a volume, one module a step:

    read        a file as an array, its affine and its header
    check       whether it can be segmented, and what is doubtful
    preprocess  to the network's grid and intensities
    resample    between two grids whose axes run parallel
    network     the U-Net, 2D or 3D
    runtime     the U-Net as it runs, in torch or OpenVINO
    window      the network over a volume of any size
    air         the part of it that holds something
    focus       one window over all structures
    look        the network's scores in windows, and their batches
    mirror      averages over mirror images
    stitch      overlapping windows as finished blocks of it
    outputs     networks that give several tensors
    regrid      the grid of the labels, where it is not the file's own
    invert      logits to labels on the file's own grid
    refine      borders between tissues, settled by the scan
    soft        how much of each structure, and how sure
    doubt       why to look at a result
    write       the label map as a file, whole or not at all
    report      volumes, scores, tables

What it goes by: `spec` (what weights see and say), `run` (how a training run goes), `config` (YAML to either), `types`,
`errors`. What drives it: `engine` (MONAI's trainer and evaluator), `bundle` (MONAI bundles), `verify` (whether they are
whole), `cases` and `batch` (what there is to do, and doing it), `ahead` (one beside the next), `header` and `memory` (what a
case will take), `export` (for other runtimes), `score` (against labels), `picture` (overlays, charts), `api` (for scripts),
`cli`, `cli_train` and `progress` (the command, and what it shows).

What trains: `layouts` (folders as people keep them), `survey` (what is wrong, what data are like), `plan`, `pace` and `draft`
(what that asks for, how fast it goes here, and its files), `training` (one run), `dataset` (labelled cases and folds),
`augment` (random patches), `synthesize` (images drawn from label maps) and `tissues` (what the maps' values are), `loss`,
`recipe` (initialisation, optimizer, learning rate, time), `validate` and `history` (how good it gets, and what it went
through), `resume` (a run cut off and gone on), `distribute` (a run in several processes), `crossval` (every fold).

What the published U-Nets need: `classics` (their weights under our names), `adopt` (their checkpoints as bundles), `sizes`
(what goes in and comes out), `tile` (overlap-tile), `rotate` (averages over rotations), `fit` (slices of one size), `regions`
(parts kept), `border` (weights between objects), `elastic` (deformation).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import Segmentation, load, segment
    from pipeline.errors import PipelineError

__all__ = ["DEFAULT_BUNDLE", "PipelineError", "Segmentation", "load", "segment"]

DEFAULT_BUNDLE = "brain_mr_structures"


def __getattr__(name: str) -> Any:
    """The Python API, imported when it is asked for: `volseg --help` needs no torch."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module("pipeline.errors" if name == "PipelineError" else "pipeline.api"), name)
