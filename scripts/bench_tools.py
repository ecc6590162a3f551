"""Run one of the tools that scripts/bench.py compares, on one volume.

    python scripts/bench_tools.py TOOL BUNDLE VOLUME OUT.nii.gz

prints one line of JSON: the seconds of the case and of its steps, measured after the model was
loaded, and the process's peak of resident memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Spec, load_spec
from pipeline.inference import peak_bytes
from pipeline.networks import build_network, load_weights

# Fraction of the range from the lowest to the highest value: in a head there is no tissue below it.
AIR_THRESHOLD = 0.05
# Segments the volume at the first path into the second; returns the seconds of each step.
SegmentFile = Callable[[Path, Path], dict[str, float]]
STEPS = ("preprocess", "network", "invert", "write")


def load_torch_network(bundle: Path) -> tuple[Spec, torch.nn.Module]:
    """Return a bundle's spec and its network in torch, ready for inference."""
    spec = load_spec(bundle / "configs" / "spec.yaml")
    network = build_network(spec)
    load_weights(network, bundle / "models" / "model.pt")
    return spec, network.eval()


def volseg(bundle: Path, *, precision: str, placement: str, air: float | None) -> SegmentFile:
    """Return volseg's path, as the command runs it.

    Args:
        bundle: folder of the bundle.
        precision: float32 or int8.
        placement: `even` or `monai`, as of the inferer.
        air: foreground threshold, as a fraction of the range of values; None: windows everywhere.
    """
    from pipeline.bundle import open_bundle
    from pipeline.inference import predict_case, ready_bytes
    from pipeline.io import as_nibabel, write_labels

    model = open_bundle(bundle, device="cpu", precision=precision)
    model.inferer.placement, model.inferer.foreground_threshold = placement, air
    ready_bytes(model)

    def run(volume: Path, out: Path) -> dict[str, float]:
        prediction = predict_case(model, volume)
        started = time.perf_counter()
        write_labels(out, as_nibabel(prediction.labels, prediction.affine, prediction.header))
        return prediction.seconds | {"write": time.perf_counter() - started}

    return run


def monai(bundle: Path) -> SegmentFile:
    """Return the path of a bundle of MONAI's model zoo, with the same network, grid and windows."""
    from monai.data import list_data_collate
    from monai.engines import SupervisedEvaluator
    from monai.engines.utils import IterationEvents
    from monai.inferers import SlidingWindowInferer
    from monai.transforms import Activationsd, AsDiscreted, Compose, Invertd, SaveImaged

    spec, network = load_torch_network(bundle)
    before = monai_preprocessing(spec)
    ends: dict[str, float] = {}

    def record_inverted(data: Any) -> Any:
        """Record the end of the inversion; a transform that changes nothing."""
        ends["invert"] = time.perf_counter()
        return data

    def record_network() -> None:
        ends["network"] = time.perf_counter()

    def run(volume: Path, out: Path) -> dict[str, float]:
        after = Compose(
            [
                Activationsd("pred", softmax=True),
                Invertd("pred", before, orig_keys="image", nearest_interp=False, to_tensor=True),
                AsDiscreted("pred", argmax=True),
                record_inverted,
                SaveImaged(
                    "pred",
                    output_dir=str(out.parent),
                    output_postfix="",
                    separate_folder=False,
                    print_log=False,
                ),
            ]
        )
        started = time.perf_counter()
        case = before({"image": str(volume)})
        ends["preprocess"] = time.perf_counter()
        evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=[list_data_collate([case])],
            network=network,
            inferer=SlidingWindowInferer(spec.roi_size, 1, spec.overlap, mode="gaussian"),
            postprocessing=after,
        )
        evaluator.add_event_handler(IterationEvents.FORWARD_COMPLETED, record_network)
        evaluator.run()
        ends["write"] = time.perf_counter()
        (out.parent / volume.name).rename(out)
        times = [started, *(ends[step] for step in STEPS)]
        seconds = [end - start for start, end in pairwise(times)]
        return dict(zip(STEPS, seconds, strict=True))

    return run


def monai_preprocessing(spec: Spec) -> Any:
    """Return MONAI's own transforms to the grid and intensities of a spec."""
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        LoadImaged,
        NormalizeIntensityd,
        Orientationd,
        Spacingd,
    )

    return Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            Orientationd(
                "image", axcodes=spec.orientation, labels=(("L", "R"), ("P", "A"), ("I", "S"))
            ),
            Spacingd("image", pixdim=spec.spacing, mode="bilinear"),
            NormalizeIntensityd("image", nonzero=spec.intensity.nonzero, channel_wise=True),
        ]
    )


def nnunet(bundle: Path) -> SegmentFile:
    """Return nnU-Net's predictor, without mirroring, with the same network and window overlap."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    spec, network = load_torch_network(bundle)
    predictor = nnUNetPredictor(
        tile_step_size=1 - spec.overlap,
        use_gaussian=True,
        use_mirroring=False,
        perform_everything_on_device=False,
        device=torch.device("cpu"),
        allow_tqdm=False,
    )
    plans = PlansManager(nnunet_plans(spec))
    labels = {
        "labels": dict(spec.labels),
        "channel_names": {"0": spec.channels[0]},
        "file_ending": ".nii.gz",
    }
    predictor.manual_initialization(
        network,
        plans,
        plans.get_configuration("3d_fullres"),
        [network.state_dict()],
        labels,
        "nnUNetTrainer",
        None,
    )

    def run(volume: Path, out: Path) -> dict[str, float]:
        started = time.perf_counter()
        predictor.predict_from_files_sequential(
            [[str(volume)]], [str(out).removesuffix(".nii.gz")], save_probabilities=False
        )
        return {"all": time.perf_counter() - started}

    return run


def nnunet_plans(spec: Spec) -> dict[str, Any]:
    """Return nnU-Net's plans for a spec: the predictor uses the grid, the windows and the norm."""
    resample = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    linear = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "none",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(spec.roi_size),
        "median_image_size_in_voxels": list(spec.roi_size),
        "spacing": list(spec.spacing),
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resample,
        "resampling_fn_seg_kwargs": resample | {"is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": linear,
        "architecture": {"network_class_name": "", "arch_kwargs": {}, "_kw_requires_import": []},
        "batch_dice": False,
    }
    return {
        "dataset_name": "none",
        "plans_name": "none",
        "original_median_spacing_after_transp": list(spec.spacing),
        "original_median_shape_after_transp": list(spec.roi_size),
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "none",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": dict.fromkeys(("mean", "std", "min", "max", "median"), 1.0)
        },
    }


TOOLS: dict[str, Callable[[Path], SegmentFile]] = {
    "monai": monai,
    "float32": lambda bundle: volseg(bundle, precision="float32", placement="monai", air=None),
    "int8": lambda bundle: volseg(bundle, precision="int8", placement="monai", air=None),
    "float32 own plan": lambda bundle: volseg(
        bundle, precision="float32", placement="even", air=AIR_THRESHOLD
    ),
    "int8 own plan": lambda bundle: volseg(
        bundle, precision="int8", placement="even", air=AIR_THRESHOLD
    ),
    "nnunet": nnunet,
}


def main() -> None:
    """Run the tool that the command line names."""
    import warnings

    warnings.simplefilter("ignore")
    name, bundle, volume, out = sys.argv[1], *map(Path, sys.argv[2:5])
    run = TOOLS[name](bundle)
    started = time.perf_counter()
    steps = run(volume, out)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "steps": steps, "peak_mb": peak_bytes() / 2**20}))


if __name__ == "__main__":
    main()
