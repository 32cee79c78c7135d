"""Names of scores and strategies, what is recorded for the datamap, and one settings class for each
rule that chooses a subset."""

import math
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from kdlib.study.base import Count, Distinct, Name, NonNegative, Positive, Seed, Settings
from kdlib.study.models import Drawn
from kdlib.study.training import Training
from kdlib.study.user_code import UserCode

# Every score, and which end of it is difficult: 1 the high one, -1 the low one, 0 neither.
DIFFICULTY = {
    "confidence": -1, "variability": 0, "correctness": -1, "forgetting_events": 1, "aum": -1,
    "el2n": 1, "entropy": 1, "loss": 1, "trend": 0, "dyn_unc": 0, "tdds": 0, "dual": 0, "grand": 1,
    "grand_last": 1, "class_distance": 1, "prototypicality": 1,
}  # fmt: skip

SCORES = tuple(DIFFICULTY)
REGION_STRATEGIES = ("easy", "ambiguous", "ambiguous_corner", "hard")
SHARD_POLICIES = ("fixed_shards", "random_shards")  # whole shards: always the same, or new per pass
# The first n of one order
RANKINGS = ("random", *REGION_STRATEGIES, *(f"{s}_{e}" for s in SCORES for e in ("top", "bottom")))
PICKED = "picked_"  # and a name: a selection that was picked by hand and saved


class Dynamics(Settings):
    """Whose training is recorded for the datamap, and how. Without `model` it is the teacher's
    training."""

    observed: Literal["train", "eval"] = "train"
    """`train` records the outputs of the training pass, of augmented images; `eval` those of clean
    images after each epoch."""
    logits: bool = False
    """Also store all logits (needed by `tdds`)."""
    model: Drawn | None = None
    training: Training | None = None
    seed: Seed = 0
    el2n_epoch: Count = 10
    """Recorded epoch, counted from 1, at which el2n is read."""
    window: Annotated[int, Field(ge=2)] = 10
    """Epochs per window of dyn_unc, tdds and dual."""
    gradient_epoch: Count | None = None
    """Epoch, counted from 1, after which the gradient of every example is measured; without it the
    datamap has no `grand` and `grand_last`."""
    clusters: Count | None = None
    """Of `prototypicality`; without it as many as classes."""
    per_seed: Literal[True] | None = None
    """Choose the subsets of each seed by a datamap of its own, of the recording of the first of
    `recordings.models` with this seed: a comparison over seeds is then about the score, and not
    about one recording of it. `gradient_epoch`, `el2n_epoch` and `window` hold for these too."""

    @model_validator(mode="after")
    def _whole(self) -> "Dynamics":
        if self.logits and self.window < 3:
            raise ValueError("`tdds`, of kept logits, needs a `window` of at least 3 epochs")
        if (self.model is None) != (self.training is None):
            raise ValueError("`model` and `training` of dynamics go together")
        return self


class ExtraRecordings(Settings):
    """Further recorded trainings of the same images, from labels without a teacher: how far two
    runs agree on a score, and which scores find wrong labels. Notebooks 07 and 08 read them."""

    models: dict[Name, Drawn] = Field(min_length=1)
    training: Training | None = None
    """Without it that of the recorded training of the study."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=2), Distinct]
    """Each of them for each model."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """Cross-validation with the first model, in so many folds: held-out probabilities of each
    image."""
    threshold_samples: bool = False
    """Two trainings of the first model in which some images are labelled with one additional class,
    for AUM's threshold (Pleiss et al. 2020)."""

    def runs(self) -> list[tuple[str, str]]:
        """Every recording as (model, part): `seed=0`, `fold=1`, `threshold=1`, ..."""
        first = next(iter(self.models))
        runs = [(model, f"seed={seed}") for model in self.models for seed in self.seeds]
        runs += [(first, f"fold={k}") for k in range(1, (self.folds or 0) + 1)]
        return runs + [(first, f"threshold={k}") for k in (1, 2) if self.threshold_samples]


class Selection(Settings):
    """A rule that chooses a subset of an exact number of examples; `coresets` and
    `feature_coresets` of `kdlib.cartography` have formula and paper of each but the rankings."""

    kind: str
    balanced: bool = False
    """Choose within each class, equally many from all classes as far as their sizes allow."""

    reads_features: ClassVar[bool] = False  # of the teacher


class Ranking(Selection):
    """The first examples in the order of a region or a score."""

    kind: Literal[RANKINGS]


Difficulty = Literal[tuple(score for score, sign in DIFFICULTY.items() if sign)]


class Mixture(Selection):
    """Several rankings, each with a share of the budget."""

    kind: Literal["mixture"] = "mixture"
    shares: dict[Literal[RANKINGS], NonNegative]
    """Shares of the budget, which sum to 1."""

    @model_validator(mode="after")
    def _whole(self) -> "Mixture":
        if not math.isclose(sum(self.shares.values()), 1):
            raise ValueError(f"shares are {self.shares}; expected numbers >= 0 that sum to 1")
        return self


class CCS(Selection):
    """Without the hardest examples, equally many from each stratum of difficulty. Zheng et al.
    2023, arXiv 2210.15809."""

    kind: Literal["ccs"] = "ccs"
    score: Difficulty = "aum"
    cutoff: Annotated[float, Field(ge=0, lt=1)] | Literal["at most 0.1"] = "at most 0.1"
    """Share of the hardest left out. A number is refused where it leaves fewer than the budget; `at
    most 0.1` then leaves out fewer."""
    n_strata: Count = 50


class D2(Selection):
    """The highest scores of a graph of nearest neighbours in the teacher's features, on which each
    choice lowers its neighbours. Maharana et al. 2023, arXiv 2310.07931."""

    kind: Literal["d2"] = "d2"
    score: Difficulty = "forgetting_events"
    neighbours: Count = 10
    gamma_forward: NonNegative = 1.0
    gamma_reverse: NonNegative = 1.0

    reads_features: ClassVar[bool] = True


class Moderate(Selection):
    """The middle of all examples, ordered by the distance to the median of their class. Xia et al.
    2023."""

    kind: Literal["moderate"] = "moderate"


class KCenter(Selection):
    """Again and again the example farthest from those chosen, in the teacher's features. Sener and
    Savarese 2018, arXiv 1708.00489."""

    kind: Literal["k_center"] = "k_center"

    reads_features: ClassVar[bool] = True


class Herding(Selection):
    """Again and again the example that brings the mean of the chosen nearest to the mean of all, in
    the teacher's features. Welling 2009."""

    kind: Literal["herding"] = "herding"

    reads_features: ClassVar[bool] = True


class DualBeta(Selection):
    """Drawn by DUAL's score and a Beta density that moves with the budget. Cho et al. 2025, arXiv
    2502.06905."""

    kind: Literal["dual_beta"] = "dual_beta"
    concentration: Positive = 15.0
    exponent: Positive = 4.0


class UserSelection(UserCode, Selection):
    """A cost of each example, from a Python file of the user; the least costly are chosen."""

    kind: Literal["own"] = "own"


AnySelection = Annotated[
    Ranking | Mixture | CCS | D2 | Moderate | KCenter | Herding | DualBeta | UserSelection,
    Field(discriminator="kind"),
]

# The class of each kind that is no ranking
CORESETS: dict[str, type[Selection]] = {
    cls.model_fields["kind"].default: cls
    for cls in get_args(get_args(AnySelection)[0])
    if cls is not Ranking
}

# Subsets of an exact number of examples that need no `selections` in the study
_UNNUMBERED = tuple(name for name in CORESETS if name not in ("mixture", "own"))
SELECTIONS = ("full", *RANKINGS, "random_balanced", *_UNNUMBERED)
STRATEGIES = (*SELECTIONS, *SHARD_POLICIES)


def built_in_rule(strategy: str) -> Selection:
    """The rule behind a strategy that needs no `selections` in the study.

    Raises: KeyError for a strategy that follows no rule, such as `full`.
    """
    if strategy == "random_balanced":
        return Ranking(kind="random", balanced=True)
    return Ranking(kind=strategy) if strategy in RANKINGS else CORESETS[strategy]()
