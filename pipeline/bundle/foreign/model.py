"""Bundles in the form of MONAI's model zoo, opened for inference.

The bundle's own transforms read, preprocess and invert; its own evaluator runs the network. volseg
checks the inputs before, and the labels after that.
"""

from __future__ import annotations

import copy
import shutil
import threading
import time
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.bundle.foreign.engine import ForeignEngine, ForeignOutput
from pipeline.bundle.foreign.files import ForeignFacts, foreign_facts, weights_hash
from pipeline.bundle.foreign.labels import checked_labels
from pipeline.bundle.foreign.settings import ForeignSettings
from pipeline.bundle.overrides import item_entries, overrides_text
from pipeline.bundle.trust import require_trust
from pipeline.errors import (
    ConfigError,
    PipelineError,
    VolumeError,
    describe_error,
    unwrapped_errors,
)
from pipeline.inference import (
    FLOAT32_BYTES,
    Prediction,
    PreparedCase,
    resident_bytes,
    resolve_device,
)
from pipeline.io import (
    LABELS_ENDING,
    PROBABILITIES_ENDING,
    UNCERTAINTY_ENDING,
    Grid,
    Header,
    Image,
    read_channels,
    read_header,
    source_list,
    temporary_folder,
    write_copy,
)
from pipeline.transforms import check_affine, check_values
from pipeline.types import ImageSource, PathOrStr

NIFTI = (".nii", ".nii.gz")
# arrays of the size of the files that reading and transforms take, float32
INPUT_COPIES = 6
# arrays of the size of the network's input that transforms and batch hold, float32; measured with
# 105 classes on 320 x 320 x 256 voxels
IMAGE_COPIES = 3
ITEM, GRIDS, WARNINGS, FOLDER = "item", "grids", "warnings", "folder"


def open_foreign(
    root: PathOrStr,
    *,
    device: str = "auto",
    labels_spacing: float | None = None,
    trust: bool = False,
    max_memory: int | None = None,
    **settings: Any,
) -> ForeignBundle:
    """Return a bundle in MONAI's form, opened for inference.

    Args:
        root: the bundle's folder.
        device: auto, cpu, cuda or mps.
        labels_spacing: must be None: the bundle's own transforms decide the grid of its labels.
        trust: whether its code may run.
        max_memory: bytes of resident memory that the process may use; None for no limit.
        settings: the other fields of `ForeignSettings`.

    Raises:
        ConfigError: it is not trusted, cannot be opened, or a setting does not apply to it.
    """
    facts = foreign_facts(root)
    require_trust(root, [facts.configuration], trust=trust)
    if labels_spacing is not None:
        raise ConfigError(
            f"{root}: --labels-spacing applies to volseg's own bundles; the transforms of this one "
            "lead back to the grid of the input"
        )
    chosen = ForeignSettings(root=root, device=resolve_device(device), **settings)
    _check_precision(chosen)
    opened = ForeignBundle(chosen, facts, max_memory)
    opened.engine()
    return opened


def _check_precision(settings: ForeignSettings) -> None:
    """Raise a ConfigError for a precision that cannot be had."""
    precision = settings.precision
    if precision in ("auto", "float32"):
        return
    if precision != "bfloat16":
        raise ConfigError(
            f"{settings.root}: --precision {precision} applies to volseg's own bundles; choose "
            "float32 or bfloat16"
        )
    if settings.device.type != "cpu" or settings.runtime not in ("auto", "openvino"):
        raise ConfigError(
            f"{settings.root}: OpenVINO computes a bundle in MONAI's form in bfloat16, on a CPU: "
            "leave out --precision, or choose --device cpu --runtime openvino (on a GPU, the "
            "bundle's own `amp` decides)"
        )


class ForeignBundle:
    """A bundle in MONAI's form, opened for inference: a `CaseModel`.

    A copy in another process opens the bundle again, because its parts cannot be pickled.

    Args:
        settings: how it is opened.
        facts: what its files say.
        max_memory: largest resident memory of the process, bytes; None sets no limit.
    """

    def __init__(
        self, settings: ForeignSettings, facts: ForeignFacts, max_memory: int | None = None
    ) -> None:
        self.settings, self.facts, self.max_memory = settings, facts, max_memory
        self._engine: ForeignEngine | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: the engine is not."""
        return {**self.__dict__, "_engine": None, "_lock": None}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def engine(self) -> ForeignEngine:
        """Return the opened bundle; a copy in another process opens it at the first call."""
        if self._engine is None:
            self._engine = ForeignEngine(self.facts, self.settings)
        return self._engine

    @property
    def root(self) -> PathOrStr:
        """Folder of the bundle."""
        return self.settings.root

    @property
    def device(self) -> torch.device:
        """Device that the network runs on."""
        return self.settings.device

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the files that a case consists of."""
        return tuple(file.name for file in self.facts.files)

    @property
    def fallback_channel(self) -> str | None:
        """No file is used for others."""
        return None

    @property
    def labels(self) -> Mapping[str, int]:
        """Name → value of the labels in label maps, as far as the metadata name them."""
        return self.facts.labels or {"background": 0}

    @property
    def endings(self) -> tuple[str, ...]:
        """Endings of the files that each case gets."""
        endings = [LABELS_ENDING]
        if self.settings.uncertainty:
            endings.append(UNCERTAINTY_ENDING)
        if self.settings.probabilities:
            endings.append(PROBABILITIES_ENDING)
        return tuple(endings)

    def limited(self, max_memory: int | None) -> ForeignBundle:
        """Return the same bundle with another limit of its memory, bytes; None for no limit."""
        limited = copy.copy(self)
        limited.max_memory = max_memory
        return limited

    def on_device(self, device: torch.device) -> ForeignBundle:
        """Return the same bundle on another device, opened again."""
        settings = replace(self.settings, device=device)
        return ForeignBundle(settings, self.facts, self.max_memory)

    def identity(self) -> dict[str, str]:
        """Return what else than the bundle's code decides the voxels: weights and settings."""
        settings = self.settings
        return {
            "weights_sha256": weights_hash(settings.root),
            "overrides": overrides_text(settings.overrides),
            "overlap": str(settings.overlap),
            "volume": str(settings.volume),
        }

    def prepare(self, image: Any, scratch: Path | None = None) -> PreparedCase:
        """Return a case whose files have been read to their end and checked.

        The bundle's own transforms read them again.

        Args:
            image: path, nibabel image or SimpleITK image, or a list of them, one per file.
            scratch: where images that the bundle cannot read itself lie as NIfTI files until the
                case is done; None for the system's folder for temporary files.

        Raises:
            PipelineError: the case cannot be read, or is no image.
        """
        started = time.perf_counter()
        sources = source_list(image)
        images = self._read(sources)
        warnings: dict[str, None] = {}
        for name, one in zip(self.channels, images, strict=True):
            warnings.update(dict.fromkeys((*one.warnings, *_image_warnings(name, one))))
        grids = [Grid(affine=i.affine, shape=i.array.shape, header=i.header) for i in images]
        folder = None
        if not _as_they_are(sources, len(images), self.settings.volume):
            folder = _Folder(scratch)
            sources = _as_nifti(images, folder.path)
        case: dict[Hashable, Any] = {
            ITEM: self._item(sources),
            GRIDS: grids,
            WARNINGS: list(warnings),
            FOLDER: folder,  # removed with the prepared case
        }
        return PreparedCase(case=case, seconds={"read": time.perf_counter() - started})

    def predict(self, prepared: PreparedCase) -> Prediction:
        """Return the prediction for a case from `prepare`, by the bundle's own parts.

        Raises:
            PipelineError: the case cannot be segmented; the message says why.
        """
        with self._lock, unwrapped_errors(), _named_errors():
            output = self.engine().run(prepared.case[ITEM], prepared.case[GRIDS][0])
        return self._prediction(prepared, output)

    def predict_case(self, image: Any, scratch: Path | None = None) -> Prediction:
        """Return the prediction for one case.

        Args:
            image: as for `prepare`.
            scratch: as for `prepare`.

        Raises:
            VolumeError: the case needs more memory than `max_memory`.
            PipelineError: the case cannot be read or segmented; the message says why.
        """
        if self.max_memory is not None:
            headers = [read_header(source) for source in source_list(image)]
            needed = self.peak_bytes(headers, resident_bytes())
            if needed > self.max_memory:
                raise VolumeError(
                    f"needs about {needed / 2**30:.2f} GB of memory, --max-memory allows "
                    f"{self.max_memory / 2**30:.2f} GB; give more, or crop the volume"
                )
        return self.predict(self.prepare(image, scratch))

    @property
    def asked_runtime(self) -> Mapping[str, str] | None:
        """`runtime` and `precision` as asked for, or as decided."""
        return {"runtime": self.settings.runtime, "precision": self.settings.precision}

    def follow_runtime(self, decided: Mapping[str, str]) -> None:
        """Ask for the runtime and precision that were decided before."""
        self.settings = replace(
            self.settings, runtime=decided["runtime"], precision=decided["precision"]
        )
        self.engine().follow(decided["runtime"], decided["precision"])

    def prepare_runtime(
        self, image: Any = None, scratch: Path | None = None
    ) -> dict[str, Any] | None:
        """Prepare the network, and describe what computes it.

        Args:
            image: a case by which it is decided whether volseg's inferer and OpenVINO agree with
                the bundle's own; None before the first case.
            scratch: folder for parts of that case; None for the system's for temporary files.

        Returns:
            None where a case is needed to decide.

        Raises:
            ConfigError: the runtime that was asked for cannot compute this bundle.
        """
        engine = self.engine()
        if engine.description is None and image is not None:
            with self._lock, unwrapped_errors(), _named_errors():
                prepared = self.prepare(image, scratch)
                engine.decide(prepared.case[ITEM], prepared.case[GRIDS][0], scratch)
        return engine.description

    @property
    def description(self) -> dict[str, Any] | None:
        """What really computes the network; None before it is decided."""
        return None if self._engine is None else self._engine.description

    def ready_bytes(self) -> int:
        """Run the network once, on an empty window, and return the process's memory, bytes."""
        with suppress(Exception):  # a network may take more than an image
            self.engine().compute_empty_window(self.facts.in_channels)
        return resident_bytes()

    def peak_bytes(self, headers: Sequence[Header], base: int) -> int:
        """Return an estimate of the process's highest memory for a case, bytes.

        Args:
            headers: of the case's files, one per channel.
            base: memory of the process before the case, bytes.
        """
        engine = self.engine()
        file_voxels = sum(prod(header.shape) for header in headers)
        shape = self._grid_shape(headers[0])
        channels = max(self.facts.out_channels, 1)
        image = prod(shape) * len(headers)
        prepare = FLOAT32_BYTES * (INPUT_COPIES * file_voxels + 2 * image)
        outputs = engine.output_bytes(channels, shape, prod(headers[0].shape))
        return int(base + max(prepare, FLOAT32_BYTES * IMAGE_COPIES * image + outputs))

    def window_count(self, header: Header) -> int:
        """Return how many windows cover a volume."""
        return self.engine().window_count(self._grid_shape(header))

    def _grid_shape(self, header: Header) -> tuple[int, ...]:
        """Return about how many voxels a volume has on the network's grid."""
        spacing = self.engine().spacing
        if spacing is None:
            return tuple(header.shape)
        return tuple(
            max(1, ceil(size * mm / (new if new > 0 else mm)))
            for size, mm, new in zip(header.shape, header.spacing, spacing, strict=True)
        )

    def _read(self, sources: Sequence[ImageSource]) -> list[Image]:
        """Return the images of a case's files.

        Raises:
            PipelineError: a file cannot be read, or there are too few or too many.
        """
        count, volume = len(self.channels), self.settings.volume
        if len(sources) == count > 1:
            # each on its own: files of different keys may lie on different grids
            return [read_channels([source], None, volume)[0] for source in sources]
        images = read_channels(list(sources), count, volume)
        if len(images) != count:
            raise VolumeError(
                f"got {len(images)} image, expected {count}: {', '.join(self.channels)}"
            )
        return images

    def _item(self, sources: Sequence[ImageSource]) -> dict[str, Any]:
        """Return the item that the bundle's dataset would list."""
        files: dict[str, list[str]] = {}
        for file, source in zip(self.facts.files, sources, strict=True):
            files.setdefault(file.key, []).append(str(Path(source).absolute()))
        item: dict[str, Any] = {key: x[0] if len(x) == 1 else x for key, x in files.items()}
        return {**item, **item_entries(self.settings.overrides)}

    def _prediction(self, prepared: PreparedCase, output: ForeignOutput) -> Prediction:
        case = prepared.case
        found = checked_labels(output.pred, case[GRIDS], self.facts.labels, self.facts.names)
        warnings = (*case[WARNINGS], *self.engine().parts.warnings, *found.warnings)
        return Prediction(
            labels=found.labels,
            affine=found.grid.affine,
            header=found.grid.header,
            warnings=warnings,
            seconds=prepared.seconds | output.seconds,
            volumes_mm3=found.volumes_mm3,
            uncertainty=output.uncertainty,
            probabilities=output.probabilities,
        )


class _Folder:
    """A temporary folder that is removed together with this object.

    Args:
        staging: where it lies; None for the system's folder for temporary files.
    """

    def __init__(self, staging: Path | None) -> None:
        self.path = temporary_folder(staging)
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _image_warnings(name: str, image: Image) -> list[str]:
    """Return the warnings about an image's values.

    Raises:
        VolumeError: it cannot be segmented.
    """
    try:
        check_affine(image.affine)
        values = torch.from_numpy(np.array(image.array, dtype=np.float32))
        broken = int((~torch.isfinite(values)).sum())
        if broken:
            raise VolumeError(
                f"{broken} voxels are NaN or infinite, which the bundle's own transforms would "
                "spread over the whole volume: set them to the background first"
            )
        return check_values(values)
    except VolumeError as error:
        raise VolumeError(f"{name}: {error}") from error


def _as_they_are(sources: Sequence[ImageSource], count: int, volume: int | None) -> bool:
    """Return whether the bundle can read the sources themselves: NIfTI files of one volume."""
    if volume is not None or len(sources) != count:
        return False
    return all(isinstance(x, str | Path) and str(x).endswith(NIFTI) for x in sources)


def _as_nifti(images: Sequence[Image], folder: Path) -> list[str]:
    """Write images as NIfTI files, and return their paths."""
    paths = [folder / f"{number}.nii" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        write_copy(path, image)
    return [str(path) for path in paths]


@contextmanager
def _named_errors() -> Iterator[None]:
    """Raise a VolumeError in place of whatever the bundle's own code raises for a case."""
    try:
        yield
    except (PipelineError, MemoryError):
        raise
    except Exception as error:
        raise VolumeError(f"the bundle cannot segment it: {describe_error(error)}") from error
