"""Images that look alike to the teacher, on request."""

from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.dataset.images import Images
from kdlib.probes.neighbours import similar_pairs
from kdlib.repro.tables import write_parquet
from kdlib.steps.teacher_outputs import open_teacher, teacher_features
from kdlib.study.study import Study

SHOWN = 8  # pairs of a figure


def near_duplicates(
    study: Study, images: Images, similarity: float = 0.99, most: int = 1000
) -> pd.DataFrame:
    """Pairs of images, of either split, whose stored teacher features have a high cosine.

    Also written to `runs/<study>/near_duplicates.parquet`.

    Args:
        similarity: The smallest cosine, in (-1, 1].
        most: Pairs, at most; of more the most similar are kept, and their number is printed.

    Returns: One row per pair, the most similar first: `split` (train, validation or test),
        `example_id` and `label`, the same with `other_` of its twin, `similarity`, and
        `same_pixels`.
    Raises: FileNotFoundError without a teacher's outputs; ValueError for limits out of range.
    """
    parts, features = [], []
    for split, cache in images.caches.items():
        ids = cache.example_ids
        part = {"split": split, "example_id": ids, "label": cache.read("labels", ids)}
        parts.append(pd.DataFrame(part))
        features.append(teacher_features(study, cache, ids))
    parts[0].loc[parts[0]["example_id"].isin(images.validation_ids), "split"] = "validation"
    places = pd.concat(parts, ignore_index=True)
    pairs, n_found = similar_pairs(np.concatenate(features), similarity, most)
    if n_found > len(pairs):
        print(f"{n_found:,} pairs reach {similarity:g}; the {len(pairs):,} most similar are kept")
    first, second = (places.loc[pairs[side]].reset_index(drop=True) for side in ("first", "second"))
    table = pd.concat([first, second.add_prefix("other_")], axis=1)
    table["similarity"] = pairs["similarity"]
    one, other = _pixels(images, table), _pixels(images, table, "other_")
    same = [(a == b).all() for a, b in zip(one, other, strict=True)]
    table["same_pixels"] = np.array(same, bool)
    made_of = {"teacher": open_teacher(study)["weights_sha256"], "images": images.fingerprints}
    write_parquet(near_file(study), table, made_of | {"similarity": similarity, "most": most})
    return table


def near_file(study: Study) -> Path:
    """Where `near_duplicates` writes its table."""
    return study.runs / "near_duplicates.parquet"


def near_images(
    images: Images, table: pd.DataFrame
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """The first pairs of a table that are not equal in every pixel, one above the other: rows of
    images, and their captions (split and example id)."""
    shown = table[~table["same_pixels"]].head(SHOWN)
    pixels, captions = {}, {}
    for row, prefix in (("image", ""), ("its twin", "other_")):
        pixels[row] = np.array(_pixels(images, shown, prefix))
        places = shown[[f"{prefix}split", f"{prefix}example_id"]].itertuples(index=False)
        captions[row] = [f"{split} {i}" for split, i in places]
    return pixels, captions


def _pixels(images: Images, table: pd.DataFrame, prefix: str = "") -> list[np.ndarray]:
    """One image of each pair."""
    places = table[[f"{prefix}split", f"{prefix}example_id"]].itertuples(index=False)
    return [
        (images.test if split == "test" else images.train).read("images", np.array([i]))[0]
        for split, i in places
    ]
