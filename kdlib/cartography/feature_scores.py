"""Scores from features: distance to the centre of the class, and to the nearest cluster.

[Xia2023] Xia et al., Moderate Coreset: A Universal Method of Data Selection for Real-world
    Data-efficient Deep Learning, ICLR 2023
[Sorscher2022] Sorscher et al., Beyond Neural Scaling Laws: Beating Power Law Scaling via Data
    Pruning, 2022, arXiv 2206.14486
"""

import numpy as np
from threadpoolctl import threadpool_limits

KMEANS_STARTS = 10  # of which k-means keeps the one with the smallest inertia


def finite_features(features: np.ndarray, n_examples: int) -> np.ndarray:
    """Features as (N, D) float64.

    Args:
        features: (N, D) of any numeric type.
        n_examples: The N that is expected.

    Raises: ValueError for another number of examples, another shape, or values that are not finite.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or not features.shape[1] or len(features) != n_examples:
        raise ValueError(
            f"features have shape {features.shape}; expected ({n_examples}, D), D > 0, one row per "
            "example"
        )
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinity; expected finite values")
    return features


def class_distance(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Euclidean distance of each example to the centre of its class.

    Args:
        features: (N, D) finite.
        labels: (N,) integers.

    Returns: (N,) float64 >= 0; high = atypical. The centre is the coordinate-wise median.
    Raises: ValueError for another shape, or values that are not finite.
    Source: [Xia2023], as in its code.

    >>> class_distance(np.array([[0.0], [1.0], [5.0], [7.0]]), np.array([0, 0, 0, 1])).tolist()
    [1.0, 0.0, 4.0, 0.0]
    """
    features = finite_features(features, len(labels))
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
        another order of the examples can lead to other clusters.
    Raises: ValueError for more clusters than distinct features, or values that are not finite.
    Source: [Sorscher2022], there over self-supervised features; here Euclidean, on those given.

    >>> prototypicality(np.array([[0.0], [2.0], [9.0]]), n_clusters=2, seed=0).round(9).tolist()
    [1.0, 1.0, 0.0]
    """
    from sklearn.cluster import KMeans

    features = finite_features(features, len(features))
    n_distinct = len(np.unique(features, axis=0))
    if n_clusters > n_distinct:
        raise ValueError(
            f"n_clusters is {n_clusters}; expected [1, {n_distinct}], the distinct features (study "
            "key dynamics.clusters)"
        )
    with threadpool_limits(1):
        model = KMeans(n_clusters, n_init=KMEANS_STARTS, random_state=int(seed)).fit(features)
    return np.linalg.norm(features - model.cluster_centers_[model.labels_], axis=1)
