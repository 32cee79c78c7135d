"""Cached images and the order of a plan in the hands of a torch DataLoader."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from kdlib.dataset.pixels import Pixels
from kdlib.dataset.plan import Plan
from kdlib.dataset.torch_adapters import ImageDataset, PlanSampler

PIXELS = Pixels([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])


def test_an_item_is_the_image_its_label_and_its_example_id(make_images):
    cache, ids = make_images(20), np.array([3, 17, 4])
    data = ImageDataset(cache, ids)
    image, label, example_id = data[1]
    assert len(data) == 3
    assert int(example_id) == 17
    assert image.dtype is torch.uint8
    assert torch.equal(image, torch.from_numpy(cache.read("images", ids[1:2])[0]))
    assert int(label) == cache.read("labels", ids[1:2])[0]
    assert len(list(data)) == 3


def test_images_are_normalised_after_they_are_transformed(make_images):
    cache, ids = make_images(9), np.arange(9)
    data = ImageDataset(cache, ids, pixels=PIXELS, transform=lambda image: image.flip(-1))
    expected = PIXELS.prepare(torch.from_numpy(cache.read("images", ids)).flip(-1))
    assert torch.equal(data[4][0], expected[4])


def test_ids_that_are_not_in_the_cache_are_refused(make_images):
    with pytest.raises(IndexError, match=r"example ids \[3, 20\] asked of"):
        ImageDataset(make_images(20), np.array([3, 20]))


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_data_loader_gives_the_order_of_each_pass_of_the_plan(make_images, n_workers):
    cache, ids = make_images(30), np.arange(5, 28)
    sampler = PlanSampler(ids, seed=3)
    loader = DataLoader(
        ImageDataset(cache, ids, pixels=PIXELS), 8, sampler=sampler, num_workers=n_workers
    )
    plan = Plan(ids, 8, 10, 3)
    for number in (0, 2):
        sampler.set_epoch(number)
        images, labels, seen = map(torch.cat, zip(*loader, strict=True))
        assert len(sampler) == 23
        assert len(loader) == 3
        assert seen.tolist() == ids[plan.order(number)].tolist()
        assert labels.tolist() == cache.read("labels", seen.numpy()).tolist()
        assert torch.equal(images, PIXELS.prepare(torch.from_numpy(cache.read("images", seen))))


def test_a_pass_may_draw_shards_anew(make_images):
    ids = np.arange(30)
    sampler = PlanSampler(ids, 0, shard_size=7, shards_per_pass=2)
    plan = Plan(ids, 8, 10, 0, shard_size=7, shards_per_pass=2)
    sampler.set_epoch(1)
    assert list(sampler) == plan.order(1).tolist()
    assert len(sampler) == len(plan.order(1))


def test_a_copy_in_another_process_maps_the_shards_itself(make_images):
    data = ImageDataset(make_images(20), np.arange(20))
    first = data[0][0]
    assert data.images._maps
    copy = pickle.loads(pickle.dumps(data))
    assert not copy.images._maps
    assert torch.equal(copy[0][0], first)
