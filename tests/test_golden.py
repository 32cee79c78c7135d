"""No number of the golden study changes unless a commit says so.

Where every library computes with AVX2 alone, the numbers are the same to the bit on processors of
both makers (tests/repro/test_processor.py); another instruction set sums in another order, and
differs from the first step on: there is nothing to compare with there.
"""

import copy

import golden
import pytest
import torch

from kdlib.study.yaml_text import parse_yaml

WHAT_TO_DO = """
A number of the golden study is another one than the committed one. Where your change is meant to
change numbers, make the file anew with

    {command}

and say in the commit which numbers changed and why. If it is not meant to, this is a mistake: the
file must stay as it is, and the change must be mended. {versions}
"""


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="compute.portable needs a processor with AVX2",
)
def test_every_number_of_the_golden_study_is_the_committed_one(tmp_path):
    committed = golden.read()
    theirs, ours = committed.pop("versions"), golden.versions()
    lines = golden.changes(committed, golden.made(tmp_path))
    if lines:
        versions = f"The libraries differ too: {theirs} -> {ours}." if theirs != ours else ""
        told = WHAT_TO_DO.format(command=golden.COMMAND, versions=versions)
        more = f"... and {len(lines) - 30} more" if len(lines) > 30 else ""
        pytest.fail("\n".join([*lines[:30], more, told]), pytrace=False)


def test_a_changed_a_new_and_a_missing_number_are_named():
    committed = golden.read()
    committed.pop("versions")
    assert golden.changes(committed, copy.deepcopy(committed)) == []
    other = copy.deepcopy(committed)
    row = "tiny full 1.0 plain 4"
    value = other["results"][row].pop("test_accuracy")
    other["results"][row]["new"] = 3
    del other["datamap"]["aum"]
    sha256 = committed["datamap"]["aum"]["sha256"]
    assert golden.changes(committed, other) == [
        f"datamap / aum / sha256: {sha256} -> None",
        f"results / {row} / test_accuracy: {value} -> None",
        f"results / {row} / new: None -> 3",
    ]


SEEDS = {"split_seed", "seed", "seeds"}
SIZES = {
    "n_train", "n_validation", "shard_size", "batch_size", "steps", "evaluate_every_steps", "k",
    "few_shot",
}  # fmt: skip


def numbers_of(content, key=None):
    """Each number of a study with the last key on the way to it."""
    if isinstance(content, dict):
        return [pair for name, value in content.items() for pair in numbers_of(value, name)]
    if isinstance(content, list):
        return [pair for value in content for pair in numbers_of(value, key)]
    return [(key, content)]


def test_seeds_and_sizes_are_different_numbers_so_that_a_swapped_one_shows():
    content = parse_yaml(golden.STUDY.read_text())
    pairs = [pair for pair in numbers_of(content) if pair[0] in SEEDS | SIZES]
    assert {key for key, _ in pairs} == SEEDS | SIZES
    values = [value for _, value in pairs]
    assert len(values) == len(set(values)), sorted(pairs, key=lambda pair: pair[1])
    seeds = content["seeds"]
    assert seeds not in (sorted(seeds), sorted(seeds, reverse=True))
    batches = [value for key, value in pairs if key == "batch_size"]
    n_train, n_test = content["data"]["n_train"] - content["data"]["n_validation"], 500
    assert all(n % size for size in batches for n in (n_train, n_test))
    assert all(o["alpha"] != 0.5 for o in content["objectives"].values() if o["kind"] == "kd")
