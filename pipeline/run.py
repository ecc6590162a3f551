"""How one training run goes: data, fold, length, seed. Nothing here says what the weights mean (that is the spec)."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline import config
from pipeline.errors import ConfigError
from pipeline.types import PathOrStr


@dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """Random changes of the training patches; each `*_chance` is a probability, 0 to 1.

    Attributes:
        affine_chance: of a rotation, scaling and shift together.
        rotation: largest angle, degrees, about each axis.
        scaling: largest relative change of size.
        shift: largest shift, voxels.
        mirror: anatomical directions along which a mirror image is as good as the original; mirror_chance: of each.
        noise: largest standard deviation of added noise, in units of the normalised image.
        blur: largest sigma of a Gaussian blur, voxels.
        contrast, brightness: largest relative change.
        gamma: exponents go from 1 - gamma to 1 + gamma.
    """

    affine_chance: float = 0.8
    rotation: float = 15.0
    scaling: float = 0.15
    shift: float = 4.0
    mirror: tuple[str, ...] = ()
    mirror_chance: float = 0.5
    noise_chance: float = 0.2
    noise: float = 0.15
    blur_chance: float = 0.15
    blur: float = 1.0
    intensity_chance: float = 0.3
    contrast: float = 0.25
    brightness: float = 0.25
    gamma: float = 0.3

    def __post_init__(self) -> None:
        for name in ("affine_chance", "mirror_chance", "noise_chance", "blur_chance", "intensity_chance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"run.augment.{name}: expected a probability, 0 to 1, got {getattr(self, name)}")
        unknown = [direction for direction in self.mirror if direction not in ("R", "A", "S")]
        if unknown:
            raise ConfigError(f"run.augment.mirror: expected directions R, A or S, got {', '.join(unknown)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """How one training run goes.

    Attributes:
        bundle: the folder of the bundle that the run fills.
        dataset: the folder that holds dataset.json; `$NAME` in it is taken from the environment.
        splits: the JSON file of folds beside dataset.json; null trains on every case.
        fold: which fold is left out.
        epochs: passes over the training cases.
        batch_size: patches a step.
        patches_per_case: patches taken from a case each time it comes up; a step mixes batch_size / patches_per_case cases.
        learning_rate, weight_decay: AdamW's, at the top of the schedule.
        warmup: the fraction of the steps over which the learning rate rises, before it falls along a cosine.
        ema_decay: of the exponential moving average of the weights, a step; 0 keeps the last weights as they are.
        start: a state dict to start from instead of random weights, as another run or bundle left it.
        seed: of the weights, the order of cases and the augmentation.
    """

    bundle: str
    dataset: str
    splits: str | None = None
    fold: int = 0
    epochs: int
    batch_size: int
    patches_per_case: int = 1
    learning_rate: float
    weight_decay: float = 1e-4
    warmup: float = 0.05
    ema_decay: float = 0.0
    start: str | None = None
    seed: int = 0
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patches_per_case"):
            if getattr(self, name) < 1:
                raise ConfigError(f"run.{name}: expected 1 or more, got {getattr(self, name)}")
        if self.batch_size % self.patches_per_case:
            raise ConfigError(
                f"run.batch_size: expected a multiple of patches_per_case ({self.patches_per_case}), got {self.batch_size}"
            )
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"run.ema_decay: expected 0 ≤ ema_decay < 1, got {self.ema_decay}")
        if not self.learning_rate > 0:
            raise ConfigError(f"run.learning_rate: expected above 0, got {self.learning_rate}")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"run.warmup: expected a fraction, 0 ≤ warmup ≤ 1, got {self.warmup}")

    @property
    def cases_per_step(self) -> int:
        """How many cases one step mixes."""
        return self.batch_size // self.patches_per_case


def load(path: PathOrStr) -> Run:
    """The run that a YAML file holds.

    Raises:
        ConfigError: with the path to the key that is wrong.
    """
    return config.load(Run, path, "run")
