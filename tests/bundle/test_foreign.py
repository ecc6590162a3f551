"""Bundles in the forms of MONAI's model zoo, beside MONAI's own run of them."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from phantom import save
from zoo_forms import by_monai, invert, metadata, transform, write_bundle, zoo_bundle, zoo_config
from zoo_forms import zoo_images as images

from pipeline.bundle import bundle_info, open_for_cases, parse_overrides
from pipeline.bundle.foreign import agreement, engine
from pipeline.bundle.foreign.imports import BundleImports
from pipeline.bundle.foreign.model import ForeignBundle
from pipeline.bundle.overrides import apply_overrides
from pipeline.errors import ConfigError, PipelineError, VolumeError
from pipeline.inference import Prediction, computes_bfloat16, openvino_trial
from pipeline.inference.openvino_models import CACHE_VARIABLE
from pipeline.io import Header

FORMS = (
    "json",
    "yaml",
    "handler",
    "channels",
    "keys",
    "sigmoid",
    "slices",
    "scripts",
    "crop",
    "labels",
)


def opened(root: Path, **settings: Any) -> ForeignBundle:
    """Open a bundle in MONAI's form on the CPU."""
    model = open_for_cases(root, device="cpu", trust=True, **settings)
    assert isinstance(model, ForeignBundle)
    return model


def predicted(root: Path, files: list[str], **settings: Any) -> Prediction:
    """Segment a case; a runtime is decided by it."""
    model = opened(root, **settings)
    image = files[0] if len(files) == 1 else files
    model.prepare_runtime(image)
    return model.predict_case(image)


def item_of(form: str, files: list[str]) -> dict[str, Any]:
    """The item of MONAI's dataset."""
    if form == "keys":
        return {"artery": files[0], "vein": files[1], "label": files[0]}
    return {"image": files[0] if len(files) == 1 else files}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_what_monai_writes(form: str, tmp_path: Path) -> None:
    """Voxel for voxel by the bundle's own inferer, and by volseg's where it takes its place."""
    root, files = zoo_bundle(tmp_path / "b", form), images(tmp_path / "in", form)
    expected = by_monai(root, item_of(form, files), tmp_path / "monai")
    stock = predicted(root, files, runtime="stock")
    assert np.array_equal(stock.labels, expected)
    assert len(np.unique(expected)) > 1
    assert np.allclose(stock.affine, nib.load(files[0]).affine)
    assert "scripts" not in sys.modules
    assert str(root) not in sys.path
    auto = predicted(root, files, runtime="auto")
    assert np.mean(auto.labels == expected) > 0.999


def test_openvino_takes_the_place_of_the_own_inferer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is decided by a case, and kept for the next process."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    root, files = zoo_bundle(tmp_path / "b", "json"), images(tmp_path / "in", "json")
    model = opened(root)
    assert model.prepare_runtime() is None
    description = model.prepare_runtime(files[0])
    assert description is not None
    assert description["runtime"] == "openvino"
    assert "streamed" in description["inferer"]
    again = opened(root).prepare_runtime()
    assert again is not None
    assert again["runtime"] == "openvino"


@pytest.mark.usefixtures("openvino_apart")
@pytest.mark.skipif(os.name != "posix", reason="there are no such signals")
def test_openvino_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Torch computes, and the next process does not try OpenVINO again."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    root, files = zoo_bundle(tmp_path / "b", "json"), images(tmp_path / "in", "json")
    crash = tmp_path / "crash.py"
    crash.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with monkeypatch.context() as patch:
        patch.setattr(openvino_trial, "CHILD", crash)
        with pytest.raises(ConfigError, match=r"openvino .*crashed .*SIGSEGV.* --runtime stock"):
            opened(root, runtime="openvino").prepare_runtime(files[0])
        description = opened(root).prepare_runtime(files[0])
    assert description is not None
    assert description["runtime"] == "torch"
    assert "SIGSEGV" in description["reason"]
    assert "computed in torch, not in OpenVINO" in caplog.text
    assert "Traceback" not in caplog.text
    again = opened(root).prepare_runtime()
    assert again is not None
    assert again["runtime"] == "torch"


@pytest.mark.parametrize("least", [0.0, 2.0])
def test_bfloat16_is_chosen_only_where_labels_agree(
    least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AMX it is tried first, then float32, then torch, then the bundle's own inferer."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(engine, "has_amx", lambda: True)
    monkeypatch.setattr(agreement, "MIN_DICE", least)
    root, files = zoo_bundle(tmp_path / "b", "json"), images(tmp_path / "in", "json")
    description = opened(root).prepare_runtime(files[0])
    assert description is not None
    best = "bfloat16" if computes_bfloat16() else "float32"
    if least:
        assert (description["runtime"], description["precision"]) == ("stock", "float32")
        tried = [f"openvino in {best}", "openvino in float32", "torch in float32"]
        assert [part.partition(":")[0] for part in description["reason"].split("; ")] == tried
    else:
        assert (description["runtime"], description["precision"]) == ("openvino", best)
    again = opened(root).prepare_runtime()
    assert again == description
    # a decision for all precisions is none for one that is asked for
    assert opened(root, precision="float32").prepare_runtime() is None


def test_bfloat16_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may change labels, as long as volseg's inferer gives the bundle's own in float32."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    root, files = zoo_bundle(tmp_path / "b", "json"), images(tmp_path / "in", "json")
    real = agreement.label_agreement

    def worse(choice: agreement.Choice, *labels: Any) -> agreement.Agreement | None:
        least = 0.999 if choice == engine.OPENVINO_FLOAT32 else 2.0
        monkeypatch.setattr(agreement, "MIN_DICE", least)
        return real(choice, *labels)

    monkeypatch.setattr(engine, "label_agreement", worse)
    model = opened(root, precision="bfloat16")
    description = model.prepare_runtime(files[0])
    assert description is not None
    computes = computes_bfloat16()
    precision = "bfloat16" if computes else "float32"
    assert (description["runtime"], description["precision"]) == ("openvino", precision)
    warning = "asked for, changes labels" if computes else "this processor has no bfloat16"
    assert warning in caplog.text
    caplog.clear()
    assert opened(root, precision="bfloat16").prepare_runtime() is not None
    assert warning in caplog.text
    expected = predicted(root, files, runtime="stock").labels
    assert np.mean(model.predict_case(files[0]).labels == expected) > 0.95


def test_bfloat16_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, files = zoo_bundle(tmp_path / "b", "json"), images(tmp_path / "in", "json")
    for runtime in ("stock", "torch"):
        with pytest.raises(ConfigError, match=r"OpenVINO computes .* in bfloat16, on a CPU"):
            opened(root, precision="bfloat16", runtime=runtime)
    with pytest.raises(ConfigError, match=r"--precision int8 applies to volseg's own"):
        opened(root, precision="int8")
    slices = zoo_bundle(tmp_path / "slices", "slices")
    with pytest.raises(ConfigError, match=r"--precision bfloat16 does not apply, its inferer"):
        opened(slices, precision="bfloat16")
    monkeypatch.setattr(engine, "label_agreement", lambda choice, *_: agreement.failed(choice, "-"))
    with pytest.raises(
        ConfigError, match=r"--precision bfloat16 does not apply \(openvino in float"
    ):
        opened(root, precision="bfloat16").prepare_runtime(files[0])
    monkeypatch.setattr(engine, "computes_bfloat16", lambda: False)
    with pytest.raises(ConfigError, match=r"results are computed in bfloat16, which .* has not"):
        opened(root).follow_runtime({"runtime": "openvino", "precision": "bfloat16"})


def test_a_copy_in_another_process_opens_the_bundle_again(tmp_path: Path) -> None:
    root, files = zoo_bundle(tmp_path / "b", "scripts"), images(tmp_path / "in", "scripts")
    model = opened(root, runtime="stock")
    copy = pickle.loads(pickle.dumps(model))
    assert np.array_equal(copy.predict_case(files[0]).labels, model.predict_case(files[0]).labels)
    assert copy.identity() == model.identity()


def test_two_bundles_have_their_own_scripts(tmp_path: Path) -> None:
    files = images(tmp_path / "in", "scripts")
    roots = [zoo_bundle(tmp_path / name, "scripts") for name in "ab"]
    own = roots[1] / "scripts" / "own.py"
    own.write_text(own.read_text().replace("* self.factor", "* 0 + 1"))
    first, second = (opened(root, runtime="stock") for root in roots)
    labels = [model.predict_case(files[0]).labels for model in (first, second, first)]
    assert np.array_equal(labels[0], labels[2])
    assert not np.array_equal(labels[0], labels[1])


def test_other_threads_may_import_meanwhile(tmp_path: Path) -> None:
    """As the one does that reads the next case."""
    (tmp_path / "own.py").write_text("")
    imports, done = BundleImports(tmp_path), threading.Event()

    def keep_importing() -> None:
        names = [f"volseg_test_{number}" for number in range(200)]
        while not done.is_set():
            sys.modules.update(dict.fromkeys(names, sys))
            for name in names:
                del sys.modules[name]

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=keep_importing)
    thread.start()
    try:
        sys.setswitchinterval(1e-5)
        for _ in range(100):
            with imports.active():
                pass
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()


def test_labels_are_inverted_by_the_nearest_voxel(tmp_path: Path) -> None:
    """Between labels nothing can be interpolated; MONAI's own file has fractions."""
    root, files = zoo_bundle(tmp_path / "b", "argmax"), images(tmp_path / "in", "argmax")
    result = predicted(root, files, runtime="stock")
    assert set(np.unique(result.labels)) <= {0, 1, 2}
    assert any("nearest" in warning for warning in result.warnings)
    nearest = {"postprocessing::transforms::1::nearest_interp": True}
    assert np.array_equal(
        result.labels, by_monai(root, item_of("", files), tmp_path / "o", **nearest)
    )


def test_labels_that_overlap_are_masks(tmp_path: Path) -> None:
    root, files = zoo_bundle(tmp_path / "b", "masks"), images(tmp_path / "in", "masks")
    result = predicted(root, files, runtime="stock")
    expected = by_monai(root, item_of("", files), tmp_path / "out")
    assert np.array_equal(np.moveaxis(result.labels, 0, -1), expected)
    assert set(result.volumes_mm3) == {"core", "whole", "rim"}
    voxel = abs(np.linalg.det(result.affine[:3, :3]))
    assert result.volumes_mm3["whole"] == pytest.approx(expected[..., 1].sum() * voxel)


def test_values_that_the_bundle_paints_itself_have_no_names(tmp_path: Path) -> None:
    """The names in the metadata are those of channels there."""
    root, files = zoo_bundle(tmp_path / "b", "sigmoid"), images(tmp_path / "in", "sigmoid")
    volumes = predicted(root, files, runtime="stock").volumes_mm3
    assert set(volumes) <= {"label 1", "label 4"}
    assert volumes


def test_cuda_that_is_written_into_a_configuration_is_replaced(tmp_path: Path) -> None:
    root, files = zoo_bundle(tmp_path / "b", "cuda"), images(tmp_path / "in", "cuda")
    assert predicted(root, files, runtime="stock").labels.any()
    assert any("spare#device" in note for note in bundle_info(root).notes)


def test_probabilities_and_uncertainty(tmp_path: Path) -> None:
    """They are the same streamed and whole, and refused where labels come too early."""
    root, files = zoo_bundle(tmp_path / "b", "json"), images(tmp_path / "in", "json")
    wanted = {"uncertainty": True, "probabilities": True}
    whole = predicted(root, files, runtime="stock", **wanted)
    assert whole.probabilities is not None
    assert whole.uncertainty is not None
    own = np.take_along_axis(whole.probabilities, whole.labels[None].astype(int), 0)[0]
    assert (own == whole.probabilities.max(0)).all()
    streamed = predicted(root, files, runtime="openvino", **wanted)
    assert streamed.probabilities is not None
    assert streamed.uncertainty is not None
    difference = streamed.probabilities.astype(int) - whole.probabilities.astype(int)
    assert np.abs(difference).max() <= 1
    assert np.abs(streamed.uncertainty - whole.uncertainty).max() < 1e-3
    early = zoo_bundle(tmp_path / "early", "argmax")
    with pytest.raises(ConfigError, match="Activationsd before AsDiscreted"):
        opened(early, **wanted)


def test_an_untrusted_bundle_does_not_run(tmp_path: Path) -> None:
    root = zoo_bundle(tmp_path / "b", "json")
    with pytest.raises(ConfigError, match="--trust"):
        open_for_cases(root, device="cpu")
    assert bundle_info(root).labels == {"background": 0, "near": 1, "far": 2}


def test_argument_that_this_monai_does_not_take(tmp_path: Path) -> None:
    """The error gives the option that removes it, and with it the bundle opens."""
    config = zoo_config()
    config["network_def"]["_target_"] = "UNet"
    root = write_bundle(tmp_path / "b", config, metadata({"0": "i"}, {"0": "background"}, 3))
    path = root / "configs" / "inference.json"
    config["network_def"]["img_size"] = 96
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="--set network_def#img_size= "):
        opened(root)
    opened(root, overrides=parse_overrides(["network_def#img_size="]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("overlap", "expected ID=VALUE"),
        ("inferrer#overlap=0.1", "did you mean inferer"),
        ("postprocessing#transforms#9=1", "a list of 4"),
        ("output_dir#x=1", "no parts"),
    ],
)
def test_overrides_that_lead_to_nothing(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides(zoo_config(), parse_overrides([text]), "inference.json")


def test_missing_weights_and_packages(tmp_path: Path) -> None:
    root = zoo_bundle(tmp_path / "b", "json")
    (root / "models" / "model.pt").unlink()
    with pytest.raises(ConfigError, match="download the bundle"):
        opened(root)
    own = zoo_bundle(tmp_path / "own", "scripts")
    (own / "scripts" / "own.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(ConfigError, match="install what the bundle needs"):
        opened(own)


def test_outputs_that_are_no_labels(tmp_path: Path) -> None:
    config = zoo_config(labels=2)
    config["postprocessing"]["transforms"] = [transform("Activationsd", softmax=True), invert()]
    root = write_bundle(tmp_path / "b", config, metadata({"0": "i"}, {"0": "background"}, 2))
    files = images(tmp_path / "in", "json")
    with pytest.raises(VolumeError, match="no whole numbers"):
        opened(root, runtime="stock").predict_case(files[0])


def test_inputs_are_checked(tmp_path: Path) -> None:
    """Truncated files, NaN and the wrong number of files are errors of the case."""
    root, [file] = zoo_bundle(tmp_path / "b", "json"), images(tmp_path / "in", "json")
    model = opened(root, runtime="stock")
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(Path(file).read_bytes()[:-40])
    image = nib.load(file)
    array = np.asarray(image.dataobj).copy()
    array[4, 5, 6] = np.nan
    for given in (str(broken), nib.Nifti1Image(array, image.affine), [file, file]):
        with pytest.raises(PipelineError):
            model.predict_case(given)
    in_memory = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
    assert np.array_equal(model.predict_case(in_memory).labels, model.predict_case(file).labels)


def many_classes(root: Path, side: int) -> Path:
    """A bundle with as many classes as a whole body has, and windows of a side, voxels."""
    config = zoo_config(labels=105)
    config["inferer"] |= {"roi_size": [side] * 3, "overlap": 0.25, "mode": "gaussian"}
    names = {str(number): "background" if not number else f"s{number}" for number in range(105)}
    return write_bundle(root, config, metadata({"0": "image"}, names, 105))


def test_estimate_of_memory_for_many_classes(tmp_path: Path) -> None:
    """Of 320 x 320 x 256 voxels, the sums of windows are the largest part; stock holds all."""
    root = many_classes(tmp_path / "b", 96)
    headers = [Header(shape=(320, 320, 256), affine=np.diag([1.5, 1.5, 2.0, 1]), bytes_per_voxel=2)]
    streamed, stock = opened(root, runtime="torch"), opened(root, runtime="stock")
    streamed.engine().follow("torch", "float32")
    sums = 4 * 106 * (105 * 105 * 113 + 25 * 320 * 256 + 105 * 25 * 256 + 105 * 105 * 25)
    assert sums < streamed.peak_bytes(headers, 0) < 1.7 * sums
    assert stock.peak_bytes(headers, 0) > 4 * 105 * 320 * 320 * 256
    # the part of a case by which the runtime is decided: two windows along one axis
    length, width = streamed.engine()._trial_mm()
    assert 2 * 96 * 1.1 < length <= 2 * 96 * 1.5
    assert width < 2 * 96


@pytest.mark.stress
def test_the_estimate_of_memory_is_kept(tmp_path: Path) -> None:
    """A case takes no more than estimated, and no less than three fifths of it."""
    root = many_classes(tmp_path / "b", 64)
    noise = np.random.default_rng(0).normal(size=(21, 20, 16)).astype(np.float32)
    array = noise.repeat(8, 0).repeat(8, 1).repeat(8, 2)
    path = str(save(tmp_path / "in.nii.gz", nib.Nifti1Image(array, np.diag([1.5, 1.5, 2.0, 1]))))
    command = [sys.executable, "-c", MEASURE, str(root), path]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    estimate, peak, base = map(int, found.stdout.split()[-3:])
    assert 0.6 * (estimate - base) < peak - base < estimate - base


MEASURE = """
import sys
from pipeline.bundle import open_for_cases
from pipeline.inference import peak_bytes, reset_peak, resident_bytes
from pipeline.io import read_header
model = open_for_cases(sys.argv[1], device="cpu", trust=True, runtime="openvino")
model.engine().follow("openvino", "float32")
base = model.ready_bytes()
estimate = model.peak_bytes([read_header(sys.argv[2])], base)
reset_peak()
model.predict(model.prepare(sys.argv[2]))
print(estimate, peak_bytes(), base)
"""


def test_a_part_of_the_network_in_float64_stays_stock(tmp_path: Path) -> None:
    root = zoo_bundle(tmp_path / "b", "slices")
    description = opened(root).prepare_runtime()
    assert description is not None
    assert description["runtime"] == "stock"
    with pytest.raises(ConfigError, match="SliceInferer"):
        opened(root, runtime="openvino")
    assert torch.get_default_dtype() == torch.float32
