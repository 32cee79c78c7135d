"""Data, teachers, dynamics, features: on a GPU the same as on a CPU, to the bit where that is said.

Each body runs on the CPU too, against a reference made in another way: the plain path of one
thread, compiled loops, or float64.
"""

import copy

import devices
import numpy as np
import pytest
import torch
from devices import AUGMENT, CLASSES, GPU, KEPT, PIXELS, SHAPE, N
from tiny import tiny_study

from kdlib.cache.outputs import decoded, stored_columns
from kdlib.cache.shards import Cache
from kdlib.cartography.gradients import gradient_norms
from kdlib.cartography.log import QUANTITIES, DynamicsLog
from kdlib.dataset import fused
from kdlib.dataset.batch import Batch, View
from kdlib.dataset.loader import Loader
from kdlib.dataset.pixels import Pixels
from kdlib.dataset.plan import Plan
from kdlib.dataset.views import apply, draw
from kdlib.models.live import LiveOutputs
from kdlib.models.outputs import Replay, store_outputs, verify_outputs
from kdlib.probes.classifiers import Features, knn_probe, linear_probe
from kdlib.probes.features import layer_features
from kdlib.repro.seeds import torch_seeded
from kdlib.steps.cache import cache_images
from kdlib.steps.datamap import make_datamap
from kdlib.steps.distill import train_student
from kdlib.steps.probe import probe_cell
from kdlib.steps.teacher import make_teacher
from kdlib.study.training import Augment, Blur, ColourJitter, ResizedCrop
from kdlib.trainer.loop import train as run_loop

JITTER = ColourJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2)
VIEWS = {
    "flip": Augment(flip=True),
    "crop": Augment(crop_padding=2),
    "resized crop": Augment(resized_crop=ResizedCrop()),
    "colour jitter": Augment(colour_jitter=JITTER),
    "all": Augment(
        flip=True,
        resized_crop=ResizedCrop(),
        colour_jitter=JITTER,
        grayscale=0.3,
        blur=Blur(probability=0.5),
    ),
}
HALF = 2.0**-11  # rounding of float16, relatively


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Cache:
    """120 images in 4 shards."""
    return devices.make_images(tmp_path_factory.mktemp("images") / "cache")


@pytest.fixture(scope="module")
def replayed(tmp_path_factory, images) -> Cache:
    """A teacher's outputs of three views of each image."""
    folder = tmp_path_factory.mktemp("teacher") / "outputs"
    return devices.make_teacher(images, folder, replay=Replay(3, AUGMENT, 5))


def rows(images: Cache, ids: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.read("images", ids))


def equal(ours: Batch, theirs: Batch) -> None:
    """Two batches are the same to the bit, wherever they lie."""
    for name, one, other in zip(Batch._fields, ours, theirs, strict=True):
        if isinstance(one, dict):
            assert one.keys() == other.keys()
            for key in one:
                assert torch.equal(one[key].cpu(), other[key].cpu()), key
        else:
            assert torch.equal(one.cpu(), other.cpu()), name


# --- views and batches -----------------------------------------------------------------------


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_view_is_the_same_to_the_bit(images, device, name, channels_last):
    """As the compiled loops of the CPU make it; on a CPU, too, these share no code with it."""
    ids, epochs = np.arange(0, N, 2), torch.arange(N // 2) % 3
    pixels = Pixels(PIXELS.mean, PIXELS.std, channels_last)
    drawn = draw(VIEWS[name], 7, epochs, torch.from_numpy(ids), SHAPE)
    raw = rows(images, ids)
    found = pixels.prepare(apply(raw.to(device), drawn))
    if fused.available():
        expected = torch.empty_like(raw, dtype=torch.float32)
        fused.deliver(raw, np.arange(len(ids)), drawn, pixels, expected)
    elif device == "cpu":
        pytest.skip("needs numba: without it a CPU has one way alone to make a view")
    else:
        expected = pixels.prepare(apply(raw, drawn))
    assert found.device.type == device
    assert found.is_contiguous(memory_format=pixels.memory_format)
    assert torch.equal(found.cpu(), expected)
    assert not torch.equal(expected, PIXELS.prepare(raw))  # something was drawn


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("residence", ["resident", "mapped"])
def test_a_loader_makes_the_batches_of_the_plain_one(
    images, replayed, device, residence, reuse, monkeypatch
):
    """Wherever pixels are kept, whether memory is reused, and while the device is still busy.

    Each step waits behind some milliseconds of work on the GPU, and what it holds is looked at
    after the last one: memory that was overwritten or freed before it was read would show.
    """
    plan = Plan(np.arange(80), 16, 12, 0, order="windowed", shard_size=devices.SHARD)
    view = View(AUGMENT, 5, PIXELS, n_views=3)
    more = {"view": view, "teacher": replayed, "reads": KEPT, "second": View(AUGMENT, 6, PIXELS)}
    plain = Loader(plan, images, residence="resident", **more)  # too few for the compiled loops
    expected = [plain.batch(step) for step in range(plan.n_steps)]
    monkeypatch.setattr("kdlib.dataset.loader.COMPILED", 0)
    loader = Loader(plan, images, device=device, residence=residence, reuse=reuse, **more)
    if device == "cpu" and residence == "mapped":  # a thread works ahead, as for a GPU
        loader._works_ahead, loader._buffers = True, [{}, {}]
    kept, places = [], set()
    for step in range(plan.n_steps):
        if device == "cuda":
            torch.cuda._sleep(10_000_000)
        batch = loader.batch(step)
        places.add(batch.images.data_ptr())
        if loader._next is not None:
            loader._next[1].result()  # the thread has made the next batch meanwhile
        teacher = {name: value.clone() for name, value in batch.teacher.items()}
        parts = (x if isinstance(x, dict) else x.clone() for x in batch)
        kept.append(Batch(*parts)._replace(teacher=teacher))
    loader.close()
    for ours, theirs in zip(kept, expected, strict=True):
        equal(ours, theirs)
    assert not reuse or len(places) == len(loader._buffers)
    assert batch.images.device.type == device


def test_a_live_teacher_computes_what_was_stored_while_a_thread_works_ahead(
    images, replayed, device
):
    plan = Plan(np.arange(80), 16, 12, 0)
    view = View(AUGMENT, 5, PIXELS, n_views=3)
    live = LiveOutputs(devices.network(width=6, seed=9).to(device), PIXELS, KEPT)
    loader = Loader(plan, images, view=view, live=live, device=device, residence="mapped",
                    reuse=True)  # fmt: skip
    if device == "cpu":
        loader._works_ahead, loader._buffers = True, [{}, {}]
    for batch, expected in zip(
        loader, Loader(plan, images, view=view, teacher=replayed, reads=KEPT), strict=True
    ):
        assert batch.teacher.keys() == expected.teacher.keys()
        for name, stored in expected.teacher.items():
            found, scale = batch.teacher[name], stored.abs().max().item()
            assert found.device.type == device
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.cpu(), stored, rtol=0, atol=2**-10 * scale)
    loader.close()


def test_stored_images_and_labels_are_handed_out_as_they_are(images, device):
    plan, ids = Plan(np.arange(10, 90), 16, 3, 0), np.array([5, 0, 79, 5])
    for residence in ("resident", "mapped"):
        loader = Loader(plan, images, device=device, residence=residence, reuse=True)
        assert torch.equal(loader.raw(ids).cpu(), rows(images, 10 + ids))
        assert loader.labels.tolist() == images.read("labels", np.arange(10, 90)).tolist()
        batch = loader.batch(1)  # without a view: uint8
        assert torch.equal(batch.images.cpu(), rows(images, batch.example_ids.cpu().numpy()))
        loader.close()


def test_a_seeded_block_draws_the_same_again_and_leaves_the_generators(device):
    source = torch.cuda if device == "cuda" else torch

    def drawn() -> list[float]:
        with torch_seeded(0, "dropout", 3):
            return torch.rand(5, device=device).tolist()

    torch.rand(1, device=device)
    before = source.get_rng_state()
    first = drawn()
    assert torch.equal(source.get_rng_state(), before)
    torch.rand(1, device=device)
    assert drawn() == first


# --- teachers, dynamics, features --------------------------------------------------------------


@pytest.mark.parametrize("n_views", [None, 2])
def test_stored_teacher_outputs_are_the_true_ones_within_float16(images, tmp_path, device, n_views):
    replay = None if n_views is None else Replay(n_views, AUGMENT, 5)
    model = devices.network(width=6, seed=9)
    stored = store_outputs(
        model.to(device), PIXELS, images, tmp_path, device, replay=replay, wanted=KEPT
    )
    ids, raw = np.arange(N), rows(images, np.arange(N))
    for view in range(n_views or 1):
        drawn = draw(AUGMENT, 5, torch.full((N,), view), torch.from_numpy(ids), SHAPE)
        seen = raw if replay is None else apply(raw, drawn)
        for name, values in devices.exact(model, seen, KEPT).items():
            found = stored.read(name, ids)[:, view].astype(np.float64)
            # beside the rounding of float16 that of float32 sums; TensorFloat-32 would give 1e-3
            np.testing.assert_allclose(
                found, values, rtol=1.1 * HALF, atol=2e-5 * np.abs(values).max(), err_msg=name
            )
    assert verify_outputs(model, PIXELS, images, stored, replay) < 1e-3


def test_logits_stored_as_the_largest_alone_are_read_on_the_device(images, tmp_path, device):
    model = devices.network(width=6, seed=9).to(device)
    how = {"wanted": ("logits",), "top_k": 2}
    stored = store_outputs(model, PIXELS, images, tmp_path, device, **how)
    loader = Loader(Plan(np.arange(N), 16, 1, 0), images, teacher=stored, device=device)
    ranks = np.arange(N)
    found = loader.teacher_rows(ranks, np.zeros_like(ranks))["logits"]
    probs = torch.from_numpy(devices.exact(model, rows(images, ranks), ("logits",))["logits"])
    probs = probs.softmax(1)
    largest = probs.topk(2).indices
    rest = (1 - probs.gather(1, largest).sum(1, keepdim=True)) / (CLASSES - 2)
    expected = rest.expand_as(probs).scatter(1, largest, probs.gather(1, largest))
    assert found.device.type == device
    # logits of a few units, rounded to float16, move a probability by 2e-3 at most
    torch.testing.assert_close(found.cpu().double().softmax(1), expected, rtol=0, atol=2e-3)
    columns = stored_columns(stored, ("logits",))
    parts = {c: torch.from_numpy(stored.read(c, ranks)[:, 0]) for c in columns}
    expected = decoded(parts, CLASSES)["logits"]
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


def observed(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """What a log keeps of (N, C) logits, in float64 from the definitions."""
    shifted = logits - logits.max(1, keepdims=True)
    probs = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    gold = np.arange(len(labels)), labels
    one_hot = np.eye(logits.shape[1])[labels]
    return {
        "gold_prob": probs[gold],
        "margin": logits[gold] - np.where(one_hot, -np.inf, logits).max(1),
        "entropy": -(probs * np.log(probs)).sum(1),
        "el2n": np.sqrt(((probs - one_hot) ** 2).sum(1)),
        "loss": -np.log(probs[gold]),
        "correct": logits.argmax(1) == labels,
    }


@pytest.mark.parametrize("when", ["train", "eval"])
def test_recorded_dynamics_are_those_of_the_logits(images, tmp_path, device, when, monkeypatch):
    n, seen = 80, []
    ids = np.arange(n)
    log = DynamicsLog.create(
        tmp_path / "dynamics", ids, images.read("labels", ids), n_epochs=4, n_classes=CLASSES,
        observed=when, logits=True, provenance={},
    )  # fmt: skip
    task = devices.task(images, device=device, log=log, observed=when)
    real = DynamicsLog.record

    def record(self, epochs, ranks, logits, labels):
        assert logits.device.type == device
        seen.append([x.cpu() for x in (epochs, ranks, logits)])
        real(self, epochs, ranks, logits, labels)

    monkeypatch.setattr(DynamicsLog, "record", record)
    run_loop(devices.run_in(tmp_path / "run"), task)
    found = log.finish()
    epochs, ranks, logits = (torch.cat(parts).numpy() for parts in zip(*seen, strict=True))
    assert len(epochs) == 4 * n
    np.testing.assert_array_equal(found["logits"][epochs, ranks], logits.astype(np.float16))
    expected = observed(logits.astype(np.float64), found.labels[ranks])
    assert set(expected) == set(QUANTITIES)
    for name, values in expected.items():
        np.testing.assert_allclose(
            found[name][epochs, ranks], values, rtol=1.1 * HALF, atol=1e-5, err_msg=name
        )


def test_features_and_what_probes_say_of_them_are_the_same(images, device):
    model, layers = devices.network(width=6, seed=9), ("features", "stage1")
    exact = devices.exact(model, rows(images, np.arange(N)), layers)
    raw = rows(images, np.arange(N)).to(device)
    found = layer_features(model.to(device), PIXELS, raw, SHAPE, layers)
    exact["stage1"] = exact["stage1"].mean((2, 3))
    for layer in layers:
        largest = np.abs(exact[layer]).max()
        np.testing.assert_allclose(found[layer], exact[layer], rtol=0, atol=1e-5 * largest)
    labels, train, test = images.read("labels", np.arange(N)), np.arange(80), np.arange(80, N)
    told = []
    for values in (found["features"], exact["features"].astype(np.float32)):
        parts = [
            Features(values[ids], labels[ids], ids, split, "a" * 64)
            for ids, split in ((train, "train"), (test, "test"))
        ]
        told.append([linear_probe(*parts, (0.1, 10.0), 0), knn_probe(*parts, 5)])
    for ours, theirs in zip(*told, strict=True):
        # rounding may move one image over a border
        assert abs(ours.accuracy - theirs.accuracy) <= 1 / len(test)
        assert theirs.accuracy > 0.4  # of 4 classes


def test_norms_of_gradients_are_the_true_ones(images, device):
    model, labels = devices.network(), torch.from_numpy(images.read("labels", np.arange(N)))
    raw = rows(images, np.arange(N))
    plain = copy.deepcopy(model).double().eval()
    expected = []
    for image, label in zip(PIXELS.prepare(raw).double()[:10], labels, strict=False):
        loss = torch.nn.functional.cross_entropy(plain(image[None]), label[None])
        parts = torch.autograd.grad(loss, list(plain.parameters()))
        expected.append(torch.cat([p.flatten() for p in parts]).norm().item())
    whole, last = gradient_norms(model.to(device), PIXELS, raw.to(device), labels.to(device))
    np.testing.assert_allclose(whole[:10], expected, rtol=1e-4)
    assert (last <= whole * (1 + 1e-6)).all()


# --- a whole study -------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)], indirect=True)
def test_a_study_runs_on_a_gpu_and_its_checks_pass(tmp_path, monkeypatch, device):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    compute = {"device": device, "precision": "bf16", "images": "mapped"}
    study = tiny_study(tmp_path, compute=compute)
    images = cache_images(study)
    evidence = [make_teacher(study, images)]
    make_datamap(study, images)
    cell = study.cell(strategy="easy", objective="kd")
    evidence += [train_student(study, images, cell, seed) for seed in study.seeds]
    table = probe_cell(study, images, cell)
    for one in evidence:
        assert one["made"]["device"].startswith(device)
        assert all(check["passed"] for check in one["checks"])
    assert set(table["strategy"]) == {"easy", "teacher"}
