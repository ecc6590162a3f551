"""How one training run goes: data, fold, length, seed. Nothing here says what the weights mean (that is the spec)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.parser import load_config
from pipeline.errors import ConfigError
from pipeline.types import PathOrStr

TrainingPrecision = Literal["float32", "bfloat16"]
TRAINING_PRECISIONS: tuple[TrainingPrecision, ...] = ("float32", "bfloat16")


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
        elastic_chance: of an elastic deformation.
        elastic_grid: points of its coarse grid along each axis.
        elastic_sigma: standard deviation of the displacement of each point, voxels.
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
    elastic_chance: float = 0.0
    elastic_grid: int = 3
    elastic_sigma: float = 10.0

    def __post_init__(self) -> None:
        for name in (
            "affine_chance",
            "mirror_chance",
            "noise_chance",
            "blur_chance",
            "intensity_chance",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"run.augment.{name}: expected a probability, 0 to 1, got {getattr(self, name)}"
                )
        unknown = [direction for direction in self.mirror if direction not in ("R", "A", "S")]
        if unknown:
            raise ConfigError(
                f"run.augment.mirror: expected directions R, A or S, got {', '.join(unknown)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Synthesis:
    """What images are drawn from label maps instead of being read; `pipeline.synthesize` does it.

    Each `*_chance` is a probability, 0 to 1; ranges are uniform unless said otherwise.

    Attributes:
        table: the CSV file that says what each value of the maps is (`pipeline.tissues`), with `$NAME` from the environment.
        rotation: largest angle, degrees, about each axis.
        scaling: largest relative change of size along each axis; shear: largest shear.
        shift: how far, mm, the middle of the image may lie from the middle of the structures, along each axis.
        neck_chance: of an image that lies lower than that, by up to `neck` mm, as windows over a neck do.
        elastic: largest standard deviation of an elastic displacement, mm, drawn every `elastic_every` mm.
        t1_chance: of grey values as in T1 images; sequence_chance: of a random function of those; otherwise each class has any.
        texture: smallest factor on the spread within a class.
        resolution_chance: of another resolution, `resolution_mm` along each axis; slices_chance: of thick slices, `slices_mm`.
        noise: largest standard deviation, a fraction of the grey scale.
        bias: largest standard deviation of the logarithm of the brightness, drawn every `bias_every` mm.
        gamma: standard deviation of the logarithm of the exponent, normal.
        cut_chance: of a field of view that ends early; cut: largest fraction of the image lost at a face.
        strip_chance: of an image without anything around the brain; outer_fluid: the maps' values of the fluid around it,
            which goes too, half of the times.
    """

    table: str
    rotation: float = 20.0
    scaling: float = 0.15
    shear: float = 0.02
    shift: float = 20.0
    neck_chance: float = 0.0
    neck: float = 100.0
    elastic: float = 4.0
    elastic_every: float = 40.0
    t1_chance: float = 0.6
    sequence_chance: float = 0.2
    texture: float = 0.3
    resolution_chance: float = 0.3
    resolution_mm: tuple[float, float] = (1.0, 4.0)
    slices_chance: float = 0.2
    slices_mm: tuple[float, float] = (3.0, 7.0)
    noise: float = 0.05
    bias: float = 0.3
    bias_every: float = 60.0
    gamma: float = 0.2
    cut_chance: float = 0.2
    cut: float = 0.3
    strip_chance: float = 0.25
    outer_fluid: tuple[int, ...] = (24,)

    def __post_init__(self) -> None:
        chances = [name for name in self.__dataclass_fields__ if name.endswith("_chance")]
        for name in (*chances, "texture", "cut"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"run.synthesis.{name}: expected 0 to 1, got {getattr(self, name)}"
                )
        if self.t1_chance + self.sequence_chance > 1:
            raise ConfigError(
                f"run.synthesis: expected t1_chance + sequence_chance ≤ 1, got {self.t1_chance + self.sequence_chance:g}"
            )
        for name in ("elastic_every", "bias_every"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"run.synthesis.{name}: expected mm above 0, got {getattr(self, name)}"
                )
        for name in ("resolution_mm", "slices_mm"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ConfigError(
                    f"run.synthesis.{name}: expected 0 < low ≤ high, mm, got {low}, {high}"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """How one training run goes.

    Attributes:
        bundle: the folder of the bundle that the run fills.
        dataset: the folder of the labelled volumes, or one of images and one of labels; `$NAME` is taken from the environment.
        splits: the JSON file of folds, beside the data or anywhere; null trains on every case.
        fold: which fold is left out.
        epochs: passes over the training cases.
        minutes: wall time after which training ends, if its epochs have not ended before; the learning rate falls by whichever
            is further, the clock or the epochs; null sets no limit. Runs that the clock ends are not repeatable to the bit.
        batch_size: patches a step.
        patch_size: of a patch, voxels, where it is not the spec's roi_size: windows may be larger than what is trained on.
        patches_per_case: patches taken from a case each time it comes up; a step mixes batch_size / patches_per_case cases.
        learning_rate, weight_decay: the optimizer's, at the top of the schedule.
        optimizer: `adamw`, or `sgd` (stochastic gradient descent with `momentum`).
        precision: of the convolutions while training, `float32` or `bfloat16` (autocast; the weights stay in float32): up to
            twice as fast on GPUs and on processors with AVX512-BF16 or AMX, slower on others.
        compile: whether torch compiles the network for training (`torch.compile`), before the first step; a CPU needs a C++
            compiler for it, and gains next to nothing.
        loss: `dice_ce` (Dice over the batch plus cross-entropy), `dice`, or `border_ce`: cross-entropy weighted by class
            balance and by `border_weight` where two objects are within about `border_sigma_mm` of each other.
        balance: of the cross-entropy in `dice_ce`: how much rare classes weigh more, 0 (every voxel alike) to 1 (every class
            alike); small structures among many are learnt much sooner with .75, and their borders better with 0.
        initialisation: of the weights, PyTorch's `default`, or `he`: normal, with variance 2 / incoming values.
        warmup: the fraction of the steps over which the learning rate rises, before it falls along a cosine.
        ema_decay: of the exponential moving average of the weights, a step; 0 keeps the last weights as they are.
        start: a state dict to start from instead of random weights, as another run or bundle left it.
        grow: whether `start` was trained one level coarser: its levels become the lower ones of this network, which has one
            more on top, and weights that have no place in it begin at random.
        validate_every: epochs from one validation to the next, on the cases of the fold that is left out; 0 does without.
        keep: the `last` weights, or the `best` by mean Dice on those cases, whose scores then flatter.
        patience: validations without a better score after which the run ends; null goes on.
        tensorboard: whether TensorBoard's event files are written beside history.csv and progress.png.
        hold_out: cases that are left out of training, by name.
        repeats: how often each case comes up in an epoch.
        synthesis: draws images from label maps: the dataset is then a folder of them; null reads images.
        seed: of the weights, the order of cases and the augmentation.
    """

    bundle: str
    dataset: str | tuple[str, ...]
    splits: str | None = None
    fold: int = 0
    epochs: int
    minutes: float | None = None
    batch_size: int
    patch_size: tuple[int, ...] | None = None
    patches_per_case: int = 1
    learning_rate: float
    weight_decay: float = 1e-4
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.99
    precision: TrainingPrecision = "float32"
    compile: bool = False
    loss: Literal["dice_ce", "dice", "border_ce"] = "dice_ce"
    balance: float = 0.0
    border_weight: float = 10.0
    border_sigma_mm: float = 5.0
    initialisation: Literal["default", "he"] = "default"
    warmup: float = 0.05
    ema_decay: float = 0.0
    start: str | None = None
    grow: bool = False
    validate_every: int = 0
    keep: Literal["last", "best"] = "last"
    patience: int | None = None
    tensorboard: bool = False
    hold_out: tuple[str, ...] = ()
    repeats: int = 1
    seed: int = 0
    augment: Augment = field(default_factory=Augment)
    synthesis: Synthesis | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patches_per_case", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"run.{name}: expected 1 or more, got {getattr(self, name)}")
        if self.batch_size % self.patches_per_case:
            raise ConfigError(
                f"run.batch_size: expected a multiple of patches_per_case ({self.patches_per_case}), got {self.batch_size}"
            )
        if self.minutes is not None and self.minutes <= 0:
            raise ConfigError(f"run.minutes: expected more than 0 or null, got {self.minutes}")
        if self.border_sigma_mm <= 0:
            raise ConfigError(
                f"run.border_sigma_mm: expected mm above 0, got {self.border_sigma_mm}"
            )
        if self.augment.elastic_grid < 2:
            raise ConfigError(
                f"run.augment.elastic_grid: expected 2 points or more, got {self.augment.elastic_grid}"
            )
        if (self.keep == "best" or self.patience is not None) and (
            self.validate_every < 1 or self.splits is None
        ):
            raise ConfigError(
                "run.keep and run.patience: expected validate_every of 1 or more and splits, to know what is best"
            )
        if not 0 <= self.balance <= 1:
            raise ConfigError(f"run.balance: expected 0 ≤ balance ≤ 1, got {self.balance}")
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


def load_run(path: PathOrStr) -> Run:
    """The run that a YAML file holds.

    Raises:
        ConfigError: with the path to the key that is wrong.
    """
    return load_config(Run, path, "run")
