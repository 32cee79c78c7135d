"""How a network is trained: views of images, budget, optimiser, computation, tracking."""

import math
from fractions import Fraction as Exact
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from kdlib.study.base import Count, Fraction, NonNegative, Positive, Settings, Share, matching

_Change = Annotated[float, Field(ge=0, le=8)]
_Decay = Annotated[float, Field(ge=0, lt=1)]
_Inside = Annotated[float, Field(gt=0, lt=1)]


def _without(dump: dict[str, Any], *later: str) -> dict[str, Any]:
    """Settings as stored outputs and runs of before there were some keys hold them."""
    return {key: value for key, value in dump.items() if key not in later or value is not None}


class ResizedCrop(Settings):
    """Ranges of a random resized crop, as torchvision defines it."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the crop, as a fraction of the image's."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Width / height."""

    @model_validator(mode="after")
    def _ordered(self) -> "ResizedCrop":
        if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(
                f"scale is {self.scale} and ratio {self.ratio}; expected 0 < scale <= 1 and "
                "0 < ratio, the lower end first"
            )
        return self


class ColourJitter(Settings):
    """Largest changes of colour, as torchvision defines them: a factor is drawn from
    [max(0, 1 - x), 1 + x], the hue's shift from [-hue, hue] turns."""

    brightness: _Change = 0.0
    contrast: _Change = 0.0
    saturation: _Change = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    probability: Fraction | None = None
    """Of a view to be recoloured; without it all are."""

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without(dump(self), "probability")


class Blur(Settings):
    """Gaussian blur, as torchvision defines it; beyond its border an image is mirrored."""

    probability: Fraction = 1.0
    """Of a view to be blurred."""
    sigma: tuple[Positive, Positive] = (0.1, 2.0)
    """Range of the standard deviation, in pixels."""
    kernel_size: Annotated[int, Field(ge=3)] | None = None
    """Pixels across the kernel, odd; without it 2 * ceil(2 * largest sigma) + 1."""

    @model_validator(mode="after")
    def _fits(self) -> "Blur":
        if self.sigma[0] > self.sigma[1]:
            raise ValueError(f"sigma is {self.sigma}; expected the lower end first")
        if self.kernel_size is not None and self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}; expected an odd number")
        return self

    @property
    def radius(self) -> int:
        """Pixels from the centre of the kernel to its end."""
        return self.kernel_size // 2 if self.kernel_size else math.ceil(2 * self.sigma[1])


class Augment(Settings):
    """Random views of a training image; all off by default. Their order is that of torchvision's
    recipes for SimCLR and Barlow Twins: crop, flip, colour jitter, grayscale, blur."""

    crop_padding: Annotated[int, Field(ge=0)] = 0
    """Pixels of zero padding before a random crop of the native size."""
    flip: bool = False
    """Mirror left-right with probability 1/2."""
    resized_crop: ResizedCrop | None = None
    """In place of the padded crop."""
    colour_jitter: ColourJitter | None = None
    grayscale: Fraction | None = None
    """Probability of a view without colours, as of torchvision's RandomGrayscale."""
    blur: Blur | None = None

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without(dump(self), "grayscale", "blur")

    @model_validator(mode="after")
    def _one_crop(self) -> "Augment":
        if self.crop_padding and self.resized_crop:
            raise ValueError("give one crop: either `crop_padding` or `resized_crop`")
        return self


class Training(Settings):
    """One budget and one optimiser. The budget is a number of optimiser steps, given as such or as
    epochs."""

    steps: Count | None = None
    """Equal-steps comparison: the same number for every subset."""
    epochs: Positive | None = None
    """Equal-epochs comparison: steps follow from the subset's size."""
    batch_size: Count
    optimiser: Literal["sgd", "adam", "adamw"] = "sgd"
    lr_peak: Positive
    lr_floor: Positive | None = None
    """The learning rate that `cosine` and `one_cycle` fall to, 0 without it, and below which
    `plateau` does not go."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of `sgd`."""
    betas: tuple[_Decay, _Decay] | None = None
    """Of `adam` and `adamw`: decay of their two running means; 0.9 and 0.999 unless given."""
    weight_decay: NonNegative = 5e-4
    """In the gradient of `sgd` and `adam`, and beside it in `adamw`."""
    schedule: Literal["cosine", "constant", "step", "one_cycle", "plateau"] = "cosine"
    """After the warm-up. `step` multiplies by `decay` at each of `milestones`; `plateau` when the
    validation loss has not fallen for more than `patience` evaluations; `one_cycle` falls to 0 in a
    line."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """The learning rate rises linearly over them."""
    milestones: tuple[_Inside, ...] = ()
    """Of `step`, as fractions of the budget."""
    decay: _Inside = 0.1
    """Of `step` and `plateau`."""
    patience: Count = 5
    """Of `plateau`, in evaluations."""
    clip_norm: Positive | None = None
    """Largest norm of a step's whole gradient."""
    accumulate: Count = 1
    """Pieces of a step's batch that are computed one after another, where memory is short;
    BatchNorm then sees one piece at a time."""
    ema: _Inside | None = None
    """Decay of a running mean of the student's weights, which is then measured and kept."""
    early_stopping: Count | None = None
    """Stop when the validation loss has not fallen for more than so many evaluations. The budget is
    then an upper bound, and runs are compared as `early_stopping`."""
    augment: Augment = Augment()
    order: Literal["shuffled", "windowed", "sequential"] = "shuffled"
    """Of each pass. `shuffled` draws from the whole training set; `windowed` permutes the shards
    and shuffles within some of them, for caches larger than memory; `sequential` is by example
    id."""
    window_shards: Count = 8
    """Shards that `windowed` shuffles together."""
    evaluate_every_steps: Count | None = None
    """Without it once per pass over the full training split."""
    record_steps: Literal[True] | None = None
    """Write the loss and the learning rate of every step to `steps.parquet` of the run."""
    checkpoint_fractions: tuple[Share, ...] = ()
    """Places of the budget, as fractions of it, at which weights are kept for probing."""

    @model_validator(mode="after")
    def _consistent(self) -> "Training":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give the budget once: either `steps` or `epochs`")
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError("`milestones` belong to `schedule: step`, and it needs some")
        if self.schedule == "one_cycle" and self.warmup_steps == 0:
            raise ValueError("`schedule: one_cycle` rises before it falls; give `warmup_steps`")
        if self.lr_floor is not None:
            if self.schedule not in (falling := ("cosine", "one_cycle", "plateau")):
                raise ValueError(f"`lr_floor` is of the schedules {', '.join(falling)}")
            if self.lr_floor >= self.lr_peak:
                raise ValueError(
                    f"lr_floor is {self.lr_floor:g}; expected less than lr_peak, {self.lr_peak:g}"
                )
        if self.betas is not None and self.optimiser == "sgd":
            raise ValueError("`betas` are of adam and adamw; sgd has `momentum`")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"a batch of {self.batch_size} is not a multiple of accumulate {self.accumulate}"
            )
        return self

    @property
    def selects(self) -> str | None:
        """The setting by which validation images steer this training; None when they do not."""
        if self.early_stopping is not None:
            return "early_stopping"
        return "schedule: plateau" if self.schedule == "plateau" else None

    def n_steps(self, n_examples: int) -> int:
        """Optimiser steps of the budget for a training set of `n_examples`."""
        if self.steps is not None:
            return self.steps
        # as written: 0.07 epochs of 100 examples are 7, where floats make 7.000000000000001
        return math.ceil(Exact(str(self.epochs)) * n_examples / self.batch_size)

    @property
    def comparison(self) -> str:
        """`equal_steps`, `equal_epochs` or `early_stopping`; a table holds runs of one of these."""
        if self.early_stopping is not None:
            return "early_stopping"
        return "equal_steps" if self.steps is not None else "equal_epochs"


class Compute(Settings):
    """Where and how tensors are computed."""

    device: matching(r"cpu|cuda(:\d+)?", "cpu, cuda or cuda:<number>") = "cpu"
    threads: Count = 1
    """Fixed, because sums depend on it."""
    channels_last: bool = True
    precision: Literal["float32", "bf16", "fp16", "auto"] = "float32"
    """Of the network's passes in training; weights and losses are float32. `bf16` is bfloat16;
    `fp16` is float16 with a scaled loss; `auto` measures a step in float32 and in bfloat16 before
    the study's first training, and all its runs take the faster."""
    compile: bool = False
    """Use torch.compile; on a CPU it needs a C++ compiler."""
    portable: bool = False
    """The same bytes on every x86-64 processor with AVX2, but for `grand`."""
    processes: Count = 1
    """Processes under torchrun that share each batch."""
    images: Literal["auto", "resident", "mapped"] = "auto"
    """Where pixels are kept: on the device, or mapped from the disk; `auto` looks at the memory.
    Changes no result."""

    @model_validator(mode="after")
    def _portable_alone(self) -> "Compute":
        for key, value in (("device", "cpu"), ("precision", "float32"), ("compile", False)):
            if self.portable and getattr(self, key) != value:
                raise ValueError(
                    f"portable: true and {key}: {getattr(self, key)} exclude each other; the same "
                    "bytes on every processor are those of float32 on a CPU, not compiled"
                )
        return self


class Tracking(Settings):
    """Where metrics go besides the run's folder. Changes no result."""

    tensorboard: bool = False
    """Write event files into the run's folder."""
    wandb: bool = False
    """Send to Weights & Biases; WANDB_MODE=offline keeps it on this machine."""
    project: str = "kdlib"
    """Of Weights & Biases."""
    group: str | None = None
    """Of its runs there; without it the name of the study."""
    tags: tuple[str, ...] | None = None
    """Of its runs there; without them those of the cell: `strategy=easy`, `seed=0`, ..."""
    notes: str | None = None
    """Beside its runs there."""
