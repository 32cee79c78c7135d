"""A whole study, its folders, and where it takes what it shares from."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, PrivateAttr, model_validator

from kdlib.repro.files import workspace
from kdlib.study import cells as points
from kdlib.study import fingerprints
from kdlib.study.base import Distinct, Name, Seed, Settings
from kdlib.study.consistency import check
from kdlib.study.data import Data, cache_folder
from kdlib.study.evaluation import Axes, Compare, Probe
from kdlib.study.models import AnyTeacher, Student
from kdlib.study.objectives import AnyObjective
from kdlib.study.selections import (
    PICKED,
    SHARD_POLICIES,
    AnySelection,
    Dynamics,
    ExtraRecordings,
    Selection,
    built_in_rule,
)
from kdlib.study.training import Compute, Tracking, Training

STEPS = ("scores", "noise", "audit")  # of the pipeline, that can be asked for by name


class Study(Settings):
    """A whole study. `name` is the file's stem and names folders in `runs/` and `figures/`."""

    name: Name
    shares: str | None = None
    """Another study's file beside this one, whose images, teacher, recorded dynamics and datamap
    are used here; this study must ask for the same."""
    data: Data
    teacher: AnyTeacher
    teachers: dict[Name, AnyTeacher] = Field(default_factory=dict)
    """Further ones, for objectives that name them."""
    dynamics: Dynamics = Dynamics()
    recordings: ExtraRecordings | None = None
    audit: bool = False
    """Also make notebook 09: what two earlier studies measured, in miniature."""
    selections: dict[Name, AnySelection] = Field(default_factory=dict)
    """Further strategies, by name."""
    students: dict[Name, Student] = Field(min_length=1)
    training: Training
    """Of the students."""
    objectives: dict[Name, AnyObjective] = Field(min_length=1)
    axes: Axes
    seeds: Annotated[tuple[Seed, ...], Field(min_length=2), Distinct]
    """Paired: one seed means the same draws in every cell."""
    probe: Probe
    compare: Compare = Compare()
    compute: Compute = Compute()
    tracking: Tracking = Tracking()
    _upstream: "Study | None" = PrivateAttr(None)

    cells = points.cells
    cell = points.cell_at
    same_subset = points.same_subset
    probed_cells = points.probed_cells
    step_settings = fingerprints.step_settings
    sharing = fingerprints.sharing

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        check(self)
        return self

    @property
    def runs(self) -> Path:
        """Folder of everything this study makes except figures and the shared cache."""
        return workspace() / "runs" / self.name

    @property
    def figures(self) -> Path:
        """Folder of this study's figures and tables."""
        return workspace() / "figures" / self.name

    @property
    def cache(self) -> Path:
        """Folder of the image cache; studies that ask for the same images share it."""
        return cache_folder(self.data)

    @property
    def upstream(self) -> "Study":
        """The study that makes images, teacher, recorded dynamics and datamap: this one, or the one
        it shares them with."""
        return self._upstream or self

    @property
    def recorded_run(self) -> Path:
        """Folder of the run whose training dynamics make the datamap."""
        return self.upstream.runs / ("teacher" if self.dynamics.model is None else "dynamics")

    @property
    def recorded_training(self) -> Training | None:
        """The training whose dynamics make the datamap; None in a study without a datamap."""
        return self.dynamics.training or getattr(self.teacher, "training", None)

    def reads_datamap(self, strategy: str) -> bool:
        """Whether a strategy chooses by the datamap; a picked selection was chosen on it by hand.

        Raises: As `selection`.
        """
        if strategy in ("full", *SHARD_POLICIES):
            return False
        if strategy.startswith(PICKED):
            return True
        rule = self.selection(strategy)
        return rule.kind != "random" or rule.balanced

    @property
    def trainings(self) -> list[Training]:
        """Of students, of the recorded network, and of every teacher that is trained."""
        sections = (self, self.dynamics, self.teacher, *self.teachers.values())
        trainings = [getattr(section, "training", None) for section in sections]
        return [training for training in trainings if training is not None]

    @property
    def shared_teachers(self) -> list[str | None]:
        """Names of the teachers that step 02 makes, None of the study's own: all but those that
        learn from the subsets of their students."""
        return [None, *(name for name, t in self.teachers.items() if not t.of_subset)]

    def selection(self, strategy: str) -> Selection:
        """The rule behind a strategy that chooses an exact number of examples.

        Raises: KeyError for `full`, shard policies and picked selections, which follow no rule.
        """
        return self.selections.get(strategy) or built_in_rule(strategy)

    def picked(self, strategy: str) -> Path:
        """Where the selection behind a strategy `picked_<name>` was saved."""
        return self.runs / "selections" / f"{strategy.removeprefix(PICKED)}.parquet"
