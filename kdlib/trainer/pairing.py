"""Whether an objective's value depends on which example a row of teacher outputs belongs to."""

from typing import Any

import numpy as np
import torch

from kdlib.models.base import eval_mode
from kdlib.models.evaluation import accuracy
from kdlib.study.objectives import needs_teacher
from kdlib.trainer.step import Learner, Task

CHUNK = 5000  # examples whose teacher logits are read at once


@torch.no_grad()
def pairing(task: Task, learner: Learner, n: int = 512) -> dict[str, Any] | None:
    """The distillation term on `n` evenly spaced training examples, with their teacher outputs and
    with swapped ones.

    Swapped: each example gets the teacher outputs of an example of another class, as long as no
    class holds more than half of the examples; of another example where there is one class, or no
    labels.

    Returns: {"paired", "permuted"}: the two terms, the second None where there is one example;
        "teacher_accuracy": of the teacher logits of all
        training examples as the loader returns them, None when the objective reads no logits or
        the teacher computes them live. None for an objective without a teacher.
    """
    loader = task.loader
    if not needs_teacher(task.objective):
        return None
    every = np.arange(len(loader.plan.example_ids))
    chosen = np.linspace(0, len(every) - 1, min(n, len(every))).astype(np.int64)
    labels = loader.labels[chosen]
    teacher = loader.teacher_rows(chosen, np.zeros_like(chosen))
    by_class = labels.argsort(stable=True)
    shift = int(labels.unique(return_counts=True)[1].max())
    shift = 1 if shift == len(labels) else shift
    swapped = {name: rows.clone() for name, rows in teacher.items()}
    for name, rows in teacher.items():
        swapped[name][by_class] = rows[by_class.roll(shift)]
    with eval_mode(learner):
        images = task.pixels.prepare(loader.raw(chosen))
        parts = [learner(some) for some in images.split(128)]
    exact = task.distiller.exact  # float64 shows a term that ignores the teacher
    student = {name: torch.cat([p[name] for p in parts]).to(exact) for name in parts[0]}
    terms = {}
    for key, rows in (("paired", teacher), ("permuted", swapped)):
        outputs = {name: values.to(exact) for name, values in rows.items()}
        terms[key] = float(task.distiller.soft_term(student, outputs, labels))
    if len(chosen) == 1:
        terms["permuted"] = None
    if "logits" not in teacher or loader.live is not None:
        return terms | {"teacher_accuracy": None}
    chunks = np.split(every, every[CHUNK::CHUNK])
    logits = [loader.teacher_rows(some, np.zeros_like(some))["logits"] for some in chunks]
    return terms | {"teacher_accuracy": accuracy(torch.cat(logits), loader.labels)}
