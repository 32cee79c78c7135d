"""The loss of a training step is the paper's formula, in float64 NumPy, of the outputs as they are.

Student outputs are given; what the trainer does with them (autocast, projectors, the pairing with
teacher rows and labels, the precision of the loss) is its own.
"""

import numpy as np
import pytest
import torch
from torch import nn

from kdlib.dataset.batch import Batch
from kdlib.dataset.pixels import Pixels
from kdlib.dataset.plan import Plan
from kdlib.models.base import Network
from kdlib.study import objectives as o
from kdlib.study.objectives import OBJECTIVES, UserObjective, needs_teacher
from kdlib.study.training import Compute, Training
from kdlib.study.user_code import pin
from kdlib.trainer.objectives import build_distiller, student_outputs, teacher_columns
from kdlib.trainer.step import Step, Task

B, C, D, SIDE, M = 24, 7, 10, 4, 311  # batch, classes, features, grid, training examples
OWN = """
import torch.nn.functional as F

def loss(student, teacher, labels, weight):
    near = (student["features"] - teacher["features"]).abs().mean()
    return F.cross_entropy(student["logits"], labels) + weight * near
"""
GIVEN = [
    o.CrossEntropy(),
    o.LabelSmoothing(smoothing=0.2),
    o.KD(alpha=0.7, temperature=3.0),
    o.KD(alpha=0.7, temperature=3.0, standardise=True),
    o.LogitMSE(alpha=0.3),
    o.DKD(temperature=4.0, target_weight=1.0, rest_weight=8.0),
    o.DKD(temperature=2.0, target_weight=1.5, rest_weight=2.0, standardise=True),
    o.DIST(temperature=2.0, inter_weight=1.0, intra_weight=2.5),
    o.Hint(weight=1.5),
    o.Attention(weight=3.0),
    o.RKD(distance_weight=25.0, angle_weight=50.0),
    o.Similarity(weight=300.0),
    o.CRD(temperature=0.2, weight=0.8, width=6),
    o.Tokens(cls_weight=1.0, patch_weight=0.5),
    o.Tokens(cls_weight=1.0, patch_weight=0.5, barlow_weight=0.1),
    "own",
]


class Given(Network):
    """Outputs that are given, times a weight of 1; the second view's where the images are 1."""

    def __init__(self, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.n_features, self.n_classes, self.n_stages = D, C, 2
        self.views, self.weight = (first, second), nn.Parameter(torch.ones(()))

    def staged(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        view = self.views[int(x[0, 0, 0, 0])]
        made = {name: self._as_layers_give(view[name][: len(x)]) for name in view}
        self.logits = made["logits"]
        return made["features"], [made["stage1"], made["stage2"]]

    def head(self, features: torch.Tensor) -> torch.Tensor:
        return self.logits

    def _as_layers_give(self, value: torch.Tensor) -> torch.Tensor:
        value = value * self.weight
        return value.bfloat16() if torch.is_autocast_enabled("cpu") else value


def drawn(seed: int, side: int = SIDE) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    shapes = {
        "logits": (C,),
        "features": (D,),
        "stage1": (3, side, side),
        "stage2": (5, side, side),
    }
    return {
        name: torch.from_numpy(rng.normal(0.3, 2, (B, *shape)).astype(np.float32))
        for name, shape in shapes.items()
    }


def step_and_batch(objective: o.Objective, precision: str) -> tuple[Step, Batch]:
    """A step of the trainer, and the batch whose student outputs are given."""
    network, rng = Given(drawn(0), drawn(1)), np.random.default_rng(2)
    teacher = drawn(3, 2 * SIDE)  # grids of twice the side
    teacher |= {f"attention{k}": torch.from_numpy(map_of(teacher[f"stage{k}"])) for k in (1, 2)}
    reads = teacher_columns(objective, 2)
    rows = {name: teacher[name].float() for name in reads}
    distiller = build_distiller(
        objective,
        network.output_shapes((1, 2, 2), student_outputs(objective, 2)),
        {name: tuple(value.shape[1:]) for name, value in rows.items()},
        seed=4,
        n_examples=M,
    )
    plan = Plan(np.arange(B), B, 1, 0)
    labels = torch.from_numpy(rng.integers(0, C, B))
    task = Task(
        network=network, distiller=distiller, pixels=Pixels([0.5], [0.25]),
        loader=type("Planned", (), {"plan": plan})(), objective=objective,
        training=Training(steps=1, batch_size=B, lr_peak=0.1),
        validation=(torch.empty(0), torch.empty(0)), full_size=B, n_examples=M, seed=4,
        compute=Compute(precision=precision),
    )  # fmt: skip
    images = torch.zeros(B, 1, 2, 2)
    second = images + 1 if objective.compares_views else None
    ids = torch.arange(B)
    return Step(task), Batch(
        ids, ids, ids * 0, images, labels, rows if needs_teacher(objective) else None, second
    )


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("objective", GIVEN, ids=str)
def test_the_loss_of_a_step_is_the_formula_of_the_paper(objective, precision, home):
    if objective == "own":
        (home / "mine.py").write_text(OWN)
        objective = UserObjective(
            code="mine.py", trust_code=True, reads=("features",), options={"weight": 2.5}
        )
        objective = pin(objective, "objectives.mine")
    step, batch = step_and_batch(objective, precision)
    seen = []
    step.learner.register_forward_hook(lambda module, given, made: seen.append(made))
    loss, logits = step(batch, 0)
    (outputs,) = seen
    student = {name: value.detach().double().numpy() for name, value in outputs.items()}
    dtypes = {value.dtype for name, value in outputs.items() if "attention" not in name}
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}
    teacher = {k: v.double().numpy() for k, v in (batch.teacher or {}).items()}
    for k in (1, 2):  # a map is part of the loss: it is compared with that of the grid
        if f"attention{k}" in student:
            grid = drawn(0)[f"stage{k}"]
            grid = grid.bfloat16() if precision == "bf16" else grid
            student[f"attention{k}"] = map_of(grid)
    if objective.kind == "crd":
        matrix = step.task.distiller.teacher_projection.double().numpy()
        teacher["features"] = teacher["features"] @ matrix
    expected = FORMULAS[objective.kind](objective, student, teacher, batch.labels.numpy())
    assert loss == pytest.approx(expected, rel=1e-6)
    assert np.array_equal(logits.double().numpy(), student["logits"])
    assert step.task.network.weight.grad.abs() > 0


def test_every_kind_of_objective_has_a_formula_here():
    assert set(FORMULAS) == set(OBJECTIVES)
    assert {x if x == "own" else x.kind for x in GIVEN} == set(OBJECTIVES)


# --- the papers' formulas, in float64 ------------------------------------------------------------


def log_softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    z = logits / temperature
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def cross_entropy(s: dict, labels: np.ndarray) -> float:
    return -log_softmax(s["logits"])[np.arange(B), labels].mean()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Mean over rows of KL(p || q) of probabilities."""
    return (p * np.log(p / q)).sum(1).mean()


def softened(objective: o.Objective, s: dict, t: dict) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (teacher's, student's) at the objective's temperature."""
    pair = [t["logits"], s["logits"]]
    if getattr(objective, "standardise", False):
        pair = [(z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True) for z in pair]
    return tuple(np.exp(log_softmax(z, objective.temperature)) for z in pair)


def smoothed(x: o.LabelSmoothing, s: dict, t: dict, labels: np.ndarray) -> float:
    target = (1 - x.smoothing) * np.eye(C)[labels] + x.smoothing / C
    return -(target * log_softmax(s["logits"])).sum(1).mean()


def hinton(x: o.KD, s: dict, t: dict, labels: np.ndarray) -> float:
    soft = x.temperature**2 * kl(*softened(x, s, t))
    return (1 - x.alpha) * cross_entropy(s, labels) + x.alpha * soft


def mse(x: o.LogitMSE, s: dict, t: dict, labels: np.ndarray) -> float:
    soft = ((s["logits"] - t["logits"]) ** 2).mean()
    return (1 - x.alpha) * cross_entropy(s, labels) + x.alpha * soft


def dkd(x: o.DKD, s: dict, t: dict, labels: np.ndarray) -> float:
    p, q = softened(x, s, t)
    gold = np.eye(C, dtype=bool)[labels]
    two = [np.stack([r[gold], 1 - r[gold]], 1) for r in (p, q)]
    rest = [r[~gold].reshape(B, -1) for r in (p, q)]
    rest = [r / r.sum(1, keepdims=True) for r in rest]
    soft = x.target_weight * kl(*two) + x.rest_weight * kl(*rest)
    return cross_entropy(s, labels) + x.temperature**2 * soft


def dist(x: o.DIST, s: dict, t: dict, labels: np.ndarray) -> float:
    p, q = softened(x, s, t)
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    soft = x.inter_weight * inter + x.intra_weight * intra
    return cross_entropy(s, labels) + x.temperature**2 * soft


def pooled(grid: np.ndarray) -> np.ndarray:
    """A teacher's grid (..., 2 H, 2 W) as means over 2 x 2 places."""
    *before, height, width = grid.shape
    return grid.reshape(*before, height // 2, 2, width // 2, 2).mean((-3, -1))


def map_of(grid: torch.Tensor) -> np.ndarray:
    """(B, H, W) float64: squares averaged over channels, of norm 1."""
    energy = (grid.double().numpy() ** 2).mean(1)
    return energy / np.sqrt((energy**2).sum((1, 2), keepdims=True))


def hint(x: o.Hint, s: dict, t: dict, labels: np.ndarray) -> float:
    gap = s["stage1"] - pooled(t["stage1"])
    return cross_entropy(s, labels) + x.weight * (gap**2).mean()


def attention(x: o.Attention, s: dict, t: dict, labels: np.ndarray) -> float:
    total = 0.0
    for name in ("attention1", "attention2"):
        target = pooled(t[name])
        target = target / np.sqrt((target**2).sum((1, 2), keepdims=True))
        total += np.sqrt(((s[name] - target) ** 2).sum((1, 2))).mean()
    return cross_entropy(s, labels) + x.weight * total


def huber(a: np.ndarray, b: np.ndarray) -> float:
    gap = np.abs(a - b)
    return np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()


def rkd(x: o.RKD, s: dict, t: dict, labels: np.ndarray) -> float:
    distances, angles = [], []
    for rows in (s["features"], t["features"]):
        gaps = rows[None] - rows[:, None]
        lengths = np.sqrt((gaps**2).sum(2))
        distances.append(lengths / lengths[~np.eye(B, dtype=bool)].mean())
        unit = gaps / np.where(lengths == 0, 1, lengths)[:, :, None]
        angles.append(np.einsum("jid,jkd->jik", unit, unit))
    relations = x.distance_weight * huber(*distances) + x.angle_weight * huber(*angles)
    return cross_entropy(s, labels) + relations


def similarity(x: o.Similarity, s: dict, t: dict, labels: np.ndarray) -> float:
    grams = []
    for rows in (s["stage2"], t["stage2"]):
        gram = rows.reshape(B, -1) @ rows.reshape(B, -1).T
        grams.append(gram / np.sqrt((gram**2).sum(1, keepdims=True)))
    return cross_entropy(s, labels) + x.weight * ((grams[0] - grams[1]) ** 2).sum() / B**2


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


def crd(x: o.CRD, s: dict, t: dict, labels: np.ndarray) -> float:
    a, b = (r / np.sqrt((r**2).sum(1, keepdims=True)) for r in (s["features"], t["features"]))
    others = labels[:, None] != labels[None]
    power = np.exp(a @ b.T / x.temperature)
    h = power / (power + others.sum(1).mean() / M)
    wrong = np.where(others, -np.log(1 - h), 0)
    contrast = -2 * np.log(np.diagonal(h)).mean() + wrong.sum(1).mean() + wrong.sum(0).mean()
    return cross_entropy(s, labels) + x.weight * contrast


def tokens(x: o.Tokens, s: dict, t: dict, labels: np.ndarray) -> float:
    total = cross_entropy(s, labels)
    total += x.cls_weight * (1 - cosines(s["features"], t["features"])).mean()
    total += x.patch_weight * (1 - cosines(s["stage2"], pooled(t["stage2"]))).mean()
    if x.barlow_weight is None:
        return total
    a, b = ((r - r.mean(0)) / np.sqrt(r.var(0) + 1e-12) for r in (s["view1"], s["view2"]))
    correlation = a.T @ b / B
    diagonal = np.diagonal(correlation)
    off = (correlation**2).sum() - (diagonal**2).sum()
    return total + x.barlow_weight * (((diagonal - 1) ** 2).sum() + 0.005 * off) / D


def own(x: UserObjective, s: dict, t: dict, labels: np.ndarray) -> float:
    return cross_entropy(s, labels) + 2.5 * np.abs(s["features"] - t["features"]).mean()


FORMULAS = {
    "cross_entropy": lambda x, s, t, labels: cross_entropy(s, labels),
    "label_smoothing": smoothed, "kd": hinton, "mse": mse, "dkd": dkd, "dist": dist, "hint": hint,
    "attention": attention, "rkd": rkd, "similarity": similarity, "crd": crd, "tokens": tokens,
    "own": own,
}  # fmt: skip
