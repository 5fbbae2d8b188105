"""What a run is made of: frozen dataclasses of base quantities, checked where they are built.

A file under `configs/` makes one `Config`; the command line overrides single fields of it. A wrong name, type or
value is a `ConfigError` that says which field, what was found and what would do. What follows from several fields
(steps, not epochs) is worked out once, after the overrides, by `make_plan`.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import arg

from train.config.fields import ConfigError, Group


class DivergedError(Exception):
    """Devices that should hold the same state do not."""


class CheckpointError(Exception):
    """A checkpoint that could not be written: no space, no permission, no disk."""


@dataclass(frozen=True)
class Model(Group):
    """The network."""

    name: Annotated[str, arg(aliases=("-a", "--arch"))] = "scnet20_small"
    """One of `scconv_jax.list_models()`."""
    init: str = ""
    """Weights to begin with: a file, a run's folder, an address, or "pretrained": those published. Empty: drawn at random."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Number type of the computation. Parameters are float32, or, with float64 (which needs JAX_ENABLE_X64=1), float64."""
    sync_batchnorm: bool = False
    """BatchNorm statistics of the whole batch, not of each device's share."""
    rematerialise: bool = False
    """Keep what convolutions make and compute the rest again for the gradient: less memory, more time."""


@dataclass(frozen=True)
class Data(Group):
    """Images, and what is done to them."""

    name: Literal["digits", "synthetic", "folder", "tfds"] = "digits"
    """Data set; folder: image files in dir/train/CLASS and dir/val/CLASS; tfds: prepared by TensorFlow Datasets."""
    dir: str = ""
    """Folder of the images (folder), of the set or of all sets (tfds)."""
    tfds_name: str = ""
    """Data set under dir, as TFDS names it: imagenet2012, or with config and version. Empty: dir is the data set itself."""
    train_split: str = "train"
    """Training images of tfds: a split, or a part of one such as train[:90%]."""
    test_split: str = ""
    """Test images of tfds. Empty: validation, or else test."""
    image_size: int = 32
    """Height and width in pixels."""
    resize: int = 0
    """Pixels to which the shorter side of a test image file is resized before the central crop. 0: 256 for 224, in proportion."""
    crop_scale: tuple[float, ...] = (0.08, 1.0)
    """Least and greatest share of the area of an image file that the random crop of a training image takes."""
    crop_ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    """Least and greatest width over height of that crop."""
    exif: bool = False
    """Turn image files the way their EXIF orientation says. PyTorch's ImageFolder does not, nor did who published accuracies."""
    max_bad_images: int = 10
    """Image files that may be unreadable; they are named and skipped. One more is an error."""
    mean: tuple[float, ...] = ()
    """Subtracted from each channel, as shares of 255. Empty: ImageNet's for image files, else that of the training images."""
    std: tuple[float, ...] = ()
    """Divides each channel, as shares of 255. Empty: as mean."""
    batch_size: Annotated[int, arg(aliases=("-b", "--batch-size"))] = 64
    """Images per step, all devices together."""
    crop_padding: int = 0
    """Pixels of padding before the random crop of a training image; 0: no crop."""
    flip: bool = False
    """Mirror training images at random. Not for digits or text."""
    threads: Annotated[int, arg(aliases=("-j", "--workers"))] = 1
    """Threads that read images."""
    synthetic_train: int = 512
    """Training images of the synthetic data set."""
    synthetic_test: int = 200
    """Test images of the synthetic data set."""
    synthetic_classes: int = 10
    """Classes of the synthetic data set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_size", "batch_size", "synthetic_train", "synthetic_test"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        self._require(self.synthetic_classes >= 2, "synthetic_classes", "at least 2")
        for name in ("crop_padding", "threads", "max_bad_images"):
            self._require(getattr(self, name) >= 0, name, "0 or more")
        self._require(self.resize == 0 or self.resize >= self.image_size, "resize", f"0 or at least image_size {self.image_size}")
        for name, highest in (("crop_scale", 1.0), ("crop_ratio", float("inf"))):
            pair = getattr(self, name)
            rising = len(pair) == 2 and 0 < pair[0] <= pair[1] <= highest
            self._require(
                rising, name, "two numbers above 0, the second not less than the first" + ", at most 1" * (highest == 1)
            )
        for name in ("mean", "std"):
            self._require(len(getattr(self, name)) in (0, 3), name, "three numbers, for red, green and blue")
        self._require(all(value > 0 for value in self.std), "std", "above 0")


@dataclass(frozen=True)
class Augment(Group):
    """What the device does to training images, beside the crop and flip of `data`."""

    mixup: float = 0.0
    """Blend pairs of images, and their targets, by a share from Beta(a, a), the same for the whole batch; 0: not."""
    cutmix: float = 0.0
    """Paste a box of one image into another, its area from Beta(a, a); with mixup, each batch has one of the two; 0: not."""

    randaugment: int = 0
    """Operations of RandAugment on each image, after crop and flip; 0: not."""
    randaugment_magnitude: int = 9
    """Their strength, 0 to 30."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mixup", "cutmix", "randaugment"):
            self._require(getattr(self, name) >= 0, name, "0 or more")
        self._require(0 <= self.randaugment_magnitude <= 30, "randaugment_magnitude", "0 to 30")


@dataclass(frozen=True)
class Optim(Group):
    """How the parameters follow the gradient."""

    name: Literal["sgd", "lars"] = "sgd"
    """SGD with momentum, as PyTorch defines it; or LARS, for batches of thousands (You et al. 2017)."""
    lr: Annotated[float, arg(aliases=("--lr", "--learning-rate"))] = 0.1
    """Highest learning rate, for the whole batch (but see the next)."""
    lr_reference_batch: int = 0
    """Batch for which `lr` is meant: what is used grows with the batch in proportion. 0: `lr` as it stands."""
    momentum: Annotated[float, arg(aliases=("--momentum",))] = 0.9
    """Momentum."""
    weight_decay: Annotated[float, arg(aliases=("--wd", "--weight-decay"))] = 1e-4
    """Times the parameter, added to its gradient."""
    decay_kernels_only: bool = False
    """Do not decay biases and what norms scale and shift by. LARS never does."""
    clip_norm: float = 0.0
    """Shorten the gradient of all parameters together to this length; 0: not."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""
    accumulate: int = 1
    """Parts into which each device's share of the batch is cut, one after the other: less memory, the same step."""
    ema: float = 0.0
    """Decay of an average over steps of parameters and BatchNorm statistics, which is then what is tested; 0: no average."""
    schedule: Literal["cosine", "step"] = "cosine"
    """How the learning rate falls after the warm-up: to 0 along a cosine, or by drops."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate rises linearly from 0."""
    drop_epochs: tuple[float, ...] = (30.0, 60.0, 90.0)
    """Epochs at which the step schedule drops the learning rate."""
    drop_factor: float = 0.1
    """What a drop multiplies it by."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.lr > 0, "lr", "above 0")
        for name in ("momentum", "label_smoothing", "ema"):
            self._require(0 <= getattr(self, name) < 1, name, "at least 0 and under 1")
        self._require(self.accumulate >= 1, "accumulate", "at least 1")
        for name in ("lr_reference_batch", "weight_decay", "clip_norm", "warmup_epochs", "drop_factor"):
            self._require(getattr(self, name) >= 0, name, "0 or more")
        self._require(list(self.drop_epochs) == sorted(set(self.drop_epochs)), "drop_epochs", "in rising order")


@dataclass(frozen=True)
class Hosts(Group):
    """The processes that train one network together, one per host: no part of the experiment, and not kept with it.

    With nothing given they find each other under SLURM, Open MPI and Kubernetes and on Cloud TPU; elsewhere there is one.
    """

    count: Annotated[int | None, arg(aliases=("--world-size",))] = None
    """Processes, one per host."""
    index: Annotated[int | None, arg(aliases=("--rank",))] = None
    """Which of them this is, from 0; process 0 writes all files."""
    address: Annotated[str | None, arg(aliases=("--dist-url",))] = None
    """HOST:PORT of process 0, as the others reach it; it takes the next port too."""
    timeout: float = 300.0
    """Seconds to wait for the others to come."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {name: getattr(self, name) for name in ("count", "index", "address")}
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < 3:
            raise ConfigError(
                f"Hosts.{missing[0]} is missing: count, index and address go together; found "
                + ", ".join(f"{name}={value!r}" for name, value in given.items())
            )
        self._require(self.timeout > 0, "timeout", "above 0 (seconds)")
        if self.count is None or self.index is None or self.address is None:
            return
        self._require(self.count >= 1, "count", "at least 1")
        self._require(0 <= self.index < self.count, "index", f"0 to {self.count - 1}")
        host, _, port = self.address.rpartition(":")
        self._require(bool(host) and port.isdecimal() and 0 < int(port) < 65535, "address", "HOST:PORT, port 1 to 65534")


@dataclass(frozen=True)
class Log(Group):
    """Where metrics go beside `metrics.jsonl`, and a look inside the steps."""

    tensorboard: bool = False
    """Write event files for TensorBoard into the workdir too."""
    wandb: bool = False
    """Send metrics to Weights & Biases too; with WANDB_MODE=offline, keep them in the workdir."""
    wandb_project: str = "scconv_jax"
    """Project there."""
    profile_steps: Annotated[tuple[int, ...], arg(aliases=("--profile-steps",))] = ()
    """First and last step of which to record what the device does, into the workdir; the first of all compiles."""

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = self.profile_steps
        self._require(not steps or (len(steps) == 2 and 1 <= steps[0] <= steps[1]), "profile_steps", "two steps in rising order")


@dataclass(frozen=True)
class Config(Group):
    """One experiment."""

    epochs: int = 90
    """Passes over the training images."""
    start_epoch: int = 0
    """Epoch to begin at: where the schedule stands, and which order the images have."""
    seed: int = 0
    """Decides the initial weights, the order of the images and their augmentation."""
    parallel: Literal["shard_map", "pmap"] = "shard_map"
    """What maps the step over the devices."""
    log_every: Annotated[int, arg(aliases=("-p", "--print-freq"))] = 20
    """Steps between two lines of training metrics; an epoch always ends with one."""
    checkpoint_every: int = 0
    """Steps between two checkpoints within an epoch; one is written after every epoch. 0: no others."""
    keep_checkpoints: int = 2
    """Latest checkpoints kept, beside the best."""
    check_every: int = 500
    """Steps between two checks that the state is the same on all devices of all hosts, bit for bit. 0: none."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    log: Log = field(default_factory=Log)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "log_every", "keep_checkpoints"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("checkpoint_every", "check_every"):
            self._require(getattr(self, name) >= 0, name, "0 or more")
        self._require(0 <= self.start_epoch < self.epochs, "start_epoch", "at least 0 and under epochs")
        self._require(0 <= self.seed < 2**31, "seed", "at least 0 and under 2**31")
        self._require(self.optim.warmup_epochs < self.epochs, "epochs", "more than Optim.warmup_epochs")


@dataclass(frozen=True)
class Plan:
    """What follows from the config, the number of training images and the number of devices."""

    steps_per_epoch: int
    total_steps: int
    first_step: int
    warmup_steps: int
    drop_steps: tuple[int, ...]
    peak_lr: float


def make_plan(config: Config, train_images: int, devices: int) -> Plan:
    """Turn epochs into steps. An incomplete last batch of an epoch is left out; the next epoch shuffles anew.

    Raises:
        ConfigError: the batch does not divide over the devices and their parts, or is larger than the training set.
    """
    batch, parts = config.data.batch_size, config.optim.accumulate
    pairs = 2 if config.augment.mixup or config.augment.cutmix else 1
    if batch % (unit := devices * parts * pairs):
        lower, upper = batch // unit * unit, (batch // unit + 1) * unit
        choices = f"{lower} or {upper}" if lower else f"{upper}"
        why = f"{devices} devices"
        why += f", each in {parts} parts (optim.accumulate)" if parts > 1 else ""
        why += ", in pairs (augment.mixup, augment.cutmix)" if pairs > 1 else ""
        raise ConfigError(f"data.batch_size {batch} does not divide over {why}: use {choices} (--data.batch-size {upper})")
    if batch > train_images:
        fits = train_images // unit * unit
        advice = f": use {fits} or less (--data.batch-size {fits})" if fits else ""
        raise ConfigError(f"data.batch_size {batch} is more than the {train_images} training images of the data set{advice}")
    steps = train_images // batch
    return Plan(
        steps_per_epoch=steps,
        total_steps=config.epochs * steps,
        first_step=config.start_epoch * steps,
        warmup_steps=round(config.optim.warmup_epochs * steps),
        drop_steps=tuple(round(epoch * steps) for epoch in config.optim.drop_epochs),
        peak_lr=config.optim.lr * batch / (config.optim.lr_reference_batch or batch),
    )
