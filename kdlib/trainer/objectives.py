"""What a student minimises: each objective's formula, what it reads, and what it trains beside the
student.

Projectors stand on the student's side alone; no parameter with a gradient lies before a teacher's
tensor. Leaves to others: the terms themselves (`losses`, `features`).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.repro.seeds import torch_seeded
from kdlib.study.objectives import Objective, needs_teacher
from kdlib.study.user_code import run
from kdlib.trainer import feature_losses
from kdlib.trainer.logit_losses import decoupled, dist_terms, logit_mse, soft_loss, standardised


def teacher_columns(objective: Objective, n_stages: int) -> tuple[str, ...]:
    """Which outputs of a teacher with `n_stages` stages an objective reads.

    Raises: ValueError for a stage the teacher does not have.
    """
    kind = objective.kind
    if kind in ("kd", "mse", "dkd", "dist"):
        return ("logits",)
    if kind in ("rkd", "crd"):
        return ("features",)
    if kind in ("hint", "similarity"):
        return (f"stage{_stage(objective, n_stages)}",)
    if kind == "attention":
        _stage(objective, n_stages)
        return tuple(f"attention{k}" for k in range(1, n_stages + 1))
    if kind == "tokens":
        return ("features", f"stage{_stage(objective, n_stages)}")
    return getattr(objective, "reads", ())


def student_outputs(objective: Objective, n_stages: int) -> tuple[str, ...]:
    """Which outputs of a student with `n_stages` stages an objective reads, `logits` first.

    Raises: ValueError for a stage the student does not have.
    """
    if objective.kind in ("kd", "mse", "dkd", "dist"):
        return ("logits",)
    read = teacher_columns(objective, n_stages) if needs_teacher(objective) else ()
    return tuple(dict.fromkeys(("logits", *read)))


def _stage(objective: Objective, n_stages: int) -> int:
    stage = getattr(objective, "stage", "last")
    if isinstance(stage, str):
        stage = {"middle": (n_stages + 1) // 2, "last": n_stages}[stage]
    if not 1 <= stage <= n_stages:
        raise ValueError(
            f"objective {objective.kind} reads stage {stage} of networks of which one has "
            f"{n_stages} stages; expected a stage in [1, {n_stages}]"
        )
    return stage


class Distiller(nn.Module):
    """An objective's loss, and the projectors it trains beside the student."""

    def __init__(self, objective: Objective, n_examples: int) -> None:
        super().__init__()
        self.objective, self.n_examples = objective, n_examples
        self.projectors = nn.ModuleDict()

    def project(
        self, outputs: Mapping[str, Tensor], second: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Everything that has parameters, of each process's own examples.

        Args:
            outputs: The student's, by name, as `student_outputs` lists them. For `tokens` the
                logits are those of detached features.
            second: The same of a second view of the same examples.

        Returns: (B, ...) by name.
        """
        found = dict(outputs)
        for name, module in self.projectors.items():
            if name != "barlow":
                found[name] = module(outputs[name])
        if second is not None:
            for key, seen in (("view1", outputs), ("view2", second)):
                found[key] = self.projectors["barlow"](seen["features"])
        return found

    def loss(
        self, projected: Mapping[str, Tensor], labels: Tensor, teacher: Mapping[str, Tensor]
    ) -> Tensor:
        """The loss of a whole batch, from what `project` gave of it.

        Args:
            labels: (B,) int64 in [0, C).
            teacher: (B, ...) float by name, as `teacher_columns` lists them.

        Returns: Scalar, mean over the batch.
        Raises: ValueError when the teacher's outputs are missing.
        """
        o, logits = self.objective, _full(projected["logits"])
        if o.kind == "label_smoothing":
            return F.cross_entropy(logits, labels, label_smoothing=o.smoothing)
        if o.kind == "own":
            return self._own("loss", *_heard(projected, teacher), labels)
        hard = F.cross_entropy(logits, labels)
        if o.kind == "cross_entropy":
            return hard
        soft = self.soft_term(projected, teacher, labels)
        if o.kind == "kd":
            return (1 - o.alpha) * hard + o.alpha * o.temperature**2 * soft
        if o.kind == "mse":
            return (1 - o.alpha) * hard + o.alpha * soft
        if o.kind in ("dkd", "dist"):
            return hard + o.temperature**2 * soft
        if o.kind in ("hint", "attention", "similarity", "crd"):
            return hard + o.weight * soft
        if o.compares_views:
            soft = soft + o.barlow_weight * feature_losses.barlow(
                _full(projected["view1"]), _full(projected["view2"])
            )
        return hard + soft

    def soft_term(
        self,
        projected: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        labels: Tensor | None = None,
    ) -> Tensor:
        """The part of the loss that hears the teacher, before the weight of its whole; of `own` its
        file's `term`, or else the loss.

        Args:
            labels: (B,) int64, for `dkd`, `crd` and `own`, which tell classes apart.
        """
        o = self.objective
        student, heard = _heard(projected, teacher)
        if o.kind == "own":
            return self._own(
                "term" if hasattr(self.code, "term") else "loss", student, heard, labels
            )
        missing = [n for n in self.reads if n not in heard]
        if missing:
            raise ValueError(
                f"the {o.kind} objective needs teacher {', '.join(missing)}; run "
                "notebooks/02_teacher.ipynb"
            )
        if o.kind in ("kd", "mse", "dkd", "dist"):
            return self._of_logits(student["logits"], heard["logits"], labels)
        if o.kind == "attention":
            return feature_losses.attention(
                *([of[n] for n in self.reads] for of in (student, heard))
            )
        if o.kind == "tokens":
            cls, patches = feature_losses.tokens(
                student["features"], student[self._grid], heard["features"], heard[self._target]
            )
            return o.cls_weight * cls + o.patch_weight * patches
        (name,) = self.reads
        own = student[self._grid or name]
        if o.kind == "hint":
            return feature_losses.hint(own, heard[name])
        if o.kind == "similarity":
            return feature_losses.similarity(own, heard[name])
        if o.kind == "crd":
            embedded = heard[name] @ self.teacher_projection.to(heard[name].dtype)
            return feature_losses.crd(own, embedded, labels, o.temperature, self.n_examples)
        distance, angle = feature_losses.rkd(own, heard[name])
        return o.distance_weight * distance + o.angle_weight * angle

    def _own(
        self,
        function: str,
        student: Mapping[str, Tensor],
        heard: Mapping[str, Tensor],
        labels: Tensor,
    ) -> Tensor:
        """What a function of the study's own file gives."""
        o = self.objective
        found = getattr(self.code, function)(student, heard, labels, **o.options)
        if not isinstance(found, Tensor) or found.ndim:
            seen = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{o.code}: {function} gave {seen}; expected a tensor of no axis")
        return found

    def _of_logits(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        o = self.objective
        if o.kind == "mse":
            return logit_mse(student, teacher)
        if o.standardise:
            student, teacher = standardised(student), standardised(teacher)
        if o.kind == "kd":
            return soft_loss(student, teacher, o.temperature)
        if o.kind == "dkd":
            target, rest = decoupled(student, teacher, labels, o.temperature)
            return o.target_weight * target + o.rest_weight * rest
        inter, intra = dist_terms(student, teacher, o.temperature)
        return o.inter_weight * inter + o.intra_weight * intra


def build_distiller(
    objective: Objective,
    student_shapes: Mapping[str, tuple[int, ...]],
    teacher_shapes: Mapping[str, tuple[int, ...]],
    *,
    seed: int,
    n_examples: int,
) -> Distiller:
    """An objective with its projectors drawn from the run's seed.

    Args:
        student_shapes, teacher_shapes: Of the outputs it reads, by name, without batch axis.
        n_examples: Of the training set.

    Raises: ValueError for networks whose shapes do not fit the objective, or no teacher where it
        needs one.
    """
    made = Distiller(objective, n_examples)
    kind, projectors = objective.kind, made.projectors
    if needs_teacher(objective) and not teacher_shapes:
        raise ValueError(
            f"objective {kind} reads a teacher's outputs, and there are none; run "
            "notebooks/02_teacher.ipynb"
        )
    made.reads = tuple(teacher_shapes)
    made._grid, made._target = (
        next((name for name in shapes if name.startswith("stage")), None)
        for shapes in (student_shapes, teacher_shapes)
    )
    if kind == "attention":
        n = sum(name.startswith("attention") for name in student_shapes)
        if n != len(teacher_shapes):
            raise ValueError(
                f"objective attention pairs stages, and the student has {n}, the teacher "
                f"{len(teacher_shapes)}; take networks with as many, or objective similarity"
            )
    with torch_seeded(seed, "projector"):
        if kind == "own":
            made.code = run(objective, "loss", "loss(student, teacher, labels, **options)")
            if hasattr(made.code, "projectors"):
                options = objective.options
                projectors.update(made.code.projectors(student_shapes, teacher_shapes, **options))
            if strange := set(projectors) - set(student_shapes):
                raise ValueError(
                    f"{objective.code}: projectors stand behind {sorted(strange)}; expected some "
                    f"of {sorted(student_shapes)}"
                )
        if kind in ("hint", "tokens"):
            n_in, n_out = student_shapes[made._grid][0], teacher_shapes[made._target][0]
            projectors[made._grid] = nn.Conv2d(n_in, n_out, 1, bias=False)
        if kind == "tokens":
            (n_in,), (n_out,) = student_shapes["features"], teacher_shapes["features"]
            projectors["features"] = nn.Linear(n_in, n_out)
            if objective.compares_views:
                projectors["barlow"] = nn.Sequential(
                    nn.Linear(n_in, n_in, bias=False),
                    nn.BatchNorm1d(n_in),
                    nn.ReLU(),
                    nn.Linear(n_in, n_in, bias=False),
                )
        if kind == "crd":
            width, (n_in,) = objective.width, student_shapes["features"]
            (n_teacher,) = teacher_shapes["features"]
            if width > n_teacher:
                raise ValueError(
                    f"objective crd embeds {n_teacher} teacher features in {width}; expected a "
                    f"width of at most {n_teacher} (study: objectives.<name>.width)"
                )
            projectors["features"] = nn.Linear(n_in, width)
            # the paper trains the teacher's embedding too; fixed and orthogonal, it keeps what
            # the teacher says and cannot collapse
            drawn, _ = torch.linalg.qr(torch.randn(n_teacher, width))
            made.register_buffer("teacher_projection", drawn)
    return made


def _heard(
    projected: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The student's and the teacher's outputs as losses take them, the latter without gradient."""
    student = {name: _full(value) for name, value in projected.items()}
    return student, {name: _full(value).detach() for name, value in teacher.items()}


def _full(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
