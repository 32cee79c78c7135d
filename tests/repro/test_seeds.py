"""`kdlib.repro.seeds`: every purpose has its own stream, and nobody else's stream moves."""

import itertools

import numpy as np
import pytest
import torch

from kdlib.repro.seeds import PURPOSES, derive, generator, torch_seeded


def test_purposes_seeds_and_parts_never_share_a_derived_seed():
    keys = [
        (seed, purpose, *parts)
        for seed, purpose in itertools.product(range(50), PURPOSES)
        for parts in [(), (0,), (1,), (0, 0), (0, 1), (1, 0)]
    ]
    assert len({derive(*key) for key in keys}) == len(keys)


def test_derived_seeds_are_63_bit_and_use_all_bits():
    drawn = np.array([derive(seed, "order") for seed in range(400)])
    assert drawn.min() >= 0
    bits = (drawn[:, None] >> np.arange(63)) & 1
    # a fair bit strays from 0.5 by more than 5 * 0.025 in 400 draws once in 2 million
    assert np.all(np.abs(bits.mean(axis=0) - 0.5) < 0.125)


@pytest.mark.parametrize("part", [(), (3,)])
@pytest.mark.parametrize("purpose", PURPOSES)
def test_seeds_s_and_s_plus_1_are_unrelated(purpose, part):
    for seed in range(5):
        a, b = (generator(s, purpose, *part).integers(0, 2**62, 1000) for s in (seed, seed + 1))
        assert not set(a) & set(b)  # shared draws, at whatever place
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(1000)


def test_two_purposes_of_one_seed_are_unrelated():
    draws = {p: generator(0, p).integers(0, 2**62, 1000) for p in PURPOSES}
    for one, other in itertools.combinations(PURPOSES, 2):
        assert not set(draws[one]) & set(draws[other])
        assert abs(np.corrcoef(draws[one], draws[other])[0, 1]) < 5 / np.sqrt(1000)


def test_seeds_never_change_their_meaning():
    """A change here would silently change every number ever recorded."""
    drawn = [derive(0, "order"), derive(1, "order"), derive(0, "init", 2)]
    assert drawn == [2607568356208829656, 5570855233604547918, 3792983772798172297]


def test_the_same_key_gives_the_same_stream_and_seed_0_is_a_seed():
    zero, again = (generator(0, "split").random(5) for _ in range(2))
    np.testing.assert_array_equal(zero, again)
    assert not np.array_equal(zero, generator(1, "split").random(5))


def test_numpy_integers_are_seeds_like_any_other():
    assert derive(np.int64(3), "order", np.int64(2)) == derive(3, "order", 2)


def test_a_negative_seed_or_an_unknown_purpose_is_refused():
    with pytest.raises(ValueError, match="seed is -1; expected an integer >= 0"):
        derive(-1, "init")
    with pytest.raises(ValueError, match="unknown purpose 'ordre'; expected one of split, init"):
        generator(0, "ordre")
    with pytest.raises(ValueError, match="seed is -1"), torch_seeded(-1, "init"):
        pytest.fail("a negative seed was taken")


def test_global_generators_are_left_as_they_were():
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()
    generator(0, "order").random(3)
    with torch_seeded(0, "init"):
        inside = torch.rand(3)
    with pytest.raises(TypeError), torch_seeded(0, "init"):
        torch.rand(-torch.rand(3))
    assert torch.equal(torch.get_rng_state(), torch_before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before[1])
    assert np.random.get_state()[2] == numpy_before[2]
    assert not torch.equal(torch.rand(3), inside)


def test_torch_blocks_of_one_key_draw_the_same_and_of_two_keys_do_not():
    drawn = []
    for key in [(0, "init"), (0, "init"), (1, "init"), (0, "dropout"), (0, "init", 0)]:
        with torch_seeded(*key):
            drawn.append(torch.rand(100))
    assert torch.equal(drawn[0], drawn[1])
    for one, other in itertools.combinations(drawn[1:], 2):
        assert not set(one.tolist()) & set(other.tolist())
