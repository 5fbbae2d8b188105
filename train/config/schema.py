"""The fields of a config: frozen dataclasses of base quantities, checked when they are built.

A file in `configs/` builds one `Config`; flags override single fields. `make_plan` converts epochs to steps, after the overrides.
"""

from dataclasses import dataclass, field
from typing import Literal

from train.config.fields import ConfigError, Group


@dataclass(frozen=True)
class Model(Group):
    """Network and initial weights."""

    name: str = "scnet20_small"
    """A name from `scconv_jax.list_models()`."""
    init: str = ""
    """Initial weights: a file, the folder of a run, a URL, or "pretrained" for the published weights. Empty: random."""
    init_key: str = ""
    """Which weights `init` takes from a source of several sets (state_dict_ema), or the prefix of their keys (ema_model)."""
    init_rename: tuple[str, ...] = ()
    """Renames of the keys in `init`: a regular expression and its replacement, perhaps more such pairs."""
    init_ignore: tuple[str, ...] = ()
    """Patterns of keys that `init` skips (fc.*); such parameters stay random."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Computation dtype. Parameters are float32; with float64, which needs JAX_ENABLE_X64=1, they are float64 too."""
    sync_batchnorm: bool = False
    """Compute BatchNorm statistics over the global batch, not over each device's part of it."""
    drop_path: float = 0.0
    """Stochastic depth: probability of leaving out the last block for an image, falling linearly to 0 at the first block."""
    dropout: float = 0.0
    """Probability that a pooled feature is set to zero before the head."""
    rematerialise: bool = False
    """Keep only the outputs of blocks and recompute the rest in the backward pass: less memory, more time."""

    def _check(self) -> None:
        for name in ("drop_path", "dropout"):
            self._require(0 <= getattr(self, name) < 1, name, "at least 0 and under 1")
        self._require(len(self.init_rename) % 2 == 0, "init_rename", "pairs of a regular expression and its replacement")


@dataclass(frozen=True)
class Data(Group):
    """Data set, preprocessing and batches."""

    name: Literal["digits", "synthetic", "folder", "tfds"] = "digits"
    """Data set. folder: image files in DIR/train/CLASS and DIR/val/CLASS. tfds: prepared by TensorFlow Datasets."""
    dir: str = ""
    """For folder: the directory DIR. For tfds: the directory of the data set, or of all data sets."""
    tfds_name: str = ""
    """Data set below dir, as TFDS names it: imagenet2012, or with config and version. Empty: dir is the data set itself."""
    train_split: str = "train"
    """Training split for tfds, or a part of a split, such as train[:90%]."""
    test_split: str = ""
    """Test split for tfds. Empty: validation if it exists, otherwise test."""
    val_fraction: float = 0.0
    """Part of each class to test on, chosen by the seed, for a folder without val: DIR/CLASS or DIR/train/CLASS is divided."""
    image_size: int = 32
    """Height and width of the network's input in pixels."""
    channels: Literal[3, 1] = 3
    """Channels of the network's input: 3, red, green and blue, or 1, grey. Images are converted."""
    resize: int = 0
    """Shorter side in pixels of a test image file before the central crop. 0: 256 for image_size 224, others in proportion."""
    crop_scale: tuple[float, ...] = (0.08, 1.0)
    """Smallest and largest area of the random training crop, as a fraction of the image file."""
    crop_ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width / height) of the random training crop."""
    exif: bool = False
    """Rotate image files by their EXIF orientation. PyTorch's ImageFolder does not, nor do published accuracies include it."""
    max_pixels: int = 2**28
    """Largest image file to decode, in pixels. A larger one counts as unreadable."""
    max_bad_images: int = 10
    """Unreadable image files to tolerate. Each is reported and replaced by another image. One more is an error."""
    mean: tuple[float, ...] = ()
    """Channel means to subtract, for pixels from 0 to 1. Empty: ImageNet's for image files, otherwise the training images'."""
    std: tuple[float, ...] = ()
    """Channel standard deviations to divide by, for pixels from 0 to 1. Empty: as for mean."""
    batch_size: int = 64
    """Global batch: images per step over all devices of all hosts."""
    crop_padding: int = 0
    """Padding in pixels before the random crop of a training image. 0: no padding and no such crop."""
    flip: bool = False
    """Mirror training images at random. Not suitable for digits or text."""
    threads: int = 1
    """Threads that read images."""
    synthetic_train: int = 512
    """Training images of the synthetic data set."""
    synthetic_test: int = 200
    """Test images of the synthetic data set."""
    synthetic_classes: int = 10
    """Classes of the synthetic data set."""

    def _check(self) -> None:
        self._at_least(1, "image_size", "max_pixels", "batch_size", "synthetic_train", "synthetic_test")
        self._at_least(2, "synthetic_classes")
        self._at_least(0, "crop_padding", "threads", "max_bad_images")
        self._require(0 <= self.val_fraction < 1, "val_fraction", "at least 0 and under 1")
        self._require(self.resize == 0 or self.resize >= self.image_size, "resize", f"0 or at least image_size {self.image_size}")
        for name, highest, limit in (("crop_scale", 1, ", at most 1"), ("crop_ratio", float("inf"), "")):
            pair = getattr(self, name)
            rising = len(pair) == 2 and 0 < pair[0] <= pair[1] <= highest
            self._require(rising, name, "two numbers above 0, the second not less than the first" + limit)
        for name in ("mean", "std"):
            expected = "three numbers, for red, green and blue" if self.channels == 3 else "one number, for channels 1"
            self._require(len(getattr(self, name)) in (0, self.channels), name, expected)
        self._require(all(value > 0 for value in self.std), "std", "above 0")


@dataclass(frozen=True)
class Augment(Group):
    """Augmentation on the device, in addition to the crop and flip of `data`."""

    mixup: float = 0.0
    """Mixup: draw the blending ratio of each batch from Beta(a, a), where a is this number. 0: no mixup."""
    cutmix: float = 0.0
    """CutMix: draw the area of the pasted box from Beta(a, a). With mixup, each batch gets one of the two. 0: no CutMix."""
    randaugment: int = 0
    """RandAugment operations per image, after crop and flip. 0: no RandAugment."""
    randaugment_magnitude: int = 9
    """Strength of the RandAugment operations, 0 to 30."""

    def _check(self) -> None:
        self._at_least(0, "mixup", "cutmix", "randaugment")
        self._require(0 <= self.randaugment_magnitude <= 30, "randaugment_magnitude", "0 to 30")


@dataclass(frozen=True)
class Optim(Group):
    """Optimizer and learning-rate schedule."""

    name: Literal["sgd", "adamw", "lars", "lamb"] = "sgd"
    """SGD with momentum or AdamW, as in PyTorch; LARS or LAMB (You et al. 2017, 2019) for batches of thousands of images."""
    lr: float = 0.1
    """Peak learning rate for the global batch; see lr_reference_batch."""
    lr_reference_batch: int = 0
    """Batch size that `lr` refers to: the peak is `lr * batch_size / lr_reference_batch`. 0: the peak is `lr`."""
    momentum: float = 0.9
    """Momentum coefficient of SGD and LARS."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """Decay rates of the averages of gradients and of their squares, for AdamW and LAMB."""
    weight_decay: float = 1e-4
    """Weight decay coefficient. SGD and LARS add the decay to the gradient; AdamW and LAMB apply it apart, times the rate."""
    decay_kernels_only: bool = False
    """Exclude biases and parameters of norms from weight decay. LARS and LAMB always exclude them."""
    freeze: tuple[str, ...] = ()
    """Stages (stem layer1 ... head) or patterns of paths (layer1/0, */bn1) to keep: parameters and BatchNorm statistics."""
    clip_norm: float = 0.0
    """Largest norm of the gradient over all parameters; longer gradients are scaled down to it. 0: no clipping."""
    label_smoothing: float = 0.0
    """Fraction of the target that is spread evenly over all classes."""
    accumulate: int = 1
    """Gradient accumulation: parts into which each device splits its batch. Less memory, the same step."""
    ema: float = 0.0
    """Decay per step of a moving average of parameters and BatchNorm statistics; tests use the average. 0: no average."""
    schedule: Literal["cosine", "step"] = "cosine"
    """Learning rate after the warm-up: to 0 along a cosine, or lower at each of drop_epochs."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0."""
    drop_epochs: tuple[float, ...] = (30.0, 60.0, 90.0)
    """Epochs at which the step schedule multiplies the learning rate by drop_factor."""
    drop_factor: float = 0.1
    """Factor of the step schedule."""

    def _check(self) -> None:
        self._require(self.lr > 0, "lr", "above 0")
        for name in ("momentum", "label_smoothing", "ema"):
            self._require(0 <= getattr(self, name) < 1, name, "at least 0 and under 1")
        rates = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        self._require(rates, "betas", "two numbers, each at least 0 and under 1, such as (0.9, 0.999)")
        self._at_least(1, "accumulate")
        self._at_least(0, "lr_reference_batch", "weight_decay", "clip_norm", "warmup_epochs", "drop_factor")
        self._require(list(self.drop_epochs) == sorted(set(self.drop_epochs)), "drop_epochs", "in rising order")


@dataclass(frozen=True)
class Hosts(Group):
    """The processes that train one network together, one per host. They are not part of the experiment and not saved with it.

    Without these flags, hosts find each other under SLURM, Open MPI and Kubernetes and on Cloud TPU; elsewhere there is one host.
    """

    count: int | None = None
    """Number of processes, one per host."""
    index: int | None = None
    """Index of this process, from 0. Process 0 writes all files."""
    address: str | None = None
    """HOST:PORT of process 0, as the other processes reach it. The next port is used too."""
    timeout: float = 300.0
    """Seconds to wait for the other processes."""

    def _check(self) -> None:
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
        self._at_least(1, "count")
        self._require(0 <= self.index < self.count, "index", f"0 to {self.count - 1}")
        host, _, port = self.address.rpartition(":")
        self._require(bool(host) and port.isdecimal() and 0 < int(port) < 65535, "address", "HOST:PORT, port 1 to 65534")


@dataclass(frozen=True)
class Log(Group):
    """Report of the run, trackers in addition to `metrics.jsonl`, and the profiler."""

    report: bool = True
    """After the last test, write report.html and the pictures in report/ to the workdir (not with several hosts)."""
    tensorboard: bool = False
    """Also write TensorBoard event files to the workdir."""
    wandb: bool = False
    """Also send metrics to Weights & Biases. With WANDB_MODE=offline they stay in the workdir."""
    wandb_project: str = "scconv_jax"
    """Project at Weights & Biases."""
    profile_steps: tuple[int, ...] = ()
    """First and last step to profile; the trace goes to the workdir. Step 1 includes compilation."""

    def _check(self) -> None:
        steps = self.profile_steps
        self._require(not steps or (len(steps) == 2 and 1 <= steps[0] <= steps[1]), "profile_steps", "two steps in rising order")


@dataclass(frozen=True)
class Config(Group):
    """One experiment."""

    epochs: int = 90
    """Passes over the training images."""
    start_epoch: int = 0
    """First epoch: sets the position in the schedule and the order of the images."""
    seed: int = 0
    """Seed of the initial weights, of the order of the images and of their augmentation."""
    patience: int = 0
    """Epochs without a better test accuracy after which training ends. 0: train to the last epoch."""
    parallel: Literal["shard_map", "pmap"] = "shard_map"
    """JAX transformation that maps the step over the devices."""
    log_every: int = 20
    """Steps between two lines of training metrics. Every epoch ends with a line."""
    checkpoint_every: int = 0
    """Steps between two checkpoints within an epoch. Every epoch ends with a checkpoint. 0: only that one."""
    keep_checkpoints: int = 2
    """Latest checkpoints to keep, in addition to the best one."""
    check_every: int = 500
    """Steps between two checks that all devices of all hosts hold the same state, bit for bit. 0: no checks."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    log: Log = field(default_factory=Log)

    def _check(self) -> None:
        self._at_least(1, "epochs", "log_every", "keep_checkpoints")
        self._at_least(0, "checkpoint_every", "check_every", "patience")
        self._require(0 <= self.start_epoch < self.epochs, "start_epoch", "at least 0 and under epochs")
        self._require(0 <= self.seed < 2**31, "seed", "at least 0 and under 2**31")
        self._require(self.optim.warmup_epochs < self.epochs, "epochs", "more than Optim.warmup_epochs")


FEW_STEPS = 400
"""Steps to recommend for a handful of images."""


@dataclass(frozen=True)
class Plan:
    """Steps and peak learning rate of a config for a number of training images and devices."""

    steps_per_epoch: int
    total_steps: int
    first_step: int
    warmup_steps: int
    drop_steps: tuple[int, ...]
    peak_lr: float


def make_plan(config: Config, train_images: int, devices: int) -> Plan:
    """Convert epochs to steps. An incomplete last batch of an epoch is dropped; the next epoch shuffles again."""
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
        advice = _recipe_for_few(config, train_images, unit, smallest=unit * 2 // pairs)
        raise ConfigError(f"data.batch_size {batch} is more than the {train_images} training images of the data set: {advice}")
    steps = train_images // batch
    return Plan(
        steps_per_epoch=steps,
        total_steps=config.epochs * steps,
        first_step=config.start_epoch * steps,
        warmup_steps=round(config.optim.warmup_epochs * steps),
        drop_steps=tuple(round(epoch * steps) for epoch in config.optim.drop_epochs),
        peak_lr=config.optim.lr * batch / (config.optim.lr_reference_batch or batch),
    )


def _recipe_for_few(config: Config, images: int, unit: int, smallest: int) -> str:
    """Return flags to train on fewer images than a batch: about ten steps an epoch, a learning rate in proportion, enough steps.

    The batch is a multiple of `unit`, at least `smallest` and, if possible, 8 and at most half of the images.
    """
    if smallest > images:
        return f"with these devices and options, a batch has at least {smallest}; use more images, fewer devices or fewer parts"
    batch = max(smallest, min(max(8, images // 10), images // 2) // unit * unit)
    epochs = max(config.epochs, -(-FEW_STEPS // (images // batch)))
    flags = [f"--data.batch-size {batch}", f"--epochs {epochs}"]
    if not config.optim.lr_reference_batch:
        flags.insert(1, f"--optim.lr {config.optim.lr * batch / config.data.batch_size:.2g}")
    if epochs > config.epochs and config.optim.schedule == "step":
        flags.append("--optim.schedule cosine")
    return f"use {' '.join(flags)}"
