"""Which examples a student learns from: a subset is a function of datamap, budget, strategy, seed.

Ties, and the whole of `random`, are decided by a hash of (seed, example id), never by an example's
position, so that permuting the data set permutes nothing but rows. Leaves to others: the scores
(cartography), the rules that are more than a ranking (coresets), the order in which a subset is
seen (sampling).
"""

import operator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kdlib.cartography import coresets, feature_coresets
from kdlib.cartography.feature_scores import finite_features
from kdlib.repro import files
from kdlib.repro.seeds import hashed
from kdlib.study.selections import DIFFICULTY, SELECTIONS, Selection, built_in_rule
from kdlib.study.user_code import run


def tie_break(example_ids: np.ndarray, seed: int) -> np.ndarray:
    """A pseudo-random number per example that depends on its id and the seed only.

    Args:
        example_ids: (N,) int64.
        seed: >= 0.

    Returns: (N,) uint64, as `seeds.hashed`: distinct for distinct ids.
    """
    return hashed(example_ids, seed, "subset")


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
    highest, lowest score. The rules of `params.CORESETS` are those of `coresets`. A rule that is
    `balanced` chooses within each class, from all classes alike as far as they reach.

    Args:
        table: A datamap: index of N distinct int64 example ids in any order, score columns, `label`
            where classes count.
        n: Budget, in [0, N].
        strategy: One of `params.SELECTIONS`, or a rule with its numbers.
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
    # By id, so that the order of the table's rows reaches no rule.
    order = np.argsort(ids, kind="stable")
    table, ids = table.iloc[order], ids[order].astype(np.int64)
    features = None if features is None else finite_features(features, n_examples)[order]
    own_cost = _own_cost(table, rule) if rule.kind == "own" else None
    choose = _Chooser(table, rule, tie_break(ids, seed), features, own_cost)
    if rule.balanced:
        labels = _labels(table, rule)
        return ids[coresets.per_class(labels, n, choose.ties, choose)]
    return ids[choose(np.arange(n_examples), n)]


@dataclass(frozen=True)
class _Chooser:
    """One rule on one datamap: which m of some positions."""

    table: pd.DataFrame
    rule: Selection
    ties: np.ndarray
    features: np.ndarray | None
    own_cost: np.ndarray | None

    def __call__(self, positions: np.ndarray, m: int) -> np.ndarray:
        """(m,) sorted positions out of `positions`."""
        table, rule, ties = self.table.iloc[positions], self.rule, self.ties[positions]
        kind = rule.kind
        if kind == "mixture":
            costs = {name: _cost(table, name) for name in rule.shares}
            chosen = coresets.mixture(costs, rule.shares, m, ties)
        elif kind == "ccs":
            difficulty = _difficulty(table, rule.score, kind)
            cutoff = rule.cutoff
            if cutoff == "at most 0.1":
                cutoff = min(0.1, 1 - m / max(len(table), 1))
            chosen = coresets.coverage(difficulty, m, ties, cutoff=cutoff, n_strata=rule.n_strata)
        elif kind == "moderate":
            chosen = coresets.central(_score(table, "class_distance", kind), m, ties)
        elif kind == "dual_beta":
            dual, confidence = (_score(table, name, kind) for name in ("dual", "confidence"))
            numbers = {"concentration": rule.concentration, "exponent": rule.exponent}
            chosen = coresets.beta_sampling(dual, confidence, m, ties, **numbers)
        elif kind in ("d2", "k_center", "herding"):
            chosen = self._by_features(table, self._features(positions), m, ties)
        elif kind == "own":
            chosen = coresets.lowest(self.own_cost[positions], m, ties)
        else:
            chosen = coresets.lowest(_cost(table, kind), m, ties)
        return positions[chosen]

    def _by_features(
        self, table: pd.DataFrame, features: np.ndarray, m: int, ties: np.ndarray
    ) -> np.ndarray:
        rule = self.rule
        if rule.kind == "k_center":
            return feature_coresets.k_center(features, m, ties)
        if rule.kind == "herding":
            return feature_coresets.herding(features, m, ties)
        difficulty = _difficulty(table, rule.score, "d2")
        difficulty -= min(difficulty.min(initial=0.0), 0.0)  # of aum, say: d2 takes numbers >= 0
        return feature_coresets.d2(
            difficulty,
            features,
            m,
            ties,
            neighbours=rule.neighbours,
            gamma_forward=rule.gamma_forward,
            gamma_reverse=rule.gamma_reverse,
        )

    def _features(self, positions: np.ndarray) -> np.ndarray:
        if self.features is None:
            raise ValueError(
                f"strategy {self.rule.kind!r} looks at the teacher's features; give them (features)"
            )
        return self.features[positions]


def _labels(table: pd.DataFrame, rule: Selection) -> np.ndarray:
    if "label" not in table.columns:
        raise ValueError(f"{rule.kind!r} balanced needs the column 'label' of the datamap")
    return table["label"].to_numpy()


def _cost(table: pd.DataFrame, ranking: str) -> np.ndarray:
    """What a ranking wants least of, per example: (N,) float64."""
    if ranking == "random":
        return np.zeros(len(table))
    if ranking == "ambiguous":
        return -_score(table, "variability", ranking)
    poles = {"easy": (0.0, 1.0), "hard": (0.0, 0.0), "ambiguous_corner": (1.0, 0.5)}
    if ranking in poles:
        variability, confidence = poles[ranking]
        return (_score(table, "variability", ranking) - variability) ** 2 + (
            _score(table, "confidence", ranking) - confidence
        ) ** 2
    column, end = ranking.rsplit("_", 1)
    score = _score(table, column, ranking)
    return -score if end == "top" else score


def _own_cost(table: pd.DataFrame, rule: Selection) -> np.ndarray:
    """What the study's own rule wants least of, per example: (N,) float64."""
    module = run(rule, "cost", "cost(table, **options), the least of which are chosen")
    found = np.asarray(module.cost(table.copy(), **rule.options), dtype=np.float64)
    if found.shape != (len(table),) or not np.isfinite(found).all():
        raise ValueError(
            f"{rule.code}: cost gave shape {found.shape}, finite: {bool(np.isfinite(found).all())};"
            f" expected a finite number for each of {len(table)} examples"
        )
    return found


def _difficulty(table: pd.DataFrame, column: str, strategy: str) -> np.ndarray:
    """A score, turned so that high is hard."""
    return DIFFICULTY[column] * _score(table, column, strategy)


# What a score that is not in every datamap needs.
_NEEDS = {
    "tdds": "dynamics.logits: true",
    "grand": "dynamics.gradient_epoch",
    "grand_last": "dynamics.gradient_epoch",
}


def _score(table: pd.DataFrame, column: str, strategy: str) -> np.ndarray:
    if column not in table.columns:
        hint = f" (it needs {_NEEDS[column]} in the study)" if column in _NEEDS else ""
        raise ValueError(
            f"strategy {strategy!r} needs the score {column!r}, which the datamap lacks{hint}; it "
            f"has {', '.join(map(str, table.columns))}"
        )
    score = table[column].to_numpy(dtype=np.float64)
    bad = ~np.isfinite(score)
    if bad.any():
        raise ValueError(
            f"{column} is NaN or infinite for {bad.sum()} of {len(score)} examples (first: id "
            f"{table.index[bad][0]}); expected finite scores: make the datamap again"
        )
    return score
