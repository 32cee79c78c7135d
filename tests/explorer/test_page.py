"""The page of a datamap, read as a file; `test_page_browser` opens it."""

import base64
import gzip
import html.parser
import json
import re

import numpy as np
import pandas as pd
import pytest

from kdlib.explorer import document as document_module
from kdlib.explorer.document import ASSETS, as_json, asset, document, packed
from kdlib.explorer.page import (
    ABSENT,
    arrays_of,
    header_of,
    named_map,
    page,
    page_path,
    quantised,
    write_page,
)
from kdlib.explorer.page_content import Content, collect, shown_epochs
from kdlib.explorer.thumbnails import atlas
from kdlib.repro import files
from kdlib.steps.cache import open_images
from kdlib.steps.datamap import open_datamap

BAD = "</script><img src=x onerror=alert(1)>"


class Blocks(html.parser.HTMLParser):
    """Elements of a page with their attributes, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.found, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data

    def text(self, name):
        [text] = [
            text
            for text, (_, attrs) in zip(self.texts, self.found, strict=True)
            if attrs.get("id") == name
        ]
        return text


@pytest.fixture(scope="module")
def tables():
    """A small datamap of five images, its curves and its predictions."""
    region = pd.Categorical(
        ["hard", "easy", "hard", "ambiguous", "hard"], categories=["easy", "ambiguous", "hard"]
    )
    table = pd.DataFrame(
        {
            "label": [0, 1, 0, 1, 1],
            "confidence": [0.3, 0.9, 0.1, 0.5, 0.2],
            "variability": [0.1, 0.05, 0.2, 0.4, 0.0],
            "correctness": [0.25, 1.0, 0.0, 0.5, 0.75],
            "forgetting_events": [1, 0, 0, 2, 0],
            "never_learned": [False, False, True, False, False],
            "region_variability": region,
        },
        pd.Index([3, 5, 6, 9, 2000], name="example_id"),
    )
    gold = np.linspace(0, 1, 20).reshape(4, 5).astype(np.float32)
    predicted = np.array([[1, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [1, 1, 0, 1, 0]])
    return table, gold, predicted


@pytest.fixture
def content(tables):
    """The content of a page with hostile names."""
    table, gold, predicted = tables

    def read(ids):
        return np.broadcast_to(np.asarray(ids, np.uint8)[:, None, None, None], (len(ids), 1, 8, 8))

    return Content(
        name="a study", network="the teacher (tiny_cnn)", table=table, classes=["zero", BAD],
        scores=["confidence", "variability", "correctness", "forgetting_events"], n_epochs=4,
        observed="train", epochs=[1, 2, 3, 4], gold=gold, predicted=predicted, read=read,
        data="d" * 64, parent="p" * 64,
    )  # fmt: skip


def unpacked(text, kind):
    return np.frombuffer(gzip.decompress(base64.b64decode(text)), kind)


def test_a_page_is_one_file_that_loads_nothing_and_runs_only_its_own_script(content):
    text = page(content)
    blocks = Blocks(text)
    policy = next(a["content"] for tag, a in blocks.found if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy
    assert "http" not in policy
    running = [a for tag, a in blocks.found if tag == "script" and "type" not in a]
    assert running == [{}]  # without a src
    assert not [a for tag, a in blocks.found if {"src", "srcset"} & a.keys()]
    assert all(a.get("href", "#").startswith("#") for tag, a in blocks.found)
    assert not [a for _, a in blocks.found for key in a if key.startswith("on")]
    assert BAD not in text
    assert json.loads(blocks.text("header"))["classes"] == ["zero", BAD]


def test_a_page_s_bytes_are_the_same_again(content):
    assert page(content) == page(content)


def test_arrays_are_binary_and_come_back(content):
    header, blocks = header_of(content), Blocks(page(content))
    arrays = {
        name: unpacked(blocks.text(f"a-{name}"), array.dtype)
        for name, array in arrays_of(content).items()
    }
    assert np.cumsum(arrays["ids"]).tolist() == content.table.index.tolist()
    assert arrays["labels"].tolist() == content.table["label"].tolist()
    assert arrays["region"].tolist() == [2, 0, 2, 1, 2]
    for score in header["scores"]:
        codes = arrays[f"s-{score['name']}"].astype(float)
        values = score["low"] + codes * (score["high"] - score["low"]) / (ABSENT - 1)
        step = (score["high"] - score["low"]) / (ABSENT - 1)
        assert np.abs(values - content.table[score["name"]]).max() <= step / 2 + 1e-12
    assert np.abs(arrays["gold"].reshape(4, 5) / 255 - content.gold).max() <= 0.5 / 255 + 1e-6
    assert (arrays["predicted"].reshape(4, 5) == content.predicted).all()


def test_numbers_that_are_none_are_marked_as_absent():
    codes = quantised(np.array([0.0, np.nan, 1.0, np.inf, 0.5]), 0.0, 1.0)
    assert codes.tolist() == [0, ABSENT, ABSENT - 1, ABSENT, 32767]
    assert quantised(np.array([2.0, 2.0]), 2.0, 2.0).tolist() == [0, 0]  # a score of one value


def test_the_hard_images_stand_with_their_reasons(content):
    # positions 0, 2 and 4 are hard: 0 is taken for 1 in three of four epochs; 2 likewise; 4 is of
    # class 1 and taken rightly in three
    assert {k: v.tolist() for k, v in content.hard().items()} == {0: [2, 0], 1: [4]}
    first, second, third = content.sentences()["hard"]
    assert first.startswith("3 of 5 images (60.0 %) are hard-to-learn: the teacher (tiny_cnn) gave")
    assert second.startswith("1 of them it classified rightly in no epoch; 1 it classified")
    assert third == (
        f"For 2 of them its most frequent prediction was another class: zero taken for {BAD} (2)."
    )


def test_a_map_without_hard_images_says_so(content):
    easy = content.table.assign(
        region_variability=pd.Categorical(["easy"] * 5, categories=["easy", "ambiguous", "hard"])
    )
    none = Content(**vars(content) | {"table": easy})
    assert none.hard() == {}
    assert none.sentences()["hard"] == ["None of the 5 images is hard-to-learn."]
    assert header_of(none)["hard"] == []


def test_what_is_left_out_is_said(content):
    bare = Content(**vars(content) | {"gold": None, "predicted": None, "epochs": [], "read": None})
    text = " ".join(json.loads(Blocks(page(bare)).text("header"))["remarks"])
    assert "Curves of single images are left out" in text
    assert "made without the images" in text
    unseen = Content(**vars(content) | {"predicted": None})
    assert "No predicted classes were recorded" in " ".join(header_of(unseen)["remarks"])
    remarks = json.loads(Blocks(page(content, thumbnails=1e-6)).text("header"))["remarks"]
    assert "Small images of all 5 points do not fit into 1e-06 MB" in " ".join(remarks)


def test_epochs_of_large_maps_are_thinned_and_then_left_out():
    assert shown_epochs(30, 1000, 4_000_000).tolist() == list(range(1, 31))
    few = shown_epochs(100, 100_000, 4_000_000)
    assert (len(few), few[0], few[-1]) == (40, 1, 100)
    assert shown_epochs(30, 1_000_000, 4_000_000).size == 0
    assert shown_epochs(3, 1_000_000, 4_000_000).tolist() == [1, 2, 3]  # few epochs are all shown


def test_an_atlas_holds_every_image_in_order_within_its_size():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (10, 3, 16, 16), np.uint8)

    def read(ids):
        return pixels[ids]

    made = atlas(read, np.arange(10), 10_000)
    assert (made.side, made.columns) == (16, 4)
    assert made.n_bytes <= 10_000
    picture = np.asarray(_decoded(made.uri))
    assert picture.shape == (48, 64, 3)
    for i in range(10):  # without loss: it fits
        top, left = 16 * (i // 4), 16 * (i % 4)
        tile = picture[top : top + 16, left : left + 16]
        assert (tile == pixels[i].transpose(1, 2, 0)).all()
    small = atlas(read, np.arange(10), 900)
    assert small.side < 16
    assert small.n_bytes <= 900
    assert atlas(read, np.arange(10), 10) is None
    assert atlas(read, np.arange(0), 10_000) is None


def _decoded(uri):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def test_a_document_refuses_what_would_end_its_script():
    with pytest.raises(ValueError, match="would end it"):
        document("t", "", ["p {}"], ["x = '</SCRIPT>'"])
    with pytest.raises(ValueError):
        document("t", "", [], data={"a": "<b>"})  # no JSON, in which `<` can be escaped
    assert "<title>&lt;b&gt;</title>" in document("<b>", "", [])
    assert "script-src 'none'" in document("t", "", [])
    with pytest.raises(ValueError):
        as_json({"a": float("nan")})


def test_packed_arrays_are_little_endian():
    array = np.array([1, 256], ">u2")
    assert unpacked(packed(array), "<u2").tolist() == [1, 256]


def test_vendored_libraries_are_those_that_their_licences_name():
    licences = asset("vendor/LICENSES.txt")
    names = [path.name for path in (ASSETS / "vendor").glob("*.js")]
    assert len(names) == 3
    for name in names:
        package, version = name.removesuffix(".js").rsplit("-", 1)
        sha256 = files.sha256_file(ASSETS / "vendor" / name)
        assert re.search(rf"^{package} {version}, .*\n  sha256 {sha256}$", licences, re.M)
    assert "<" not in licences  # stands in the page as it is
    assert document_module.ASSETS.is_dir()


def test_a_study_s_page_shows_its_map_and_is_written_again_the_same(study):
    path = write_page(study)
    assert path == study.figures / "datamap.html" == page_path(study)
    before = path.read_bytes()
    assert write_page(study).read_bytes() == before
    header = json.loads(Blocks(before.decode()).text("header"))
    images = open_images(study)
    table = open_datamap(study, images)
    assert header["n"] == len(table)
    assert header["selection"]["data_fingerprint"] == files.fingerprint(images.fingerprints)
    assert header["epochs"] == [1, 2, 3, 4, 5]
    assert header["results"] is None  # no tables are committed
    assert "from which the teacher (tiny_cnn) learnt" in header["sentences"]["map"][0]
    assert header["thumbnails"]["side"] == 8


def test_two_maps_are_linked_by_their_ids(study):
    images = open_images(study)
    other = open_datamap(study, images).iloc[::2]
    path = write_page(study, other, "half")
    assert path.name == "datamap_against_half.html"
    blocks = Blocks(path.read_text())
    assert json.loads(blocks.text("header"))["other"] == {"name": "half", "n": 550}
    assert unpacked(blocks.text("a-o-rows"), np.uint32).tolist() == list(range(0, 1100, 2))


def test_what_is_no_second_map_is_refused(study):
    with pytest.raises(ValueError, match="'resnet8' is no second map"):
        named_map(study, "resnet8")
    with pytest.raises(FileNotFoundError):
        named_map(study, "tiny/seed=0")  # not recorded yet


def test_results_show_how_many_hard_images_each_subset_holds(lab):
    from kdlib.compare.committed import write_committed
    from kdlib.steps.compare import compile_tables
    from kdlib.study.load import load_study

    study = load_study("params/tiny.yaml")
    write_committed(study, compile_tables(study))
    content = collect(study)
    n_hard = int((content.table["region_variability"] == "hard").sum())
    results = content.results
    assert results["n_hard"] == n_hard > 0
    assert {row["strategy"] for row in results["rows"]} >= {"easy"}
    for row in results["rows"]:
        assert row["hard"] <= n_hard
        assert row["few"] == (row["hard"] <= 0.1 * 0.33 * n_hard)
        assert row["verdict"] in ("better", "worse", "equivalent", "inconclusive")
    assert header_of(content)["results"] == results
