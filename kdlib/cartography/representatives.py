"""A few examples that stand for many: the nearest to each centre of k-means."""

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from kdlib.cartography.feature_scores import finite_features
from kdlib.repro.seeds import hashed

READ = 5_000  # examples of which clusters are made; of more, a seeded sample


def sample(example_ids: np.ndarray, most: int = READ) -> np.ndarray:
    """At most so many of some ids, sorted: the same for the same ids."""
    order = np.argsort(hashed(example_ids, 0, "subset"))[:most]
    return np.sort(np.asarray(example_ids)[order])


def representatives(
    example_ids: np.ndarray, features: np.ndarray, labels: np.ndarray, n: int = 12
) -> pd.DataFrame:
    """Groups of examples with similar features, and the example in the middle of each.

    Args:
        example_ids: (N,) int64, sorted.
        features: (N, D) finite.
        labels: (N,) int64.
        n: Groups, at most.

    Returns: One row per group: `example_id`, of the example nearest to the group's centre; `size`,
        its examples; `label`, the most frequent one of them, of equals the lowest; `labels`, each
        label's count, most frequent first. Sorted by `label`, then the largest first. Equal for
        equal input.

    >>> ids, features = np.array([4, 6, 8, 9]), np.array([[0.0], [0.1], [5.0], [5.1]])
    >>> representatives(ids, features, np.array([1, 1, 1, 0]), n=2)[["example_id", "label"]].values
    array([[8, 0],
           [4, 1]])
    """
    from sklearn.cluster import KMeans

    values = finite_features(features, len(example_ids))
    n = min(n, len(np.unique(values, axis=0)))
    rows = []
    if n:
        with threadpool_limits(1):
            model = KMeans(n, n_init=1, random_state=0).fit(values)
        distance = np.linalg.norm(values - model.cluster_centers_[model.labels_], axis=1)
        for group in range(n):
            members = np.flatnonzero(model.labels_ == group)
            middle = members[np.argmin(distance[members].round(9))]
            found, counts = np.unique(labels[members], return_counts=True)
            order = np.argsort(-counts, kind="stable")
            tally = dict(zip(found[order].tolist(), counts[order].tolist(), strict=True))
            rows.append((int(example_ids[middle]), len(members), int(found[order[0]]), tally))
    table = pd.DataFrame(rows, columns=["example_id", "size", "label", "labels"])
    order = np.lexsort((table["example_id"], -table["size"], table["label"]))
    return table.iloc[order].reset_index(drop=True)
