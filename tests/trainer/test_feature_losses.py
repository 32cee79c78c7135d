"""`kdlib.trainer.feature_losses` and the objectives made of them: by hand, as loops, paired with
a teacher."""

import ast
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ROOT

from kdlib.models.base import attention_map
from kdlib.study import objectives
from kdlib.study.objectives import (
    OBJECTIVES,
    Attention,
    Hint,
    LabelSmoothing,
    Objective,
    Similarity,
    Tokens,
    needs_teacher,
)
from kdlib.trainer import feature_losses
from kdlib.trainer.objectives import build_distiller, student_outputs, teacher_columns

B, CLASSES = 12, 3
HINT = Hint(weight=1.0)
ATTENTION = Attention(weight=1.0)
RKD = objectives.RKD(distance_weight=25.0, angle_weight=50.0)
SIMILARITY = Similarity(weight=10.0)
CRD = objectives.CRD(weight=0.8, temperature=0.1, width=6)
TOKENS = Tokens(cls_weight=1.0, patch_weight=0.5)
BARLOW = TOKENS.model_copy(update={"barlow_weight": 0.1})
ALL = [HINT, ATTENTION, RKD, SIMILARITY, CRD, TOKENS]


def drawn(seed: int, channels: int = 6, side: int = 4) -> dict[str, torch.Tensor]:
    """Outputs of a network with two stages; float64."""
    rng = np.random.default_rng(seed)
    made = {"logits": rng.normal(size=(B, CLASSES)), "features": rng.normal(size=(B, channels))}
    for k in (1, 2):
        made[f"stage{k}"] = rng.normal(size=(B, channels, side, side))
    made = {name: torch.from_numpy(value) for name, value in made.items()}
    for k in (1, 2):
        made[f"attention{k}"] = attention_map(made[f"stage{k}"])
    return made


LABELS = torch.arange(B) % CLASSES


def built(objective: Objective, seed: int = 0, n_channels: int = 6):
    """(distiller, student outputs, teacher outputs) that fit each other; float64."""
    reads = teacher_columns(objective, 2)
    student, teacher = drawn(seed, n_channels), drawn(seed + 1)
    wanted = {name: student[name] for name in student_outputs(objective, 2)}
    of_teacher = {name: teacher[name] for name in reads}
    made = build_distiller(
        objective,
        {k: tuple(v.shape[1:]) for k, v in wanted.items()},
        {k: tuple(v.shape[1:]) for k, v in of_teacher.items()},
        seed=seed,
        n_examples=100,
    ).double()
    return made, wanted, of_teacher


def copied(made, of_teacher: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a student projects whose outputs are the teacher's own."""
    projected = {"logits": F.one_hot(LABELS, CLASSES).double() * 50}
    for name, value in of_teacher.items():
        projected[name] = value.clone()
    if made.objective.kind == "crd":
        projected["features"] = of_teacher["features"] @ made.teacher_projection
    return {k: v.requires_grad_() for k, v in projected.items()}


# --- without labels ------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [HINT, ATTENTION, RKD, SIMILARITY, TOKENS, BARLOW])
def test_without_logits_the_loss_is_the_sum_of_the_weighted_terms(objective):
    """With a cross-entropy of 0: logits of 50 for the gold class."""
    labelled, student, teacher = built(objective)
    without = {name: value for name, value in student.items() if name != "logits"}
    shapes = [{k: tuple(v.shape[1:]) for k, v in x.items()} for x in (without, teacher)]
    made = build_distiller(objective, *shapes, seed=0, n_examples=100).double()
    student["logits"] = F.one_hot(LABELS, CLASSES).double() * 50
    second = None
    if objective.compares_views:
        second = {name: value + drawn(9)[name] for name, value in without.items()}
    expected = labelled.loss(labelled.project(student, second), LABELS, teacher)
    found = made.loss(made.project(without, second), torch.full_like(LABELS, -1), teacher)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_tokens_without_logits_worked_by_hand():
    # vectors at 60 degrees: 1 - 1/2; grids at right angles: 1 - 0; so 2 * 0.5 + 0.5 * 1
    made = build_distiller(
        Tokens(cls_weight=2.0, patch_weight=0.5),
        {"features": (2,), "stage2": (2, 1, 1)},
        {"features": (2,), "stage2": (2, 1, 1)},
        seed=0,
        n_examples=1,
    )
    student = {"features": torch.tensor([[1.0, 0.0]]), "stage2": torch.ones(1, 2, 1, 1)}
    teacher = {"features": torch.tensor([[0.5, math.sqrt(3) / 2]])}
    teacher["stage2"] = torch.tensor([[[[1.0]], [[-1.0]]]])
    assert made.loss(student, torch.tensor([-1]), teacher).item() == pytest.approx(1.5, abs=1e-6)


# --- by hand -------------------------------------------------------------------------------------


def test_a_hint_worked_by_hand():
    # teacher (0 2 / 4 6) averaged to one place: 3; student 1: (3 - 1)**2
    teacher = torch.tensor([[[[0.0, 2.0], [4.0, 6.0]]]])
    assert feature_losses.hint(torch.ones(1, 1, 1, 1), teacher).item() == 4.0
    assert feature_losses.hint(torch.ones(1, 1, 2, 2), teacher).item() == (1 + 1 + 9 + 25) / 4


def test_attention_maps_worked_by_hand():
    # two channels (3, 0 / 0, 0) and (0, 0 / 4, 0): mean squares (4.5, 0 / 8, 0), norm sqrt(84.25)
    grid = torch.zeros(1, 2, 2, 2)
    grid[0, 0, 0, 0], grid[0, 1, 1, 0] = 3.0, 4.0
    found = attention_map(grid)
    assert found[0, :, 0].tolist() == pytest.approx([4.5 / math.sqrt(84.25), 8 / math.sqrt(84.25)])
    # a map of norm 1 at one place, against one at another: |(1, -1)| = sqrt 2, for each stage
    here, there = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    here[0, 0, 0] = there[0, 1, 1] = 1.0
    assert feature_losses.attention([here, here], [there, here]).item() == pytest.approx(
        math.sqrt(2)
    )


def test_relations_worked_by_hand():
    # student at 0, 3 + 4i and 6 + 8i of a line: distances 5, 5, 10, mean 20/3: 3/4, 3/4, 3/2
    # teacher an equilateral triangle: distances 1, 1, 1: Huber halves the squares below 1
    student = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]], dtype=torch.float64)
    root = math.sqrt(3) / 2
    teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, root]], dtype=torch.float64)
    distance, angle = feature_losses.rkd(student, teacher)
    assert distance.item() == pytest.approx(2 * (2 * 0.5 * 0.25**2 + 0.5 * 0.5**2) / 9)
    # cosines at the corners of the line: 1 at both ends, -1 in the middle; of the triangle 1/2.
    # Each corner counts its pair twice among 27 entries: gaps 1/2, 1/2 and 3/2 (Huber: 3/2 - 1/2)
    assert angle.item() == pytest.approx(2 * (0.125 + 0.125 + 1.0) / 27)


def test_similarities_worked_by_hand():
    # student rows (1, 0), (0, 1): Gram the identity. Teacher rows (1, 0), (1, 0): all ones, rows
    # divided by sqrt 2. Squared gaps: twice (1 - 1/sqrt 2)**2 and twice 1/2, over 4
    student, teacher = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    expected = (2 * (1 - math.sqrt(0.5)) ** 2 + 2 * 0.5) / 4
    assert feature_losses.similarity(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_a_contrast_worked_by_hand():
    # two examples of two classes, T = 1, M = 2, so N = 1 and N / M = 1/2; student = teacher =
    # orthogonal: own cosine 1, other 0. h(own) = e / (e + 1/2), 1 - h(other) = (1/2) / (1 + 1/2)
    rows = torch.eye(2, dtype=torch.float64)
    own, other = math.e / (math.e + 0.5), 1 / 3
    found = feature_losses.crd(rows, rows, torch.tensor([0, 1]), 1.0, 2)
    assert found.item() == pytest.approx(-2 * math.log(own) - 2 * math.log(other))


def test_tokens_worked_by_hand():
    # CLS at 60 degrees: 1 - 1/2. Patches: one the same, one opposite: (0 + 2) / 2
    cls = torch.tensor([[1.0, 0.0]])
    other = torch.tensor([[0.5, math.sqrt(3) / 2]])
    patches = torch.tensor([[[[1.0, 1.0]], [[0.0, 0.0]]]])
    turned = torch.tensor([[[[3.0, -2.0]], [[0.0, 0.0]]]])
    found = [feature_losses.tokens(*pair).item() for pair in ((cls, other), (patches, turned))]
    assert found == pytest.approx([0.5, 1.0], abs=1e-6)


def test_barlow_worked_by_hand():
    # columns (1, -1, 1, -1) and (1, 1, -1, -1) are uncorrelated; the second view swaps them: the
    # correlation matrix is (0 1 / 1 0): 2 on the diagonal, 2 beside it, over D = 2
    first = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    assert feature_losses.barlow(first, first.flip(1), 0.5).item() == pytest.approx(1.5, rel=1e-4)
    assert feature_losses.barlow(first, first * 3).item() == pytest.approx(0, abs=1e-6)


def test_identical_views_are_refused():
    rows = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="identical views"):
        feature_losses.barlow(rows, rows.clone())


@pytest.mark.parametrize("quadrant", range(4))
@pytest.mark.parametrize("size", [(6, 6), (7, 5), (16, 16), (24, 24)])
def test_a_bright_quadrant_stays_in_its_quadrant(quadrant, size):
    grid = torch.zeros(1, 1, 16, 16)
    top, left = 8 * (quadrant // 2), 8 * (quadrant % 2)
    grid[0, 0, top : top + 8, left : left + 8] = 1.0
    found = feature_losses.resized(grid, size)[0, 0]
    assert found.shape == size
    height, width = (n // 2 for n in size)
    parts = [found[:height, :width], found[:height, -width:],
             found[-height:, :width], found[-height:, -width:]]  # fmt: skip
    means = [part.mean().item() for part in parts]
    assert means[quadrant] > 0.8
    assert max(m for i, m in enumerate(means) if i != quadrant) < 0.15


# --- independent, slow ---------------------------------------------------------------------------


def cosine(a, b) -> float:
    return float(np.dot(a, b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def huber(gap: float) -> float:
    return 0.5 * gap**2 if abs(gap) < 1 else abs(gap) - 0.5


def test_relations_are_their_formula_written_as_a_loop():
    student, teacher = drawn(0, 5)["features"], drawn(1)["features"]
    distances, angles = [], []
    for rows in (student.numpy(), teacher.numpy()):
        pairs = [[np.linalg.norm(a - b) for b in rows] for a in rows]
        mean = np.sum(pairs) / (B * (B - 1))
        distances.append(np.array(pairs) / mean)
        angles.append([
            [[cosine(rows[i] - rows[j], rows[k] - rows[j]) for k in range(B)] for i in range(B)]
            for j in range(B)
        ])  # fmt: skip
    expected = [
        np.mean([huber(a - b) for a, b in zip(np.ravel(x), np.ravel(y), strict=True)])
        for x, y in (distances, angles)
    ]
    found = [x.item() for x in feature_losses.rkd(student, teacher)]
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_contrast_is_its_formula_written_as_a_loop():
    student, teacher = (drawn(s)["features"].numpy() for s in (0, 1))
    negatives = [[j for j in range(B) if LABELS[j] != LABELS[i]] for i in range(B)]
    ratio = np.mean([len(n) for n in negatives]) / 100

    def h(i: int, j: int) -> float:
        power = math.exp(cosine(student[i], teacher[j]) / 0.2)
        return power / (power + ratio)

    total = 0.0
    for i in range(B):
        total += -2 * math.log(h(i, i))
        total -= sum(math.log(1 - h(i, j)) + math.log(1 - h(j, i)) for j in negatives[i])
    found = feature_losses.crd(
        torch.from_numpy(student), torch.from_numpy(teacher), LABELS, 0.2, 100
    )
    assert found.item() == pytest.approx(total / B, rel=1e-9)


def test_similarities_are_their_formula_written_as_a_loop():
    student, teacher = drawn(0, 5)["stage2"], drawn(1)["stage2"]
    grams = []
    for rows in (student.flatten(1).numpy(), teacher.flatten(1).numpy()):
        gram = [[float(np.dot(a, b)) for b in rows] for a in rows]
        grams.append([np.array(row) / np.linalg.norm(row) for row in gram])
    expected = sum(float(np.sum((a - b) ** 2)) for a, b in zip(*grams, strict=True)) / B**2
    assert feature_losses.similarity(student, teacher).item() == pytest.approx(expected, rel=1e-9)


def test_barlow_is_its_formula_written_as_a_loop():
    first, second = drawn(0)["features"].numpy(), drawn(1)["features"].numpy()
    d, total = first.shape[1], 0.0
    for i in range(d):
        for j in range(d):
            c = np.corrcoef(first[:, i], second[:, j])[0, 1]
            total += (1 - c) ** 2 if i == j else 0.005 * c**2
    found = feature_losses.barlow(torch.from_numpy(first), torch.from_numpy(second))
    assert found.item() == pytest.approx(total / d, rel=1e-4)


# --- as objectives -------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.kind)
def test_permuting_teacher_rows_raises_the_loss(objective):
    made, _, of_teacher = built(objective)
    paired = made.loss(copied(made, of_teacher), LABELS, of_teacher)
    swapped = {k: v.roll(1, dims=0) for k, v in of_teacher.items()}  # to rows of other classes
    assert made.loss(copied(made, of_teacher), LABELS, swapped) > paired + 1e-3


@pytest.mark.parametrize("objective", [*ALL, BARLOW], ids=lambda o: f"{o.kind} {o.compares_views}")
@pytest.mark.parametrize("n_channels", [6, 5])
def test_the_gradient_reaches_the_student_and_only_the_student(objective, n_channels):
    if objective.kind == "attention" and n_channels == 5:
        return
    made, student, of_teacher = built(objective, n_channels=n_channels)
    student = {k: v.requires_grad_() for k, v in student.items()}
    of_teacher = {k: v.requires_grad_() for k, v in of_teacher.items()}
    second = None
    if objective.compares_views:
        second = {k: v.detach() * 1.5 + 0.1 * v.detach().flip(0) for k, v in student.items()}
    loss = made.loss(made.project(student, second), LABELS, of_teacher)
    loss.backward()
    for name, value in student.items():
        assert value.grad.flatten(1).abs().sum(1).min() > 0, name  # every example
    for value in of_teacher.values():
        assert value.grad is None
    for name, parameter in made.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert not any(p.grad is not None for p in made.buffers())


@pytest.mark.parametrize("objective", [o for o in ALL if o is not CRD], ids=lambda o: o.kind)
def test_a_perfect_copy_is_the_minimum(objective):
    made, _, of_teacher = built(objective)
    projected = copied(made, of_teacher)
    term = made.soft_term(projected, of_teacher, LABELS)
    term.backward()
    assert term.item() == pytest.approx(0, abs=1e-9)
    for name in of_teacher:
        if objective is not ATTENTION:  # a norm has no flat bottom
            assert projected[name].grad.abs().max() < 1e-6
        moved = projected | {name: projected[name] + 0.01 * drawn(7)[name]}
        assert made.soft_term(moved, of_teacher, LABELS) > term


def test_a_contrast_is_lowest_for_the_student_s_own_row():
    """A contrast also pushes others away, so that its minimum over all student features is no
    copy; among the orders of given rows the true one is best."""
    made, _, of_teacher = built(CRD)
    projected = copied(made, of_teacher)
    paired = made.soft_term(projected, of_teacher, LABELS)
    for shift in range(1, B):
        turned = {"features": projected["features"].roll(shift, 0)}
        assert made.soft_term(turned, of_teacher, LABELS) > paired


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.kind)
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(B)))
def test_the_order_of_examples_does_not_matter(objective, order):
    made, student, of_teacher = built(objective)
    order = torch.tensor(order)
    before = made.loss(made.project(student), LABELS, of_teacher)
    turned = [{k: v[order] for k, v in rows.items()} for rows in (student, of_teacher)]
    after = made.loss(made.project(turned[0]), LABELS[order], turned[1])
    assert after.item() == pytest.approx(before.item(), rel=1e-9)


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.kind)
def test_identical_and_zero_rows_stay_finite(objective):
    made, student, of_teacher = built(objective)
    for fill in (0.0, 1.0):
        leaves = {k: torch.full_like(v, fill).requires_grad_() for k, v in student.items()}
        same = {k: torch.full_like(v, fill) for k, v in of_teacher.items()}
        loss = made.loss(made.project(leaves), LABELS, same)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(v.grad).all() for v in leaves.values() if v.grad is not None)


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.kind)
def test_half_precision_outputs_give_a_float32_loss(objective):
    made, student, of_teacher = built(objective)
    made.float()
    student = {k: v.bfloat16() for k, v in made.project({k: v.float() for k, v in student.items()})
               .items()}  # fmt: skip
    loss = made.loss(student, LABELS, {k: v.half() for k, v in of_teacher.items()})
    assert loss.dtype == torch.float32


def test_vectors_of_one_length_do_not_make_tokens_blind():
    """Squared norms of unit vectors are all 1: a loss that compares them is 0 whatever the
    vectors."""
    rows = F.normalize(drawn(0)["features"], dim=1)
    grid = F.normalize(drawn(0)["stage2"], dim=1)
    assert feature_losses.tokens(rows, rows.roll(1, 0)) > 0.1
    assert feature_losses.tokens(grid, grid.roll(1, 0)) > 0.1


@pytest.mark.parametrize(
    ("cls", "patch", "reads"), [(1.0, 0.0, ("features",)), (0.0, 0.5, ("features", "stage2"))]
)
def test_a_part_of_tokens_whose_weight_is_0_is_neither_read_nor_trained(cls, patch, reads):
    made, student, teacher = built(Tokens(cls_weight=cls, patch_weight=patch))
    assert made.reads == reads
    made.loss(made.project(student), LABELS, teacher).backward()
    assert all(p.grad.abs().sum() > 0 for p in made.parameters())  # as the check demands
    assert len(list(made.projectors)) == 1


def test_tokens_of_no_weight_are_refused():
    with pytest.raises(ValueError, match="cls_weight and patch_weight are 0, and nothing is"):
        Tokens(cls_weight=0.0, patch_weight=0.0)


def test_projectors_are_drawn_from_the_seed_and_leave_the_generator():
    state = torch.get_rng_state()
    one, same, other = (built(TOKENS, seed)[0].state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not any(torch.equal(one[k], other[k]) for k in one)


def test_the_teacher_s_embedding_is_fixed_and_orthogonal():
    made, _, _ = built(CRD)
    assert "teacher_projection" not in dict(made.named_parameters())
    product = made.teacher_projection.T @ made.teacher_projection
    assert torch.allclose(product, torch.eye(6, dtype=product.dtype), atol=1e-5)


def test_a_width_beyond_the_teacher_s_is_refused():
    with pytest.raises(ValueError, match=r"embeds 6 teacher features in 128; expected a width"):
        built(objectives.CRD(weight=0.8, temperature=0.1))


def test_stages_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"hint reads stage 3 .* 2 stages; expected .*\[1, 2\]"):
        teacher_columns(HINT.model_copy(update={"stage": 3}), 2)
    with pytest.raises(ValueError, match="0 stages"):
        student_outputs(TOKENS, 0)
    shapes = {"logits": (3,), "attention1": (4, 4)}
    with pytest.raises(ValueError, match=r"the student has 1, the teacher 2"):
        build_distiller(
            ATTENTION, shapes, {"attention1": (4, 4), "attention2": (2, 2)}, seed=0, n_examples=9
        )


def test_what_each_objective_reads():
    def reads(o: Objective) -> tuple[str, ...]:
        return teacher_columns(o, 3)

    assert reads(HINT) == ("stage2",)
    assert reads(SIMILARITY) == ("stage3",)
    assert reads(ATTENTION) == ("attention1", "attention2", "attention3")
    assert reads(RKD) == reads(CRD) == ("features",)
    assert reads(TOKENS) == ("features", "stage3")
    assert student_outputs(TOKENS, 2) == ("logits", "features", "stage2")
    assert reads(LabelSmoothing(smoothing=0.1)) == ()


# --- the registry --------------------------------------------------------------------------------


def test_every_kind_of_a_study_is_described_and_built():
    taught = set(OBJECTIVES) - {"cross_entropy", "label_smoothing", "own"}
    assert {o.kind for o in ALL} | {"kd", "mse", "dkd", "dist"} == taught
    assert all(needs_teacher(o) for o in ALL)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_test_that_works_an_objective_by_hand_is_there(kind):
    path, name = OBJECTIVES[kind].described()[2].split("::")
    tree = ast.parse((ROOT / path).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


# --- what cannot be compared -----------------------------------------------------------------


def test_relations_of_one_example_are_refused():
    with pytest.raises(ValueError, match="relations need two examples"):
        feature_losses.rkd(torch.ones(1, 3), torch.ones(1, 5))


@pytest.mark.parametrize(
    "loss", [feature_losses.rkd, feature_losses.similarity, feature_losses.hint]
)
def test_batches_of_different_size_are_refused(loss):
    rows = (torch.ones(4, 3, 2, 2), torch.ones(5, 3, 2, 2))
    if loss is feature_losses.rkd:
        rows = tuple(r.flatten(1) for r in rows)
    with pytest.raises(ValueError, match="expected the same batch"):
        loss(*rows)


def test_a_constant_column_of_an_embedding_has_a_finite_gradient():
    first = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    first[:, 1] = 2.0
    first.requires_grad_(True)
    feature_losses.barlow(first, first.detach() + 0.1 * torch.arange(18).view(6, 3)).backward()
    assert first.grad.isfinite().all()


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.kind)
def test_an_objective_without_its_teacher_says_which_notebook_to_run(objective):
    with pytest.raises(ValueError, match="python -m kdlib step teacher STUDY"):
        build_distiller(objective, {"features": (4,)}, {}, seed=0, n_examples=9)
