"""What went wrong in the runs of study B: how it drew shards, seeded, cached and resumed.

The code of the defects stands here, marked `wrong`.
"""

import hashlib
from typing import Any

import numpy as np
import torch

from audit.small_study import BRIEF, Exhibit, SmallStudy, judged, mean, named, refused
from kdlib.cache.outputs import open_outputs
from kdlib.dataset.plan import Plan
from kdlib.models.weights import weights_fingerprint
from kdlib.repro import checks
from kdlib.repro.run import Run
from kdlib.repro.seeds import generator
from kdlib.study.objectives import Hint
from kdlib.study.training import Augment
from kdlib.trainer.loop import train
from kdlib.trainer.state import read_state
from kdlib.trainer.step import Step
from kdlib.trainer.tracking import Tracker

# The scheme of study B: a pass draws 25 of 122 shards of 2,048 images, sorts them, and ends after
# 500 of their 800 batches of 64, so that the last shards are hardly read.
N_SHARDS, SHARD_SIZE, N_DRAWN, N_BATCHES, BATCH_SIZE = 122, 2048, 25, 500, 64


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


def biased_shards(small: SmallStudy) -> Exhibit:
    """The drawn shards hold 800 batches, were read in sorted order, and a pass ended after 500. The
    shards at the end of the list were hardly ever read."""
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
        name="shards sorted and cut short",
        measure="samples from the last third of the shards",
        defect=float(wrong[last].sum() / wrong.sum()),
        honest=float(planned[last].sum() / planned.sum()),
        **judged((checks.coverage,), *evidence),
    )


def seed_plus_epoch(small: SmallStudy) -> Exhibit:
    """Each epoch was seeded with seed + epoch on the global generator. Two replicates drew the same
    shards, one epoch apart, and were counted as independent."""
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
        name="seed + epoch",
        measure="draws that seeds 42 and 43 share, 100 epochs",
        defect=defect,
        honest=honest,
        check=named(generator),
        sentence=f"the hash of seed, purpose and epoch gives {honest:.0%} shared draws instead of "
        f"{defect:.0%}",
        caught=defect > 0,
        quiet=honest == 0,
    )


def keyed_by_pixels(small: SmallStudy) -> Exhibit:
    """Teacher outputs were kept under the md5 of an augmented batch. The same pixels did not come
    again, so that no output was read twice, and the key named no teacher."""
    training = BRIEF.model_copy(update={"augment": Augment(crop_padding=1), "epochs": 2})
    plan = small.plan(small.ids, 0, training)
    loader = small.loader(plan, 0, training)
    known: set[str] = set()
    stored, hits, complete, n = set(small.outputs.example_ids.tolist()), 0, 0, 0
    for k in range(plan.n_steps):
        batch = loader.batch(k)
        # wrong: no two views are the same, and no key says whose outputs they are
        key = hashlib.md5(batch.images.numpy().tobytes(), usedforsecurity=False).hexdigest()
        if k * plan.batch_size >= len(small.ids):
            n += 1
            hits += key in known
            complete += set(batch.example_ids.tolist()) <= stored
        known.add(key)
    other = weights_fingerprint(small.network(1))
    images, folder = small.images.train, small.outputs.folder
    sentence = refused(lambda: open_outputs(folder, images, other))
    mine = weights_fingerprint(small.teacher[0])
    return Exhibit(
        name="a teacher cache keyed by pixels",
        measure="batches of the second pass that are found",
        defect=hits / n,
        honest=complete / n,
        check=named(open_outputs),
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


def resumed_elsewhere(small: SmallStudy) -> Exhibit:
    """A resumed run drew its projector anew and skipped the rest of the epoch. It could also take
    the file of another experiment, and what it ended with was no longer the declared training."""
    hint = Hint(weight=1.0)
    training = BRIEF.model_copy(update={"evaluate_every_steps": 5, "epochs": 4})
    plan = small.plan(small.ids, 0, training)
    options = {"training": training, "objective": hint}
    whole = small.fit(small.task(plan, 0, **options))
    folder, settings = small.place(), {}
    try:
        task = small.task(plan, 0, **options)
        train(Run(folder, settings), task, None, _Killer(at=25), state_every_s=0.0)
    except _Killed:
        pass
    before = task.network.state_dict()
    other = refused(
        lambda: train(Run(folder, {"experiment": "another"}), small.task(plan, 0, **options), None)
    )
    resumed = small.fit(small.task(plan, 0, **options), folder=folder)
    # wrong: the network's weights alone, from the beginning of the next pass
    task = small.task(plan, 0, **options)
    task.network.load_state_dict(before)
    step, at = Step(task), 25
    task.network.train()
    start = -(-at * plan.batch_size // len(small.ids)) * len(small.ids)
    late = Plan(small.ids, plan.batch_size, plan.n_steps + 50, 0)
    visits = np.zeros(small.images.train.n_examples, np.int64)
    for k in range(at):
        np.add.at(visits, small.ids[plan.at(k)[1]], 1)
    loader = small.loader(late, 0, training, teacher=small.outputs, reads=("stage1",))
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
        "coverage": checks.coverage_evidence(visits, small.ids, plan.visits())
    }
    result = judged((checks.coverage,), wrong, resumed.evidence)
    result["check"] += ", " + named(read_state)
    result["sentence"] += "; of another experiment: " + other
    result["caught"] &= bool(other)
    result["quiet"] &= same[0] == 1.0
    return Exhibit(
        name="a resume that went elsewhere",
        measure="tensors equal to the uninterrupted run's",
        defect=same[1],
        honest=same[0],
        **result,
    )
