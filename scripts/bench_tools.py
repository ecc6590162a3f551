"""The tools that scripts/bench.py compares: each segments one volume, file to file, in a process of its own.

    python scripts/bench_tools.py TOOL BUNDLE VOLUME OUT.nii.gz

prints one line of JSON: the seconds of the case and of its steps, with the model loaded and the network run once before, and
the process's largest resident memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Spec, load_spec
from pipeline.inference import peak_bytes
from pipeline.networks import build_network

AIR = (
    0.05  # of the way from the lowest value to the brightest: below it there is no tissue in a head
)
Run = Callable[[Path, Path], dict[str, float]]


def opened(bundle: Path) -> tuple[Spec, torch.nn.Module]:
    """A bundle's spec and its network in torch, ready to run."""
    spec = load_spec(bundle / "configs" / "spec.yaml")
    network = build_network(spec)
    network.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
    return spec, network.eval()


def volseg(bundle: Path, *, precision: str, placement: str, air: float | None) -> Run:
    """This project, as the command runs it."""
    from pipeline.bundle import open_bundle
    from pipeline.inference import predict_case, ready_bytes
    from pipeline.io import as_nibabel, write_labels

    model = open_bundle(bundle, device="cpu", precision=precision)
    model.evaluator.inferer.placement, model.evaluator.inferer.foreground_threshold = placement, air
    ready_bytes(model)

    def run(volume: Path, out: Path) -> dict[str, float]:
        prediction = predict_case(model, volume)
        started = time.perf_counter()
        write_labels(out, as_nibabel(prediction.labels, prediction.affine, prediction.header))
        return prediction.seconds | {"write": time.perf_counter() - started}

    return run


def monai(bundle: Path) -> Run:
    """The parts that bundles of MONAI's model zoo are made of, with the same network, grid and windows."""
    from monai.data import list_data_collate
    from monai.engines import SupervisedEvaluator
    from monai.engines.utils import IterationEvents
    from monai.inferers import SlidingWindowInferer
    from monai.transforms import Activationsd, AsDiscreted, Compose, Invertd, SaveImaged

    spec, network = opened(bundle)
    before = _monai_transforms(spec)
    marks: dict[str, float] = {}

    def mark(step: str) -> Callable[[Any], Any]:
        return lambda data: (marks.update({step: time.perf_counter()}), data)[1]

    def run(volume: Path, out: Path) -> dict[str, float]:
        after = Compose(
            [
                Activationsd("pred", softmax=True),
                Invertd("pred", before, orig_keys="image", nearest_interp=False, to_tensor=True),
                AsDiscreted("pred", argmax=True),
                mark("invert"),
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
        marks["preprocess"] = time.perf_counter()
        evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=[list_data_collate([case])],
            network=network,
            inferer=SlidingWindowInferer(spec.roi_size, 1, spec.overlap, mode="gaussian"),
            postprocessing=after,
        )
        evaluator.add_event_handler(
            IterationEvents.FORWARD_COMPLETED, lambda: mark("network")(None)
        )
        evaluator.run()
        marks["write"] = time.perf_counter()
        (out.parent / volume.name).rename(out)
        ends = [marks[step] for step in ("preprocess", "network", "invert", "write")]
        return dict(
            zip(
                ("preprocess", "network", "invert", "write"),
                [b - a for a, b in zip([started, *ends], ends, strict=False)],
                strict=True,
            )
        )

    return run


def _monai_transforms(spec: Spec) -> Any:
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


def nnunet(bundle: Path) -> Run:
    """nnU-Net's predictor, without mirroring, with the same network and as many windows."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    spec, network = opened(bundle)
    predictor = nnUNetPredictor(
        tile_step_size=1 - spec.overlap,
        use_gaussian=True,
        use_mirroring=False,
        perform_everything_on_device=False,
        device=torch.device("cpu"),
        allow_tqdm=False,
    )
    plans = PlansManager(_plans(spec))
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


def _plans(spec: Spec) -> dict[str, Any]:
    """What nnU-Net wants to know of a network: only the grid, the normalisation and the patch count here."""
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


TOOLS: dict[str, Callable[[Path], Run]] = {
    "monai": monai,
    "float32": lambda bundle: volseg(bundle, precision="float32", placement="monai", air=None),
    "int8": lambda bundle: volseg(bundle, precision="int8", placement="monai", air=None),
    "float32 own plan": lambda bundle: volseg(
        bundle, precision="float32", placement="even", air=AIR
    ),
    "int8 own plan": lambda bundle: volseg(bundle, precision="int8", placement="even", air=AIR),
    "nnunet": nnunet,
}


def main() -> None:
    """One tool, one volume, one line of JSON."""
    import warnings

    warnings.simplefilter("ignore")
    name, bundle, volume, out = sys.argv[1], *map(Path, sys.argv[2:5])
    run = TOOLS[name](bundle)
    started = time.perf_counter()
    steps = run(volume, out)
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - started,
                "steps": steps,
                "peak_mb": peak_bytes() / 2**20,
            }
        )
    )


if __name__ == "__main__":
    main()
