"""What went wrong in the results of study A: how it measured, chose and compared.

The code of the defects stands here, marked `wrong`.
"""

import shutil

from torch import Tensor

from audit.small_study import BRIEF, SEEDS, Exhibit, SmallStudy, judged, mean, named
from kdlib.models.evaluation import accuracy, all_outputs, evaluate
from kdlib.repro import checks, files
from kdlib.study import objectives
from kdlib.study.objectives import CrossEntropy, Objective
from kdlib.trainer.step import Step

ACCURACY = "test accuracy"
KD = objectives.KD(alpha=0.7, temperature=4.0)


def _wrong_accuracy(logits: Tensor, labels: Tensor, batch_size: int = 64) -> float:
    """The mean over batches of the accuracy so far."""
    right = (logits.argmax(1) == labels).double()
    ends = [*range(batch_size, len(right), batch_size), len(right)]
    return mean([float(right[:end].mean()) for end in ends])


def prefix_accuracy(small: SmallStudy) -> Exhibit:
    """Test accuracy was logged as the mean over batches of the accuracy so far. The first images
    counted more than the last ones, and the number depended on the order of the test set."""
    network = small.known("random", 0).task.network
    images, labels = small.test
    (logits,) = all_outputs(network, small.images.pixels, images, ("logits",))
    # an order that a test set may have as well: the images that are right first
    right = (logits.argmax(1) == labels).long()
    order = right.argsort(descending=True, stable=True)
    accuracies = {
        rule: [rule(logits, labels), rule(logits[order], labels[order])]
        for rule in (_wrong_accuracy, accuracy)
    }
    (wrong, sorted_wrong), (ours, sorted_ours) = accuracies.values()
    return Exhibit(
        name="the mean of prefix accuracies",
        measure=f"{ACCURACY} of one network",
        defect=wrong,
        honest=ours,
        check=named(accuracy),
        sentence=f"the same logits, the right ones first: {wrong:.1%} becomes {sorted_wrong:.1%}; "
        f"counts summed and divided once, {ours:.1%} stays {sorted_ours:.1%}",
        caught=wrong != sorted_wrong,
        quiet=ours == sorted_ours,
    )


RESTLESS = BRIEF.model_copy(update={"schedule": "constant"})


def best_on_test(small: SmallStudy) -> Exhibit:
    """What a table called the result was the best epoch on the set on which it was measured. A
    maximum over epochs lies above the accuracy of any epoch that is chosen without that set, and
    more so for restless trainings."""
    best, last = [], []
    for seed in (*SEEDS, 3, 4):
        task = small.task(small.plan(small.third("random", seed), seed), seed, training=RESTLESS)
        step, seen = Step(task), []
        for k in range(task.loader.plan.n_steps):
            task.network.train()
            step(task.loader.batch(k), k)
            if k % 5 == 4 or k == task.loader.plan.n_steps - 1:
                read = evaluate(task.network, small.images.pixels, *small.test)
                seen.append(read.accuracy)
        best.append(max(seen))  # wrong: the test set chose
        last.append(seen[-1])
    held_out = evaluate(task.network, small.images.pixels, *task.validation).read
    chosen = {"held_out": held_out, "overlap": 0, "teacher_overlap": 0, "steers": None}
    return Exhibit(
        name="the best epoch, chosen on test",
        measure=f"{ACCURACY}, mean of 5 seeds",
        defect=mean(best),
        honest=mean(last),
        **judged(
            (checks.untouched_test,),
            {"selection": chosen, "read": {"validation": [read.read]}},
            {"selection": chosen, "read": {"validation": [held_out]}},
        ),
    )


def last_called_best(small: SmallStudy) -> Exhibit:
    """Numbers of the best epoch stood beside the weights of the last one. The teacher that was
    loaded had another accuracy than the one printed for it."""
    training = RESTLESS.model_copy(update={"evaluate_every_steps": 5})
    for seed in range(10):
        fit = small.student(small.third("random", seed), seed, training=training)
        if fit.trained.best_step != fit.trained.last_step:
            break
    entries = {}
    for which, step in (("last", fit.trained.last_step), ("best", fit.trained.best_step)):
        file = fit.trained.checkpoints[step][0]
        entries[which] = {"file": file, "file_sha256": files.sha256_file(fit.folder / file)}
    evidence = {"checkpoints": entries}
    before = checks.checkpoint_hashes(fit.folder, evidence)
    last, best = (fit.folder / entries[which]["file"] for which in ("last", "best"))
    shutil.copy(last, best)  # wrong: only the last weights were ever kept
    after = checks.checkpoint_hashes(fit.folder, evidence)
    rows = fit.trained.metrics["validation_accuracy"]
    validation = evaluate(fit.task.network, small.images.pixels, *fit.task.validation).accuracy
    return Exhibit(
        name="last weights called best",
        measure="validation accuracy told of the kept weights",
        defect=float(rows.max()),
        honest=validation,
        check=named(checks.checkpoint_hashes),
        sentence=after.sentence,
        caught=not after.passed,
        quiet=before.passed,
    )


def no_plain_student(small: SmallStudy) -> Exhibit:
    """No subset was trained on without distillation. What the choice of the subset does to any
    student was credited to the teacher."""
    taught = [small.known("random", seed, KD).accuracy for seed in SEEDS]
    plain, elsewhere = (
        [small.known(strategy, seed).accuracy for seed in SEEDS] for strategy in ("random", "easy")
    )

    def settings(strategy: str, objective: Objective) -> dict:
        return {"subset": {"strategy": strategy}, "objective": objective.model_dump()}

    cross_entropy = CrossEntropy()
    pairs = [
        checks.differing(settings("random", KD), settings(strategy, cross_entropy), ["objective."])
        for strategy in ("easy", "random")
    ]
    return Exhibit(
        name="no student without the teacher",
        measure="points credited to the teacher",
        defect=mean(taught) - mean(elsewhere),  # wrong: another subset
        honest=mean(taught) - mean(plain),
        check=named(checks.differing),
        sentence="differs from the other runs in " + ", ".join(pairs[0]),
        caught=bool(pairs[0]),
        quiet=not pairs[1],
    )


def stopped_early(small: SmallStudy) -> Exhibit:
    """Early stopping was left on, and arguments that were not known were dropped without a word.
    Runs of one table took different numbers of steps, and a subset that learns fast was cut
    short."""
    honest = small.known("random", 0)
    eager = RESTLESS.model_copy(update={"early_stopping": 1, "evaluate_every_steps": 2})
    wrong = small.fit(small.task(honest.plan, 0, training=eager))
    return Exhibit(
        name="early stopping left on",
        measure="steps taken, of those declared",
        defect=wrong.trained.last_step / wrong.plan.n_steps,
        honest=honest.trained.last_step / honest.plan.n_steps,
        **judged((checks.budget, checks.coverage), wrong.evidence, honest.evidence),
    )
