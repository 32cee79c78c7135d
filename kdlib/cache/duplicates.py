"""Images with the same pixels, within and across the two splits of a study."""

from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import numpy as np
import pandas as pd

from kdlib.cache.shards import Cache
from kdlib.repro import files, splits

# A test image that is also in train can raise test accuracy by at most its share, and of images
# with two labels a share that is no larger than theirs is lost: below one point, which is the
# default margin of a comparison, neither decides one.
LIMIT = 0.01
_DIGEST = np.dtype([("first", "<u8"), ("second", "<u8")])


def pixel_digests(cache: Cache) -> np.ndarray:
    """The first 128 bits of the sha256 of each image's pixels, in the order of `example_ids`.

    Returns: (N,) with two uint64 fields, `first` and `second`.
    """

    def of_shard(shard: int) -> bytes:
        images = cache.mapped("images", shard).numpy()
        return b"".join(sha256(image).digest()[:16] for image in images)

    with ThreadPoolExecutor(files.n_cpus()) as pool:  # hashing frees the GIL
        return np.frombuffer(b"".join(pool.map(of_shard, cache.shards.tolist())), _DIGEST)


def find_duplicates(train: Cache, test: Cache | None, validation_ids: np.ndarray) -> pd.DataFrame:
    """The images whose pixels occur more than once.

    Args:
        test: None for images without labels.
        validation_ids: (N,) int64, of the training split.

    Returns: One row per image: `group`, equal for images with the same pixels, numbered from 0;
        `split` (train, validation or test), `example_id`, and `label` as the source gives it, -1
        where there is none.
    """
    tables = []
    for split, cache in (("train", train), ("test", test)):
        if cache is None:
            continue
        ids = cache.example_ids
        column = "original_labels" if "original_labels" in cache.header["columns"] else "labels"
        table = pd.DataFrame(pixel_digests(cache))
        tables.append(table.assign(split=split, example_id=ids, label=cache.read(column, ids)))
    table = pd.concat(tables, ignore_index=True)
    held_out = (table["split"] == "train") & table["example_id"].isin(validation_ids)
    table.loc[held_out, "split"] = "validation"
    digest = ["first", "second"]
    table = table[table.duplicated(digest, keep=False)]
    group = table.groupby(digest, sort=False).ngroup()
    table = table.drop(columns=digest).assign(group=group)
    return table[["group", "split", "example_id", "label"]].reset_index(drop=True)


def count_duplicates(
    table: pd.DataFrame,
    n_train: int,
    n_test: int | None,
    limit: float | None,
    n_validation: int = 0,
) -> splits.Facts:
    """Counts of what `find_duplicates` found, for the evidence.

    Args:
        n_test: None without a test split.
        limit: The largest share that is allowed; None: `LIMIT`.

    Returns: `pairs` in train (validation images included), in test and across, and those of them
        with two labels (`contradicting`); `crossing`, test images that are in train too;
        `held_out`, validation images that are among those trained on; `two_labels`, images whose
        pixels have another label elsewhere; `n_images`, `limit`. Without a test split `pairs`,
        `held_out`, `n_validation`, `n_images` and `limit`.
    """
    is_test = table["split"] == "test"
    held_out = table["split"] == "validation"
    marks = table.assign(test=is_test, train=~is_test, kept=~is_test & ~held_out, held_out=held_out)
    where = ["train", "test", "kept", "held_out"]
    groups = marks.groupby("group")[where].sum()
    pairs, alike = _pairs(groups), _pairs(marks.groupby(["group", "label"])[where].sum())
    n_labels = table.groupby("group")["label"].transform("nunique")
    held_out = int(groups.loc[groups["kept"] > 0, "held_out"].sum())
    limit = LIMIT if limit is None else limit
    if n_test is None:
        facts = {"n_images": {"train": n_train}, "pairs": {"train": pairs["train"]}}
        return facts | {"held_out": held_out, "n_validation": n_validation, "limit": limit}
    return {
        "n_images": {"train": n_train, "test": n_test},
        "pairs": pairs,
        "contradicting": {key: pairs[key] - alike[key] for key in pairs},
        "crossing": int(groups.loc[groups["train"] > 0, "test"].sum()),
        "held_out": held_out,
        "two_labels": int((n_labels > 1).sum()),
        "limit": limit,
    }


def _pairs(counts: pd.DataFrame) -> dict[str, int]:
    """Pairs of images in groups with so many in train and in test."""
    train, test = counts["train"], counts["test"]
    within = {"train": train * (train - 1) // 2, "test": test * (test - 1) // 2}
    return {key: int(n.sum()) for key, n in (within | {"across": train * test}).items()}
