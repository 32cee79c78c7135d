"""What went wrong in study A, which chose subsets by training dynamics: each defect made again in
miniature, beside the number without it and the check that catches it.

The code of the defects stands here, marked `wrong`.
"""

import dataclasses

import numpy as np
import torch

from audit.small_study import BRIEF, SEEDS, THIRD, Exhibit, SmallStudy, judged, mean, named, refused
from audit.study_a_results import (
    ACCURACY,
    best_on_test,
    last_called_best,
    no_plain_student,
    prefix_accuracy,
    stopped_early,
)
from kdlib.cartography.log import DynamicsLog
from kdlib.cartography.selection import select
from kdlib.cartography.subset import Subset
from kdlib.dataset.plan import budget
from kdlib.models.weights import weights_fingerprint
from kdlib.repro import checks, files
from kdlib.repro.seeds import generator
from kdlib.study.selections import Mixture
from kdlib.trainer.step import Step, Task


def ignored_subset(small: SmallStudy) -> Exhibit:
    """A guard forgot the probability of the random subset, so that the baseline called a random
    third trained on all images. Every subset of a third was compared with three times its data,
    and the conclusion that random choice wins rests on it."""
    wrong, honest = [], []
    for seed in SEEDS:
        honest.append(small.known("random", seed))
        declared = honest[-1].plan  # wrong: the loader forgot this plan
        wrong.append(dataclasses.replace(small.known("full", seed), plan=declared))
    return Exhibit(
        name="a random third that was the full set",
        measure=f"{ACCURACY} of a random third",
        defect=mean([fit.accuracy for fit in wrong]),
        honest=mean([fit.accuracy for fit in honest]),
        **judged((checks.budget, checks.coverage), wrong[0].evidence, honest[0].evidence),
    )


# At BRIEF's rate the loss of a network without BatchNorm's training is soon NaN
GENTLE = BRIEF.model_copy(update={"lr_peak": 0.05, "epochs": 5})


def _wrong_recording(task: Task) -> None:
    """Record a clean pass after each epoch, and leave the network in evaluation mode."""
    step, loader = Step(task), task.loader
    n = len(loader.plan.example_ids)
    task.network.train()
    for k in range(loader.plan.n_steps):
        step(loader.batch(k), k)
        if (k + 1) * loader.plan.batch_size // n > k * loader.plan.batch_size // n:
            task.network.eval()  # wrong: never undone
            with torch.no_grad():
                task.network(task.pixels.prepare(loader.raw(np.arange(n))))


def frozen_statistics(small: SmallStudy) -> Exhibit:
    """The callback that recorded dynamics switched the network to evaluation mode and did not
    switch it back. From the second epoch on, BatchNorm kept its statistics in every recorded run,
    the teacher's included: the recording changed the training that it recorded."""
    wrong, honest, same, differ = [], [], [], []
    sentence = ""
    for seed in SEEDS[:2]:
        plan = small.plan(small.ids, seed, GENTLE)
        plain = small.fit(small.task(plan, seed, training=GENTLE))
        log = small.log(plan, "eval")
        recorded = small.fit(small.task(plan, seed, training=GENTLE, log=log, observed="eval"))
        log.finish()
        task = small.task(plan, seed, training=GENTLE)
        _wrong_recording(task)
        wrong.append(small.accuracy(task.network))
        honest.append(recorded.accuracy)
        unrecorded, ours, theirs = (
            weights_fingerprint(network)[:12]
            for network in (plain.task.network, recorded.task.network, task.network)
        )
        same.append(unrecorded == ours)
        differ.append(unrecorded != theirs)
        sentence = sentence or (
            f"weights {unrecorded} unrecorded, {theirs} recorded: recording changed the training; "
            f"recorded by kdlib {ours}"
        )
    return Exhibit(
        name="recording that froze BatchNorm",
        measure=f"{ACCURACY} of the recorded network",
        defect=mean(wrong),
        honest=mean(honest),
        check=named(weights_fingerprint),
        sentence=sentence,
        caught=all(differ),
        quiet=all(same),
    )


def one_seed(small: SmallStudy) -> Exhibit:
    """Every seed and split was overwritten by the teacher's, so that three replicates were one
    training three times. The spread over seeds was 0, and any difference looked certain."""
    honest = [small.known("random", seed) for seed in SEEDS]
    same = small.known("random", 0)  # wrong: whatever was requested
    evidences = [fit.evidence for fit in honest]
    forged = [
        same.evidence | {"seeds": evidence["seeds"] | {"requested": seed}}
        for seed, evidence in zip(SEEDS, evidences, strict=True)
    ]
    outcomes = checks.distinct_seeds(forged)
    return Exhibit(
        name="three seeds that were one",
        measure=f"s.d. of {ACCURACY} over seeds",
        defect=float(np.std([same.accuracy for _ in SEEDS], ddof=1)),
        honest=float(np.std([fit.accuracy for fit in honest], ddof=1)),
        check=named(checks.distinct_seeds),
        sentence=f"seed {SEEDS[0]} {outcomes[0].sentence}",
        caught=not any(check.passed for check in outcomes),
        quiet=all(check.passed for check in checks.distinct_seeds(evidences)),
    )


def unsaved_subset(small: SmallStudy) -> Exhibit:
    """Random subsets were drawn before the generator was seeded, and were not saved. The same seed
    gave another subset each time, and no result could be made again."""
    n = budget(len(small.ids), THIRD)
    # wrong: what the generator happens to hold; two sessions are two states
    drawn = [np.sort(generator(s, "subset").choice(small.ids, n, replace=False)) for s in (11, 12)]
    ours = [small.third("random", 0) for _ in range(2)]

    def saved(ids: np.ndarray) -> Subset:
        return Subset(ids, "random", THIRD, 0, None, files.fingerprint(small.images.fingerprints))

    path = saved(drawn[0]).save(small.place() / "subset.parquet")
    sentence = refused(lambda: saved(drawn[1]).save(path))
    again = saved(ours[0]).save(small.place() / "subset.parquet")
    return Exhibit(
        name="subsets drawn before the seed was set",
        measure="examples that two draws of one seed share",
        defect=len(np.intersect1d(*drawn)) / n,
        honest=len(np.intersect1d(*ours)) / n,
        check=named(Subset.save),
        sentence=sentence,
        caught=bool(sentence),
        quiet=not refused(lambda: saved(ours[1]).save(again)),
    )


def _size_evidence(n_declared: int, ids: np.ndarray) -> checks.Evidence:
    declared = {"unique_examples": n_declared}
    return {"budget": {"declared": declared, "recorded": {"unique_examples": len(ids)}}}


def overlapping_union(small: SmallStudy) -> Exhibit:
    """Mixtures were unions of regions that overlap, and an image in both counted once. Rows of one
    table had subsets of different sizes, and smaller subsets looked like worse mixtures."""
    n, table = budget(len(small.ids), THIRD), small.table
    halves = {"ambiguous": n - n // 2, "hard": n // 2}
    # wrong: what both regions hold counts once
    union = np.unique(np.concatenate([select(table, m, s, 0) for s, m in halves.items()]))
    rule = Mixture(shares={"ambiguous": 0.5, "hard": 0.5})
    mixed = select(table, n, rule, 0)
    return Exhibit(
        name="a union of regions that overlap",
        measure="size of a third, half ambiguous, half hard",
        defect=len(union) / len(small.ids),
        honest=len(mixed) / len(small.ids),
        **judged((checks.budget,), _size_evidence(n, union), _size_evidence(n, mixed)),
    )


def slice_of_minus_zero(small: SmallStudy) -> Exhibit:
    """The top n of a ranking was its slice from -n, and a slice from -0 is the whole ranking. A
    mixture with a share of 0 for one region trained on all images."""
    n, order = 0, small.table["confidence"].sort_values(kind="stable").index.to_numpy()
    wrong = order[-n:]  # wrong: -0 is 0
    ours = select(small.table, n, "confidence_top", 0)
    return Exhibit(
        name="a slice of -0 that took everything",
        measure="size of an empty part of a mixture",
        defect=len(wrong) / len(small.ids),
        honest=len(ours) / len(small.ids),
        **judged((checks.budget,), _size_evidence(n, wrong), _size_evidence(n, ours)),
    )


def ties_in_order(small: SmallStudy) -> Exhibit:
    """Most images are classified rightly in every epoch and tie at the highest correctness. Which
    of them made the top third was decided by their place in the data set: sorted by class, the
    third lacks classes."""
    n, table = budget(len(small.ids), THIRD), small.table
    by_class = table.sort_values(["label", "confidence"], kind="stable")
    shuffled = by_class.iloc[generator(0, "order").permutation(len(by_class))]

    def wrong(rows) -> np.ndarray:
        """Ties stay in the order of the data set."""
        ranked = rows["correctness"].sort_values(ascending=False, kind="stable")
        return np.sort(ranked.index[:n].to_numpy())

    def ours(rows) -> np.ndarray:
        return select(rows, n, "correctness_top", 0)

    shares = [len(np.intersect1d(rule(by_class), rule(shuffled))) / n for rule in (wrong, ours)]
    return Exhibit(
        name="ties cut in the order of the data set",
        measure=f"{ACCURACY}, data set sorted by class",
        defect=mean([small.student(wrong(by_class), seed).accuracy for seed in SEEDS]),
        honest=mean([small.student(ours(by_class), seed).accuracy for seed in SEEDS]),
        check="a permuted data set",
        sentence=f"the data set permuted, {shares[0]:.0%} of the selection is the same; of "
        f"kdlib's, whose ties are drawn by seed and id, {shares[1]:.0%}",
        caught=shares[0] < 1,
        quiet=shares[1] == 1,
    )


def keyed_by_position(small: SmallStudy) -> Exhibit:
    """Dynamics were kept by the position of an image in its split. After another split each score
    belonged to another image, so that an easy third was a random one."""
    n, table = budget(len(small.ids), THIRD), small.table
    easiest = select(table, n, "easy", 0)
    places = np.searchsorted(small.ids, easiest)  # wrong: positions, taken for ids
    log = small.teacher[1]
    fresh = small.log(small.plan(small.ids, 0))
    rng = generator(0, "order")
    logits = rng.normal(size=(len(places), small.images.n_classes)).astype(np.float32)
    epochs, labels = np.zeros(len(places), np.int64), small.labels(places)
    sentence = refused(lambda: fresh.record(epochs, places, logits, labels))
    honest = refused(lambda: fresh.record(epochs, places, logits, log.labels[places]))
    other = small.images.fingerprints | {"split": "another"}
    split = refused(lambda: DynamicsLog.open(log.folder, other))
    return Exhibit(
        name="dynamics keyed by position",
        measure="examples of the easiest third that are easy",
        defect=float(np.isin(places, easiest).mean()),
        honest=float(np.isin(small.ids[np.searchsorted(small.ids, easiest)], easiest).mean()),
        check=named(DynamicsLog.record, DynamicsLog.open),
        sentence=f"{sentence}; of another split: {split}",
        caught=bool(sentence) and bool(split),
        quiet=not honest,
    )


DEFECTS_A = (
    ignored_subset, frozen_statistics, one_seed, unsaved_subset, overlapping_union,
    slice_of_minus_zero, ties_in_order, keyed_by_position, prefix_accuracy, best_on_test,
    last_called_best, no_plain_student, stopped_early,
)  # fmt: skip
