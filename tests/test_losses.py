"""`kdlib.losses`: the formulas by hand, and teacher and student rows that belong together."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.losses import needs_teacher, objective_loss, soft_loss
from kdlib.params import Objective

CE = Objective(kind="cross_entropy")


def kd(alpha: float, temperature: float) -> Objective:
    return Objective(kind="kd", alpha=alpha, temperature=temperature)


def drawn(seed: int = 0, n: int = 16, n_classes: int = 5) -> tuple[torch.Tensor, ...]:
    """Student logits, teacher logits, labels; float64."""
    rng = np.random.default_rng(seed)
    student, teacher = (torch.from_numpy(rng.normal(size=(n, n_classes)) * 3) for _ in range(2))
    return student, teacher, torch.from_numpy(rng.integers(0, n_classes, n))


def slow_loss(objective: Objective, student, labels, teacher) -> float:
    """Loop over examples and classes, in Python floats."""

    def softened(row: list[float], temperature: float) -> list[float]:
        powers = [math.exp(x / temperature) for x in row]
        return [p / sum(powers) for p in powers]

    total = 0.0
    for s, label, t in zip(student.tolist(), labels.tolist(), teacher.tolist(), strict=True):
        hard = -math.log(softened(s, 1.0)[label])
        if objective.kind == "cross_entropy":
            total += hard
        elif objective.kind == "label_smoothing":
            e, n_classes = objective.smoothing, len(s)
            target = [e / n_classes + (1 - e) * (c == label) for c in range(n_classes)]
            total -= sum(q * math.log(p) for q, p in zip(target, softened(s, 1.0), strict=True))
        else:
            pair = [softened(row, objective.temperature) for row in (t, s)]
            kl = sum(q * math.log(q / p) for q, p in zip(*pair, strict=True))
            total += (1 - objective.alpha) * hard
            total += objective.alpha * objective.temperature**2 * kl
    return total / len(labels)


OBJECTIVES = [
    CE,
    Objective(kind="label_smoothing", smoothing=0.1),
    Objective(kind="label_smoothing", smoothing=0.0),
    kd(0.7, 4.0),
    kd(0.3, 0.5),
    kd(1.0, 1.0),
    kd(0.0, 2.0),
]


def test_a_kd_loss_worked_by_hand():
    # student [0, 0] -> p = (1/2, 1/2) at any temperature; label 0 -> CE = ln 2
    # teacher [2 ln 3, 0] at temperature 2 -> [ln 3, 0] -> q = (3/4, 1/4)
    # KL(q || p) = 3/4 ln(3/2) + 1/4 ln(1/2)
    # loss = (1 - 0.25) * ln 2 + 0.25 * 2**2 * KL
    student, teacher = torch.zeros(1, 2), torch.tensor([[2 * math.log(3), 0.0]])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl == pytest.approx(0.130812, abs=1e-6)
    loss = objective_loss(kd(0.25, 2.0), student, torch.tensor([0]), teacher)
    assert loss.item() == pytest.approx(0.75 * math.log(2) + kl, rel=1e-6)
    assert soft_loss(student, teacher, 2.0).item() == pytest.approx(kl, rel=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_every_objective_is_its_formula_written_as_a_loop(objective):
    student, teacher, labels = drawn()
    loss = objective_loss(objective, student, labels, teacher)
    assert loss.item() == pytest.approx(slow_loss(objective, student, labels, teacher), rel=1e-12)


def test_alpha_0_is_plain_cross_entropy_in_value_and_gradient():
    student, teacher, labels = drawn()
    gradients = []
    for objective in (kd(0.0, 4.0), CE):
        leaf = student.clone().requires_grad_()
        loss = objective_loss(objective, leaf, labels, teacher)
        loss.backward()
        gradients.append(leaf.grad)
        assert loss.item() == objective_loss(CE, student, labels).item()
    assert torch.equal(*gradients)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_a_student_equal_to_its_teacher_has_kl_0_and_no_soft_gradient(temperature):
    _, teacher, _ = drawn()
    for shift in (0.0, 5.0):  # the same probabilities
        student = (teacher + shift).requires_grad_()
        loss = soft_loss(student, teacher, temperature)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-15)
        assert student.grad.abs().max() < 1e-15


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), temperature=st.floats(0.2, 20))
def test_kl_is_never_negative_and_grows_when_teacher_rows_are_permuted(seed, temperature):
    student, teacher, _ = drawn(seed)
    assert soft_loss(student, teacher, temperature) > 0
    rolled = teacher.roll(1, dims=0)
    assert soft_loss(teacher, rolled, temperature) > soft_loss(teacher, teacher, temperature) + 1e-4


def test_permuting_teacher_rows_raises_the_whole_objective():
    _, teacher, labels = drawn()
    paired = objective_loss(kd(0.5, 2.0), teacher, labels, teacher)
    permuted = objective_loss(kd(0.5, 2.0), teacher, labels, teacher.roll(1, dims=0))
    assert permuted > paired + 0.1


def test_the_loss_is_of_the_student_from_the_teacher_not_the_reverse():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[5.0, 0.0]])
    q = torch.softmax(teacher, 1)
    expected = (q * (q.log() - math.log(0.5))).sum()
    assert soft_loss(student, teacher, 1.0).item() == pytest.approx(expected.item(), rel=1e-6)
    assert soft_loss(teacher, student, 1.0).item() != pytest.approx(expected.item(), rel=0.1)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_gradient_reaches_the_student_only(objective):
    student, teacher, labels = drawn()
    student.requires_grad_()
    teacher.requires_grad_()
    objective_loss(objective, student, labels, teacher).backward()
    assert student.grad.abs().sum(1).min() > 0  # every example
    assert teacher.grad is None


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


def test_huge_logits_stay_finite():
    student, teacher = torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]])
    loss = objective_loss(kd(0.5, 1.0), student.requires_grad_(), torch.tensor([1]), teacher)
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert torch.isfinite(student.grad).all()


def test_kd_without_a_teacher_is_refused_with_the_notebook_that_makes_one():
    student, _, labels = drawn()
    with pytest.raises(ValueError, match="needs teacher logits; run notebooks/02_teacher"):
        objective_loss(kd(0.5, 2.0), student, labels)


def test_teacher_logits_of_another_shape_are_refused():
    student, teacher, _ = drawn()
    with pytest.raises(ValueError, match=r"teacher logits are \(16, 4\), student logits \(16, 5\)"):
        soft_loss(student, teacher[:, :4], 2.0)
    with pytest.raises(ValueError, match=r"\(1, 5\).*expected the same \(B, C\)"):
        soft_loss(student, teacher[:1], 2.0)


def test_only_kd_needs_a_teacher():
    assert [needs_teacher(o) for o in OBJECTIVES] == [o.kind == "kd" for o in OBJECTIVES]
    assert needs_teacher(kd(0.0, 1.0))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"temperature is .*; expected a number > 0"):
        soft_loss(logits, logits, temperature)
