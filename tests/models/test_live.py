"""`kdlib.models.live`: a live teacher returns what would have been stored for these views."""

import dataclasses

import numpy as np
import pytest
import torch
from trainer.small_task import (
    TRAINING,
    Stopped,
    kept_bytes,
    run_in,
    small_images,
    small_task,
    stop_after,
)  # fmt: skip

from kdlib.cache.outputs import stored_logits
from kdlib.dataset.batch import View
from kdlib.dataset.loader import Loader
from kdlib.dataset.pixels import Pixels
from kdlib.dataset.plan import Plan
from kdlib.models.live import LiveOutputs, live_evidence
from kdlib.models.networks import build_network
from kdlib.models.outputs import Replay, store_outputs
from kdlib.models.weights import weights_fingerprint
from kdlib.repro.seeds import derive
from kdlib.study.models import Model
from kdlib.study.training import Augment
from kdlib.trainer import loop
from kdlib.trainer.loop import train

PIXELS, OTHER = Pixels([0.4] * 3, [0.2] * 3), Pixels([0.5] * 3, [0.3] * 3)
AUGMENT = Augment(flip=True, crop_padding=1)
WANTED = ("logits", "features", "stage1", "attention2")
N = 31


def teacher_of(shape=(3, 6, 6), size: int | None = None):
    model = Model(name="tiny_cnn", options={"width": 4})
    made = build_network(model, n_classes=4, image_shape=shape, seed=5)
    made.image_size = size
    return made


def loader_of(images, live, augment=AUGMENT, **how):
    view = View(augment, 7, PIXELS)
    return Loader(Plan(images.example_ids, 6, 12, 0), images, view=view, live=live, **how)


@pytest.mark.parametrize("size", [None, 9])
@pytest.mark.parametrize("pixels", [PIXELS, OTHER], ids=["of the student", "its own"])
@pytest.mark.parametrize("n_views", [None, 3])
def test_live_outputs_are_the_stored_ones_of_the_same_views(
    make_images, tmp_path, n_views, pixels, size
):
    images, network = make_images(N), teacher_of(size=size)
    replay = n_views and Replay(n_views, AUGMENT, 7)
    stored = store_outputs(network, pixels, images, tmp_path / "o", replay=replay, wanted=WANTED)
    live = LiveOutputs(network, pixels, WANTED)
    loader = loader_of(images, live, AUGMENT if n_views else Augment(), reuse=True)
    for batch in loader:  # 72 samples of 31 examples: three passes
        ids, views = batch.example_ids.numpy(), batch.passes.numpy() if n_views else 0
        for name in WANTED:
            kept = torch.from_numpy(stored.read(name, ids)[np.arange(len(ids)), views]).float()
            half = 2**-11 * kept.abs().max().item()  # rounding of float16
            torch.testing.assert_close(batch.teacher[name], kept, rtol=0, atol=half)
    assert batch.passes.max() == 2
    if not n_views:  # what `pairing` reads
        clean = loader.teacher_rows(np.arange(N), np.zeros(N))["logits"]
        kept = stored_logits(stored, images.example_ids)
        torch.testing.assert_close(clean, kept, rtol=0, atol=2**-11 * kept.abs().max().item())


def test_processes_together_compute_what_one_process_does(make_images):
    images, live = make_images(N), LiveOutputs(teacher_of(), PIXELS, ("logits",))
    whole = loader_of(images, live)
    parts = [loader_of(images, live, rank=rank, world_size=2) for rank in (0, 1)]
    for step in range(12):
        rows = torch.cat([part.batch(step).teacher["logits"] for part in parts])
        torch.testing.assert_close(rows, whole.batch(step).teacher["logits"])


@pytest.mark.parametrize(("precision", "most"), [("bf16", 0.05), ("fp16", 0.005)])
def test_a_live_teacher_is_frozen_and_draws_no_random_numbers(make_images, precision, most):
    network = teacher_of().train()
    weights, state = weights_fingerprint(network), torch.get_rng_state()
    live = LiveOutputs(network, PIXELS, ("logits", "stage2"), precision)
    batch = loader_of(make_images(N), live).batch(0)
    assert not batch.teacher["logits"].requires_grad
    assert {values.dtype for values in batch.teacher.values()} == {torch.float32}
    assert weights_fingerprint(network) == weights  # running statistics too
    assert torch.equal(torch.get_rng_state(), state)
    exact = LiveOutputs(network, PIXELS, ("logits",))(batch.images)["logits"]
    gap = (batch.teacher["logits"] - exact).abs().max() / exact.abs().max()
    assert 0 < gap < most


def test_a_training_with_a_live_teacher_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    images = small_images(tmp_path)
    training = TRAINING.model_copy(update={"augment": Augment(flip=True, crop_padding=1)})

    def one(folder):
        task = small_task(images, training=training)
        network = build_network(Model(name="tiny_cnn"), n_classes=3, image_shape=(1, 4, 4), seed=9)
        live = LiveOutputs(network, task.pixels, ("logits",))
        view = View(training.augment, derive(0, "augment"), task.pixels)
        loader = Loader(task.loader.plan, images, view=view, live=live, reuse=True)
        trained = train(run_in(folder), dataclasses.replace(task, loader=loader))
        assert trained.evidence["pairing"]["permuted"] > trained.evidence["pairing"]["paired"]
        assert trained.evidence["pairing"]["teacher_accuracy"] is None  # nothing was stored

    one(tmp_path / "whole")
    monkeypatch.setattr(loop, "STATE_EVERY_S", 0.0)
    for n_steps in (2, 5):
        with monkeypatch.context() as patch:
            stop_after(patch, n_steps)
            with pytest.raises(Stopped):
                one(tmp_path / "resumed")
    one(tmp_path / "resumed")
    assert kept_bytes(tmp_path / "resumed") == kept_bytes(tmp_path / "whole")


def test_a_live_teacher_needs_views(make_images):
    images, live = make_images(N), LiveOutputs(teacher_of(), PIXELS, ("logits",))
    with pytest.raises(ValueError, match="asked for outputs of views; give `view`"):
        Loader(Plan(images.example_ids, 6, 12, 0), images, live=live)


def shifted(batch):
    return batch._replace(teacher={k: v.roll(1, 0) for k, v in batch.teacher.items()})


def without_views(batch):
    return batch._replace(passes=batch.passes + 1)


@pytest.mark.parametrize("fault", [None, shifted, without_views, "pixels", "mode"])
def test_the_evidence_shows_wrong_rows_views_pixels_and_modes(make_images, monkeypatch, fault):
    images, network = make_images(N), teacher_of()
    live = LiveOutputs(network, OTHER, ("logits", "stage1"))
    loader = loader_of(images, live)
    if fault == "pixels":
        loader._live_view = None  # normalised for the student
    elif fault == "mode":
        network.train()
    elif fault is not None:
        made = loader.batch
        monkeypatch.setattr(loader, "batch", lambda step: fault(made(step)))
    found = live_evidence(live, loader, images, AUGMENT, 7)
    assert found["n"] == 72  # the whole training is shorter than a sample
    assert (found["drift"] < 1e-6) == (fault is None)
    if fault is not None:
        assert found["drift"] > 0.1  # what the check lets pass in bfloat16
    assert 0 <= found["accuracy"] <= 1
