"""Settings of the sweep, of the probes and of the comparison."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdlib.study.base import (
    Count,
    Distinct,
    Fraction,
    Name,
    Positive,
    Seed,
    Settings,
    matching,
    suggested,
)
from kdlib.study.data import Data
from kdlib.study.selections import STRATEGIES

AXES = ("student", "strategy", "fraction", "objective")
# What a study compares, and the column of the results table that holds it.
MEASURES = {"accuracy": "test_accuracy", "linear": "linear_accuracy", "knn": "knn_accuracy"}

Strategy = Annotated[str, suggested(STRATEGIES)]
Layer = matching(r"features|stage[1-9]\d*", "features, stage1, stage2, ...")
_Names = Annotated[tuple[str, ...], Field(min_length=1), Distinct]
_Strategies = Annotated[tuple[Strategy, ...], Field(min_length=1), Distinct]


class Axes(Settings):
    """The axes of the sweep; the full set is one more strategy, run once per objective."""

    student: _Names
    """Names of `students`."""
    strategy: _Strategies
    """Built-in strategies, names of `selections`, or `picked_<name>` of a saved selection."""
    fraction: Annotated[tuple[Fraction, ...], Field(min_length=1), Distinct]
    """Of the training images."""
    objective: _Names
    """Names of `objectives`."""


class Probe(Settings):
    """Which cells are probed, and how."""

    strategy: _Strategies = ("full", "random")
    fraction: Fraction
    objective: _Names
    k: Count = 20
    """Neighbours."""
    c_grid: Annotated[tuple[Positive, ...], Field(min_length=1)] = tuple(
        10.0 ** (k / 4) for k in range(-24, 21)
    )
    """Inverse regularisation, on standardised features; 45 values from 1e-6 to 1e5 by default."""
    few_shot: Annotated[tuple[Count, ...], Distinct] = ()
    """Numbers of labelled examples of each class, one few-shot probe for each."""
    few_shot_draws: Count = 5
    """How often each number of them is drawn."""
    layers: Annotated[tuple[Layer, ...], Distinct] = ("features",)
    """`features`, what the last layer reads (of a transformer what timm hands its classifier), and
    the mean of a stage's grid, `stage1`, ..."""
    others: dict[Name, Data] = Field(default_factory=dict)
    """Further data sets on which the same networks are probed."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _consistent(self) -> "Probe":
        if "features" not in self.layers:
            raise ValueError(f"layers are {list(self.layers)}; expected features, and stage1, ...")
        if "own" in self.others:
            raise ValueError("`own` is the study's data; give the further data set another name")
        return self


class Compare(Settings):
    """The measure that is compared, the baseline, and the margin of equivalence."""

    measure: Literal["accuracy", "linear", "knn"] = "accuracy"
    """Test accuracy of the student's last layer, or of a probe of its features at the last step."""
    baseline: Strategy = "random"
    """Strategy that the others are compared with."""
    objective: str | None = None
    """Objective with which every other one is compared, in the table `controls`; the table
    `objectives` compares each with the one without a teacher."""
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Accuracy; differences inside +-margin are equivalent."""
    confidence_level: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
