"""What went wrong in study B, which distilled features over fixed or random shards: each defect
made again in miniature, beside the number without it and the check that catches it.

The code of the defects stands here, marked `wrong`.
"""

import hashlib
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.bench import BRIEF, C_GRID, Bench, Exhibit, judged, mean, refused
from kdlib.cache.outputs import open_outputs
from kdlib.dataset.plan import Plan
from kdlib.models.weights import weights_fingerprint
from kdlib.probes.classifiers import Features, linear_probe
from kdlib.probes.diagnostics import collapse
from kdlib.repro import checks
from kdlib.repro.run import Run
from kdlib.repro.seeds import generator, torch_seeded
from kdlib.study.objectives import Hint, Tokens
from kdlib.study.training import Augment
from kdlib.trainer.feature_losses import barlow, resized
from kdlib.trainer.loop import train
from kdlib.trainer.objectives import TokensDistiller
from kdlib.trainer.step import Learner, Step
from kdlib.trainer.tracking import Tracker

# The scheme of study B: a pass draws 25 of 122 shards of 2,048 images, sorts them, and ends after
# 500 of their 800 batches of 64, so that the last shards are hardly read.
N_SHARDS, SHARD_SIZE, N_DRAWN, N_BATCHES, BATCH_SIZE = 122, 2048, 25, 500, 64
TOKENS = Tokens(cls_weight=1.0, patch_weight=1.0)


def stale_features(bench: Bench) -> Exhibit:
    """Test features extracted once, with the untrained student, and probed at every checkpoint."""
    network = bench.network(0)
    untrained = bench.features(network, "test")
    floor = bench.probed(network)
    network = bench.known("full", 0).task.network
    train_features = bench.features(network, "train")
    fresh = bench.features(network, "test")
    # wrong: features that do not know their weights
    forged = Features(
        untrained.values, untrained.labels, untrained.example_ids, "test", fresh.weights_sha256
    )
    wrong = linear_probe(train_features, forged, C_GRID, 0).accuracy
    ours = linear_probe(train_features, fresh, C_GRID, 0).accuracy
    sentence = refused(lambda: linear_probe(train_features, untrained, C_GRID, 0))
    slack = 2 * math.sqrt(floor * (1 - floor) / len(bench.test_ids))  # as notebook 05's
    below = [
        checks.probe_floor({"floor": {"trained": accuracy, "untrained": floor, "slack": slack}})
        for accuracy in (wrong, ours)
    ]
    return Exhibit(
        study="B",
        name="test features of the untrained student",
        happened="Test features were extracted once, before training, and reused for every "
        "checkpoint: trained 11.9 %, untrained 36.9 %, and weeks of work on an artefact.",
        measure=f"probe of the trained student (untrained: {100 * floor:.1f} %)",
        defect=wrong,
        honest=ours,
        tripwire="probe.linear_probe, checks.probe_floor",
        sentence=f"{below[0].sentence}; {sentence}",
        caught=bool(sentence) and not below[0].passed,
        quiet=below[1].passed,
    )


class _WrongNorms(TokensDistiller):
    """Compares the squared norms of features that have norm 1."""

    def soft_term(self, projected: Any, teacher: Any, labels: Tensor | None = None) -> Tensor:
        student, heard = (F.normalize(v["features"], dim=1) for v in (projected, teacher))
        norms = [rows.square().sum(1) for rows in (student, heard.detach())]
        return (norms[0] - norms[1]).square().mean()  # wrong: 1 - 1


def norms_of_unit_vectors(bench: Bench) -> Exhibit:
    """A feature loss that is 0 whatever the student does."""
    still = BRIEF.model_copy(update={"weight_decay": 0.0, "epochs": 5})
    fits = [
        bench.student(bench.ids, 0, objective=TOKENS, training=still, distiller=distiller)
        for distiller in (_WrongNorms, None)
    ]
    wrong, honest = (fit.evidence for fit in fits)
    return Exhibit(
        study="B",
        name="squared norms of unit vectors",
        happened="Features were brought to norm 1 and their squared norms compared: the loss was "
        "0 and no gradient reached the student.",
        measure="probe of the distilled student",
        defect=bench.probed(fits[0].task.network),
        honest=bench.probed(fits[1].task.network),
        **judged((checks.pairing,), wrong, honest),
    )


def projector_of_the_teacher(bench: Bench) -> Exhibit:
    """A trainable projector before the target."""
    network, read = bench.network(0), bench.outputs.read
    teacher = torch.from_numpy(read("features", bench.ids)[:, 0]).float()
    with torch_seeded(0, "projector"):
        projector = nn.Linear(teacher.shape[1], network.n_features)
    trained = [*network.parameters(), *projector.parameters()]
    optimiser = torch.optim.SGD(trained, lr=0.4, momentum=0.9)
    plan = bench.plan(bench.ids, 0, BRIEF.model_copy(update={"epochs": 5}))
    loader = bench.loader(plan, 0)
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
    task = bench.task(bench.plan(bench.ids, 0), 0, objective=TOKENS)
    learner, batch = Learner(task.network, task.distiller, TOKENS), task.loader.batch(0)
    heard = {name: rows.requires_grad_() for name, rows in batch.teacher.items()}
    task.distiller.loss(learner(batch.images), batch.labels, heard).backward()
    reached = sum(rows.grad is not None for rows in heard.values())
    again = torch.from_numpy(read("features", bench.ids)[:, 0]).float()
    return Exhibit(
        study="B",
        name="a trainable projector of the teacher",
        happened="The projector stood on the teacher's side and was trained with the student: the "
        "target itself moved towards what costs nothing.",
        measure="spread of the target, of that before training",
        defect=float(after / before),
        honest=float(again.std(0).mean() / teacher.std(0).mean()),
        tripwire="gradient before the target",
        sentence=f"the gradient reaches {moved} tensors before the target; in kdlib's objective of "
        f"features {reached} of {len(heard)}",
        caught=moved > 0,
        quiet=reached == 0,
    )


def _wrong_grid(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """The first patches of a grid (B, C, H, W) in reading order, as many as the other one has."""
    return grid.flatten(2)[:, :, : size[0] * size[1]].unflatten(2, size)


def truncated_patches(bench: Bench) -> Exhibit:
    """256 teacher patches cut to the first 36."""
    found = {}
    for bring in (_wrong_grid, resized):
        kept = []
        for top in (0, 1):
            for left in (0, 1):
                grid = torch.zeros(1, 1, 16, 16)
                grid[:, :, 8 * top : 8 * top + 8, 8 * left : 8 * left + 8] = 1.0
                small = bring(grid, (6, 6))
                inside = small[:, :, 3 * top : 3 * top + 3, 3 * left : 3 * left + 3]
                kept.append(float(inside.sum()) / 9)
        found[bring] = kept
    wrong, ours = found.values()
    places = ("top left", "top right", "bottom left", "bottom right")
    lost = [place for place, kept in zip(places, wrong, strict=True) if kept < 0.99]
    return Exhibit(
        study="B",
        name="patches truncated, not resized",
        happened="The teacher's 16x16 patches were cut to the first 36 to meet the student's 6x6 "
        "grid: the top 2.25 rows of the image were all that was taught.",
        measure="brightness of a quadrant that stays in it",
        defect=mean(wrong),
        honest=mean(ours),
        tripwire="a bright quadrant",
        sentence=f"a quadrant that is 1 and the rest 0, brought to 6x6: {', '.join(lost)} left "
        f"their place; by features.resized {sum(k < 0.99 for k in ours)} did",
        caught=bool(lost),
        quiet=min(ours) > 0.99,
    )


def drawn_shards(n_passes: int, order: str = "shuffled") -> Plan:
    """The plan of a training of study B's size: 25 of 122 shards a pass, each pass whole."""
    return Plan(
        np.arange(N_SHARDS * SHARD_SIZE), BATCH_SIZE, n_passes * N_BATCHES, 0, order=order,
        shard_size=SHARD_SIZE, shards_per_pass=N_DRAWN,
    )  # fmt: skip


def visits_cut_short(n_passes: int) -> np.ndarray:
    """Visits of each example where every pass takes 500 batches in sorted order: (N,) int64."""
    plan = drawn_shards(n_passes, "sequential")
    counts = np.zeros(len(plan.example_ids), np.int64)
    for number in range(n_passes):
        counts[plan.order(number)[: N_BATCHES * BATCH_SIZE]] += 1  # wrong: the pass has 800
    return counts


def biased_shards(bench: Bench) -> Exhibit:
    """25 of 122 shards a pass, sorted, cut after 500 of 800 batches: at that study's own size."""
    plan = drawn_shards(200)
    wrong, planned, ids = visits_cut_short(200), plan.visits(), plan.example_ids
    evidence = [
        {
            "coverage": checks.coverage_evidence(visits, ids, planned, N_DRAWN),
            "subset": {"n_examples": len(ids)},
            "budget": {"declared": {"unique_examples": int((planned > 0).sum())}},
        }
        for visits in (wrong, planned)
    ]
    last = slice(-(N_SHARDS // 3) * SHARD_SIZE, None)
    return Exhibit(
        study="B",
        name="shards sorted and cut short",
        happened="25 shards hold 800 batches, and a pass ended after 500: sorted shards at the "
        "end of the list were hardly ever read.",
        measure="samples from the last third of the shards",
        defect=float(wrong[last].sum() / wrong.sum()),
        honest=float(planned[last].sum() / planned.sum()),
        **judged((checks.coverage,), *evidence),
    )


def seed_plus_epoch(bench: Bench) -> Exhibit:
    """Shards drawn by a generator seeded with seed + epoch."""
    n_epochs, pair = 100, (42, 43)

    def wrong(seed: int, epoch: int) -> bytes:
        return np.random.default_rng(seed + epoch).choice(122, 25, replace=False).tobytes()

    def ours(seed: int, epoch: int) -> bytes:
        return generator(seed, "shards", epoch).choice(122, 25, replace=False).tobytes()

    shared = []
    for rule in (wrong, ours):
        one, other = ({rule(seed, epoch) for epoch in range(n_epochs)} for seed in pair)
        shared.append(len(one & other) / n_epochs)
    defect, honest = shared
    return Exhibit(
        study="B",
        name="seed + epoch",
        happened="Each epoch was seeded with seed + epoch on the global generator: two replicates "
        "drew the same shards, one epoch apart.",
        measure="draws that seeds 42 and 43 share, 100 epochs",
        defect=defect,
        honest=honest,
        tripwire="seeds.generator",
        sentence=f"the hash of seed, purpose and epoch gives {honest:.0%} shared draws instead of "
        f"{defect:.0%}",
        caught=defect > 0,
        quiet=honest == 0,
    )


def identical_views(bench: Bench) -> Exhibit:
    """Two views that collation made one."""
    network = bench.network(0)
    training = BRIEF.model_copy(update={"augment": Augment(crop_padding=1)})
    plan = bench.plan(bench.ids, 0, training)
    network.train()
    with torch.no_grad():
        first, second = (
            network.features(bench.loader(plan, seed, training).batch(0).images) for seed in (0, 1)
        )

    def agreement(one: Tensor, other: Tensor) -> float:
        """Mean correlation of the same feature in two views."""
        scaled = [(rows - rows.mean(0)) / rows.std(0, correction=0) for rows in (one, other)]
        return float((scaled[0] * scaled[1]).mean())

    sentence = refused(lambda: barlow(first, first))
    return Exhibit(
        study="B",
        name="two views that were one",
        happened="After collation both views were the same one, and Barlow Twins compared each "
        "image with itself.",
        measure="correlation of two views, untrained student",
        defect=agreement(first, first),
        honest=agreement(first, second),
        tripwire="features.two_views",
        sentence=sentence,
        caught=bool(sentence),
        quiet=not refused(lambda: barlow(first, second)),
    )


def alarm_out_of_reach(bench: Bench) -> Exhibit:
    """A collapse alarm whose threshold no features can pass."""
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
        study="B",
        name="an alarm that always rang",
        happened="The collapse alarm rang below a variance of 0.01, and unit vectors of 384 "
        "features have at most 1/384 of it.",
        measure="isotropic random features called collapsed",
        defect=mean(wrong),
        honest=mean(ours),
        tripwire="diagnostics.collapse",
        sentence=f"the largest variance that unit vectors of {n_features} features can have is "
        f"{1 / n_features:.4f}, below the alarm's {threshold}; effective rank calls "
        f"{sum(ours)} of {len(ours)} isotropic draws collapsed, and constant features "
        f"{'collapsed' if collapse(constant).collapsed else 'sound'}",
        caught=1 / n_features < threshold and all(wrong),
        quiet=not any(ours) and collapse(constant).collapsed,
    )


def c_chosen_on_test(bench: Bench) -> Exhibit:
    """The probe's C chosen on the test features, with labels that mean nothing."""
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
        study="B",
        name="C chosen on the test set",
        happened="The probe's regularisation was chosen by the accuracy that was then reported.",
        measure="probe of two classes of noise (chance: 50 %)",
        defect=mean(chosen_on_test),
        honest=mean(ours),
        tripwire="other test labels",
        sentence=f"with test labels drawn anew, C changes in {sum(moved)} of {len(moved)} draws; "
        f"that of probe.linear_probe in {sum(not h for h in held)}",
        caught=any(moved),
        quiet=all(held),
    )


def fixed_c(bench: Bench) -> Exhibit:
    """C = 1 on features of norm 1."""
    from sklearn.linear_model import LogisticRegression

    network = bench.network(0)
    pair = [bench.features(network, split) for split in ("train", "test")]

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

    found = [(rule(1.0), rule(16.0)) for rule in (wrong, ours)]
    return Exhibit(
        study="B",
        name="C = 1 on unit vectors",
        happened="The probe's C was fixed at 1 on features of norm 1, which is strong "
        "regularisation: what it measured was the norm.",
        measure="probe of the untrained student",
        defect=found[0][0],
        honest=found[1][0],
        tripwire="features times 16",
        sentence=f"the same features times 16: {found[0][0]:.1%} becomes {found[0][1]:.1%}; by "
        f"probe.linear_probe, which standardises and chooses C, {found[1][0]:.1%} stays "
        f"{found[1][1]:.1%}",
        caught=found[0][0] != found[0][1],
        quiet=found[1][0] == found[1][1],
    )


def keyed_by_pixels(bench: Bench) -> Exhibit:
    """A teacher cache keyed by the md5 of an augmented batch."""
    training = BRIEF.model_copy(update={"augment": Augment(crop_padding=1), "epochs": 2})
    plan = bench.plan(bench.ids, 0, training)
    loader = bench.loader(plan, 0, training)
    known: set[str] = set()
    stored, hits, found, n = set(bench.outputs.example_ids.tolist()), 0, 0, 0
    for k in range(plan.n_steps):
        batch = loader.batch(k)
        # wrong: no two views are the same, and no key says whose outputs they are
        key = hashlib.md5(batch.images.numpy().tobytes(), usedforsecurity=False).hexdigest()
        if k * plan.batch_size >= len(bench.ids):
            n += 1
            hits += key in known
            found += set(batch.example_ids.tolist()) <= stored
        known.add(key)
    other = weights_fingerprint(bench.network(1))
    images, folder = bench.images.train, bench.outputs.folder
    sentence = refused(lambda: open_outputs(folder, images, other))
    mine = weights_fingerprint(bench.taught[0])
    return Exhibit(
        study="B",
        name="a teacher cache keyed by pixels",
        happened="Teacher outputs were kept under the md5 of an augmented batch: the key never "
        "came again, and named no teacher.",
        measure="batches of the second pass that are found",
        defect=hits / n,
        honest=found / n,
        tripwire="teacher.open_outputs",
        sentence=sentence,
        caught=bool(sentence) and hits == 0,
        quiet=not refused(lambda: open_outputs(folder, images, mine)),
    )


class _Killed(Exception):
    """Stands for a kill."""


class _Killer(Tracker):
    """Stops the training at its first evaluation from a step on."""

    def __init__(self, at: int) -> None:
        super().__init__({})
        self.at = at

    def log(self, row: Any, step: int) -> None:
        if step >= self.at:
            raise _Killed


def resumed_elsewhere(bench: Bench) -> Exhibit:
    """A resume that draws the projector anew and skips the rest of the epoch."""
    hint = Hint(weight=1.0)
    training = BRIEF.model_copy(update={"evaluate_every_steps": 5, "epochs": 4})
    plan = bench.plan(bench.ids, 0, training)
    options = {"training": training, "objective": hint}
    whole = bench.fit(bench.task(plan, 0, **options))
    folder, settings = bench.place(), {}
    try:
        task = bench.task(plan, 0, **options)
        train(Run(folder, settings), task, None, _Killer(at=25), state_every_s=0.0)
    except _Killed:
        pass
    before = task.network.state_dict()
    other = refused(
        lambda: train(Run(folder, {"experiment": "another"}), bench.task(plan, 0, **options), None)
    )
    resumed = bench.fit(bench.task(plan, 0, **options), folder=folder)
    # wrong: the network's weights alone, from the beginning of the next pass
    task = bench.task(plan, 0, **options)
    task.network.load_state_dict(before)
    step, at = Step(task), 25
    task.network.train()
    start = -(-at * plan.batch_size // len(bench.ids)) * len(bench.ids)
    late = Plan(bench.ids, plan.batch_size, plan.n_steps + 50, 0)
    visits = np.zeros(bench.images.train.n_examples, np.int64)
    for k in range(at):
        np.add.at(visits, bench.ids[plan.at(k)[1]], 1)
    loader = bench.loader(late, 0, training, teacher=bench.outputs, reads=("stage1",))
    for k in range(at, plan.n_steps):
        where = -(-start // plan.batch_size) + k - at
        batch = loader.batch(where)
        step(batch, k)
        np.add.at(visits, batch.example_ids.numpy(), 1)
    final = [
        {k: v.clone() for k, v in network.state_dict().items()}
        for network in (whole.task.network, resumed.task.network, task.network)
    ]
    same = [
        mean([float(torch.equal(v, final[0][k])) for k, v in state.items()]) for state in final[1:]
    ]
    wrong = whole.evidence | {
        "coverage": checks.coverage_evidence(visits, bench.ids, plan.visits())
    }
    told = judged((checks.coverage,), wrong, resumed.evidence)
    told["tripwire"] += ", states.read_state"
    told["sentence"] += "; of another experiment: " + other
    told["caught"] &= bool(other)
    told["quiet"] &= same[0] == 1.0
    return Exhibit(
        study="B",
        name="a resume that went elsewhere",
        happened="A resumed run drew its projector anew, skipped the rest of the epoch, and could "
        "take another experiment's file.",
        measure="tensors equal to the uninterrupted run's",
        defect=same[1],
        honest=same[0],
        **told,
    )


DEFECTS_B = (
    stale_features, norms_of_unit_vectors, projector_of_the_teacher, truncated_patches,
    biased_shards, seed_plus_epoch, identical_views, alarm_out_of_reach, c_chosen_on_test, fixed_c,
    keyed_by_pixels, resumed_elsewhere,
)  # fmt: skip
