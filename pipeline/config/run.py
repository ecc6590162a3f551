"""The run: dataset, length and options of one training run (run.yaml)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from pipeline.config.checks import require
from pipeline.config.parser import load_config
from pipeline.errors import ConfigError
from pipeline.types import PathOrStr

TrainingPrecision = Literal["float32", "bfloat16", "auto"]
# the ones that a step can be computed in; `auto` is one of them
TRAINING_PRECISIONS: tuple[TrainingPrecision, ...] = ("float32", "bfloat16")
LossName = Literal["dice_ce", "dice", "border_ce", "focal", "dice_focal", "tversky", "dice_topk"]
UNWEIGHTED_LOSSES = ("border_ce", "tversky")  # they have no weights of classes


@dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """Settings of the random augmentation of training patches.

    Attributes:
        affine_chance: probability of an affine transform: rotation, scaling and shift together.
        rotation: largest angle about each axis, degrees.
        scaling: largest relative change of size.
        shift: largest shift, voxels.
        mirror: anatomical directions along which patches are mirrored: `R`, `A` or `S`.
        mirror_chance: probability of mirroring along each of these directions.
        noise_chance: probability of added Gaussian noise.
        noise: largest standard deviation of the noise, in units of the normalised image.
        blur_chance: probability of a Gaussian blur.
        blur: largest standard deviation of the blur, voxels.
        intensity_chance: probability of a change of brightness, of contrast and of gamma, each
            drawn separately.
        contrast: largest relative change of the contrast.
        brightness: largest relative change of the brightness.
        gamma: largest deviation of the gamma exponent from 1.
        elastic_chance: probability of an elastic deformation.
        elastic_grid: number of control points of the deformation along each axis.
        elastic_sigma: standard deviation of the displacement of each control point, voxels.
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
        for name in _chances(self):
            value = getattr(self, name)
            require(0 <= value <= 1, f"run.augment.{name}", "a probability, 0 to 1", value)
        unknown = [direction for direction in self.mirror if direction not in ("R", "A", "S")]
        require(not unknown, "run.augment.mirror", "directions R, A or S", ", ".join(unknown))
        require(
            self.elastic_grid >= 2,
            "run.augment.elastic_grid",
            "2 points or more",
            self.elastic_grid,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Synthesis:
    """Settings of training images that are synthesised from label maps, instead of being read.

    `pipeline.transforms.synthesis_transform` synthesises them. Values are drawn uniformly, from 0
    or symmetrically about 0, up to the largest value given here, unless stated otherwise.

    Attributes:
        table: CSV file that defines the tissue of each value of the label maps; `$NAME` is replaced
            by the value of the environment variable.
        rotation: largest angle about each axis, degrees.
        scaling: largest relative change of size along each axis.
        shear: largest shear, the entries of the shear matrix.
        shift: largest distance along each axis between the centres of image and structures, mm.
        centred_on: names of the structures at whose mean position the images are centred, before
            the shift; none for all structures.
        neck_chance: probability of an image that lies lower, as scans that include the neck do.
        neck: largest distance by which such an image lies lower, mm.
        elastic: largest standard deviation of the elastic displacement, mm.
        elastic_every: distance between control points of the displacement, mm.
        fine_elastic, fine_elastic_every: the same for a second displacement, with closer control
            points, which changes the shapes of small structures; 0 for none.
        magnifications: number of random points whose surroundings are magnified or shrunk, such as
            the ventricles of an old brain.
        magnification: largest strength of that, below 1: 0.5 doubles lengths at the point.
        magnified_mm: smallest and largest reach of a magnification, the standard deviation of a
            Gaussian, mm.
        magnified_within: largest distance along each axis from the centre of the structures to
            such a point, mm.
        t1_chance: probability of the contrast of T1-weighted images.
        sequence_chance: probability of the contrast of another sequence: tissue intensities that
            are a random function of those in T1. With the remaining probability each tissue has a
            random intensity.
        lesions: value of a tissue in the label maps → value of its lesions, a row of the table that
            belongs to the same structure, such as {2: 25, 41: 57} for white matter.
        lesion_chance: probability that lesions are drawn into these tissues.
        lesion_share: largest fraction of such a tissue that becomes a lesion.
        lesion_mm: smallest and largest distance between control points of the random field whose
            highest values are lesions, mm.
        texture: smallest factor on the standard deviation within a tissue; the largest is 1.
        resolution_chance: probability of a coarser resolution.
        resolution_mm: smallest and largest voxel size of that resolution, mm; each axis has its
            own.
        slices_chance: probability of thick slices along one axis.
        slices_mm: smallest and largest thickness of these slices, mm.
        noise: largest standard deviation of the noise, as a fraction of the intensity range.
        bias: largest standard deviation of the logarithm of the bias field.
        bias_every: distance between control points of the bias field, mm.
        gamma: standard deviation of the logarithm of the gamma exponent, normally distributed.
        cut_chance: probability of a field of view that cuts off a part of the head.
        cut: largest fraction of the image that is lost at one face.
        strip_chance: probability of a skull-stripped image.
        scans: folder with the scans of some of the label maps, each with the name and the grid of
            its label map; null if there are none. `$NAME` is replaced by the value of the
            environment variable.
        scan_chance: probability that the image of a label map with a scan shows the scan.
        inset: names of structures whose labels end before the border that the image shows: people,
            and programs that learnt from them, count voxels that are partly white matter to it.
        inset_from: names of the tissues that the borders of `inset` are moved away from.
        inset_mm: how far, mm.
        outer_fluid: values in the label maps of the fluid around the brain; half of the
            skull-stripped images lack it.
    """

    table: str
    rotation: float = 20.0
    scaling: float = 0.15
    shear: float = 0.02
    shift: float = 20.0
    centred_on: tuple[str, ...] = ()
    neck_chance: float = 0.0
    neck: float = 100.0
    elastic: float = 4.0
    elastic_every: float = 40.0
    fine_elastic: float = 0.0
    fine_elastic_every: float = 12.0
    magnifications: int = 0
    magnification: float = 0.4
    magnified_mm: tuple[float, float] = (10.0, 30.0)
    magnified_within: float = 40.0
    t1_chance: float = 0.6
    sequence_chance: float = 0.2
    lesions: dict[int, int] = field(default_factory=dict)
    lesion_chance: float = 0.3
    lesion_share: float = 0.1
    lesion_mm: tuple[float, float] = (6.0, 20.0)
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
    scans: str | None = None
    scan_chance: float = 0.5
    inset: tuple[str, ...] = ()
    inset_from: tuple[str, ...] = ()
    inset_mm: float = 0.5
    outer_fluid: tuple[int, ...] = (24,)

    def __post_init__(self) -> None:
        for name in (*_chances(self), "texture", "cut", "lesion_share"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"run.synthesis.{name}", "0 to 1", value)
        total = self.t1_chance + self.sequence_chance
        require(total <= 1, "run.synthesis", "t1_chance + sequence_chance ≤ 1", f"{total:g}")
        for name in ("elastic_every", "fine_elastic_every", "bias_every"):
            value = getattr(self, name)
            require(value > 0, f"run.synthesis.{name}", "mm above 0", value)
        require(
            0 <= self.magnification < 1,
            "run.synthesis.magnification",
            "0 to below 1",
            self.magnification,
        )
        require(self.inset_mm > 0, "run.synthesis.inset_mm", "mm above 0", self.inset_mm)
        require(
            bool(self.inset) == bool(self.inset_from),
            "run.synthesis.inset_from",
            "names of tissues with inset, and none without",
            ", ".join(self.inset_from),
        )
        for name in ("resolution_mm", "slices_mm", "magnified_mm", "lesion_mm"):
            low, high = getattr(self, name)
            require(
                0 < low <= high, f"run.synthesis.{name}", "0 < low ≤ high, mm", f"{low}, {high}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Settings of one training run.

    Attributes:
        bundle: folder of the bundle that is trained.
        dataset: folder of the labelled volumes, or a folder of images and a folder of labels;
            `$NAME` is replaced by the value of the environment variable.
        splits: JSON file of the folds, relative to the dataset or to the working folder; null
            trains on every case.
        fold: number of the fold whose held-out cases are left out of training, from 0.
        epochs: passes over the training cases.
        minutes: wall time of the whole run, minutes, with the reading of the cases and the final
            validation; null sets no limit. With a limit, the learning rate falls to 0 by the end of
            the steps or of the time for them, whichever comes first. A run that the time limit ends
            cannot be repeated exactly.
        batch_size: patches per training step.
        accumulate: number of batches whose gradients are averaged before the weights change: as
            many patches per change as batch_size · accumulate, in the memory of one batch.
        patch_size: size of a training patch, voxels; null takes the spec's roi_size. Windows at
            inference may be larger than the patches in training.
        patches_per_case: number of patches that are cropped from a case each time it is loaded. A
            step has patches of batch_size / patches_per_case cases.
        sampling: how the centre of a patch is drawn: `foreground` draws a voxel of any structure,
            `balanced` draws a label of the case first and then a voxel of it, so that a rare
            structure is seen as often as a large one.
        foreground_share: fraction of the patches that are centred on a structure; the others are
            centred on the background.
        cache_gb: memory for training cases that stay loaded, GB; the others are read and
            preprocessed again in each epoch. null takes half of the memory that the process may
            use.
        learning_rate: highest learning rate of the schedule.
        weight_decay: weight decay of the optimizer.
        optimizer: `adamw`, or `sgd` (stochastic gradient descent with `momentum`).
        momentum: momentum of `sgd`, 0 to 1.
        precision: number format of the convolutions in training, `float32`, `bfloat16` (autocast;
            the weights stay float32), or `auto`: bfloat16 on GPUs that have instructions for it
            (since 2020), the faster of both on CPUs that have them (AVX512-BF16 or AMX), measured
            with the first batch, and float32 on others. A run that names bfloat16 has a warning
            and float32 there.
        compile: whether the network is compiled by `torch.compile`. On a CPU this requires a C++
            compiler and makes training hardly faster.
        loss: `dice_ce` (Dice over the batch plus cross-entropy), `dice`, `border_ce` (cross-entropy
            weighted by class balance and near borders between objects), `focal` (cross-entropy in
            which voxels that are right already count less), `dice_focal`, `tversky` (Dice with
            weights of its own for false positives and false negatives), or `dice_topk` (Dice plus
            the cross-entropy of the voxels where it is highest).
        focal_gamma: exponent of the focal loss, 0 or more; 0 is the cross-entropy.
        tversky_weights: weight of false positives and of false negatives in `tversky`; 0.5, 0.5 is
            Dice. More weight on false negatives finds more of small structures.
        top_k: fraction of the voxels that the cross-entropy of `dice_topk` is the mean of, above 0
            and up to 1.
        class_weights: name of a label → its weight in the loss; labels that are not named have 1.
            Not for `border_ce` and `tversky`.
        balance: weight of rare classes in the cross-entropy of `dice_ce`, from 0 (each voxel has
            the same weight) to 1 (each class has the same weight). With 0.75, small structures are
            learnt much earlier; with 0, their borders become better.
        border_weight: largest additional weight of a voxel between two objects, for `border_ce`.
        border_sigma_mm: scale on which this weight falls with the distance from the two objects,
            mm.
        initialisation: initialisation of the weights: PyTorch's `default`, or `he` (normal, with
            the variance 2 / number of inputs).
        warmup: fraction of the steps over which the learning rate rises, before it falls along a
            cosine.
        ema_decay: decay per step of the exponential moving average (EMA) of the weights; 0 keeps
            the weights of the last step. During the first steps the decay is lower, (1 + step) /
            (10 + step), so that the average forgets the initial weights.
        start: bundle to start from (its folder, or the name of a bundle that comes with volseg), or
            a file of weights; null starts from random weights. Every tensor that fits by name and
            shape is loaded, and the log has those that do not: with other labels, the last layer
            is new. A first layer for other channels starts from the mean over the channels.
        grow: whether `start` has the weights of a network with one level less. They become the
            lower levels of this network; all other weights are random.
        freeze_encoder: number of epochs, from the first, in which the weights of the encoder stay
            as they are.
        encoder_rate: factor on the learning rate of the encoder, above 0. Below 1, weights from
            `start` change less there than in the decoder.
        validate_every: number of epochs between two validations on the held-out cases; 0 turns
            validation off.
        keep: weights that the bundle gets: the `last`, or the `best` by mean Dice in validation. As
            they are chosen by it, the validation score of the best ones is optimistic.
        patience: number of validations without a better score after which training ends; null sets
            no limit.
        tensorboard: whether TensorBoard event files are written.
        hold_out: names of further cases that are left out of training.
        repeats: number of times that each case is used per epoch.
        seed: seed of the initial weights, the order of the cases and the augmentation.
        augment: settings of the random augmentation.
        synthesis: settings of synthetic images; the dataset is then a folder of label maps. null
            reads images.
    """

    bundle: str
    dataset: str | tuple[str, ...]
    splits: str | None = None
    fold: int = 0
    epochs: int
    minutes: float | None = None
    batch_size: int
    patch_size: tuple[int, ...] | None = None
    accumulate: int = 1
    patches_per_case: int = 1
    sampling: Literal["foreground", "balanced"] = "foreground"
    foreground_share: float = 2 / 3
    cache_gb: float | None = None
    learning_rate: float
    weight_decay: float = 1e-4
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.99
    precision: TrainingPrecision = "float32"
    compile: bool = False
    loss: LossName = "dice_ce"
    focal_gamma: float = 2.0
    tversky_weights: tuple[float, float] = (0.3, 0.7)
    top_k: float = 0.1
    class_weights: dict[str, float] = field(default_factory=dict)
    balance: float = 0.0
    border_weight: float = 10.0
    border_sigma_mm: float = 5.0
    initialisation: Literal["default", "he"] = "default"
    warmup: float = 0.05
    ema_decay: float = 0.0
    start: str | None = None
    grow: bool = False
    freeze_encoder: int = 0
    encoder_rate: float = 1.0
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
        for name in ("epochs", "batch_size", "patches_per_case", "repeats", "accumulate"):
            value = getattr(self, name)
            require(value >= 1, f"run.{name}", "1 or more", value)
        require(
            self.batch_size % self.patches_per_case == 0,
            "run.batch_size",
            f"a multiple of patches_per_case ({self.patches_per_case})",
            self.batch_size,
        )
        minutes_valid = self.minutes is None or self.minutes > 0
        require(minutes_valid, "run.minutes", "more than 0 or null", self.minutes)
        require(self.border_sigma_mm > 0, "run.border_sigma_mm", "mm above 0", self.border_sigma_mm)
        require(0 <= self.balance <= 1, "run.balance", "0 ≤ balance ≤ 1", self.balance)
        require(0 <= self.ema_decay < 1, "run.ema_decay", "0 ≤ ema_decay < 1", self.ema_decay)
        require(self.learning_rate > 0, "run.learning_rate", "above 0", self.learning_rate)
        require(0 <= self.warmup <= 1, "run.warmup", "a fraction, 0 ≤ warmup ≤ 1", self.warmup)
        _check_validation(self)
        _check_loss(self)
        _check_sampling_and_transfer(self)

    @property
    def cases_per_step(self) -> int:
        """Number of cases that the patches of one step are cropped from."""
        return self.batch_size // self.patches_per_case


def load_run(path: PathOrStr) -> Run:
    """Return the settings in a run's YAML file.

    Raises:
        ConfigError: the file cannot be read, or has a wrong key or value; the message has the path
            of the key.
    """
    return load_config(Run, path, "run")


def _chances(options: Augment | Synthesis) -> list[str]:
    """Return the names of the fields that are probabilities."""
    return [field.name for field in fields(options) if field.name.endswith("_chance")]


def _check_loss(run: Run) -> None:
    require(run.focal_gamma >= 0, "run.focal_gamma", "0 or more", run.focal_gamma)
    require(0 < run.top_k <= 1, "run.top_k", "a fraction, 0 < top_k ≤ 1", run.top_k)
    require(
        min(run.tversky_weights) >= 0 and sum(run.tversky_weights) > 0,
        "run.tversky_weights",
        "two weights, 0 or more, not both 0",
        run.tversky_weights,
    )
    for name, weight in run.class_weights.items():
        require(weight >= 0, f"run.class_weights.{name}", "a weight, 0 or more", weight)
    require(
        not run.class_weights or run.loss not in UNWEIGHTED_LOSSES,
        "run.class_weights",
        f"none with the loss {run.loss}",
        ", ".join(run.class_weights),
    )
    require(
        not run.balance or run.loss == "dice_ce",
        "run.balance",
        f"0 with the loss {run.loss}; only dice_ce has a balance",
        run.balance,
    )


def _check_sampling_and_transfer(run: Run) -> None:
    require(
        0 < run.foreground_share <= 1,
        "run.foreground_share",
        "a fraction, 0 < foreground_share ≤ 1",
        run.foreground_share,
    )
    cache_valid = run.cache_gb is None or run.cache_gb >= 0
    require(cache_valid, "run.cache_gb", "GB, 0 or more, or null", run.cache_gb)
    require(run.freeze_encoder >= 0, "run.freeze_encoder", "epochs, 0 or more", run.freeze_encoder)
    require(run.encoder_rate > 0, "run.encoder_rate", "a factor above 0", run.encoder_rate)
    require(
        run.start is not None or not (run.freeze_encoder or run.grow),
        "run.start",
        "weights to start from with freeze_encoder and grow",
        "null",
    )


def _check_validation(run: Run) -> None:
    needs_scores = run.keep == "best" or run.patience is not None
    if needs_scores and (run.validate_every < 1 or run.splits is None):
        raise ConfigError(
            "run.keep and run.patience: expected validate_every of 1 or more and splits, "
            "because `keep: best` and patience compare validation scores"
        )
