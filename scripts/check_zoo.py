"""Compare `volseg segment` with `python -m monai.bundle run` on the bundles of MONAI's model zoo.

    python scripts/check_zoo.py ZOO [BUNDLE...] [--work FOLDER]

ZOO is the folder `models` of a checkout of github.com/Project-MONAI/model-zoo; nothing of it is
changed. Its weights are not in it: each network gets random weights, whose last layer is centred on
a window of noise so that several labels occur. Each bundle segments one small oblique volume in
both ways. The table says whether the label maps are equal voxel for voxel by the bundle's own
inferer (`stock`), what `auto` chose, and the lowest Dice of a label of over 100 voxels by that.

The bundles need the packages einops and itk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pipeline.bundle import open_for_cases, parse_overrides
from pipeline.errors import PipelineError

VOLUMES = (
    "brats_mri_segmentation",
    "multi_organ_segmentation",
    "pancreas_ct_dints_segmentation",
    "pediatric_abdominal_ct_segmentation",
    "prostate_mri_anatomy",
    "renalStructures_CECT_segmentation",
    "renalStructures_UNEST_segmentation",
    "segmentation_template",
    "spleen_ct_segmentation",
    "spleen_deepedit_annotation",
    "swin_unetr_btcv_segmentation",
    "ventricular_short_axis_3label",
    "vista3d",
    "wholeBody_ct_segmentation",
    "wholeBrainSeg_Large_UNEST_segmentation",
)
CPU_CHECKPOINT = "arch_ckpt=$torch.load(@arch_ckpt_path, map_location='cpu', weights_only=False)"
CPU_SPACE = "dints_space#device=$torch.device('cpu')"
MIN_VOXELS = 100


@dataclass(frozen=True, kw_only=True)
class How:
    """What a bundle needs to run on a CPU.

    Attributes:
        both: overrides for MONAI and for volseg.
        monai: overrides for MONAI alone: what volseg does by itself.
        shape: of the volume.
        spacing: of the volume, mm.
        weights: file of weights, in the bundle.
    """

    both: tuple[str, ...] = ()
    monai: tuple[str, ...] = ()
    shape: tuple[int, int, int] = (61, 52, 45)
    spacing: tuple[float, float, float] = (1.3, 1.1, 1.7)
    weights: str = "models/model.pt"


HOW: Mapping[str, How] = {
    # its windows of 240 × 240 × 160 voxels take 8 GB
    "brats_mri_segmentation": How(both=("inferer#roi_size=[64, 64, 48]",), shape=(72, 64, 56)),
    "multi_organ_segmentation": How(monai=(CPU_CHECKPOINT, CPU_SPACE)),
    "pancreas_ct_dints_segmentation": How(monai=(CPU_CHECKPOINT, CPU_SPACE)),
    "pediatric_abdominal_ct_segmentation": How(weights="models/dynunet_FT.pt"),
    "prostate_mri_anatomy": How(
        monai=("postprocessing#transforms#2#nearest_interp=True",), shape=(41, 36, 29)
    ),
    "segmentation_template": How(shape=(64, 72, 56)),
    "swin_unetr_btcv_segmentation": How(both=("network_def#img_size=",)),
    "ventricular_short_axis_3label": How(shape=(240, 256, 7)),
    "vista3d": How(both=("dataset#data#0#label_prompt=[1, 3]",)),
}


@dataclass(kw_only=True)
class Row:
    """A line of the table."""

    bundle: str
    stock: str = ""
    chosen: str = ""
    dice: str = ""
    labels: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    def text(self) -> str:
        """The line as text."""
        times = ", ".join(f"{name} {value:.0f} s" for name, value in self.seconds.items())
        cells = (self.bundle, self.stock, self.chosen, self.dice, self.labels, times)
        return " | ".join(cells)


def main() -> None:
    """Check the bundles that were named, or all, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("zoo", type=Path)
    parser.add_argument("bundles", nargs="*", default=VOLUMES)
    parser.add_argument("--work", type=Path, default=Path("zoo-check"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print("bundle | stock | auto | Dice | labels over 1 % | time", flush=True)
    failed = 0
    for name in arguments.bundles:
        row = check(arguments.zoo / name, arguments.work / name, HOW.get(name, How()))
        failed += not row.stock.startswith("equal")
        print(row.text(), flush=True)
    sys.exit(1 if failed else 0)


def check(source: Path, work: Path, how: How) -> Row:
    """Return how the two agree for one bundle."""
    shutil.rmtree(work, ignore_errors=True)
    root = work / "bundle"
    shutil.copytree(source, root)
    row = Row(bundle=source.name)
    try:
        make_weights(root, how)
        item = make_item(root, work / "in", how)
        begun = time.perf_counter()
        expected = by_monai(root, work / "monai", item, how)
        row.seconds["MONAI"] = time.perf_counter() - begun
        share = np.bincount(expected.astype(np.int64).ravel()) / expected.size
        row.labels = str(int((share >= 0.01).sum()))
        image = [path for key, path in flat(item) if key != "label"]
        for runtime in ("stock", "auto"):
            begun = time.perf_counter()
            found, chosen = by_volseg(root, image, how, runtime)
            row.seconds[runtime] = time.perf_counter() - begun
            if runtime == "stock":
                different = int((found != expected).sum())
                row.stock = "equal" if different == 0 else f"{different} voxels differ"
            else:
                row.chosen, row.dice = chosen, f"{lowest_dice(found, expected):.5f}"
    except (PipelineError, subprocess.CalledProcessError) as error:
        row.stock = row.stock or f"{type(error).__name__}: {error}"
    return row


def flat(item: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return key and path of each file of an item."""
    pairs = []
    for key, value in item.items():
        pairs += [(key, path) for path in (value if isinstance(value, list) else [value])]
    return pairs


def make_item(root: Path, folder: Path, how: How) -> dict[str, Any]:
    """Write the volumes of a case, and return the item of MONAI's dataset."""
    from pipeline.bundle import foreign_facts

    folder.mkdir(parents=True)
    facts = foreign_facts(root)
    item: dict[str, Any] = {}
    for number, file in enumerate(facts.files):
        path = folder / f"{file.name.replace(' ', '_')}.nii.gz"
        nib.save(volume(how.shape, number, how.spacing), path)
        item.setdefault(file.key, []).append(str(path.absolute()))
    item = {key: paths[0] if len(paths) == 1 else paths for key, paths in item.items()}
    if "renalStructures_CECT" in str(root):
        label = folder / "label.nii.gz"
        nib.save(volume(how.shape, 9, how.spacing), label)
        item["label"] = str(label.absolute())
    return item


def volume(shape: Sequence[int], seed: int, spacing: tuple[float, float, float]) -> nib.Nifti1Image:
    """Return a smooth volume with the range of CT units, oblique and anisotropic."""
    noise = np.random.default_rng(seed).normal(size=shape)
    smooth = gaussian_filter(noise, 2.5)
    array = (smooth / smooth.std() * 120 + 60).astype(np.int16)
    array[:4] = array[-3:] = 0
    turn = np.radians(9)
    rotation = np.array(
        [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]
    )
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([-spacing[0], *spacing[1:]])
    affine[:3, 3] = (31, -42, 17)
    return nib.Nifti1Image(array, affine)


def make_weights(root: Path, how: How) -> None:
    """Write random weights for a bundle's network, centred so that several labels occur."""
    torch.manual_seed(7)
    models = root / "models"
    models.mkdir(exist_ok=True)
    parser = ConfigParser()
    configuration = next(
        path for path in sorted((root / "configs").glob("inference.*")) if path.suffix != ".conf"
    )
    parser.read_config(configuration)
    parser["bundle_root"] = str(root)
    parser["device"] = torch.device("cpu")
    if "arch_ckpt_path" in parser:
        write_search_code(models / "search_code_18590.pt", parser)
    sys.path.insert(0, str(root))
    try:
        for key, value in parse_overrides((*how.both, *how.monai)).items():
            if key.startswith(("network_def", "arch_ckpt", "dints_space")):
                *place, last = key.split("::")
                node = parser["::".join(place)] if place else parser.config
                if how.both and how.both[0].endswith("img_size="):
                    node.pop(last)
                else:
                    node[last] = value
        network = parser.get_parsed_content("network_def").eval()
    finally:
        sys.path.remove(str(root))
        for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
            del sys.modules[name]
    centre(network, root)
    torch.save(network.state_dict(), root / how.weights)


def centre(network: torch.nn.Module, root: Path) -> None:
    """Shift the last layer so that each channel of the output has the mean 0 on noise."""
    from pipeline.bundle import foreign_facts

    facts = foreign_facts(root)
    biases = [
        parameter
        for name, parameter in network.named_parameters()
        if name.endswith("bias") and len(parameter) == facts.out_channels
    ]
    dims = 2 if "ventricular" in str(root) else 3
    if not biases or "vista3d" in str(root):
        return
    noise = torch.rand(1, facts.in_channels, *((64,) * dims if dims == 2 else (96, 96, 96)))
    if "deepedit" in str(root):
        noise[:, 1:] = 0
    with torch.no_grad():
        logits = network(noise)[0]
        biases[-1].sub_(logits.flatten(1).mean(dim=1))


def write_search_code(path: Path, parser: ConfigParser) -> None:
    """Write a random architecture, as the search for DiNTS's bundles leaves it."""
    from monai.networks.nets import TopologySearch

    space = TopologySearch(
        channel_mul=0.5, num_blocks=12, num_depths=4, use_downsample=True, device="cpu"
    )
    node_a, arch_code_a, arch_code_c, _ = space.decode()
    code = {
        "node_a": np.asarray(node_a),
        "arch_code_a": np.asarray(arch_code_a),
        "arch_code_c": np.asarray(arch_code_c),
    }
    torch.save(code, path)


def by_monai(root: Path, output: Path, item: Mapping[str, Any], how: How) -> NDArray[Any]:
    """Return the label map that `python -m monai.bundle run` writes."""
    command, environment = by_monai_command(root, output, item, how)
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    try:
        if done.returncode:
            raise PipelineError(f"it ended with {done.returncode}")
        return written_by(output, item)
    except PipelineError as error:
        log = root.parent / "monai.log"
        log.write_text(done.stdout + done.stderr)
        lines = [line for line in done.stderr.splitlines() if "Error" in line] or [str(error)]
        raise PipelineError(f"MONAI itself fails: {lines[-1]}; see {log}") from error


def written_by(output: Path, item: Mapping[str, Any]) -> NDArray[Any]:
    """Return the one label map that a command wrote for an item."""
    first = Path(flat(item)[0][1]).name.split(".")[0]
    written = [path for path in output.rglob("*.nii.gz") if path.name.startswith(first)]
    if len(written) != 1:
        raise PipelineError(f"{output}: expected one label map, found {len(written)}")
    array: NDArray[Any] = np.asarray(nib.load(written[0]).dataobj)
    return array


def by_monai_command(
    root: Path, output: Path, item: Mapping[str, Any], how: How
) -> tuple[list[str], dict[str, str]]:
    """Return the command `python -m monai.bundle run` for an item, and its environment."""
    configuration = next(
        path for path in sorted((root / "configs").glob("inference.*")) if path.suffix != ".conf"
    )
    content = ConfigParser.load_config_file(configuration)
    run = next(name for name in ("run", "evaluating", "inference") if name in content)
    overrides = parse_overrides((*how.both, *how.monai))
    given = dict(item)
    options = []
    removed = []
    for key, value in overrides.items():
        if key.startswith("dataset::data::0::"):
            given[key.rsplit("::", 1)[1]] = value
        elif isinstance(value, str | int | float | list | dict | bool):
            options += [f"--{key.replace('::', '#')}", str(value)]
        else:
            removed.append(key.split("::"))
    if removed:
        for *place, last in removed:
            node = content
            for part in place:
                node = node[part]
            del node[last]
        configuration = configuration.with_name("monai.json")
        configuration.write_text(json.dumps(content))
    command = [sys.executable, "-m", "monai.bundle", "run", run]
    command += ["--config_file", str(configuration.absolute())]
    command += ["--meta_file", str((root / "configs" / "metadata.json").absolute())]
    command += ["--bundle_root", str(root.absolute()), "--output_dir", str(output.absolute())]
    command += ["--dataset#data", str([given]), "--dataloader#num_workers", "0"]
    command += ["--dataset_dir", str(Path(flat(item)[0][1]).parent)]
    environment = {**os.environ, "PYTHONPATH": str(root.absolute())}
    return [*command, *options], environment


def by_volseg(root: Path, image: list[str], how: How, runtime: str) -> tuple[NDArray[Any], str]:
    """Return the label map by volseg, and what computed it."""
    model = open_for_cases(
        root, device="cpu", runtime=runtime, overrides=parse_overrides(how.both), trust=True
    )
    given = image[0] if len(image) == 1 else image
    description = model.prepare_runtime(given) or {"runtime": "undecided", "reason": ""}
    found = model.predict_case(given).labels
    return found, f"{description['runtime']} ({description['reason']})"


def lowest_dice(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return the lowest Dice of the labels of over 100 voxels."""
    scores = [1.0]
    for value in np.union1d(np.unique(found), np.unique(expected)):
        one, other = found == value, expected == value
        sizes = np.count_nonzero(one), np.count_nonzero(other)
        if value and max(sizes) > MIN_VOXELS:
            scores.append(2 * np.count_nonzero(one & other) / sum(sizes))
    return min(scores)


if __name__ == "__main__":
    main()
