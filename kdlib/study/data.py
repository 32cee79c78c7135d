"""Which images a study learns from, and the folder of their cache."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from kdlib.repro.files import data_root, fingerprint, workspace
from kdlib.study.base import Count, Fraction, ImageSize, Seed, Settings, Share


class HuggingFace(Settings):
    """A data set of the Hugging Face hub, or a local folder or file that `datasets` can read."""

    dataset: str
    """`owner/name` on the hub, or a local parquet file or folder (relative: in the data folder)."""
    config: str | None = None
    """The data set's configuration, where it has several."""
    revision: str | None = None
    """Commit of the hub repository; without it the latest one is taken and recorded."""
    train_split: str = "train"
    test_split: str = "test"
    """Not read with `labelled: false`."""
    image_column: str = "image"
    label_column: str = "label"
    streaming: bool = False
    """Read once, in order, without keeping the files. Of parquet files a part, or a build that goes
    on, reads none of the rows before its own; of others it reads the stream from its start."""


class Relabel(Settings):
    """Other labels for the training split, to measure which scores find wrong ones: drawn noise
    (`noise`), or the labels of a file (`file`, `key`). The source's labels are kept beside them as
    the truth; no training reads those."""

    noise: Fraction | None = None
    """Probability that a label is replaced."""
    kind: Literal["symmetric", "next_class"] = "symmetric"
    """What replaces it: any other class with equal probability, or always the next one."""
    seed: Seed = 0
    file: str | None = None
    """An .npz file; a relative path is looked up in the data folder."""
    key: str | None = None
    """The file's array of one label in [0, n_classes) for each training image."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Relabel":
        if (self.noise is None) == (self.file is None) or (self.file is None) != (self.key is None):
            raise ValueError("other labels are drawn (`noise`) or read (`file` and `key`)")
        return self


def parse_part(part: str) -> tuple[int, int]:
    """`i/k` as (i, k), with 1 <= i <= k.

    Raises: ValueError for anything else.

    >>> parse_part("2/8")
    (2, 8)
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"part is {part!r}; expected i/k with 1 <= i <= k, such as 2/8")
    return int(match[1]), int(match[2])


class Data(Settings):
    """Which images. `n_validation` training images are held out, the same for teacher and students
    of the study."""

    source: Literal["digits", "mnist", "cifar10", "cifar100", "folder", "huggingface", "tensors"]
    folder: str | None = None
    """Of source `folder`: a path with train/<class>/ and test/<class>/; without labels train/. Of
    source `tensors`: a path with `.pt` files, each a tensor (n, C, H, W) of images in [0, 1]."""
    test_folder: str = "test"
    """Name of the folder of test images, such as `val`."""
    huggingface: HuggingFace | None = None
    """Of source `huggingface`."""
    labelled: bool = True
    """False: labels are not read, and stored as -1; there is no test split, and students are judged
    by probes on `probe.others`."""
    relabel: Relabel | None = None
    """Other labels for the training split."""
    n_train: Annotated[int, Field(ge=2)] | None = None
    """Only the first so many training images."""
    image_size: ImageSize | None = None
    """Pixels to which images are resized; without it they keep their size."""
    exif: Literal["apply", "ignore", "refuse"] | None = None
    """Of images in files that carry an EXIF orientation: `apply` turns them upright, `ignore` reads
    them as stored; without it, or with `refuse`, such an image stops the build of the cache."""
    alpha: Literal["white", "black", "drop", "refuse"] | None = None
    """Of images in files with transparent pixels: what these lie on, `white` or `black`; `drop`
    reads the colours stored under them; without it, or with `refuse`, such an image stops the build
    of the cache."""
    n_validation: Annotated[int, Field(ge=0)]
    """0 learns from all of them, for a final run: there is then no validation accuracy and no best
    epoch, and no setting may read them."""
    split_seed: Seed = 0
    shard_size: Count = 2048
    """Examples per shard of the cache."""
    duplicates: Share | None = None
    """The largest share of test images whose pixels are also in the training split, and of images
    whose pixels have another label elsewhere; beyond it step 01 stops. 0.01 unless given."""
    part: str = "1/1"
    """`i/k`: learn from the i-th of k equal runs of shards of the training split."""

    @model_validator(mode="after")
    def _consistent(self) -> "Data":
        for key, sources in (("folder", ("folder", "tensors")), ("huggingface", ("huggingface",))):
            if (self.source in sources) != (getattr(self, key) is not None):
                raise ValueError(
                    f"`{key}` says where the images are: give it with "
                    f"{' or '.join(f'`source: {name}`' for name in sources)}, and only there"
                )
        if self.labelled and self.source == "tensors":
            raise ValueError("tensors of images have no labels: give `labelled: false`")
        if self.relabel is not None and not self.labelled:
            raise ValueError("`relabel` replaces labels, and `labelled: false` says there are none")
        for key in ("exif", "alpha"):
            if getattr(self, key) and self.source not in ("folder", "huggingface"):
                raise ValueError(f"`{key}` is for images in files; {self.source} has arrays")
        parse_part(self.part)
        return self

    @field_validator("exif", "alpha")
    @classmethod
    def _refuse_is_absence(cls, value: str | None) -> str | None:
        return None if value == "refuse" else value

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are cached; `train` alone without labels, of which a test would ask."""
        return ("train", "test") if self.labelled else ("train",)

    def part_of(self, split: str) -> tuple[int, int]:
        """(i, k): part i of k of a split's shards is learnt from; the test split stays whole."""
        return parse_part(self.part) if split == "train" else (1, 1)


def cache_folder(data: Data) -> Path:
    """Folder of the cache of these images; studies that ask for the same images share it."""
    content = data.model_dump(exclude={"n_validation", "split_seed", "duplicates", "part"})
    for key in ("relabel", "exif", "alpha"):
        if content[key] is None:  # caches of before there was the key keep their names
            del content[key]
    return workspace() / "cache" / f"{data.source}-{fingerprint(content)[:8]}"


def data_path(name: str) -> Path:
    """Where a file named in a study lies: as written if absolute, else in the data root."""
    path = Path(name)
    return path if path.is_absolute() else data_root() / path
