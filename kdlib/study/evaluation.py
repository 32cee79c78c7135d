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
    listed,
    matching,
    one_or_more,
    suggested,
)
from kdlib.study.data import Data
from kdlib.study.selections import SHARD_POLICIES, STRATEGIES

AXES = ("student", "strategy", "fraction", "objective")
# What a study compares, and the column of the results table that holds it.
MEASURES = {"accuracy": "test_accuracy", "linear": "linear_accuracy", "knn": "knn_accuracy"}
OWN = "own"  # name of the study's data set among those of probes
_ON = "_on_"

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
    fraction: Annotated[tuple[Fraction, ...], Field(min_length=1), Distinct] | None = None
    """Of the training images; may be left out where `shards` are given for all strategies."""
    shards: Annotated[tuple[Count, ...], Field(min_length=1), Distinct] | None = None
    """Numbers of shards of the cache: `fixed_shards` and `random_shards` then take so many, each
    number in cells of its own, and not a fraction."""
    objective: _Names
    """Names of `objectives`."""

    @model_validator(mode="after")
    def _sizes(self) -> "Axes":
        of_shards = [name for name in self.strategy if name in SHARD_POLICIES]
        if self.shards is not None and not of_shards:
            raise ValueError(f"`shards` are for the strategies {' and '.join(SHARD_POLICIES)}")
        if self.fraction is None:
            for name in self.strategy:
                if name != "full" and (self.shards is None or name not in SHARD_POLICIES):
                    raise ValueError(
                        f"`fraction` is missing: {name} takes a fraction of the images"
                    )
        return self


class Probe(Settings):
    """Which cells are probed, and how."""

    strategy: _Strategies = ("full", "random")
    fraction: one_or_more(Fraction) | None = None
    """One of `axes.fraction`, or several. Cells of so many shards are probed at each number."""
    objective: _Names
    k: one_or_more(Count) = 20
    """Neighbours, one k-NN probe for each number; the first is the probe `knn`, which `compare`
    takes, and another one `knn_<k>`."""
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
    uninformed: Literal[True] | None = None
    """Let features pass that are collapsed, or probed worse than those of random weights, as in a
    miniature."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _consistent(self) -> "Probe":
        if "features" not in self.layers:
            raise ValueError(f"layers are {list(self.layers)}; expected features, and stage1, ...")
        if OWN in self.others:
            raise ValueError("`own` is the study's data; give the further data set another name")
        return self

    @property
    def fractions(self) -> tuple[float, ...]:
        return () if self.fraction is None else listed(self.fraction)

    @property
    def ks(self) -> tuple[int, ...]:
        return listed(self.k)


class Pair(Settings):
    """Two cells of so many shards: the first is compared with the second."""

    strategy: Literal["fixed_shards", "random_shards"]
    shards: Count
    against_strategy: Literal["fixed_shards", "random_shards"]
    against_shards: Count

    @property
    def cells(self) -> tuple[tuple[str, int], tuple[str, int]]:
        return (self.strategy, self.shards), (self.against_strategy, self.against_shards)


class Compare(Settings):
    """The measure that is compared, the baseline, and the margin of equivalence."""

    measure: Literal["accuracy", "linear", "knn"] = "accuracy"
    """Test accuracy of the student's last layer, or of a probe of its features at the last step."""
    on: Annotated[tuple[Name, ...], Field(min_length=1), Distinct] | None = None
    """Data sets on which the probe's accuracy is compared, each in a table of its own: names of
    `probe.others`, and `own` for the study's images, which are taken where the key is not given."""
    baseline: Strategy = "random"
    """Strategy that the others are compared with."""
    pairs: Annotated[tuple[Pair, ...], Field(min_length=1)] | None = None
    """Pairs of cells of so many shards that are compared, too."""
    objective: str | None = None
    """Objective with which every other one is compared, in the table `controls`; the table
    `objectives` compares each with the one without a teacher."""
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Accuracy; differences inside +-margin are equivalent."""
    confidence_level: Annotated[float, Field(gt=0.5, lt=1)] = 0.95

    @property
    def places(self) -> tuple[str, ...]:
        """Names of the data sets on which cells are compared."""
        return self.on or (OWN,)

    @property
    def columns(self) -> dict[str, str]:
        """Data set -> the column of the results table that is compared."""
        return {on: measured_column(self.measure, on) for on in self.places}

    def placed(self, figure: str, on: str) -> str:
        """Name of a figure of one data set: the first one that is compared on has none in it."""
        return figure if on == self.places[0] else f"{figure}{_ON}{on}"


def measured_column(measure: str, on: str = OWN) -> str:
    """The column of the results table with a measure of a data set.

    >>> measured_column("linear"), measured_column("linear", "mnist")
    ('linear_accuracy', 'linear_accuracy_on_mnist')
    """
    return MEASURES[measure] if on == OWN else f"{MEASURES[measure]}{_ON}{on}"


def named_place(name: str) -> tuple[str, str]:
    """A column or figure without its data set, and the data set's name, "" where it has none.

    >>> named_place("linear_accuracy_on_mnist"), named_place("linear_accuracy")
    (('linear_accuracy', 'mnist'), ('linear_accuracy', ''))
    """
    base, _, on = name.partition(_ON)
    return base, on
