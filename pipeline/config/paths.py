"""The files of a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.types import PathOrStr


@dataclass(frozen=True, slots=True)
class BundlePaths:
    """Where each file of a bundle lies, whether it exists or not.

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
        """The inputs and outputs that the weights were trained for."""
        return self.configs / "spec.yaml"

    @property
    def single_fold_spec(self) -> Path:
        """The spec of one fold, kept once the bundle is an ensemble of folds."""
        return self.configs / "single_fold.yaml"

    @property
    def run(self) -> Path:
        """The settings of the training run."""
        return self.configs / "run.yaml"

    @property
    def card(self) -> Path:
        """Description, licence and scores, for readers."""
        return self.configs / "card.yaml"

    @property
    def splits(self) -> Path:
        """The folds that `volseg plan` made."""
        return self.configs / "splits.json"

    @property
    def metadata(self) -> Path:
        """MONAI's metadata, generated from spec and card."""
        return self.configs / "metadata.json"

    @property
    def inference(self) -> Path:
        """The wiring for inference."""
        return self.configs / "inference.yaml"

    @property
    def train(self) -> Path:
        """The wiring for training, an overlay on the one for inference."""
        return self.configs / "train.yaml"

    @property
    def models(self) -> Path:
        """The folder of the weights."""
        return self.folder / "models"

    @property
    def weights(self) -> Path:
        """The weights, a plain state dict."""
        return self.models / "model.pt"

    @property
    def best_weights(self) -> Path:
        """The best weights so far, while a run that keeps them goes on."""
        return self.models / "best.pt"

    @property
    def checkpoint(self) -> Path:
        """The state of an unfinished run."""
        return self.models / "checkpoint.pt"

    @property
    def int8_model(self) -> Path:
        """The quantised network, for OpenVINO."""
        return self.models / "model_int8.xml"

    @property
    def training(self) -> Path:
        """The folder of the history of the training run."""
        return self.folder / "train"

    @property
    def cross_validation(self) -> Path:
        """The folder of out-of-fold predictions and their scores."""
        return self.folder / "crossval"

    def fold(self, number: int) -> BundlePaths:
        """The bundle of one fold of a cross-validation."""
        return BundlePaths(self.folder / "folds" / str(number))

    @property
    def readme(self) -> Path:
        """The page of the bundle."""
        return self.folder / "docs" / "README.md"

    @property
    def licence(self) -> Path:
        """The licence of the bundle."""
        return self.folder / "LICENSE"
