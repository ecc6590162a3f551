"""MONAI Deploy's operator for bundles, run on a volume as its DICOM loader hands it over.

Runs in the environment that scripts/peers makes: deploy_operator.py BUNDLE VOLUME OUT; BUNDLE is a
folder or a TorchScript file. Writes the label map as OUT, an array (X, Y, Z).
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
from monai.deploy.core import AppContext, Fragment, Image, IOType
from monai.deploy.operators.monai_bundle_inference_operator import (
    IOMapping,
    MonaiBundleInferenceOperator,
)


class Port:
    """An input with one image, and an output that keeps what is emitted."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.emitted: dict[str, Any] = {}

    def receive(self, name: str) -> Image:
        return self.image

    def get(self, name: str) -> None:
        return None

    def emit(self, value: Any, name: str) -> None:
        self.emitted[name] = value


def main() -> None:
    bundle, volume, out = map(Path, sys.argv[1:])
    file = nib.load(volume)
    # as DICOMSeriesToVolumeOperator: (Z, Y, X), sizes of voxels and an affine of NIfTI
    image = Image(
        np.swapaxes(np.asanyarray(file.dataobj), 0, 2),
        metadata={
            "row_pixel_spacing": file.header.get_zooms()[0],
            "col_pixel_spacing": file.header.get_zooms()[1],
            "depth_pixel_spacing": file.header.get_zooms()[2],
            "nifti_affine_transform": file.affine,
        },
    )
    operator = MonaiBundleInferenceOperator(
        Fragment(),
        app_context=SimpleNamespace(models=None),
        input_mapping=[IOMapping("image", Image, IOType.IN_MEMORY)],
        output_mapping=[IOMapping("pred", Image, IOType.IN_MEMORY)],
        bundle_path=bundle,
        name="bundle",
    )
    port = Port(image)
    operator.compute(port, port, None)
    np.save(out, np.swapaxes(port.emitted["pred"].asnumpy(), 0, 2))


assert AppContext is not None  # what is imported is the real package
main()
