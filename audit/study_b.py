"""What went wrong in study B, which distilled features over fixed or random shards: each defect
made again in miniature, beside the number without it and the check that catches it.

The code of the defects stands here, marked `wrong`.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.small_study import BRIEF, C_GRID, Exhibit, SmallStudy, judged, mean, named, refused
from audit.study_b_runs import biased_shards, keyed_by_pixels, resumed_elsewhere, seed_plus_epoch
from kdlib.probes.classifiers import Features, linear_probe
from kdlib.probes.diagnostics import collapse
from kdlib.repro import checks
from kdlib.repro.seeds import generator, torch_seeded
from kdlib.study.objectives import Tokens
from kdlib.study.training import Augment
from kdlib.trainer.feature_losses import barlow, resized, two_views
from kdlib.trainer.objectives import TokensDistiller
from kdlib.trainer.step import Learner

TOKENS = Tokens(cls_weight=1.0, patch_weight=1.0)


def stale_features(small: SmallStudy) -> Exhibit:
    """Test features were extracted once, before training, and read again for every checkpoint. A
    classifier of trained features was tested on untrained ones: 11.9 % for the trained student,
    36.9 % for the untrained one, and weeks of work on an artefact."""
    network = small.network(0)
    untrained = small.features(network, "test")
    floor = small.probed(network)
    network = small.known("full", 0).task.network
    train_features = small.features(network, "train")
    fresh = small.features(network, "test")
    # wrong: features that do not know their weights
    forged = Features(
        untrained.values, untrained.labels, untrained.example_ids, "test", fresh.weights_sha256
    )
    wrong = linear_probe(train_features, forged, C_GRID, 0).accuracy
    ours = linear_probe(train_features, fresh, C_GRID, 0).accuracy
    sentence = refused(lambda: linear_probe(train_features, untrained, C_GRID, 0))
    slack = 2 * math.sqrt(floor * (1 - floor) / len(small.test_ids))  # as notebook 05's
    (wrong_passed, reason), (honest_passed, _) = (
        checks.probe_floor({"floor": {"trained": accuracy, "untrained": floor, "slack": slack}})
        for accuracy in (wrong, ours)
    )
    return Exhibit(
        name="test features of the untrained student",
        measure=f"probe of the trained student (untrained: {100 * floor:.1f} %)",
        defect=wrong,
        honest=ours,
        check=named(linear_probe, checks.probe_floor),
        sentence=f"{reason}; {sentence}",
        caught=bool(sentence) and not wrong_passed,
        quiet=honest_passed,
    )


class _WrongNorms(TokensDistiller):
    """Compares the squared norms of features that have norm 1."""

    def soft_term(self, projected: Any, teacher: Any, labels: Tensor | None = None) -> Tensor:
        student, target = (F.normalize(v["features"], dim=1) for v in (projected, teacher))
        norms = [rows.square().sum(1) for rows in (student, target.detach())]
        return (norms[0] - norms[1]).square().mean()  # wrong: 1 - 1


def norms_of_unit_vectors(small: SmallStudy) -> Exhibit:
    """Features were brought to norm 1 and their squared norms were compared, which are 1 for any
    features. The loss was 0, and no gradient of the teacher's term reached the student."""
    still = BRIEF.model_copy(update={"weight_decay": 0.0, "epochs": 5})
    fits = [
        small.student(small.ids, 0, objective=TOKENS, training=still, distiller=distiller)
        for distiller in (_WrongNorms, None)
    ]
    wrong, honest = (fit.evidence for fit in fits)
    return Exhibit(
        name="squared norms of unit vectors",
        measure="probe of the distilled student",
        defect=small.probed(fits[0].task.network),
        honest=small.probed(fits[1].task.network),
        **judged((checks.pairing,), wrong, honest),
    )


def projector_of_the_teacher(small: SmallStudy) -> Exhibit:
    """The projector that brings features to one size stood on the teacher's side and was trained
    with the student. The target itself moved towards one that costs nothing, all features
    alike."""
    network, read = small.network(0), small.outputs.read
    teacher = torch.from_numpy(read("features", small.ids)[:, 0]).float()
    with torch_seeded(0, "projector"):
        projector = nn.Linear(teacher.shape[1], network.n_features)
    trained = [*network.parameters(), *projector.parameters()]
    optimiser = torch.optim.SGD(trained, lr=0.4, momentum=0.9)
    plan = small.plan(small.ids, 0, BRIEF.model_copy(update={"epochs": 5}))
    loader = small.loader(plan, 0)
    network.train()
    with torch.no_grad():
        before = projector(teacher).std(0).mean()
    for k in range(plan.n_steps):
        batch = loader.batch(k)
        # wrong: the target is trained to be easy to meet
        loss = F.mse_loss(network.features(batch.images), projector(teacher[batch.positions]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        after = projector(teacher).std(0).mean()
    moved = sum(float(p.grad.norm()) > 0 for p in projector.parameters())
    # ours: the same question to the objective that a student of features minimises
    task = small.task(small.plan(small.ids, 0), 0, objective=TOKENS)
    learner, batch = Learner(task.network, task.distiller, TOKENS), task.loader.batch(0)
    targets = {name: rows.requires_grad_() for name, rows in batch.teacher.items()}
    task.distiller.loss(learner(batch.images), batch.labels, targets).backward()
    reached = sum(rows.grad is not None for rows in targets.values())
    again = torch.from_numpy(read("features", small.ids)[:, 0]).float()
    return Exhibit(
        name="a trainable projector of the teacher",
        measure="spread of the target, of that before training",
        defect=float(after / before),
        honest=float(again.std(0).mean() / teacher.std(0).mean()),
        check="gradient before the target",
        sentence=f"the gradient reaches {moved} tensors before the target; in kdlib's objective of "
        f"features {reached} of {len(targets)}",
        caught=moved > 0,
        quiet=reached == 0,
    )


def _wrong_grid(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """The first patches of a grid (B, C, H, W) in reading order, as many as the other one has."""
    return grid.flatten(2)[:, :, : size[0] * size[1]].unflatten(2, size)


def truncated_patches(small: SmallStudy) -> Exhibit:
    """The teacher's grid of 16x16 patches was cut to its first 36 to meet the student's 6x6. Those
    are the top 2.25 rows of the image: nothing of the rest was taught, and each patch was
    compared with one of another place."""
    kept_by = {}
    for bring in (_wrong_grid, resized):
        kept = []
        for top in (0, 1):
            for left in (0, 1):
                grid = torch.zeros(1, 1, 16, 16)
                grid[:, :, 8 * top : 8 * top + 8, 8 * left : 8 * left + 8] = 1.0
                resized_grid = bring(grid, (6, 6))
                inside = resized_grid[:, :, 3 * top : 3 * top + 3, 3 * left : 3 * left + 3]
                kept.append(float(inside.sum()) / 9)
        kept_by[bring] = kept
    wrong, ours = kept_by.values()
    places = ("top left", "top right", "bottom left", "bottom right")
    lost = [place for place, kept in zip(places, wrong, strict=True) if kept < 0.99]
    return Exhibit(
        name="patches truncated, not resized",
        measure="brightness of a quadrant that stays in it",
        defect=mean(wrong),
        honest=mean(ours),
        check="a bright quadrant",
        sentence=f"a quadrant that is 1 and the rest 0, brought to 6x6: {', '.join(lost)} left "
        f"their place; by {named(resized)} {sum(k < 0.99 for k in ours)} did",
        caught=bool(lost),
        quiet=min(ours) > 0.99,
    )


def identical_views(small: SmallStudy) -> Exhibit:
    """After collation both views of an image were the same one. Barlow Twins, which learns what two
    views have in common, compared each image with itself."""
    network = small.network(0)
    training = BRIEF.model_copy(update={"augment": Augment(crop_padding=1)})
    plan = small.plan(small.ids, 0, training)
    network.train()
    with torch.no_grad():
        first, second = (
            network.features(small.loader(plan, seed, training).batch(0).images) for seed in (0, 1)
        )

    def agreement(one: Tensor, other: Tensor) -> float:
        """Mean correlation of the same feature in two views."""
        scaled = [(rows - rows.mean(0)) / rows.std(0, correction=0) for rows in (one, other)]
        return float((scaled[0] * scaled[1]).mean())

    sentence = refused(lambda: barlow(first, first))
    return Exhibit(
        name="two views that were one",
        measure="correlation of two views, untrained student",
        defect=agreement(first, first),
        honest=agreement(first, second),
        check=named(two_views),
        sentence=sentence,
        caught=bool(sentence),
        quiet=not refused(lambda: barlow(first, second)),
    )


def alarm_out_of_reach(small: SmallStudy) -> Exhibit:
    """The alarm for collapsed features rang below a variance of 0.01 per dimension. Unit vectors of
    384 features have a variance of at most 1/384, so that it rang for the best of features
    too."""
    n_features, threshold = 384, 0.01
    rng = generator(0, "probe")
    wrong, ours = [], []
    for _ in range(10):
        rows = rng.normal(size=(256, n_features))
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        wrong.append(unit.var(axis=0).mean() < threshold)
        ours.append(collapse(unit.astype(np.float32)).collapsed)
    constant = np.repeat(unit[:1], len(unit), axis=0).astype(np.float32)
    return Exhibit(
        name="an alarm that always rang",
        measure="isotropic random features called collapsed",
        defect=mean(wrong),
        honest=mean(ours),
        check=named(collapse),
        sentence=f"the largest variance that unit vectors of {n_features} features can have is "
        f"{1 / n_features:.4f}, below the alarm's {threshold}; effective rank calls "
        f"{sum(ours)} of {len(ours)} isotropic draws collapsed, and constant features "
        f"{'collapsed' if collapse(constant).collapsed else 'sound'}",
        caught=1 / n_features < threshold and all(wrong),
        quiet=not any(ours) and collapse(constant).collapsed,
    )


def c_chosen_on_test(small: SmallStudy) -> Exhibit:
    """The regularisation of the probe was chosen by the accuracy that was then reported. The best
    of several tries on the test set lies above chance even for labels that are noise."""
    rng, grid = generator(0, "labels"), (1e-3, 3e-2, 1.0)
    chosen_on_test, ours, moved, held = [], [], [], []

    def noise(n: int, split: str, labels: np.ndarray, values: np.ndarray) -> Features:
        return Features(values, labels, np.arange(n), split, "noise")

    for _ in range(16):
        values = [rng.normal(size=(n, 8)).astype(np.float32) for n in (80, 40)]
        labels = [rng.integers(0, 2, n) for n in (80, 40, 40)]
        fitted = noise(80, "train", labels[0], values[0])
        picks = []
        for drawn in labels[1:]:
            test = noise(40, "test", drawn, values[1])
            scores = [linear_probe(fitted, test, [c], 0).accuracy for c in grid]
            picks.append((grid[int(np.argmax(scores))], max(scores)))  # wrong: test chose
            honest = linear_probe(fitted, test, grid, 0)
            picks[-1] += (honest.chosen, honest.accuracy)
        chosen_on_test += [pick[1] for pick in picks]
        ours += [pick[3] for pick in picks]
        moved.append(picks[0][0] != picks[1][0])
        held.append(picks[0][2] == picks[1][2])
    return Exhibit(
        name="C chosen on the test set",
        measure="probe of two classes of noise (chance: 50 %)",
        defect=mean(chosen_on_test),
        honest=mean(ours),
        check="other test labels",
        sentence=f"with test labels drawn anew, C changes in {sum(moved)} of {len(moved)} draws; "
        f"that of {named(linear_probe)} in {sum(not h for h in held)}",
        caught=any(moved),
        quiet=all(held),
    )


def fixed_c(small: SmallStudy) -> Exhibit:
    """The regularisation of the probe was fixed at C = 1 on features of norm 1, where it is strong.
    The probe measured the scale of the features: the same features times 16 are probed far
    better."""
    from sklearn.linear_model import LogisticRegression

    network = small.network(0)
    pair = [small.features(network, split) for split in ("train", "test")]

    def wrong(scale: float) -> float:
        unit = [f.values / np.linalg.norm(f.values, axis=1, keepdims=True) * scale for f in pair]
        model = LogisticRegression(C=1.0, max_iter=2000).fit(unit[0], pair[0].labels)
        return float((model.predict(unit[1]) == pair[1].labels).mean())

    def ours(scale: float) -> float:
        scaled = [
            Features(f.values * np.float32(scale), f.labels, f.example_ids, f.split, "same")
            for f in pair
        ]
        return linear_probe(*scaled, C_GRID, 0).accuracy

    (once, scaled), (our_once, our_scaled) = ((rule(1.0), rule(16.0)) for rule in (wrong, ours))
    return Exhibit(
        name="C = 1 on unit vectors",
        measure="probe of the untrained student",
        defect=once,
        honest=our_once,
        check="features times 16",
        sentence=f"the same features times 16: {once:.1%} becomes {scaled:.1%}; by "
        f"{named(linear_probe)}, which standardises and chooses C, {our_once:.1%} stays "
        f"{our_scaled:.1%}",
        caught=once != scaled,
        quiet=our_once == our_scaled,
    )


DEFECTS_B = (
    stale_features, norms_of_unit_vectors, projector_of_the_teacher, truncated_patches,
    biased_shards, seed_plus_epoch, identical_views, alarm_out_of_reach, c_chosen_on_test, fixed_c,
    keyed_by_pixels, resumed_elsewhere,
)  # fmt: skip
