"""The paths of all files in a bundle; no other module names these files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.types import PathOrStr


@dataclass(frozen=True, slots=True)
class BundlePaths:
    """Paths of the files in a bundle, whether they exist or not.

    Args:
        root: the bundle's folder.
    """

    root: PathOrStr

    @property
    def folder(self) -> Path:
        """The bundle's folder."""
        return Path(self.root)

    @property
    def configs(self) -> Path:
        """The folder of the configuration files."""
        return self.folder / "configs"

    @property
    def spec(self) -> Path:
        """The spec: inputs and outputs that the weights were trained for."""
        return self.configs / "spec.yaml"

    @property
    def single_fold_spec(self) -> Path:
        """The spec of a single fold, if the bundle is an ensemble of the folds."""
        return self.configs / "single_fold.yaml"

    @property
    def run(self) -> Path:
        """The run: settings of the training run."""
        return self.configs / "run.yaml"

    @property
    def card(self) -> Path:
        """The card: description of the bundle for its users."""
        return self.configs / "card.yaml"

    @property
    def dicom_codes(self) -> Path:
        """Codes of the labels for DICOM objects, which a bundle may have."""
        return self.configs / "dicom_codes.csv"

    @property
    def splits(self) -> Path:
        """The folds of the cross-validation, which `volseg plan` writes."""
        return self.configs / "splits.json"

    @property
    def plan(self) -> Path:
        """The settings that `volseg plan` chose, each with its reason."""
        return self.configs / "plan.json"

    @property
    def metadata(self) -> Path:
        """MONAI's metadata, generated from the spec and the card."""
        return self.configs / "metadata.json"

    @property
    def inference(self) -> Path:
        """The wiring for inference."""
        return self.configs / "inference.yaml"

    @property
    def train(self) -> Path:
        """The wiring for training, which is merged into the wiring for inference."""
        return self.configs / "train.yaml"

    @property
    def models(self) -> Path:
        """The folder of the weights."""
        return self.folder / "models"

    @property
    def weights(self) -> Path:
        """The weights, a plain state dict of the network."""
        return self.models / "model.pt"

    @property
    def cascade_weights(self) -> Path:
        """The weights of the second network of a cascade, a plain state dict."""
        return self.models / "model_cascade.pt"

    @property
    def best_weights(self) -> Path:
        """The best weights so far, during a run with `keep: best`."""
        return self.models / "best.pt"

    @property
    def checkpoint(self) -> Path:
        """The checkpoint from which an interrupted run resumes."""
        return self.models / "checkpoint.pt"

    @property
    def int8_model(self) -> Path:
        """The network quantised to int8, in OpenVINO's format."""
        return self.models / "model_int8.xml"

    @property
    def quality(self) -> Path:
        """The fits of the predicted Dice."""
        return self.models / "quality.json"

    @property
    def training(self) -> Path:
        """The folder of the history (table and figure) of the training run."""
        return self.folder / "train"

    @property
    def training_lock(self) -> Path:
        """The file that is locked while a process trains the bundle."""
        return self.training / "lock"

    @property
    def training_report(self) -> Path:
        """The report of the training run, for people."""
        return self.training / "report.md"

    @property
    def validation_scores(self) -> Path:
        """The Dice of each validation case with the weights that the run kept."""
        return self.training / "validation.csv"

    @property
    def cross_validation(self) -> Path:
        """The folder of the cross-validation's predictions and scores."""
        return self.folder / "crossval"

    def fold(self, number: int) -> BundlePaths:
        """Return the paths in the bundle of one fold of the cross-validation."""
        return BundlePaths(self.folder / "folds" / str(number))

    @property
    def readme(self) -> Path:
        """The README of the bundle."""
        return self.folder / "docs" / "README.md"

    @property
    def licence(self) -> Path:
        """The licence of the bundle."""
        return self.folder / "LICENSE"
