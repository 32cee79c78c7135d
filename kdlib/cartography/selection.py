"""The examples a student learns from: a function of datamap, budget, strategy and seed.

A hash of (seed, example id) decides ties and the whole of `random`, so that the order of rows does
not matter. To add a rule: its function in `coresets` or `feature_coresets`, its settings in
`kdlib.study.selections` (a class of `AnySelection`), and its case in `choose`.
"""

import operator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kdlib.cartography import coresets, feature_coresets
from kdlib.cartography.datamap import ranked
from kdlib.cartography.feature_scores import finite_features
from kdlib.repro import files
from kdlib.repro.seeds import hashed
from kdlib.study.selections import (
    CCS,
    D2,
    DIFFICULTY,
    SELECTIONS,
    DualBeta,
    Herding,
    KCenter,
    Mixture,
    Moderate,
    Ranking,
    Selection,
    UserSelection,
    built_in_rule,
)
from kdlib.study.user_code import run

# (variability, confidence) of the examples that a region's strategy takes first
POLES = {"easy": (0.0, 1.0), "hard": (0.0, 0.0), "ambiguous_corner": (1.0, 0.5)}
# Study keys of the scores that are not in every datamap
NEEDS = {
    "tdds": "dynamics.logits: true",
    "grand": "dynamics.gradient_epoch",
    "grand_last": "dynamics.gradient_epoch",
}


def select(
    table: pd.DataFrame,
    n: int,
    strategy: str | Selection,
    seed: int,
    features: np.ndarray | None = None,
) -> np.ndarray:
    """The ids of exactly `n` examples, chosen by one strategy.

    `full`: all (n must be N). `random`: uniformly; with one seed, a smaller random subset lies
    within a larger one. `easy`, `hard`, `ambiguous_corner`: nearest to (variability, confidence) =
    (0, 1), (0, 0), (1, 0.5). `ambiguous`: highest variability. `<score>_top`, `<score>_bottom`:
    highest, lowest score; examples never learned have the most `forgetting_events`. `coresets` and
    `feature_coresets` have the other rules. A rule that is `balanced` chooses within each class,
    equally many from all classes as far as their sizes allow.

    Args:
        table: A datamap: index of N distinct int64 example ids in any order, score columns, `label`
            where classes count.
        n: Budget, in [0, N].
        strategy: One of `kdlib.study.selections.SELECTIONS`, or a rule with its numbers.
        seed: >= 0; decides `random`, every draw and every tie.
        features: (N, D) float, one row per row of `table`; `k_center`, `herding` and `d2` read it.

    Returns: (n,) int64, sorted and distinct.
    Raises: ValueError for an unknown strategy (with the nearest name), a budget out of range, a
        score that is absent or not finite, features that are absent, and ids that are not distinct
        integers.
    """
    ids = table.index.to_numpy()
    if ids.dtype.kind not in "iu" or not table.index.is_unique:
        raise ValueError(
            f"the datamap's index is {ids.dtype}, distinct: {table.index.is_unique}; expected "
            "distinct int64 example ids"
        )
    if isinstance(strategy, str) and strategy not in SELECTIONS:
        raise ValueError(f"unknown strategy {strategy!r}; {files.nearest(strategy, SELECTIONS)}")
    n, n_examples = operator.index(n), len(ids)
    if not 0 <= n <= n_examples:
        raise ValueError(f"the budget is {n} examples; expected [0, {n_examples}]")
    if strategy == "full":
        if n != n_examples:
            raise ValueError(
                f"strategy 'full' is all {n_examples} examples; got a budget of {n}: set fraction 1"
            )
        return np.sort(ids.astype(np.int64))
    rule = built_in_rule(strategy) if isinstance(strategy, str) else strategy
    order = np.argsort(ids, kind="stable")  # by id: the order of the table's rows decides nothing
    table, ids = table.iloc[order], ids[order].astype(np.int64)
    features = None if features is None else finite_features(features, n_examples)[order]
    costs = _user_costs(table, rule) if isinstance(rule, UserSelection) else None
    examples = Candidates(table, hashed(ids, seed, "subset"), features, costs)
    if not rule.balanced:
        return ids[choose(rule, examples, n)]
    if "label" not in table.columns:
        raise ValueError(f"{rule.kind!r} balanced needs the column 'label' of the datamap")

    def choose_within(positions: np.ndarray, m: int) -> np.ndarray:
        return positions[choose(rule, examples.at(positions), m)]

    return ids[coresets.per_class(table["label"].to_numpy(), n, examples.ties, choose_within)]


@dataclass(frozen=True)
class Candidates:
    """The N examples that a rule chooses from, sorted by id.

    Attributes: table, their rows of the datamap; ties, (N,) uint64; features, (N, D) float64, and
        costs by the user's code, (N,) float64, where the rule reads them.
    """

    table: pd.DataFrame
    ties: np.ndarray
    features: np.ndarray | None
    costs: np.ndarray | None

    def at(self, positions: np.ndarray) -> "Candidates":
        """Those at some positions."""
        features, costs = (
            None if rows is None else rows[positions] for rows in (self.features, self.costs)
        )
        return Candidates(self.table.iloc[positions], self.ties[positions], features, costs)

    def score(self, name: str) -> np.ndarray:
        """A score as it orders examples, (N,) float64.

        Raises: ValueError when it is absent or not finite.
        """
        if name not in self.table.columns:
            hint = f" (it needs {NEEDS[name]} in the study)" if name in NEEDS else ""
            raise ValueError(
                f"the strategy needs the score {name!r}, which the datamap lacks{hint}; it has "
                f"{', '.join(map(str, self.table.columns))}"
            )
        score = ranked(self.table, name)
        bad = ~np.isfinite(score)
        if bad.any():
            raise ValueError(
                f"{name} is NaN or infinite for {bad.sum()} of {len(score)} examples (first: id "
                f"{self.table.index[bad][0]}); expected finite scores, which "
                "`python -m kdlib step datamap STUDY` makes"
            )
        return score

    def difficulty(self, name: str) -> np.ndarray:
        """A score, (N,) float64, with a sign such that high is hard."""
        return DIFFICULTY[name] * self.score(name)

    def cost(self, ranking: str) -> np.ndarray:
        """What a ranking sorts by, lowest first: (N,) float64."""
        if ranking == "random":
            return np.zeros(len(self.table))
        if ranking == "ambiguous":
            return -self.score("variability")
        if ranking in POLES:
            variability, confidence = POLES[ranking]
            return (self.score("variability") - variability) ** 2 + (
                self.score("confidence") - confidence
            ) ** 2
        name, end = ranking.rsplit("_", 1)
        return -self.score(name) if end == "top" else self.score(name)


def choose(rule: Selection, examples: Candidates, n: int) -> np.ndarray:
    """The positions of the n examples that a rule chooses: (n,) int64, sorted and distinct.

    Raises: ValueError for a score or features that the rule reads and that are absent; as the
        function of the rule.
    """
    ties, features = examples.ties, examples.features
    if rule.reads_features and features is None:
        raise ValueError(f"{rule.kind!r} needs the teacher's features (argument `features`)")
    match rule:
        case Ranking():
            return coresets.lowest(examples.cost(rule.kind), n, ties)
        case Mixture():
            costs = {ranking: examples.cost(ranking) for ranking in rule.shares}
            return coresets.mixture(costs, rule.shares, n, ties)
        case CCS():
            difficulty, cutoff = examples.difficulty(rule.score), rule.cutoff
            if cutoff == "at most 0.1":
                cutoff = min(0.1, 1 - n / max(len(difficulty), 1))
            return coresets.ccs(difficulty, n, ties, cutoff=cutoff, n_strata=rule.n_strata)
        case Moderate():
            return coresets.moderate(examples.score("class_distance"), n, ties)
        case DualBeta():
            dual, confidence = examples.score("dual"), examples.score("confidence")
            numbers = rule.model_dump(include={"concentration", "exponent"})
            return coresets.dual_beta(dual, confidence, n, ties, **numbers)
        case D2():
            difficulty = examples.difficulty(rule.score)
            difficulty -= min(difficulty.min(initial=0.0), 0.0)  # d2 takes numbers >= 0
            numbers = rule.model_dump(include={"neighbours", "gamma_forward", "gamma_reverse"})
            return feature_coresets.d2(difficulty, features, n, ties, **numbers)
        case KCenter():
            return feature_coresets.k_center(features, n, ties)
        case Herding():
            return feature_coresets.herding(features, n, ties)
        case UserSelection():
            return coresets.lowest(examples.costs, n, ties)
    raise TypeError(f"no rule for {type(rule).__name__}")


def _user_costs(table: pd.DataFrame, rule: UserSelection) -> np.ndarray:
    """What the user's rule sorts by, lowest first: (N,) float64."""
    module = run(rule, "cost", "cost(table, **options), the least of which are chosen")
    costs = np.asarray(module.cost(table.copy(), **rule.options), dtype=np.float64)
    if costs.shape != (len(table),) or not np.isfinite(costs).all():
        raise ValueError(
            f"{rule.code}: cost gave shape {costs.shape}, finite: {bool(np.isfinite(costs).all())};"
            f" expected a finite number for each of {len(table)} examples"
        )
    return costs
