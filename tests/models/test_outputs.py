"""`kdlib.cache.outputs`: stored outputs belong to their examples, their teacher and their
images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.cache import outputs
from kdlib.cache.outputs import decoded, encoded, open_outputs, stored_columns, stored_logits
from kdlib.cache.shards import Cache, CacheError
from kdlib.dataset.pixels import Pixels
from kdlib.dataset.views import augment
from kdlib.models.base import Network
from kdlib.models.evaluation import all_outputs, evaluate
from kdlib.models.networks import build_network
from kdlib.models.outputs import (
    Replay,
    output_header,
    store_outputs,
    stored_accuracy,
    verify_outputs,
)
from kdlib.models.weights import weights_fingerprint
from kdlib.study.models import Model
from kdlib.study.training import Augment

PIXELS = Pixels([0.5, 0.5, 0.5], [0.3, 0.3, 0.3])
N = 31  # shards of 7, 7, 7, 7, 3
HALF = 2**-11  # relative rounding of float16


def network_of(seed: int = 0) -> Network:
    return build_network(Model(name="tiny_cnn"), n_classes=4, image_shape=(3, 6, 6), seed=seed)


@pytest.fixture
def images(make_images) -> Cache:
    return make_images(N)


@pytest.fixture
def stored(images: Cache, tmp_path: Path) -> Cache:
    return store_outputs(network_of(), PIXELS, images, tmp_path / "outputs")


def overwrite(stored: Cache, column: str, change) -> Cache:
    """Change a stored column behind the cache's back; returns the cache, opened anew."""
    rows = change(stored.read(column, np.arange(N)))
    for path in sorted(stored.folder.glob(f"{column}-*.npy")):
        n = len(np.load(path, allow_pickle=False))
        np.save(path, rows[:n])
        rows = rows[n:]
    return Cache(stored.folder)


def test_outputs_are_aligned_with_the_images_by_example_id(images, stored):
    network = network_of().eval()
    assert stored.n_examples == N
    assert stored.header["columns"] == {"logits": ["<f2", [1, 4]], "features": ["<f2", [1, 16]]}
    for i in range(N):  # one image at a time
        image = torch.from_numpy(images.read("images", np.array([i])))
        with torch.no_grad():
            features = network.features(PIXELS.prepare(image))
            logits = network.head(features)
        for column, fresh in (("logits", logits), ("features", features)):
            row = stored.read(column, np.array([i]))[0, 0].astype(np.float32)
            np.testing.assert_allclose(row, fresh[0].numpy(), rtol=2 * HALF, atol=1e-3)
    rows = stored.read("logits", np.arange(N))[:, 0]
    assert len({row.tobytes() for row in rows}) == N  # so that a wrong row would have shown


def test_stored_logits_are_the_stored_rows_as_float32(stored):
    logits = stored_logits(stored, np.arange(N))
    assert (logits.dtype, logits.shape) == (torch.float32, (N, 4))
    for i in range(N):
        row = stored.read("logits", np.array([i]))[0, 0].astype(np.float32)
        np.testing.assert_array_equal(logits[i].numpy(), row)


def test_storing_leaves_the_teacher_and_the_generators_as_they_were(images, tmp_path):
    network = network_of()
    before, rng = weights_fingerprint(network), torch.get_rng_state()
    store_outputs(network, PIXELS, images, tmp_path / "outputs")
    assert weights_fingerprint(network) == before
    assert network.training
    assert torch.equal(torch.get_rng_state(), rng)


def test_the_same_teacher_and_images_open_what_is_stored(images, stored):
    again = store_outputs(network_of(), PIXELS, images, stored.folder)
    opened = open_outputs(stored.folder, images, weights_fingerprint(network_of()))
    assert again.fingerprint == opened.fingerprint == stored.fingerprint


def test_another_teacher_is_refused_and_said(images, stored):
    other = network_of(seed=1)
    with pytest.raises(CacheError, match=r"\(there -> expected\): teacher: [0-9a-f]{64} -> "):
        open_outputs(stored.folder, images, weights_fingerprint(other))
    with pytest.raises(CacheError, match="teacher: "):
        store_outputs(other, PIXELS, images, stored.folder)
    verify_outputs(network_of(), PIXELS, images, Cache(stored.folder))  # untouched


def test_other_images_are_refused_and_said(images, stored, make_images):
    others = make_images(N, seed=1)
    with pytest.raises(CacheError, match=r"\(there -> expected\): images: [0-9a-f]{64} -> "):
        open_outputs(stored.folder, others, weights_fingerprint(network_of()))
    with pytest.raises(CacheError, match="images: "):
        store_outputs(network_of(), PIXELS, others, stored.folder)


def test_another_normalisation_is_refused_and_said(images, stored):
    with pytest.raises(CacheError, match=r"pixels\.std: \[0\.3, 0\.3, 0\.3\] -> \[1\.0, 1\.0"):
        store_outputs(network_of(), Pixels([0.5] * 3, [1.0] * 3), images, stored.folder)


def test_an_image_cache_is_no_cache_of_outputs(images):
    with pytest.raises(CacheError, match=r"images: None -> .*kind: images -> teacher_outputs"):
        open_outputs(images.folder, images, weights_fingerprint(network_of()))


@pytest.mark.parametrize("factor", [1e6, float("nan")])
def test_outputs_beyond_float16_are_refused(images, tmp_path, factor):
    network = network_of()
    with torch.no_grad():
        network.linear.weight *= factor
    with pytest.raises(OverflowError, match=r"teacher logits reach .*float16's 65,504.*normalis"):
        store_outputs(network, PIXELS, images, tmp_path / "outputs")
    assert not (tmp_path / "outputs/index.json").exists()


def test_features_beyond_float16_are_refused(images, tmp_path):
    with pytest.raises(OverflowError, match="teacher features reach"):
        store_outputs(
            network_of(),
            Pixels([0.0] * 3, [1e-7] * 3),
            images,
            tmp_path / "outputs",
            wanted=("features", "logits"),
        )


def test_grids_and_attention_maps_are_stored_verified_and_read(images, tmp_path):
    wanted = ("features", "stage1", "attention2")
    stored = store_outputs(
        network_of(), PIXELS, images, tmp_path / "outputs", wanted=wanted, replay=REPLAY
    )
    shapes = {name: shape for name, (_, shape) in stored.header["columns"].items()}
    assert shapes == {"features": [3, 16], "stage1": [3, 8, 6, 6], "attention2": [3, 3, 3]}
    assert verify_outputs(network_of(), PIXELS, images, stored, REPLAY) < 2 * HALF
    worse = overwrite(stored, "stage1", lambda rows: rows[::-1])
    with pytest.raises(CacheError, match="differ from recomputed"):
        verify_outputs(network_of(), PIXELS, images, worse, REPLAY)
    with pytest.raises(CacheError, match=r"holds attention2, features, stage1 .* and no logits"):
        stored_columns(stored, ("features", "logits"))


def test_a_network_without_such_a_stage_is_said(images, tmp_path):
    with pytest.raises(ValueError, match=r"has no output 'stage3'; it has logits, features, stage"):
        store_outputs(network_of(), PIXELS, images, tmp_path / "outputs", wanted=("stage3",))


def test_verify_accepts_what_was_stored_within_rounding(images, stored):
    assert 0 <= verify_outputs(network_of(), PIXELS, images, stored) < 2 * HALF


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: np.roll(rows, 1, axis=0),
        lambda rows: rows[::-1],
        lambda rows: np.concatenate([rows[1:2], rows[:1], rows[2:]]),  # two neighbours
        lambda rows: np.roll(rows, 1, axis=2),
        lambda rows: np.full_like(rows, np.nan),
    ],
    ids=["rolled", "reversed", "two swapped", "classes", "nan"],
)
def test_verify_finds_rows_that_are_not_those_of_their_examples(images, stored, change):
    damaged = overwrite(stored, "logits", change)
    with pytest.raises(CacheError, match=r"differ from recomputed .*delete .*, then run `"):
        verify_outputs(network_of(), PIXELS, images, damaged)


def test_verify_finds_a_teacher_that_computes_nothing_any_more(images, stored):
    broken = network_of()
    with torch.no_grad():
        broken.linear.weight.fill_(float("nan"))
    with pytest.raises(CacheError, match="differ from recomputed ones by nan"):
        verify_outputs(broken, PIXELS, images, stored)


def test_verify_of_a_teacher_whose_logits_are_all_0_is_no_division_by_0(images, tmp_path):
    silent = network_of()
    with torch.no_grad():
        silent.linear.weight.zero_()
    zeros = store_outputs(silent, PIXELS, images, tmp_path / "zeros")
    assert verify_outputs(silent, PIXELS, images, zeros) < 2 * HALF


@pytest.mark.parametrize("example", [0, N - 1])
def test_verify_looks_at_the_first_and_the_last_example(images, stored, example):
    def change(rows: np.ndarray) -> np.ndarray:
        rows[example] += 10
        return rows

    with pytest.raises(CacheError, match="differ from recomputed"):
        verify_outputs(network_of(), PIXELS, images, overwrite(stored, "logits", change), n=2)


def test_a_killed_store_resumes_and_gives_the_same_bytes(images, stored, tmp_path, monkeypatch):
    folder, made = tmp_path / "resumed", []
    half = outputs._to_float16

    def counting(values, name):
        made.append(name)
        if len(made) == 8:  # in the third shard; two columns each, and of the layout
            raise KeyboardInterrupt
        return half(values, name)

    monkeypatch.setattr(outputs, "_to_float16", counting)
    with pytest.raises(KeyboardInterrupt):
        store_outputs(network_of(), PIXELS, images, folder)
    with pytest.raises(CacheError, match="unfinished build"):
        open_outputs(folder, images, weights_fingerprint(network_of()))
    with pytest.raises(CacheError, match=r"made of something else .*teacher: "):
        store_outputs(network_of(seed=1), PIXELS, images, folder)
    resumed = store_outputs(network_of(), PIXELS, images, folder)
    assert len(made) == 8 + 2 + 2 + 2 * 3  # the last three of five shards
    names = sorted(p.name for p in stored.folder.iterdir())
    assert sorted(p.name for p in resumed.folder.iterdir()) == names
    for name in names:
        assert (folder / name).read_bytes() == (stored.folder / name).read_bytes()


def test_accuracy_read_from_the_store_is_that_of_a_direct_evaluation(images, stored):
    pixels, labels = images.resident("images"), images.resident("labels")
    direct = evaluate(network_of(), PIXELS, pixels, labels).accuracy
    _, logits = all_outputs(network_of(), PIXELS, pixels)
    top = logits.topk(2, dim=1).values
    # only where two logits round to one may the decision differ
    close = int((top[:, 0] - top[:, 1] < 2 * HALF * top[:, 0].abs()).sum())
    assert abs(stored_accuracy(stored, images) - direct) <= close / N
    assert close <= 1
    by_hand = stored_logits(stored, np.arange(N)).numpy().argmax(1) == labels.numpy()
    assert stored_accuracy(stored, images) == by_hand.mean()


# --- top-k -----------------------------------------------------------------------------------


def test_top_k_keeps_the_largest_and_shares_the_rest_evenly():
    # probabilities 0.5, 0.3, 0.1, 0.1: two kept, the others share 0.2 and get 0.1 each
    logits = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log() + 3
    stored = encoded({"logits": logits}, 2)
    assert stored["indices"].tolist() == [[0, 2]]
    assert np.exp(stored["log_tail"][0]) == pytest.approx(0.2, rel=1e-3)
    parts = {k: torch.from_numpy(v) for k, v in stored.items() if k != "features"}
    dense = decoded(parts, 4)["logits"]
    np.testing.assert_allclose(dense.softmax(1), [[0.5, 0.1, 0.3, 0.1]], rtol=3e-3)


@settings(max_examples=60, deadline=None)
@given(n_classes=st.integers(2, 12), scale=st.floats(0.1, 30), data=st.data())
def test_decoded_top_k_has_the_stored_probabilities(n_classes, scale, data):
    k = data.draw(st.integers(1, n_classes - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    logits = torch.from_numpy(scale * rng.standard_normal((5, n_classes))).float()
    stored = encoded({"logits": logits}, k)
    parts = {key: torch.from_numpy(v) for key, v in stored.items() if key != "features"}
    dense = decoded(parts, n_classes)["logits"]
    assert (dense.dtype, dense.shape) == (torch.float32, (5, n_classes))
    assert torch.isfinite(dense).all()
    wanted, found = logits.softmax(1), dense.softmax(1)
    kept = parts["indices"].long()
    # float16 moves a logit of 60 by up to 0.016, so a probability by that part of itself
    torch.testing.assert_close(found.gather(1, kept), wanted.gather(1, kept), rtol=0.05, atol=1e-4)
    tails = [1 - p.gather(1, kept).sum(1) for p in (found, wanted)]
    torch.testing.assert_close(*tails, rtol=0.1, atol=2e-3)
    np.testing.assert_array_equal(found.gather(1, kept).argmax(1), wanted.gather(1, kept).argmax(1))


@pytest.mark.parametrize("top_k", [1, 3])
def test_top_k_outputs_are_stored_verified_and_read_as_logits(images, tmp_path, top_k):
    stored = store_outputs(
        network_of(), PIXELS, images, tmp_path / "outputs", top_k=top_k, wanted=("logits",)
    )
    assert stored.header["columns"] == {
        "values": ["<f2", [1, top_k]],
        "indices": ["<i2", [1, top_k]],
        "log_tail": ["<f2", [1]],
    }
    assert verify_outputs(network_of(), PIXELS, images, stored) < 0.003
    whole = store_outputs(network_of(), PIXELS, images, tmp_path / "whole")
    assert stored_accuracy(stored, images) == stored_accuracy(whole, images)
    if top_k == 3:  # of four classes: nothing is left to share
        torch.testing.assert_close(
            stored_logits(stored, np.arange(N)).softmax(1),
            stored_logits(whole, np.arange(N)).softmax(1),
            rtol=0.01,
            atol=2e-3,
        )
    rolled = overwrite(stored, "indices", lambda rows: (rows + 1) % 4)
    with pytest.raises(CacheError, match="differ from recomputed"):
        verify_outputs(network_of(), PIXELS, images, rolled)


@pytest.mark.parametrize("top_k", [0, 4, 5])
def test_a_top_k_outside_the_classes_is_refused(images, tmp_path, top_k):
    with pytest.raises(ValueError, match=rf"top_k is {top_k} of 4 classes; expected \[1, 4\)"):
        store_outputs(network_of(), PIXELS, images, tmp_path, top_k=top_k)


# --- replayed views --------------------------------------------------------------------------

REPLAY = Replay(3, Augment(crop_padding=1, flip=True), seed=11)


def test_replayed_views_are_those_of_the_first_passes(images, tmp_path):
    network = network_of()
    stored = store_outputs(network, PIXELS, images, tmp_path / "outputs", replay=REPLAY)
    assert stored.header["columns"]["logits"] == ["<f2", [3, 4]]
    ids = torch.arange(N)
    pixels = images.resident("images")
    for view in range(3):
        seen = augment(pixels, ids, torch.full((N,), view), REPLAY.augment, REPLAY.seed)
        features, logits = all_outputs(network, PIXELS, seen)
        np.testing.assert_allclose(
            stored_logits(stored, ids.numpy(), view), logits, rtol=2 * HALF, atol=1e-3
        )
        rows = stored.read("features", ids.numpy())[:, view]
        np.testing.assert_allclose(rows, features, rtol=2 * HALF, atol=1e-3)
    assert verify_outputs(network, PIXELS, images, stored, REPLAY) < 2 * HALF
    with pytest.raises(CacheError, match="differ from recomputed"):
        verify_outputs(network, PIXELS, images, stored, Replay(3, REPLAY.augment, 12))
    swapped = overwrite(stored, "logits", lambda rows: rows[:, [1, 0, 2]])
    with pytest.raises(CacheError, match="differ from recomputed"):
        verify_outputs(network, PIXELS, images, swapped, REPLAY)


def test_outputs_of_other_views_are_refused_and_said(images, stored, tmp_path):
    with pytest.raises(CacheError, match="view: clean -> "):
        store_outputs(network_of(), PIXELS, images, stored.folder, replay=REPLAY)
    store_outputs(network_of(), PIXELS, images, tmp_path / "replayed", replay=REPLAY)
    other = Replay(3, Augment(crop_padding=1), 11)
    with pytest.raises(CacheError, match=r"view\.augment\.flip: True -> False"):
        store_outputs(network_of(), PIXELS, images, tmp_path / "replayed", replay=other)


def test_parts_of_outputs_give_the_bytes_of_the_whole(images, stored, tmp_path):
    for i in (2, 1):
        part = store_outputs(network_of(), PIXELS, images, tmp_path / "parts", part=(i, 2))
        verify_outputs(network_of(), PIXELS, Cache(images.folder, part=(i, 2)), part)
    whole = store_outputs(network_of(), PIXELS, images, tmp_path / "parts")
    assert whole.fingerprint == stored.fingerprint
    for path in stored.folder.glob("*.npy"):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()


def test_outputs_of_larger_images_are_others(images):
    network, large = network_of(), network_of()
    large.image_size = 12
    headers = [output_header(n, PIXELS, images, None, None) for n in (network, large)]
    assert headers[0]["teacher"] == headers[1]["teacher"]
    assert "image_size" not in headers[0]
    assert headers[1]["image_size"] == 12
