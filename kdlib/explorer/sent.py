"""Selections that the page of a datamap wrote, which become strategies of a study."""

from pathlib import Path

import numpy as np

from kdlib.cartography.subset import Subset
from kdlib.explorer.selections import selection_path
from kdlib.repro import files
from kdlib.steps.cache import open_images
from kdlib.study.selections import PICKED
from kdlib.study.study import Study

SELECTION_FORMAT = 1  # of the file that a page writes


def read_selection(study: Study, path: Path, name: str | None = None) -> Subset:
    """Save a selection that a page of a datamap wrote, as the strategy `picked_<name>`.

    Args:
        path: The JSON file: name, example ids in any order, and the fingerprint of the data set.
        name: Of the selection; None takes that in the file.

    Raises: ValueError for another file, a selection of another data set, ids that are no training
        images of this study, and a name that is none or is taken.
    """
    content = files.read_json(path, lambda path: "download it from the page again")
    fields = {"kdlib": str, "format": int, "name": str, "example_ids": list,
              "data_fingerprint": str, "datamap_sha256": str}  # fmt: skip
    if content.get("kdlib") != "selection":
        raise ValueError(
            f"{path} is no selection; expected a file that the button of a page wrote, with "
            f"{', '.join(fields)}"
        )
    wrong = [key for key, kind in fields.items() if not isinstance(content.get(key), kind)]
    if wrong or content["format"] != SELECTION_FORMAT:
        raise ValueError(
            f"{path} has format {content.get('format')!r} and lacks or misstates "
            f"{', '.join(wrong) or 'nothing'}; expected format {SELECTION_FORMAT}: download it "
            "from the page again"
        )
    images, given = open_images(study), content["example_ids"]
    if content["data_fingerprint"] != (data := files.fingerprint(images.fingerprints)):
        raise ValueError(
            f"{path} was selected on other images or another split than those of {study.name} "
            f"(fingerprint {content['data_fingerprint'][:12]}, here {data[:12]}); expected a "
            "selection from a page of this study"
        )
    strange = [i for i in given if type(i) is not int or not -1 < i < 2**63]
    strange = strange or np.setdiff1d(np.array(given, np.int64), images.train_ids).tolist()
    if strange or not given:
        raise ValueError(
            f"{path} selects {len(given)} images, {len(strange)} of them no training images of "
            f"{study.name} (first: {strange[:1]}); expected at least one, all of them training "
            "images"
        )
    name = content["name"] if name is None else name
    ids, target = np.unique(np.array(given, np.int64)), selection_path(study, name)
    fraction = len(ids) / len(images.train_ids)
    subset = Subset(ids, PICKED + name, fraction, 0, content["datamap_sha256"], data)
    subset.save(target)
    return subset
