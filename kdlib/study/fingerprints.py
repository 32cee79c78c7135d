"""The settings that each step reads, with which a finished run or a shared study is compared."""

from typing import TYPE_CHECKING, Any

from kdlib.repro.files import difference
from kdlib.study.base import StudyError
from kdlib.study.cells import Cell
from kdlib.study.evaluation import AXES
from kdlib.study.objectives import needs_teacher
from kdlib.study.selections import CORESETS

if TYPE_CHECKING:
    from kdlib.study.study import Study

_SCORING = tuple(f"dynamics.{key}" for key in ("el2n_epoch", "window", "clusters"))
_RECORDED = tuple(f"dynamics.{key}" for key in ("observed", "logits", "gradient_epoch"))

# Sections, and keys of sections, that each step reads; `-` and a key leaves it out again
READS = {
    "cache": ("data",),
    "teacher": (
        "teacher", "dynamics", *(f"-{key}" for key in _SCORING), "-dynamics.per_seed", "compute",
    ),
    "datamap": _SCORING,
    "record": ("recordings", *_RECORDED, "compute"),
    "audit": ("compute",),
    "scores": (*_SCORING, "recordings"),
    "noise": (*_SCORING, "recordings"),
    "probe": ("probe", *(f"-probe.{axis}" for axis in AXES), "compute"),
    "compare": (
        "data", "teacher", "teachers", "dynamics", *(f"-{key}" for key in _SCORING), "selections",
        "students", "training", "objectives", "axes", "seeds", "probe", "compare", "compute",
    ),
}  # fmt: skip


def step_settings(
    study: "Study", step: str, cell: Cell | None = None, teacher: str | None = None
) -> dict[str, Any]:
    """The settings that one step reads, without those of earlier steps, whose results it names by
    fingerprints.

    Args:
        step: One of `READS`, or distill.
        cell: The cell, for distill.
        teacher: One of the further teachers, for teacher; None: the study's `teacher`.
    """
    dump = dumped(study)
    if step == "distill":
        return _of_student(study, dump, cell)
    settings = {}
    for key in READS[step]:
        section, _, name = key.removeprefix("-").partition(".")
        if key.startswith("-"):
            settings[section].pop(name, None)
        elif not name and section in dump:
            value = dump[section]
            settings[section] = dict(value) if isinstance(value, dict) else value
        elif name in dump.get(section, {}):
            settings.setdefault(section, {})[name] = dump[section][name]
    if step == "record":
        settings["training"] = study.recorded_training.model_dump(mode="json", exclude_none=True)
    if step == "compare" and study.dynamics.per_seed:  # they choose its subsets
        settings["recordings"] = dumped(study.upstream)["recordings"]
    if step == "teacher":
        if teacher is not None:
            del settings["dynamics"]
            settings["teacher"] = dump["teachers"][teacher]
            settings |= _read_as(study)
        if study.teacher.stored.views:  # replayed views are those of the students' augmentation
            settings["augment"] = dump["training"]["augment"]
        read = {o.teacher_features for o in study.objectives.values() if o.teacher == teacher}
        settings["features_for"] = sorted(read - {None})
    return settings


def dumped(study: "Study", **options: Any) -> dict[str, Any]:
    """The settings on which results depend, as JSON; keys without a value are left out."""
    aside = {"name": True, "shares": True, "tracking": True, "compute": {"images"}}
    return study.model_dump(mode="json", exclude=aside, exclude_none=True, **options)


def _of_student(study: "Study", dump: dict[str, Any], cell: Cell) -> dict[str, Any]:
    subset = {"strategy": cell.strategy, **cell.size}
    if cell.strategy in study.selections or cell.strategy in CORESETS:
        rule = study.selection(cell.strategy)
        subset["rule"] = rule.model_dump(mode="json", exclude_none=True)
    settings = {
        "student": dump["students"][cell.student],
        "objective": dump["objectives"][cell.objective],
        "subset": subset,
        "training": dump["training"],
        "compute": dump["compute"],
    }
    objective = study.objectives[cell.objective]
    if objective.teacher not in study.shared_teachers:
        settings["teacher"] = dump["teachers"][objective.teacher]
    return settings | (_read_as(study) if needs_teacher(objective) else {})


def _read_as(study: "Study") -> dict[str, Any]:
    """How teachers' outputs are read, for settings without those of the study's own teacher."""
    if study.teacher.live:
        return {"teacher_outputs": "live"}
    grid = study.teacher.stored.grid
    return {} if grid is None else {"teacher_outputs": {"grid": grid}}


def sharing(study: "Study", other: "Study") -> "Study":
    """The study with the images, teacher, recorded dynamics and datamap of another one.

    Raises: StudyError with the differences, where the study asks for something else.
    """
    lines = []
    for step in ("cache", "teacher", "datamap"):
        ours, theirs = study.step_settings(step), other.step_settings(step)
        if step == "teacher":
            missing = set(ours.pop("features_for")) - set(theirs.pop("features_for"))
            lines += [f"objectives: no teacher outputs for {m}" for m in sorted(missing)]
        lines += difference(ours, theirs)
    if study.dynamics.per_seed and not other.dynamics.per_seed:
        lines.append("dynamics.per_seed: None -> True")
    elif study.dynamics.per_seed and (more := set(study.seeds) - set(other.recordings.seeds)):
        lines.append(f"seeds: no recordings of {sorted(more)}")
    if other.shares is not None:
        lines.append(f"it shares those of {other.shares} itself: name that one")
    if lines:
        raise StudyError(
            f"{study.name} cannot share the images, teacher and datamap of {other.name} (there "
            "-> here):\n  " + "\n  ".join(lines)
        )
    shared = study.model_copy()
    shared._upstream = other
    return shared
