"""Pairs of similar features: all of them, whichever blocks they are in, within the memory given."""

import numpy as np
import pytest

from kdlib.probes import neighbours
from kdlib.probes.diagnostics import unit_rows
from kdlib.probes.neighbours import nearest, similar_pairs


def slowly(values, least):
    """Every pair by a loop."""
    pairs = []
    for i, a in enumerate(values):
        for j in range(i + 1, len(values)):
            norms = np.linalg.norm(a) * np.linalg.norm(values[j])
            cosine = round(float(a @ values[j] / norms), 6) if norms else 0.0
            pairs += [(i, j, cosine)] if cosine >= least else []
    return sorted(pairs, key=lambda pair: (-pair[2], *pair[:2]))


@pytest.mark.parametrize("block", [3, 64])
def test_pairs_are_those_of_a_loop_whatever_the_blocks(monkeypatch, block):
    monkeypatch.setattr(neighbours, "BLOCK", block)
    values = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    values[7], values[11] = values[2] * 3, 0
    expected = slowly(values, 0.8)
    assert len(expected) > 5
    table, n_found = similar_pairs(values, 0.8, 100)
    assert [tuple(row) for row in table.itertuples(index=False)] == expected
    assert n_found == len(expected)
    table, n_found = similar_pairs(values, 0.8, 4)
    assert [tuple(row) for row in table.itertuples(index=False)] == expected[:4]
    assert n_found == len(expected)


def test_where_nothing_is_similar_there_is_no_pair():
    table, n_found = similar_pairs(np.eye(3), 0.5, 10)
    assert table.empty
    assert n_found == 0


@pytest.mark.parametrize(("least", "most"), [(1.1, 5), (-1.0, 5), (0.9, 0)])
def test_limits_out_of_range_are_refused(least, most):
    with pytest.raises(ValueError, match=r"expected a cosine in \(-1, 1\] and at least one pair"):
        similar_pairs(np.eye(2), least, most)


def test_the_nearest_rows_of_one_are_those_of_a_sort_of_all_cosines():
    rng = np.random.default_rng(3)
    values = rng.normal(size=(50, 4))
    values[7], values[20] = values[3] * 2, 0
    table = nearest(values, 3, 6)
    unit = unit_rows(values)
    cosine = (unit @ unit[3]).round(6)
    cosine[3] = -2
    assert table["position"].tolist() == np.argsort(-cosine, kind="stable")[:6].tolist()
    assert table["similarity"].iloc[0] == 1
    assert len(nearest(values, 0, 99)) == 49
