"""Fit the predicted Dice of a model that was trained on drawn images, on drawn and degraded ones.

    python scripts/fit_quality.py configs/brain_mr_structures.yaml -o runs/quality --count 120

Images are drawn from the label maps of the run, as for its training, and degraded
(`pipeline.transforms.draw_degradation`). The bundle segments them, and their Dice against the maps
that they were drawn from is known. Images of the maps that the run holds out are never fitted: the
fit is scored on them. A run that was interrupted goes on where it was: everything follows from the
seed and the number of an image, and the batch does not segment an image twice. `--keep` writes
models/quality.json and the section of the README of the bundle.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import nibabel as nib
import numpy as np

from pipeline.batch import output_path, read_case, segment_cases
from pipeline.bundle import open_bundle
from pipeline.config import BundlePaths, Intensity, Run, Spec
from pipeline.errors import ConfigError
from pipeline.evaluation import QualityCase, fit_quality, score_quality
from pipeline.inference import Model, keep_freed_memory, stored_features, write_quality
from pipeline.io import label_maps, read, sha256, write_atomically, write_csv, write_json
from pipeline.report import quality_section, with_section
from pipeline.training import read_run
from pipeline.transforms import (
    IMAGE,
    LABEL,
    TrainingTransform,
    degrade,
    draw_degradation,
    synthesis_transform,
)
from pipeline.types import Array, Case

HISTOGRAM_BINS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
INTENSITY_STEPS = 8  # per unit of the synthesis, whose intensities are from 0 to 255
LOW_DICE, BETWEEN = 0.7, (0.6, 0.8)  # of a mean Dice
WANTED_LOW, WANTED_BETWEEN = (0.2, 0.5), 0.3  # parts of the images


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Which images are drawn.

    Attributes:
        folder: where they are written.
        count: their number.
        test_share: part of them that is drawn from the maps that the run holds out.
        seed: of the random numbers.
        spacing: voxel size before degradation, mm.
        field: field of view, mm.
    """

    folder: Path
    count: int
    test_share: float
    seed: int
    spacing: float
    field: tuple[float, float, float]


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/quality"))
@click.option("--count", default=120, show_default=True, help="Number of images.")
@click.option("--test-share", default=0.35, show_default=True, help="Share that is never fitted.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random numbers.")
@click.option("--spacing", default=1.0, show_default=True, help="Voxel size of the images, mm.")
@click.option(
    "--field",
    type=float,
    nargs=3,
    default=(176.0, 224.0, 232.0),
    show_default=True,
    metavar="R A S",
    help="Field of view, mm.",
)
@click.option("--keep", is_flag=True, help="Write the fit into the bundle, and its README.")
def main(
    config: Path,
    output: Path,
    count: int,
    test_share: float,
    seed: int,
    spacing: float,
    field: tuple[float, float, float],
    keep: bool,
) -> None:
    """Fit the predicted Dice of the bundle of CONFIG on drawn and degraded images."""
    keep_freed_memory()
    run, _ = read_run(config)
    if run.synthesis is None or not run.hold_out:
        raise ConfigError(f"{config}: expected a run with synthesis and hold_out")
    plan = Plan(
        folder=output, count=count, test_share=test_share, seed=seed, spacing=spacing, field=field
    )
    model = replace(open_bundle(run.bundle), keep_quality_features=True)
    cases = draw_images(run, model.spec, plan)
    begun = time.perf_counter()
    before = sum(1 for case in cases if output_path(output / "out", case["case"]).is_file())
    segment_cases(model, cases, output / "out")
    found = [
        known for case in cases if (known := scored_case(model.spec, case, output)) is not None
    ]
    per_image = (time.perf_counter() - begun) / max(1, len(cases) - before)
    click.echo(f"{per_image:.1f} s for each image that was segmented and scored", err=True)
    if len(found) < len(cases):
        failed = len(cases) - len(found)
        click.echo(f"{failed} images were not segmented: see {output}/out/cases.csv", err=True)
    if not has_wanted_range(found):
        click.echo(
            f"the degradations are too strong or too weak: expected {WANTED_LOW[0]:.0%} to "
            f"{WANTED_LOW[1]:.0%} of the images below a mean Dice of {LOW_DICE}, and "
            f"{WANTED_BETWEEN:.0%} from {BETWEEN[0]} to {BETWEEN[1]}",
            err=True,
        )
    report(model, run, plan, found, config, keep=keep)


def has_wanted_range(found: Sequence[QualityCase]) -> bool:
    """Return whether enough of the images, but not too many, have a low mean Dice."""
    low, between = dice_shares(found)
    return WANTED_LOW[0] <= low <= WANTED_LOW[1] and between >= WANTED_BETWEEN


def dice_shares(found: Sequence[QualityCase]) -> tuple[float, float]:
    """Return the part of the images below `LOW_DICE`, and the part within `BETWEEN`."""
    dice = np.array([case.mean_dice for case in found])
    within = (dice >= BETWEEN[0]) & (dice < BETWEEN[1])
    return float((dice < LOW_DICE).mean()), float(within.mean())


def draw_images(run: Run, spec: Spec, plan: Plan) -> list[Case]:
    """Draw and degrade the images that are not there yet, and return all of them as cases."""
    transform = _transform(run, spec, plan)
    maps = label_maps(run.dataset)
    tests = [case for case in maps if case["case"] in run.hold_out]
    fits = [case for case in maps if case["case"] not in run.hold_out]
    values = np.array(list(spec.labels.values()), dtype=np.uint16)
    test_count = round(plan.count * plan.test_share)
    cases: list[Case] = []
    begun, drawn = time.perf_counter(), 0
    for number in range(plan.count):
        part = tests if number < test_count else fits
        source = part[number % len(part)]
        name = f"{'test' if part is tests else 'fit'}_{number:04}_{source['case']}"
        files = [plan.folder / kind / f"{name}.nii.gz" for kind in ("images", "labels")]
        cases.append({"case": name, "image": files[0], "label": str(files[1])})
        if files[1].is_file():  # written last
            continue
        transform.set_random_state(plan.seed * 100_003 + number)
        sample = transform(dict(source))
        labels = values[sample[LABEL][0].numpy().astype(int)]
        affine = np.diag([plan.spacing] * 3 + [1.0])
        degradation = draw_degradation(plan.seed * 100_003 + number)
        image, labels, affine = degrade(sample[IMAGE][0].numpy(), labels, affine, degradation)
        write_json(plan.folder / "degradations" / f"{name}.json", degradation.columns())
        _save(files[0], as_scanned(image), affine)
        _save(files[1], labels, affine)
        drawn += 1
        click.echo(f"{number + 1} of {plan.count}: {name}", err=True)
    if drawn:
        seconds = (time.perf_counter() - begun) / drawn
        click.echo(f"{seconds:.1f} s for each image that was drawn", err=True)
    return cases


def _transform(run: Run, spec: Spec, plan: Plan) -> TrainingTransform:
    """Return the synthesis of a run, for whole images with intensities as of a scan."""
    if run.synthesis is None:
        raise ConfigError("expected a run with synthesis")
    size = tuple(round(length / plan.spacing) for length in plan.field)
    # only the grid matters here, and a network without pooling accepts any size
    any_size = replace(spec.network, features=(1, 1), strides=(1,), deep_supervision=0)
    grid = replace(
        spec,
        roi_size=size,
        spacing=(plan.spacing,) * 3,
        intensity=Intensity(method="none"),
        network=any_size,
    )
    return synthesis_transform(grid, run.synthesis)


def as_scanned(image: Array) -> Array:
    """Return an image in whole numbers, as scanners store them, which also compress far better."""
    limits = np.iinfo(np.int16)
    stored: Array = np.rint(image * INTENSITY_STEPS).clip(0, limits.max).astype(np.int16)
    return stored


def _save(path: Path, array: Array, affine: Array) -> None:
    """Write one image under its final name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    partial = path.with_name(f"partial_{path.name}")
    nib.save(image, partial)
    partial.rename(path)


def scored_case(spec: Spec, case: Case, folder: Path) -> QualityCase | None:
    """Return the features and the Dice of a segmented image; None for one that failed."""
    record = read_case(folder / "out", case["case"])
    if record is None or record.status != "done" or not record.quality_features:
        return None
    predicted = np.rint(read(output_path(folder / "out", case["case"])).array).astype(int)
    true = np.rint(read(case["label"]).array).astype(int)
    # how many voxels have each pair of values; one pass, where a mask per structure takes 32
    size = 1 + max(int(predicted.max()), int(true.max()), *map(max, spec.values_of.values()))
    pairs = np.bincount((predicted * size + true).ravel(), minlength=size**2).reshape(size, size)
    dice = {}
    for name, values in spec.values_of.items():
        of_both = list(values)
        total = int(pairs[of_both].sum() + pairs[:, of_both].sum())
        both = int(pairs[np.ix_(of_both, of_both)].sum())
        dice[name] = 2 * both / total if total else float("nan")
    return QualityCase(
        case=case["case"],
        group=case["case"].split("_", 2)[2],
        features=stored_features(record.quality_features),
        dice=dice,
    )


def report(
    model: Model,
    run: Run,
    plan: Plan,
    found: Sequence[QualityCase],
    config: Path,
    *,
    keep: bool,
) -> None:
    """Fit the images of one part, score those of the other, and write what came out."""
    tests = [case for case in found if case.case.startswith("test_")]
    fits = [case for case in found if case.case.startswith("fit_")]
    structures = list(model.spec.values_of)
    paths = BundlePaths(run.bundle)
    command = (
        f"python scripts/fit_quality.py {config} --count {plan.count} --seed {plan.seed} "
        f"--test-share {plan.test_share:g} --spacing {plan.spacing:g} "
        f"--field {' '.join(f'{mm:g}' for mm in plan.field)} --keep"
    )
    words = f"{len(fits)} drawn and degraded images of {len({case.group for case in fits})} maps"
    weights = sha256(paths.weights)
    fitted = fit_quality(fits, structures, weights_sha256=weights, fitted_on=words)
    if fitted is None:
        raise ConfigError(f"{plan.folder}: no image to fit was segmented")
    scores = score_quality(fitted, tests, structures)
    fitted = replace(fitted, scores=tuple(score.columns() for score in scores))
    text = quality_section(scores, method_text(found, words, tests, run.hold_out), command)
    write_quality(plan.folder / "quality.json", fitted)
    write_atomically(plan.folder / "quality.md", text.encode())
    write_csv(
        plan.folder / "cases.csv",
        [_row(case, fitted.predict(case.features).mean.columns()) for case in found],
    )
    click.echo(text)
    if keep:
        write_quality(paths.quality, fitted)
        page = with_section(paths.readme.read_text(encoding="utf-8"), text)
        write_atomically(paths.readme, page.encode())


def _row(case: QualityCase, predicted: dict[str, float]) -> dict[str, object]:
    return {"case": case.case, "group": case.group, "mean_dice": case.mean_dice, **predicted}


def method_text(
    found: Sequence[QualityCase], fits: str, tests: Sequence[QualityCase], held_out: Sequence[str]
) -> str:
    """Return sentences on the images, with the histogram of their mean Dice."""
    dice = np.array([case.mean_dice for case in found])
    counts = np.histogram(dice, HISTOGRAM_BINS)[0]
    bins = [
        f"{low:.1f} to {high:.1f}: {count}"
        for low, high, count in zip(HISTOGRAM_BINS[:-1], HISTOGRAM_BINS[1:], counts, strict=True)
    ]
    low, between = dice_shares(found)
    return (
        f"The predicted Dice was fitted on {fits}, and scored on {len(tests)} images of the maps "
        f"{', '.join(held_out)}, which neither the network nor the fit had. Images are degraded by "
        "noise, motion, a bias field, thick slices, a cropped field of view, ringing, spikes and "
        "lesions, whose chances and severities were chosen for the range of the Dice alone. Of all "
        f"images {low:.0%} have a mean Dice below {LOW_DICE}, and {between:.0%} one from "
        f"{BETWEEN[0]} to {BETWEEN[1]} (mean Dice: {'; '.join(bins)})."
    )


if __name__ == "__main__":
    main()
