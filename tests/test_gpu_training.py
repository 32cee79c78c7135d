"""Trainings: on a GPU what they are on a CPU, killed and resumed to the bit, in every precision.

Each body runs on the CPU too, in miniature where it may.
"""

import contextlib
import gc
import math
import os
import shutil
from pathlib import Path

import devices
import numpy as np
import pytest
import torch
from devices import CLASSES, GPU, KD, PIXELS, PLAIN, SHAPE, TRAINING
from tiny import tiny_study
from torch import Tensor, nn

from kdlib.cache.shards import Cache
from kdlib.dataset.batch import Batch
from kdlib.dataset.pixels import Pixels
from kdlib.models.base import Network
from kdlib.steps.processes import launch_run, prepare_device
from kdlib.study.objectives import OBJECTIVES, Objective
from kdlib.study.training import Compute
from kdlib.study.user_code import UserCode, pin
from kdlib.trainer.distributed import launch
from kdlib.trainer.loop import Trained, train
from kdlib.trainer.objectives import Distiller
from kdlib.trainer.step import Step, Task, TrainingError

OWN = """
import torch.nn.functional as F
from torch import nn

def projectors(student, teacher):
    return {"features": nn.Linear(student["features"][0], teacher["features"][0])}

def loss(student, teacher, labels):
    near = F.mse_loss(student["features"], teacher["features"])
    return F.cross_entropy(student["logits"], labels) + near
"""
NUMBERS = {
    "cross_entropy": {},
    "label_smoothing": {"smoothing": 0.1},
    "kd": {"alpha": 0.5, "temperature": 4.0, "standardise": True},
    "mse": {"alpha": 0.5},
    "dkd": {"target_weight": 1.0, "rest_weight": 2.0, "temperature": 2.0},
    "dist": {"inter_weight": 1.0, "intra_weight": 1.0, "temperature": 1.0},
    "hint": {"weight": 1.0},
    "attention": {"weight": 1.0},
    "rkd": {"distance_weight": 1.0, "angle_weight": 2.0},
    "similarity": {"weight": 10.0},
    "crd": {"weight": 0.8, "temperature": 0.5, "width": 4},
    "tokens": {"cls_weight": 1.0, "patch_weight": 0.5, "barlow_weight": 0.01},
    "own": {"code": "mine.py", "trust_code": True, "reads": ["features"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the images and the teacher's outputs are."""
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def images(folder) -> Cache:
    """120 images in 4 shards."""
    return devices.make_images(folder / "images")


@pytest.fixture(scope="module")
def teacher(folder, images) -> Cache:
    """A teacher's outputs of all kinds."""
    return devices.make_teacher(images, folder / "teacher")


def objective_of(kind: str) -> Objective:
    """An objective with the numbers of these tests."""
    objective = OBJECTIVES[kind](**NUMBERS[kind])
    return pin(objective, kind) if isinstance(objective, UserCode) else objective


def in_kind(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch with images and teacher's outputs in another precision."""
    second = None if batch.second is None else batch.second.to(dtype)
    rows = batch.teacher and {k: v.to(dtype) for k, v in batch.teacher.items()}
    return batch._replace(images=batch.images.to(dtype), teacher=rows, second=second)


def losses(task: Task, n: int = 20, dtype: torch.dtype = torch.float32) -> list[float]:
    """Of the first n steps."""
    task.network.to(dtype), task.distiller.to(dtype)
    step = Step(task)
    found = [step(in_kind(task.loader.batch(i), dtype), i)[0] for i in range(n)]
    task.loader.close()
    return found


# --- objectives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_first_losses_of_an_objective_are_the_true_ones_in_float32(
    images, teacher, device, kind, tmp_path, monkeypatch
):
    """Against the same 20 steps in float64 on the CPU.

    float32 rounds by 6e-8; the steps make of it 1e-7 to 5e-7 on a CPU (all kinds, 2026-11, one
    AVX-512 machine). Convolutions whose factors are rounded to TensorFloat-32 give 5e-5 to 4e-3
    (emulated there): 2e-5 lies between, and 40 times above what another order of sums does.
    """
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(OWN)
    objective = objective_of(kind)
    true = losses(devices.task(images, teacher, objective=objective), dtype=torch.float64)
    task = devices.task(images, teacher, objective=objective, device=device)
    assert next(task.network.parameters()).device.type == device
    assert losses(task) == pytest.approx(true, rel=2e-5)
    assert max(true) - min(true) > 1e-2  # it does train


# --- killed and resumed --------------------------------------------------------------------------


class Dropping(Network):
    """Drops half of its features."""

    def __init__(self) -> None:
        super().__init__()
        self.n_features, self.n_classes, self.n_stages = 16, CLASSES, 0
        self.first = nn.Linear(math.prod(SHAPE), 16)
        self.drop, self.linear = nn.Dropout(0.5), nn.Linear(16, CLASSES)
        weights = np.random.default_rng(0)
        for parameter in self.parameters():
            drawn = weights.normal(0, 0.1, parameter.shape).astype(np.float32)
            parameter.data.copy_(torch.from_numpy(drawn))

    def features(self, x: Tensor) -> Tensor:
        return self.drop(torch.relu(self.first(x.flatten(1))))


RESUMED = {
    "sgd": {},
    "channels last": {"channels_last": True},
    "adamw, ema": {"optimiser": "adamw", "lr_peak": 0.01, "ema": 0.9},
    "bf16, in pieces, clipped": {"bf16": True, "accumulate": 2, "clip_norm": 0.5},
    "dropout": {"student": Dropping},
    "every loss of features": {"kind": "tokens"},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_training_goes_on_to_the_same_bytes(
    images, teacher, device, name, tmp_path, monkeypatch
):
    """What is promised on a GPU: one kind of GPU and one PyTorch give the same bytes, killed or
    not, wherever PyTorch has deterministic kernels (`processor.hold_gpu`). Another kind of GPU sums
    in another order."""
    how = dict(RESUMED[name])
    pixels = Pixels(PIXELS.mean, PIXELS.std, how.pop("channels_last", False))
    compute = Compute(precision="bf16" if how.pop("bf16", False) else "float32")
    kind, student = how.pop("kind", "kd"), how.pop("student", None)
    objective = objective_of(kind)
    training = TRAINING.model_copy(update=how)

    def one(run: str) -> Trained:
        task = devices.task(
            images, teacher, device=device, objective=objective, training=training, pixels=pixels,
            student=student and student(), compute=compute,
        )  # fmt: skip
        return train(devices.run_in(tmp_path / run), task, state_every_s=0.0)

    whole = one("whole")
    for n in (1, 7):
        with monkeypatch.context() as patch:
            devices.killed_after(patch, n)
            with pytest.raises(devices.Killed):
                one("killed")
    resumed = one("killed")
    assert devices.kept_bytes(tmp_path / "killed") == devices.kept_bytes(tmp_path / "whole")
    assert (resumed.checkpoints, resumed.evidence) == (whole.checkpoints, whole.evidence)
    again = one("again")  # and begun again, from nothing
    assert again.checkpoints == whole.checkpoints


# --- ways to train -------------------------------------------------------------------------------


def trained(images, teacher, device, folder, *, pixels=PIXELS, compute=None, **training):
    """(metrics, last weights) of 60 steps."""
    long = TRAINING.model_copy(update={"steps": 60, "evaluate_every_steps": 15} | training)
    task = devices.task(
        images, teacher, device=device, objective=KD, training=long, pixels=pixels,
        compute=compute or Compute(),
    )  # fmt: skip
    found = train(devices.run_in(folder), task)
    return found.metrics, devices.last_weights(folder, found)


WAYS = {  # what is changed, and how far losses may be from those without; None: far
    "channels_last": ({"pixels": Pixels(PIXELS.mean, PIXELS.std, True)}, 1e-3),
    # 8 bits of mantissa: 4e-3 at each rounding, averaged over a batch
    "bf16": ({"compute": Compute(precision="bf16")}, 5e-2),
    "ema": ({"ema": 0.9}, 0),  # a mean beside the training, which does not read it
    "accumulate": ({"accumulate": 4}, None),  # BatchNorm sees 4 images
    "clip": ({"clip_norm": 0.2}, None),
    "loose clip": ({"clip_norm": 1e6}, 0),
    "adamw": ({"optimiser": "adamw", "lr_peak": 0.02}, None),
}


@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_train_trains(images, teacher, device, name, tmp_path):
    changes, near = WAYS[name]
    metrics, weights = trained(images, teacher, device, tmp_path / "this", **changes)
    columns = ["train_loss", "validation_loss"]
    assert np.isfinite(metrics[columns]).all(axis=None)
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert metrics["train_loss"].iloc[-1] < 0.9 * metrics["train_loss"].iloc[0]
    plain, others = trained(images, teacher, device, tmp_path / "plain")
    if near is not None:
        np.testing.assert_allclose(metrics["train_loss"], plain["train_loss"], rtol=near)
    same = all(torch.equal(value, others[key]) for key, value in weights.items())
    assert same == (name == "loose clip") or name == "channels_last"  # it has taken effect


def test_a_clipped_gradient_has_the_norm_asked_for(images, teacher, device):
    training = TRAINING.model_copy(update={"clip_norm": 0.01})
    task = devices.task(images, teacher, device=device, objective=KD, training=training)
    step = Step(task)
    step(task.loader.batch(0), 0)
    task.loader.close()
    norm = torch.cat([p.grad.flatten() for p in task.network.parameters()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("cc", "gcc", "clang")),
    reason="on a GPU torch.compile needs a C compiler",
)
@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)], indirect=True)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_compiled_network_trains_like_the_plain_one(images, teacher, device, precision):
    """On a CPU: `test_trainer`. The compiler fuses operations, which rounds less often."""
    pixels, found = Pixels(PIXELS.mean, PIXELS.std, True), []
    for compiled in (False, True):
        compute = Compute(compile=compiled, precision=precision)
        task = devices.task(
            images, teacher, device=device, objective=KD, pixels=pixels, compute=compute
        )
        found.append(losses(task, 10))
    assert found[1] == pytest.approx(found[0], rel=1e-3 if precision == "float32" else 3e-2)


# --- several processes, no memory, no GPU --------------------------------------------------------


def test_processes_that_share_a_batch_train_what_one_does(
    images, teacher, device, folder, monkeypatch
):
    """As many as there are GPUs, at most two; one of them gathers, sums and waits as well.

    On a CPU it is this process; two of them: `test_distributed`.
    """
    n = 1 if device == "cpu" else min(2, torch.cuda.device_count())
    if device == "cpu":
        place = {"RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
        for name, value in (place | {"WORLD_SIZE": 1}).items():
            monkeypatch.setenv(name, str(value))
        devices.share(folder, device)
    else:
        path = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        monkeypatch.setenv("PYTHONPATH", path)
        launch(["devices", str(folder), device], n)
    backend = "nccl" if device == "cuda" else "gloo"
    assert (folder / "backend").read_text() == f"{backend} {n}"
    alone = train(
        devices.run_in(folder / "alone"),
        devices.task(images, teacher, device=device, objective=KD),
    )
    ours = devices.last_weights(folder / "alone", alone)
    theirs = devices.load_file(folder / "together" / (folder / "last").read_text())
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():  # BatchNorm over processes has a formula of its own
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-4, msg=name)
    shutil.rmtree(folder / "together")
    shutil.rmtree(folder / "alone")


@contextlib.contextmanager
def starved(device: str, patch: pytest.MonkeyPatch):
    """A few MB are left on the GPU; on the CPU the loss asks for more than any machine has."""
    if device == "cpu":
        patch.setattr(Distiller, "loss", lambda *_: torch.empty(2**60, dtype=torch.uint8))
        yield
        return
    gc.collect()  # what earlier trainings held must not be found meanwhile
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**25) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_memory_that_runs_out_is_explained_and_the_run_goes_on_afterwards(
    images, teacher, device, tmp_path, monkeypatch
):
    # activations of a step: 4096 x 64 x 8 x 8 floats, 64 MiB, several times
    size, width = (16, 4) if device == "cpu" else (4096, 64)
    training = TRAINING.model_copy(update={"steps": 6, "batch_size": size})

    def one(run: str) -> Trained:
        task = devices.task(
            images, teacher, device=device, objective=KD, training=training,
            student=devices.network(width),
        )  # fmt: skip
        return train(devices.run_in(tmp_path / run), task, state_every_s=0.0)

    whole = one("whole")
    with monkeypatch.context() as patch:
        devices.killed_after(patch, 2)
        with pytest.raises(devices.Killed):
            one("starved")
    state = (tmp_path / "starved" / "state" / "state.safetensors").read_bytes()
    sentence = r"out of memory: lower training\.batch_size, or raise training\.accumulate \("
    with (
        monkeypatch.context() as patch,
        starved(device, patch),
        pytest.raises(TrainingError, match=sentence),
    ):
        one("starved")
    assert (tmp_path / "starved" / "state" / "state.safetensors").read_bytes() == state
    assert one("starved").checkpoints == whole.checkpoints


@pytest.mark.parametrize(
    "first_line",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_memory_that_a_library_lacks_is_explained_before_the_first_step_too(
    images, teacher, tmp_path, monkeypatch, first_line
):
    def explode(*_):
        raise RuntimeError(f"{first_line}\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(Step, "__init__", explode)
    task = devices.task(images, teacher, objective=PLAIN)
    with pytest.raises(TrainingError, match=r"out of memory: lower training\.batch_size"):
        train(devices.run_in(tmp_path), task)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for asked in ("cuda", "cuda:1"):
        with pytest.raises(RuntimeError, match=f"asks for {asked}, but torch sees no GPU here"):
            prepare_device(Compute(device=asked))


def test_more_processes_than_gpus_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    study = tiny_study(tmp_path, compute={"device": "cuda", "processes": 4})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RuntimeError, match=r"asks for 4 processes, .* torch sees 2 here; lower"):
        launch_run(study, tmp_path / "run", {}, "teacher")


def test_a_gpu_is_held_to_float32_and_to_deterministic_kernels(monkeypatch):
    """The settings alone; what they do is measured above, on a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.backends.cudnn.allow_tf32
    try:
        assert prepare_device(Compute(device="cuda")) == "cuda"
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.allow_tf32 = before
        torch.utils.deterministic.fill_uninitialized_memory = True
