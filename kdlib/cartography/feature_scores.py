"""Scores from features: distance to the class mean, and to the nearest cluster."""

import operator

import numpy as np
from threadpoolctl import threadpool_limits

from kdlib.cartography.coresets import _labels, _matrix, _number

KMEANS_STARTS = 10  # of which k-means keeps the one with the smallest inertia


def class_distance(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Euclidean distance of each example to the centre of its class.

    Args:
        features: (N, D) finite.
        labels: (N,) integers.

    Returns: (N,) float64 >= 0; high = atypical. The centre is the coordinate-wise median.
    Source: [Xia2023], as in its code.

    >>> class_distance(np.array([[0.0], [1.0], [5.0], [7.0]]), np.array([0, 0, 0, 1])).tolist()
    [1.0, 0.0, 4.0, 0.0]
    """
    features = _matrix(features)
    labels = _labels(labels, len(features))
    distance = np.empty(len(labels))
    order = np.argsort(labels, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        if len(members):
            inside = features[members]
            distance[members] = np.linalg.norm(inside - np.median(inside, axis=0), axis=1)
    return distance


def prototypicality(features: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    """Euclidean distance of each example to the nearest centroid of k-means.

    Args:
        features: (N, D) finite.
        n_clusters: In [1, number of distinct features].
        seed: In [0, 2**32); of the `KMEANS_STARTS` starts.

    Returns: (N,) float64 >= 0; high = atypical. One thread: equal on CPU for equal input, while
        another order of the examples may lead to other clusters.
    Source: [Sorscher2022], there over self-supervised features; here Euclidean, on those given.

    >>> prototypicality(np.array([[0.0], [2.0], [9.0]]), n_clusters=2, seed=0).round(9).tolist()
    [1.0, 1.0, 0.0]
    """
    from sklearn.cluster import KMeans

    features = _matrix(features)
    n_distinct = len(np.unique(features, axis=0))
    is_possible = 1 <= operator.index(n_clusters) <= n_distinct
    _number("n_clusters", n_clusters, f"[1, {n_distinct}], the distinct features", is_possible)
    _number("seed", seed, "[0, 2**32)", 0 <= operator.index(seed) < 2**32)
    with threadpool_limits(1):
        model = KMeans(n_clusters, n_init=KMEANS_STARTS, random_state=int(seed)).fit(features)
    return np.linalg.norm(features - model.cluster_centers_[model.labels_], axis=1)
