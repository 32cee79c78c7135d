"""`kdlib.dataset.loader`: a batch holds what was planned, wherever pixels are kept and whoever
made it."""

import math
import mmap
import os
import shutil
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.cache.build import build_images, build_shards
from kdlib.cache.outputs import CLEAN_VIEW
from kdlib.cache.shards import Cache, CacheError
from kdlib.cache.sources import array_source
from kdlib.dataset import loader as loader_module
from kdlib.dataset import rows as rows_module
from kdlib.dataset.batch import View
from kdlib.dataset.loader import Loader
from kdlib.dataset.pixels import Pixels
from kdlib.dataset.plan import ORDERS, Plan
from kdlib.dataset.rows import Rows, map_in_one
from kdlib.dataset.views import augment
from kdlib.study.training import Augment, ColourJitter, ResizedCrop

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
VIEW = View(Augment(crop_padding=2, flip=True), 7, Pixels(MEAN, STD))
N, SHARD = 100, 8


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Cache:
    """100 images of 3x6x5 in 13 shards."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (N, 3, 6, 5), np.uint8)
    source = array_source("noise", "train", pixels, rng.integers(0, 4, N), "abcd")
    return build_images(source, tmp_path_factory.mktemp("images") / "cache", SHARD)


def plan_of(ids: np.ndarray | None = None, order: str = "shuffled", **changes) -> Plan:
    settings = {"batch_size": 16, "n_steps": 12, "seed": 0, "window_shards": 3} | changes
    ids = np.arange(N) if ids is None else ids
    return Plan(ids, order=order, shard_size=SHARD, **settings)


def same(ours, theirs) -> bool:
    """Whether two batches are equal in every field."""
    pairs = zip(ours, theirs, strict=True)
    return all((a is b is None) or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("residence", ["resident", "mapped"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n_ids", [60, 5], ids=["subset", "smaller than a batch"])
def test_a_batch_carries_the_right_rows(images, residence, order, n_ids):
    ids = np.sort(np.random.default_rng(0).permutation(N)[:n_ids])
    plan = plan_of(ids, order)
    loader = Loader(plan, images, residence=residence)
    visits = np.zeros(N, int)
    for step in range(plan.n_steps):
        batch, (passes, positions) = loader.batch(step), plan.at(step)
        assert batch.passes.tolist() == passes.tolist()
        assert batch.positions.tolist() == positions.tolist()
        assert batch.example_ids.tolist() == ids[positions].tolist()
        assert batch.images.dtype == torch.uint8
        np.testing.assert_array_equal(batch.images.numpy(), images.read("images", ids[positions]))
        np.testing.assert_array_equal(batch.labels.numpy(), images.read("labels", ids[positions]))
        assert batch.teacher is None
        np.add.at(visits, batch.example_ids.numpy(), 1)
    np.testing.assert_array_equal(visits[ids], plan.visits())
    loader.close()


@settings(max_examples=25, deadline=None)
@given(
    order=st.sampled_from(ORDERS),
    reuse=st.booleans(),
    fast=st.booleans(),
    channels_last=st.booleans(),
    resized=st.booleans(),
    data=st.data(),
)
def test_where_pixels_are_kept_changes_no_byte(
    images, order, reuse, fast, channels_last, resized, data
):
    steps = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=6), label="steps")
    chosen = Augment(crop_padding=2, flip=True)
    if resized:
        chosen = Augment(resized_crop=ResizedCrop(), colour_jitter=ColourJitter(brightness=0.4))
    view, plan = View(chosen, 3, Pixels(MEAN, STD, channels_last)), plan_of(order=order)
    with pytest.MonkeyPatch.context() as patch:
        if fast:
            patch.setattr(loader_module, "COMPILED", 0)
        loaders = [
            Loader(plan, images, view=view, residence=r, reuse=reuse)
            for r in ("resident", "mapped")
        ]
        for step in steps:
            first, second = (loader.batch(step) for loader in loaders)
            assert same(first, second)
            ids = first.example_ids
            raw = torch.from_numpy(images.read("images", ids.numpy()))
            expected = VIEW.pixels.prepare(augment(raw, ids, first.passes, chosen, 3))
            assert torch.equal(first.images, expected)
            layout = torch.channels_last if channels_last else torch.contiguous_format
            assert first.images.is_contiguous(memory_format=layout)
        for loader in loaders:
            loader.close()


def test_a_step_is_the_same_in_whatever_order_steps_are_asked_for(images):
    fresh = Loader(plan_of(), images, view=VIEW, residence="mapped")
    forward = [fresh.batch(step) for step in range(12)]
    other = Loader(plan_of(), images, view=VIEW, residence="mapped", reuse=True)
    for step in (3, 4, 4, 0, 11, 10, 11, 5, 6):
        assert same(other.batch(step), forward[step])
    for loader in (fresh, other):
        loader.close()


def test_a_reused_batch_is_valid_until_the_next_is_asked_for(images):
    for residence in ("resident", "mapped"):
        kept = Loader(plan_of(), images, view=VIEW, residence=residence)
        reused = Loader(plan_of(), images, view=VIEW, residence=residence, reuse=True)
        places = set()
        for step in range(8):
            batch = reused.batch(step)
            places.add(batch.images.data_ptr())
            assert same(batch, kept.batch(step))
        assert len(places) == 1
        kept.close()
        reused.close()


def test_the_thread_asks_for_each_shard_before_it_is_read_and_ends(images, monkeypatch):
    asked, before = [], threading.active_count()
    monkeypatch.setattr(rows_module, "READ_AHEAD", 2)
    monkeypatch.setattr(rows_module, "ASK_AGAIN", 4)
    populate = Rows.populate
    monkeypatch.setattr(Rows, "populate", lambda rows, n: (asked.append(n), populate(rows, n)))
    loader = Loader(plan_of(order="sequential"), images, view=VIEW, residence="mapped")
    first = loader.batch(0)
    loader.close()
    assert asked == list(range(8))  # four batches of 16, in shards of 8
    assert threading.active_count() == before
    assert same(first, Loader(plan_of(order="sequential"), images, view=VIEW).batch(0))
    assert same(loader.batch(2), Loader(plan_of(order="sequential"), images, view=VIEW).batch(2))


def test_what_goes_wrong_in_the_thread_is_raised_when_it_is_asked_again(images, monkeypatch):
    def failing(rows, number):
        raise OSError("disk on fire")

    monkeypatch.setattr(rows_module, "READ_AHEAD", 2)
    monkeypatch.setattr(Rows, "populate", failing)
    loader = Loader(plan_of(), images, residence="mapped")
    loader.batch(0)
    loader._read_ahead._reading.exception()  # waits for it
    with pytest.raises(OSError, match="disk on fire"):
        loader.batch(2)
    loader.close()


def test_a_batch_may_be_made_ahead_as_for_a_gpu(images, monkeypatch):
    expected = [Loader(plan_of(), images, view=VIEW).batch(step) for step in range(12)]
    loader = Loader(plan_of(), images, view=VIEW, residence="mapped", reuse=True)
    monkeypatch.setattr(loader, "_works_ahead", True)
    monkeypatch.setattr(loader, "_buffers", [{}, {}])
    for step in (0, 1, 2, 5, 5, 6, 11, 3, 4):
        assert same(loader.batch(step), expected[step])
        assert (loader._next is None) == (step == 11)
    loader.close()


def test_processes_together_make_the_batch_of_one_process(images):
    alone = Loader(plan_of(), images, view=VIEW)
    for world_size in (2, 4):
        shares = [
            Loader(plan_of(), images, view=VIEW, rank=r, world_size=world_size)
            for r in range(world_size)
        ]
        for step in (0, 7):
            batches, whole = [share.batch(step) for share in shares], alone.batch(step)
            assert torch.equal(torch.cat([b.images for b in batches]), whole.images)
            assert torch.equal(torch.cat([b.example_ids for b in batches]), whole.example_ids)


def test_auto_keeps_pixels_resident_where_they_fit_and_maps_them_where_not(images, monkeypatch):
    assert Loader(plan_of(), images).residence == "resident"
    monkeypatch.setattr(loader_module, "free_memory", lambda device: 2 * N * 90 - 1)
    small = Loader(plan_of(), images)
    assert small.residence == "mapped"
    small.close()
    with pytest.raises(ValueError, match="residence is 'gpu'; expected auto, resident or mapped"):
        Loader(plan_of(), images, residence="gpu")


def test_free_memory_is_a_plausible_number_of_bytes():
    assert 2**26 < rows_module.free_memory(torch.device("cpu")) < 2**46


def test_raw_rows_and_labels_are_those_of_their_positions(images):
    ids = np.arange(3, 90, 2)
    for residence in ("resident", "mapped"):
        loader = Loader(plan_of(ids), images, residence=residence)
        positions = np.array([5, 0, 43, 5])
        np.testing.assert_array_equal(
            loader.raw(positions).numpy(), images.read("images", ids[positions])
        )
        np.testing.assert_array_equal(loader.labels.numpy(), images.read("labels", ids))
        loader.close()


@pytest.mark.parametrize("residence", ["resident", "mapped"])
def test_a_plan_of_ids_the_cache_does_not_have_is_refused(images, residence):
    with pytest.raises(IndexError, match=r"which has ids \[0, 100\)"):
        Loader(Plan(np.arange(N + 2), 12, 1, 0), images, residence=residence)


def test_a_damaged_shard_is_found_before_the_first_batch(images, tmp_path):
    import shutil

    copied = shutil.copytree(images.folder, tmp_path / "cache")
    path = copied / "images-00004.npy"
    path.write_bytes(path.read_bytes()[:-1])
    for residence in ("resident", "mapped"):
        with pytest.raises(CacheError, match=r"images-00004\.npy is cut or damaged"):
            Loader(plan_of(), Cache(copied), residence=residence)
        fine = Loader(plan_of(np.arange(32)), Cache(copied), residence=residence)  # not its shard
        fine.close()


def test_mapped_shards_are_one_tensor_of_which_every_byte_can_be_read(images):
    rows = Rows(images, "images", np.arange(3, N), torch.device("cpu"), resident=False)
    whole, source = rows.source.clone(), rows.source
    assert "tensor" in repr(source)
    assert int(source[-1].sum()) == 0  # behind the end of the last file
    del rows  # the range of memory stays as long as a tensor needs it
    assert torch.equal(source, whole)


def test_files_are_mapped_one_behind_the_other(tmp_path):
    texts = [b"a" * 5000, b"b", b"c" * mmap.PAGESIZE]
    paths = [tmp_path / str(i) for i in range(3)]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text)
    memory, begins = map_in_one(paths, [len(text) for text in texts])
    for begin, text in zip(begins.tolist(), texts, strict=True):
        assert memory[begin : begin + len(text)].numpy().tobytes() == text
    assert len(memory) % mmap.PAGESIZE == 0
    memory.zero_()  # a private copy
    assert [path.read_bytes() for path in paths] == texts
    with pytest.raises(FileNotFoundError):
        map_in_one([tmp_path / "none"], [1])


def test_mapped_batches_leave_the_files_as_they_are(images):
    loader = Loader(plan_of(order="sequential"), images, residence="mapped")
    loader.batch(0).images.zero_()
    loader.close()
    images.verify()


# --- teacher rows ----------------------------------------------------------------------------


def teacher_of(folder, n_views: int | None = None, view: View | None = None) -> Cache:
    """Stored logits that say which example, view and class they belong to."""
    n = n_views or 1

    def make(span):
        ids = np.arange(*span)[:, None, None]
        rows = 8 * ids + np.arange(n)[:, None] + np.arange(4) / 8
        return {"logits": rows.astype("<f4")}

    named = CLEAN_VIEW
    if view is not None:
        augment = view.settings.model_dump(mode="json")
        named = {"n": n_views, "augment": augment, "seed": view.seed}
    header = {"view": named, "top_k": None, "n_classes": 4}
    columns = {"logits": ("<f4", (n, 4))}
    return build_shards(folder, header, columns, make, n_examples=N, shard_size=SHARD)


@pytest.mark.parametrize("residence", ["resident", "mapped"])
def test_teacher_rows_are_those_of_their_examples(images, tmp_path, residence):
    ids = np.arange(1, 80, 2)
    teacher = teacher_of(tmp_path)
    loader = Loader(plan_of(ids), images, teacher=teacher, residence=residence)
    for step in range(6):
        batch = loader.batch(step)
        expected = 8 * batch.example_ids[:, None] + torch.arange(4) / 8
        assert torch.equal(batch.teacher["logits"], expected)
    loader.close()


@pytest.mark.parametrize("residence", ["resident", "mapped"])
def test_a_pass_sees_its_replayed_view_and_the_teacher_s_row_of_it(images, tmp_path, residence):
    view = View(VIEW.settings, 7, VIEW.pixels, n_views=3)
    teacher = teacher_of(tmp_path, 3, view)
    loader = Loader(plan_of(np.arange(20)), images, view=view, teacher=teacher, residence=residence)
    for step in range(12):  # nine passes
        batch = loader.batch(step)
        ids, views = batch.example_ids, batch.passes % 3
        assert torch.equal(
            batch.teacher["logits"], 8 * ids[:, None] + views[:, None] + torch.arange(4) / 8
        )
        raw = torch.from_numpy(images.read("images", ids.numpy()))
        expected = VIEW.pixels.prepare(augment(raw, ids, views, view.settings, 7))
        assert torch.equal(batch.images, expected)
    assert batch.passes.max() == 9
    loader.close()


@pytest.mark.parametrize(
    ("view", "difference"),
    [
        (View(Augment(flip=True), 7, VIEW.pixels, 3), r"augment\.crop_padding: 2 -> 0"),
        (View(VIEW.settings, 8, VIEW.pixels, 3), "seed: 7 -> 8"),
        (View(VIEW.settings, 7, VIEW.pixels, 4), "n: 3 -> 4"),
        (View(VIEW.settings, 7, VIEW.pixels), "n: 3 -> None"),
        (None, "seed"),
    ],
)
def test_a_teacher_that_saw_other_views_is_refused(images, tmp_path, view, difference):
    replayed = View(VIEW.settings, 7, VIEW.pixels, n_views=3)
    teacher = teacher_of(tmp_path, 3, replayed)
    with pytest.raises(CacheError, match=difference):
        Loader(plan_of(), images, view=view, teacher=teacher)


def test_loading_leaves_the_global_generators_alone(images):
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    Loader(plan_of(), images, view=VIEW).batch(2)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_the_limit_of_a_job_is_what_it_leaves(tmp_path):
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    groups.write_text("1:cpu:/elsewhere\n0::/job/step\n")
    for group, most, used in (("job", "5000", 1000), ("job/step", "max", 700)):
        (root / group).mkdir(parents=True)
        (root / group / "memory.max").write_text(f"{most}\n")
        (root / group / "memory.current").write_text(f"{used}\n")
    assert rows_module._allowed(root, groups) == 4000
    (root / "job" / "memory.max").write_text("max\n")
    assert rows_module._allowed(root, groups) == math.inf
    groups.write_text("1:cpu:/\n")  # version 1 alone
    assert rows_module._allowed(root, groups) == math.inf


def test_a_loader_can_be_iterated_and_has_a_length(images):
    loader = Loader(Plan(np.arange(40), 8, 7, seed=0), images)
    seen = [batch.example_ids for batch in loader]
    assert len(loader) == len(seen) == 7
    assert torch.equal(torch.stack(seen[3:4]), loader.batch(3).example_ids[None])


def test_a_shard_that_is_cut_while_batches_are_drawn_from_it_is_named(tmp_path, images):
    folder = shutil.copytree(images.folder, tmp_path / "cache")
    loader = Loader(plan_of(), Cache(folder), residence="mapped")
    loader.batch(0)
    os.truncate(folder / "images-00000.npy", 200)
    with pytest.raises(CacheError, match=r"images-00000\.npy was cut to 200 of .* while it was"):
        loader.batch(0)
