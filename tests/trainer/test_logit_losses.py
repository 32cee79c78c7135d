"""`kdlib.trainer.logit_losses`: the formulas by hand, as slow loops, and their properties."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.study import objectives
from kdlib.study.objectives import KD, CrossEntropy, LabelSmoothing, LogitMSE, Objective
from kdlib.trainer.logit_losses import (
    decoupled,
    dist_terms,
    logit_mse,
    soft_loss,
    standardised,
)
from kdlib.trainer.objectives import build_distiller


def drawn(seed: int = 0, n: int = 16, n_classes: int = 5) -> tuple[torch.Tensor, ...]:
    """Student logits, teacher logits, labels; float64."""
    rng = np.random.default_rng(seed)
    student, teacher = (torch.from_numpy(rng.normal(size=(n, n_classes)) * 3) for _ in range(2))
    return student, teacher, torch.from_numpy(rng.integers(0, n_classes, n))


def objective_loss(objective: Objective, student, labels, teacher=None) -> torch.Tensor:
    """The whole loss of an objective of logits."""
    shape = {"logits": (student.shape[1],)}
    of_teacher = {} if objective.kind in ("cross_entropy", "label_smoothing") else shape
    made = build_distiller(objective, shape, of_teacher, seed=0, n_examples=100)
    return made.loss(
        made.project({"logits": student}), labels, {} if teacher is None else {"logits": teacher}
    )


def kd(alpha: float, temperature: float, **more) -> Objective:
    return KD(alpha=alpha, temperature=temperature, **more)


CE = CrossEntropy()
DKD = objectives.DKD(target_weight=1.0, rest_weight=8.0, temperature=4.0)
DIST = objectives.DIST(inter_weight=1.0, intra_weight=2.0, temperature=2.0)
OBJECTIVES = [
    CE,
    LabelSmoothing(smoothing=0.1),
    LabelSmoothing(smoothing=0.0),
    kd(0.7, 4.0),
    kd(0.3, 0.5),
    kd(1.0, 1.0),
    kd(0.0, 2.0),
    kd(0.7, 2.0, standardise=True),
    LogitMSE(alpha=0.4),
    DKD,
    DKD.model_copy(update={"standardise": True}),
    DIST,
]
TAUGHT = [o for o in OBJECTIVES if o.kind not in ("cross_entropy", "label_smoothing")]


# --- independent, slow ---------------------------------------------------------------------------


def softened(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(x / temperature) for x in row]
    return [p / sum(powers) for p in powers]


def z_scored(row: list[float]) -> list[float]:
    mean = sum(row) / len(row)
    sd = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row))
    return [(x - mean) / (sd + 1e-7) for x in row]


def kl(q: list[float], p: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))


def correlation(a: list[float], b: list[float]) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def slow_loss(o: Objective, student, labels, teacher) -> float:
    """Loops over examples and classes, in Python floats."""
    rows, of_teacher = student.tolist(), teacher.tolist()
    total = 0.0
    for s, label, t in zip(rows, labels.tolist(), of_teacher, strict=True):
        hard = -math.log(softened(s)[label])
        if o.kind == "cross_entropy":
            total += hard
        elif o.kind == "label_smoothing":
            e, n_classes = o.smoothing, len(s)
            target = [e / n_classes + (1 - e) * (c == label) for c in range(n_classes)]
            total -= sum(q * math.log(p) for q, p in zip(target, softened(s), strict=True))
        elif o.kind == "mse":
            squared = sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)
            total += (1 - o.alpha) * hard + o.alpha * squared
        elif o.kind in ("kd", "dkd"):
            if o.standardise:
                s, t = z_scored(s), z_scored(t)
            q, p = softened(t, o.temperature), softened(s, o.temperature)
            if o.kind == "kd":
                total += (1 - o.alpha) * hard + o.alpha * o.temperature**2 * kl(q, p)
                continue
            target = kl([q[label], 1 - q[label]], [p[label], 1 - p[label]])
            others = [[x / (1 - r[label]) for c, x in enumerate(r) if c != label] for r in (q, p)]
            total += hard + o.temperature**2 * (
                o.target_weight * target + o.rest_weight * kl(*others)
            )
        else:
            total += hard
    if o.kind == "dist":
        p, q = ([softened(r, o.temperature) for r in given] for given in (rows, of_teacher))
        inter = np.mean([1 - correlation(a, b) for a, b in zip(p, q, strict=True)])
        columns = zip(zip(*p, strict=True), zip(*q, strict=True), strict=True)
        intra = np.mean([1 - correlation(a, b) for a, b in columns])
        weighted = o.inter_weight * inter + o.intra_weight * intra
        total += len(rows) * o.temperature**2 * weighted
    return total / len(rows)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_every_objective_is_its_formula_written_as_a_loop(objective):
    student, teacher, labels = drawn()
    loss = objective_loss(objective, student, labels, teacher)
    assert loss.item() == pytest.approx(slow_loss(objective, student, labels, teacher), rel=1e-6)


# --- by hand -------------------------------------------------------------------------------------


def test_a_cross_entropy_worked_by_hand():
    # (ln 3, 0) -> p = (3/4, 1/4); label 1 -> ln 4
    loss = objective_loss(CE, torch.tensor([[math.log(3), 0.0]]), torch.tensor([1]))
    assert loss.item() == pytest.approx(math.log(4))


def test_label_smoothing_worked_by_hand():
    # p = (3/4, 1/4), label 0, smoothing 1/2 -> target (3/4, 1/4): its entropy
    o = LabelSmoothing(smoothing=0.5)
    loss = objective_loss(o, torch.tensor([[math.log(3), 0.0]]), torch.tensor([0]))
    assert loss.item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


def test_a_kd_loss_worked_by_hand():
    # student [0, 0] -> p = (1/2, 1/2) at any temperature; label 0 -> CE = ln 2
    # teacher [2 ln 3, 0] at temperature 2 -> [ln 3, 0] -> q = (3/4, 1/4)
    # KL(q || p) = 3/4 ln(3/2) + 1/4 ln(1/2)
    # loss = (1 - 0.25) * ln 2 + 0.25 * 2**2 * KL
    student, teacher = torch.zeros(1, 2), torch.tensor([[2 * math.log(3), 0.0]])
    value = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert value == pytest.approx(0.130812, abs=1e-6)
    loss = objective_loss(kd(0.25, 2.0), student, torch.tensor([0]), teacher)
    assert loss.item() == pytest.approx(0.75 * math.log(2) + value, rel=1e-6)
    assert soft_loss(student, teacher, 2.0).item() == pytest.approx(value, rel=1e-6)


def test_a_squared_difference_of_logits_worked_by_hand():
    # ((1 - 0)**2 + (5 - 2)**2) / 2 = 5; CE of (0, 2), label 0: ln(1 + e**2)
    student, teacher = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 5.0]])
    assert logit_mse(student, teacher).item() == 5.0
    loss = objective_loss(LogitMSE(alpha=0.5), student, torch.tensor([0]), teacher)
    assert loss.item() == pytest.approx(2.5 + 0.5 * math.log(1 + math.exp(2)))


def test_decoupled_parts_worked_by_hand():
    # student (1/3, 1/3, 1/3); teacher (1/2, 3/8, 1/8); gold class 0
    # TCKD = KL((1/2, 1/2) || (1/3, 2/3)) = 1/2 ln(3/2) + 1/2 ln(3/4)
    # NCKD = KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 ln(3/2) + 1/4 ln(1/2)
    student, teacher = torch.zeros(1, 3), torch.tensor([[0.5, 0.375, 0.125]]).log()
    target, rest = decoupled(student, teacher, torch.tensor([0]), 1.0)
    assert target.item() == pytest.approx(0.5 * math.log(1.5) + 0.5 * math.log(0.75), abs=1e-6)
    assert rest.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)


def test_correlations_worked_by_hand():
    # rows (.8, .2) and (.2, .8) against the same, swapped: every row and column correlates with -1
    student = torch.tensor([[0.8, 0.2], [0.2, 0.8]]).log()
    inter, intra = dist_terms(student, student.flip(0), 1.0)
    assert (inter.item(), intra.item()) == pytest.approx((2.0, 2.0))
    # three classes: (0.5, 0.25, 0.25) and (0.25, 0.5, 0.25), centred (1/6)(1, -.5, -.5) and
    # (1/6)(-.5, 1, -.5): correlation (-.5 - .5 + .25) / 1.5 = -1/2
    one, other = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert dist_terms(one, other, 1.0)[0].item() == pytest.approx(1.5)


def test_another_temperature_makes_standardised_logits_those_of_the_authors_code():
    logits, temperature, n = torch.tensor([[0.0, 2.0, 4.0, 1.0]], dtype=torch.float64), 2.0, 4
    theirs = (logits - logits.mean(1)) / logits.std(1) / temperature  # divides by n - 1
    ours = standardised(logits) / (temperature * (n / (n - 1)) ** 0.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


# --- teacher and student rows belong together ----------------------------------------------------


@pytest.mark.parametrize("objective", TAUGHT, ids=str)
def test_permuting_teacher_rows_raises_the_loss(objective):
    if getattr(objective, "alpha", None) == 0:
        return
    _, teacher, labels = drawn()
    paired = objective_loss(objective, teacher, labels, teacher)
    permuted = objective_loss(objective, teacher, labels, teacher.roll(1, dims=0))
    assert permuted > paired + 0.05


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_gradient_reaches_the_student_only(objective):
    student, teacher, labels = drawn()
    student.requires_grad_()
    teacher.requires_grad_()
    objective_loss(objective, student, labels, teacher).backward()
    assert student.grad.abs().sum(1).min() > 0  # every example
    assert teacher.grad is None


@pytest.mark.parametrize("objective", TAUGHT, ids=str)
def test_a_perfect_copy_is_the_minimum_of_the_teacher_s_term(objective):
    _, teacher, labels = drawn()
    shape = {"logits": (5,)}
    made = build_distiller(objective, shape, shape, seed=0, n_examples=100)
    student = teacher.clone().requires_grad_()
    term = made.soft_term({"logits": student}, {"logits": teacher}, labels)
    term.backward()
    assert term.item() == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max() < 1e-9


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), temperature=st.floats(0.2, 20))
def test_the_decoupled_parts_add_up_to_kl(seed, temperature):
    """[Zhao2022], eq. 4: KL = TCKD + (1 - p_t[gold]) NCKD, example by example."""
    student, teacher, labels = drawn(seed, n=1)
    target, rest = decoupled(student, teacher, labels, temperature)
    gold = F.softmax(teacher / temperature, 1)[0, labels[0]]
    whole = soft_loss(student, teacher, temperature)
    assert (target + (1 - gold) * rest).item() == pytest.approx(whole.item(), rel=1e-9, abs=1e-12)


def test_temperature_squared_keeps_the_scale_of_the_gradient():
    """[Hinton2015], sec. 2.1: for high temperatures the gradient of KL tends to
    (s - t) / (C * T**2), s and t the centred logits; times T**2 it no longer depends on T.

    So it is compared with (s - t) / (B * C) at three high temperatures: without the factor it
    would shrink a hundredfold from each to the next.
    """
    student, teacher, labels = drawn()
    centred = [x - x.mean(dim=1, keepdim=True) for x in (student, teacher)]
    limit = (centred[0] - centred[1]) / student.numel()
    for temperature in (1e2, 1e3, 1e4):
        leaf = student.clone().requires_grad_()
        objective_loss(kd(1.0, temperature), leaf, labels, teacher).backward()
        assert (leaf.grad - limit).abs().max() < 15 / temperature * limit.abs().max()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), objective=st.sampled_from(OBJECTIVES), data=st.data())
def test_adding_a_constant_to_all_logits_of_an_example_changes_nothing(seed, objective, data):
    if objective.kind == "mse":
        return  # it compares the logits themselves
    student, teacher, labels = drawn(seed)
    shift = st.lists(st.floats(-50, 50), min_size=16, max_size=16)
    shifts = [torch.tensor(data.draw(shift), dtype=torch.float64)[:, None] for _ in range(2)]
    before = objective_loss(objective, student, labels, teacher)
    after = objective_loss(objective, student + shifts[0], labels, teacher + shifts[1])
    assert after.item() == pytest.approx(before.item(), rel=1e-9, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(objective=st.sampled_from(OBJECTIVES), order=st.permutations(range(16)))
def test_the_order_of_examples_does_not_matter(objective, order):
    student, teacher, labels = drawn()
    order = torch.tensor(order)
    before = objective_loss(objective, student, labels, teacher)
    after = objective_loss(objective, student[order], labels[order], teacher[order])
    assert after.item() == pytest.approx(before.item(), rel=1e-12)


@pytest.mark.parametrize("objective", TAUGHT, ids=str)
def test_huge_logits_and_constant_rows_stay_finite(objective):
    for student, teacher in (
        (torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])),
        (torch.zeros(1, 3), torch.zeros(1, 3)),
    ):
        leaf = student.clone().requires_grad_()
        loss = objective_loss(objective, leaf, torch.tensor([1]), teacher)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(leaf.grad).all()


def test_an_objective_without_its_teacher_is_refused_with_the_notebook_that_makes_one():
    student, _, labels = drawn()
    with pytest.raises(ValueError, match=r"needs teacher logits; `python -m kdlib step teacher"):
        objective_loss(kd(0.5, 2.0), student, labels)


def test_teacher_logits_of_another_shape_are_refused():
    student, teacher, labels = drawn()
    for call in (
        lambda t: soft_loss(student, t, 2.0),
        lambda t: logit_mse(student, t),
        lambda t: decoupled(student, t, labels, 2.0),
        lambda t: dist_terms(student, t, 2.0),
    ):
        with pytest.raises(ValueError, match=r"logits are \(16, 4\), student logits \(16, 5\)"):
            call(teacher[:, :4])
        with pytest.raises(ValueError, match=r"\(1, 5\).*expected the same \(B, C\)"):
            call(teacher[:1])


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    logits = torch.zeros(2, 3)
    for call in (soft_loss, dist_terms):
        with pytest.raises(ValueError, match=r"temperature is .*; expected a number > 0"):
            call(logits, logits, temperature)
