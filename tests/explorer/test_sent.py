"""A selection that a page wrote is a subset of the study that it belongs to, and of no other."""

import json

import pytest

from kdlib.cartography.subset import Subset
from kdlib.explorer.selections import saved_selections
from kdlib.explorer.sent import read_selection
from kdlib.repro import files
from kdlib.repro.run import read_evidence
from kdlib.steps.distill import make_subset


@pytest.fixture
def written(state, study, tmp_path):
    """A function that writes the file of a page's button, changed at will."""

    def write(**changes):
        content = {
            "kdlib": "selection", "format": 1, "study": study.name, "name": "sent",
            "data_fingerprint": files.fingerprint(state.images.fingerprints),
            "datamap_sha256": read_evidence(study.runs / "datamap")["datamap_sha256"],
            "example_ids": state.table.index[110:0:-1].tolist(),
        }  # fmt: skip
        path = tmp_path / "sent.json"
        path.write_text(json.dumps(content | changes))
        return path

    return write


def test_a_selection_from_a_page_is_that_of_the_same_lasso(state, study, written):
    subset = read_selection(study, written())
    state.select(state.table.index[1:111])
    path = state.save("sent")  # refused, were the file not the same
    assert Subset.load(path).sha256 == subset.sha256
    assert read_selection(study, written(), "again").strategy == "picked_again"
    assert saved_selections(study) == ["again", "sent"]
    made = make_subset(study, state.images, study.cell(strategy="picked_again"), 1)
    assert made.example_ids.tolist() == state.table.index[1:111].tolist()
    with pytest.raises(ValueError, match="holds another subset"):
        read_selection(study, written(example_ids=state.table.index[:9].tolist()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kdlib": "figure"}, "is no selection"),
        ({"format": 2}, "has format 2"),
        ({"example_ids": "1 2"}, "lacks or misstates example_ids"),
        ({"data_fingerprint": "0" * 64}, "on other images or another split than those of tiny"),
        ({"example_ids": []}, "selects 0 images"),
        ({"example_ids": [1.5]}, "1 of them no training images"),
        ({"example_ids": [10**9]}, "1 of them no training images"),
        ({"example_ids": [2**70]}, "1 of them no training images"),
        ({"example_ids": [True]}, "1 of them no training images"),
        ({"name": "../a"}, "names no selection"),
    ],
)
def test_another_file_than_a_page_s_selection_of_these_images_is_refused(
    study, written, changes, message
):
    with pytest.raises(ValueError, match=message):
        read_selection(study, written(**changes))
    assert saved_selections(study) == []
    path = written()
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match="download it from the page again"):
        read_selection(study, path)
