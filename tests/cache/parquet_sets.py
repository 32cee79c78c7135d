"""Small data sets in parquet files."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kdlib.cache.sources import Source
from kdlib.cache.study_source import open_source
from kdlib.study.data import Data, HuggingFace

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
BOTH = pytest.mark.parametrize("streaming", [False, True])


def pixels(n: int, seed: int = 0, size: tuple[int, int] = (4, 6)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *size, 3), np.uint8)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def write_parquet(
    path: Path,
    images: list[bytes | None],
    labels: list[int | None] | None,
    names: str | None = "abc",
    kind: pa.DataType = STRUCT,
    **options: int,
) -> None:
    """Columns image, label and text; with the features of `datasets` in the metadata when there are
    `names` of classes."""
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [b if kind != STRUCT or b is None else {"bytes": b, "path": "x.png"} for b in images]
    columns = {"image": pa.array(rows, kind), "text": pa.array(["a"] * len(images))}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    table = pa.table(columns)
    if names is not None:
        features = {"image": datasets.Image(), "text": datasets.Value("string")}
        if labels is not None:
            features["label"] = datasets.ClassLabel(names=list(names))
        table = table.cast(datasets.Features(features).arrow_schema)
    pq.write_table(table, path, **options)


def open_hub(
    dataset: Path | str,
    split: str = "train",
    *,
    labelled: bool = True,
    image_size: int | None = None,
    n_train: int | None = None,
    **options: str | bool,
) -> Source:
    hub = HuggingFace(dataset=str(dataset), **options)
    data = Data(
        source="huggingface",
        huggingface=hub,
        labelled=labelled,
        image_size=image_size,
        n_train=n_train,
        n_validation=1,
    )
    return open_source(data, split)
