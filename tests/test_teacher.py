"""`kdlib.teacher`: stored outputs belong to their examples, their teacher and their images."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kdlib import teacher
from kdlib.cache import Cache, CacheError
from kdlib.evaluation import Pixels, all_outputs, evaluate
from kdlib.models import Network, build_network
from kdlib.params import Model
from kdlib.teacher import (
    logits_by_id,
    open_outputs,
    store_outputs,
    stored_accuracy,
    verify_outputs,
)
from kdlib.weights import weights_fingerprint

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


def test_logits_by_id_are_the_stored_rows_as_float32(stored):
    logits = logits_by_id(stored)
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
    with pytest.raises(CacheError, match=r"images: None -> .*view: None -> clean"):
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
        store_outputs(network_of(), Pixels([0.0] * 3, [1e-7] * 3), images, tmp_path / "outputs")


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
    with pytest.raises(CacheError, match=r"differ from recomputed .*run notebooks/02_teacher"):
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
    assert verify_outputs(silent, PIXELS, images, zeros) == 0


@pytest.mark.parametrize("example", [0, N - 1])
def test_verify_looks_at_the_first_and_the_last_example(images, stored, example):
    def change(rows: np.ndarray) -> np.ndarray:
        rows[example] += 10
        return rows

    with pytest.raises(CacheError, match="differ from recomputed"):
        verify_outputs(network_of(), PIXELS, images, overwrite(stored, "logits", change), n=2)


def test_a_killed_store_resumes_and_gives_the_same_bytes(images, stored, tmp_path, monkeypatch):
    folder, made = tmp_path / "resumed", []
    half = teacher._to_float16

    def counting(values, name):
        made.append(name)
        if len(made) == 6:  # in the third shard
            raise KeyboardInterrupt
        return half(values, name)

    monkeypatch.setattr(teacher, "_to_float16", counting)
    with pytest.raises(KeyboardInterrupt):
        store_outputs(network_of(), PIXELS, images, folder)
    with pytest.raises(CacheError, match="unfinished build"):
        open_outputs(folder, images, weights_fingerprint(network_of()))
    with pytest.raises(CacheError, match=r"unfinished cache of something else .*teacher: "):
        store_outputs(network_of(seed=1), PIXELS, images, folder)
    resumed = store_outputs(network_of(), PIXELS, images, folder)
    assert len(made) == 6 + 2 * 3  # the last three of five shards, two columns each
    names = sorted(p.name for p in stored.folder.iterdir())
    assert sorted(p.name for p in resumed.folder.iterdir()) == names
    for name in names:
        assert (folder / name).read_bytes() == (stored.folder / name).read_bytes()


def test_accuracy_read_from_the_store_is_that_of_a_direct_evaluation(images, stored):
    pixels, labels = images.resident("images"), images.resident("labels")
    _, direct = evaluate(network_of(), PIXELS, pixels, labels)
    _, logits = all_outputs(network_of(), PIXELS, pixels)
    top = logits.topk(2, dim=1).values
    # only where two logits round to one may the decision differ
    close = int((top[:, 0] - top[:, 1] < 2 * HALF * top[:, 0].abs()).sum())
    assert abs(stored_accuracy(stored, images) - direct) <= close / N
    assert close <= 1
    by_hand = logits_by_id(stored).numpy().argmax(1) == labels.numpy()
    assert stored_accuracy(stored, images) == by_hand.mean()
