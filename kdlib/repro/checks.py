"""The checks on a run's evidence.

Each check is a function from the evidence to whether it passed, and a sentence. Checks run where
the number is made (a failure stops the notebook) and again when a table is compiled (a failure
refuses the row and gives the reason). To add one: a function here, listed in `CACHE`, `TEACHER`,
`RUN`, `STUDENT` or `PROBE`; what it reads goes into the evidence of the step.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdlib.repro import files
from kdlib.repro.splits import agree, duplicates

# Teacher terms are float64. Those of a loss that ignores the teacher differ by rounding, by 1e-33
# measured (2026-11), in either direction.
ROUNDING = 1e-12

# By which live outputs of a teacher in float32, and in a type of 16 bits, may differ from those
# computed again in float32, relative to the largest: bfloat16 keeps 8 bits in each layer
LIVE_DRIFT = (0.01, 0.1)


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    name: str
    passed: bool
    sentence: str


class CheckError(RuntimeError):
    """A run that fails one of its checks."""


Evidence = dict[str, Any]
Outcome = tuple[bool, str]  # whether the check passed, and a sentence
Rules = Iterable[Callable[[Evidence], Outcome]]


def budget(evidence: Evidence) -> Outcome:
    """Unique examples, samples and steps on record are those declared."""
    declared, recorded = evidence["budget"]["declared"], evidence["budget"]["recorded"]
    lines = files.difference(recorded, declared)
    return (
        not lines,
        f"declared -> recorded: {'; '.join(lines)}" if lines else f"recorded {recorded}",
    )


def coverage(evidence: Evidence) -> Outcome:
    """The examples of the subset and no others were visited, each as often as planned. Unless each
    pass draws some of the shards, the numbers of visits differ by at most one."""
    visits, wanted = evidence["coverage"], evidence["subset"]["n_examples"]
    even = visits["most"] - visits["fewest"] <= 1 or visits["shards_per_pass"] is not None
    seen_all = visits["unique"] == evidence["budget"]["declared"]["unique_examples"]
    passed = even and seen_all and visits["outside_subset"] == visits["unlike_plan"] == 0
    return passed, (
        f"{visits['unique']} of {wanted} examples visited {visits['fewest']} to {visits['most']} "
        f"times, {visits['unlike_plan']} not as often as planned, {visits['outside_subset']} "
        "visits outside the subset"
    )


def gradient(evidence: Evidence) -> Outcome:
    """The first step's gradient reached every trained tensor, or the second's, where tensors that
    were drawn as zeros held the first back."""
    norm, without, n = (evidence["gradient"][k] for k in ("norm", "tensors_without", "tensors"))
    sentence = f"gradient norm {norm:.3g}; {without} of {n} parameter tensors got none"
    return norm > 0 and without == 0, sentence


def pairing(evidence: Evidence) -> Outcome:
    """Teacher rows belong to their examples: permuting them raises the objective's teacher term,
    and the logits that the loader reads are as accurate as the teacher's stored outputs."""
    terms = evidence["pairing"]
    if terms is None:
        return True, "no teacher in this objective"
    if terms["permuted"] is None:
        passed, sentence = True, "one example has no other's rows: permuting shows nothing"
    else:
        passed = terms["permuted"] - terms["paired"] > ROUNDING
        sentence = f"teacher term {terms['paired']:.4g}, {terms['permuted']:.4g} with permuted rows"
        if not passed and (evidence.get("teacher") or {}).get("uninformed"):
            passed = True
            sentence += ", which need not differ: the teacher is `uninformed`"
    if terms["teacher_accuracy"] is not None:
        read, measured = terms["teacher_accuracy"], terms["stored_accuracy"]
        passed = passed and abs(read - measured) < 1e-9
        sentence += f"; teacher rows {read:.2%} right where the teacher is {measured:.2%}"
    if (live := terms.get("live")) is not None:
        same = live["weights_sha256"] == evidence["teacher"]["weights_sha256"]
        passed = passed and same and live["drift"] <= LIVE_DRIFT[live["precision"] != "float32"]
        sentence += (
            f"; live outputs of {live['n']} views differ by {live['drift']:.2%} from those "
            f"computed again, by {'the' if same else 'OTHER'} weights of the teacher's card"
        )
        if live["accuracy"] is not None:
            sentence += f", and are right for {live['accuracy']:.2%}"
    return passed, sentence


def teacher_card(evidence: Evidence) -> Outcome:
    """The teacher's accuracy, measured on its stored outputs, reaches the expected one, and is more
    than its answers would reach by chance."""
    card = evidence["teacher"]
    if card is None:
        return True, "no teacher in this objective"
    sentence = (
        f"teacher measured {card['measured']:.2%} on the {card['split']} split by "
        f"{card['measured_by']}, claimed {card['claimed']:.2%} (tolerance "
        f"{card['tolerance']:.2%}), trained on: {card['trained_on']}"
    )
    informed = card["measured"] > card["chance"]
    if card["chance"] == 1:
        informed = True
        sentence += "; the test images are too few to tell it from chance"
    elif not informed:
        sentence += (
            f"; such answers reach {card['chance']:.2%} by chance: are labels or images permuted? "
            "A teacher without knowledge is allowed by `uninformed: true` of the teacher"
        )
    reached = card["measured"] >= card["claimed"] - card["tolerance"]
    return reached and (informed or card["uninformed"]), sentence


def untouched_test(evidence: Evidence) -> Outcome:
    """Every validation accuracy is of the held-out images and no others, no training saw them, and
    none that the teacher was trained on steered the training. Where none are held out, there is no
    validation accuracy."""
    selection, read = evidence["selection"], evidence["read"]["validation"]
    overlap, by_teacher = selection["overlap"], selection["teacher_overlap"]
    wanted = selection["held_out"]
    sentence = f"best epoch chosen on {wanted['n']} held-out images"
    if wanted["n"] == 0 and read == []:
        return overlap == 0, "no image was held out: the last epoch counts, and no best one"
    if others := [r for r in read if r != wanted]:
        numbers = ", ".join(str(r["n"]) for r in others)
        sentence = f"best epoch chosen on {numbers} images that are not the {wanted['n']} held out"
    elif not read:
        sentence = "no epoch was evaluated"
    sentence += f"; {overlap} of them were trained on"
    if by_teacher:
        sentence += f"; the teacher has learnt from {by_teacher}: the best epoch is not reported"
    steered = by_teacher > 0 and selection["steers"] is not None
    if steered:
        sentence += f"; yet `{selection['steers']}` read them"
    return read == [wanted] and overlap == 0 and not steered, sentence


def probe_floor(evidence: Evidence) -> Outcome:
    """A trained network's probe is not below that of the untrained network."""
    trained, floor, slack = (evidence["floor"][k] for k in ("trained", "untrained", "slack"))
    if evidence["floor"].get("given"):
        return True, (
            f"linear probe {trained:.2%}; the networks began from given weights, and a short "
            "training may forget some of what these know"
        )
    if floor is None:
        return True, (
            f"linear probe {trained:.2%} trained; the untrained network was not kept, and nothing "
            "was compared (training.checkpoint_fractions: 0 keeps it)"
        )
    sentence = f"linear probe {trained:.2%} trained, {floor:.2%} untrained (slack {slack:.2%})"
    if trained < floor - slack:
        sentence += ": were test features extracted with the weights of this checkpoint?"
    return trained >= floor - slack or _uninformed(evidence), sentence


def same_weights(evidence: Evidence) -> Outcome:
    """Training and test features of every probe came from the same weights."""
    wrong = [p for p in evidence["probes"] if p["train_weights"] != p["test_weights"]]
    return (
        not wrong,
        f"{len(wrong)} of {len(evidence['probes'])} probes mix features of two weights",
    )


def not_collapsed(evidence: Evidence) -> Outcome:
    """The effective rank of the features reaches a share of that of isotropic features."""
    ratio, least = evidence["collapse"]["ratio"], evidence["collapse"]["threshold"]
    sentence = f"effective rank is {ratio:.1%} of that of isotropic features (at least {least:.1%})"
    return ratio >= least or _uninformed(evidence), sentence


def _uninformed(evidence: Evidence) -> bool:
    """Whether the study lets features pass that know nothing (probe.uninformed)."""
    return evidence.get("uninformed") is True


CACHE = (agree, duplicates)
TEACHER = (teacher_card,)
RUN = (budget, coverage, gradient, untouched_test)  # every training
STUDENT = (*RUN, pairing, teacher_card)
PROBE = (probe_floor, same_weights, not_collapsed)


# What is looked at beside the evidence of one run when a table is compiled: name -> what holds
FURTHER = {
    "checkpoint_hashes": "The weights on the disk are those the accuracies were measured with.",
    "derived_again": "Split, subset, batches, settings and accuracies, derived and measured again "
    "from the files by other code, are those on record.",
    "images": "Split, pixels and duplicates on record are those of the cache's files.",
    "inputs": "Images, teacher and datamap are those of the study as they are now.",
    "one_factor": "Settings differ from those of the other runs in the compared factors only.",
    "distinct_seeds": "Two seeds of one cell share neither initial weights nor order.",
    "twins": "No run of other settings has the same weights.",
    "probed": "The probe of the last step is there, of these weights, and passes its checks.",
    "evidence": "The run is finished, and its evidence is whole and of the study's settings.",
}


def student_rules(labelled: bool) -> Rules:
    """The checks of a student; without labels those that read none."""
    return STUDENT if labelled else (*RUN, pairing)


def run_all(checks: Rules, evidence: Evidence) -> list[Check]:
    """Every check on one run's evidence; one whose evidence is missing has failed."""
    results = []
    for check in checks:
        try:
            outcome = check(evidence)
        except (KeyError, TypeError) as error:
            outcome = False, f"the evidence this needs is missing ({error})"
        results.append(Check(check.__name__, *outcome))
    return results


def demand(checks: Rules, evidence: Evidence) -> list[dict]:
    """Run checks and stop at failures.

    Returns: The results, ready for the evidence.
    Raises: CheckError that gives every failed sentence.
    """
    results = run_all(checks, evidence)
    if failed := [f"{c.name}: {c.sentence}" for c in results if not c.passed]:
        raise CheckError("this result must not be used.\n  " + "\n  ".join(failed))
    return [asdict(check) for check in results]


def checkpoint_hashes(folder: Path, evidence: Evidence) -> Check:
    """The weights on the disk are those the accuracies were measured with."""
    wrong = []
    for which in ("last", "best"):
        entry = evidence.get("checkpoints", {}).get(which)
        path = folder / entry["file"] if entry else None
        if path is None or not path.is_file() or files.sha256_file(path) != entry["file_sha256"]:
            wrong.append(which)
    sentence = f"checkpoints missing or changed: {', '.join(wrong)}" if wrong else "hashes match"
    return Check("checkpoint_hashes", not wrong, sentence)


def distinct_seeds(evidences: list[Evidence]) -> list[Check]:
    """Two seeds of one cell share neither initial weights nor order; one `Check` per run. Of runs
    that begin from given weights, what was drawn beside these counts."""
    begun = [e["initialisation"] for e in evidences]
    drawn = [
        {b.get("drawn_sha256", b["weights_sha256"]), e["order_sha256"]} - {None}
        for b, e in zip(begun, evidences, strict=True)
    ]
    results = []
    for i, mine in enumerate(drawn):
        twins = [
            evidence["seeds"]["requested"]
            for j, evidence in enumerate(evidences)
            if i != j and mine & drawn[j]
        ]
        shared = f"shares initial weights or order with seed {twins}"
        alone = "draws of its seed" if len(evidences) > 1 else "the only seed: nothing to compare"
        results.append(Check("distinct_seeds", not twins, shared if twins else alone))
    return results


def twins(rows: list[dict[str, Any] | None]) -> list[str]:
    """For each row of a table, a sentence when another row has the same last weights, and another
    student, subset, objective, teacher or seed: one of the two did not do what its settings say.

    Args:
        rows: `weights_sha256` and `did`, what the run is to have done, JSON-able; None where there
            is no run.
    """
    made = [
        (r["weights_sha256"], files.canonical_json(r["did"]), r["run"]) if r else None for r in rows
    ]
    sentences = []
    for mine in made:
        others = [
            run
            for weights, did, run in filter(None, made)
            if mine and weights == mine[0] and did != mine[1]
        ]
        sentences.append(f"twins: its weights are those of {others[0]}" if others else "")
    return sentences


def differing(settings: dict[str, Any], other: dict[str, Any], allowed: Iterable[str]) -> list[str]:
    """Lines `key: other -> this` of the settings in which two runs differ.

    Args:
        allowed: Dotted prefixes of settings that may differ, such as `step.subset`.
    """
    allowed = tuple(allowed)
    return [line for line in files.difference(settings, other) if not line.startswith(allowed)]


def coverage_evidence(
    visits: np.ndarray,
    subset_ids: np.ndarray,
    planned: np.ndarray,
    shards_per_pass: int | None = None,
) -> dict[str, int | None]:
    """Summary of recorded visits, counted over all examples of the split.

    Args:
        visits: (n_examples,) int64, visits per example id.
        subset_ids: (N,) the declared training set.
        planned: (N,) int64, the visits its plan gives each of them.
        shards_per_pass: How many shards each pass draws; None when it has all.
    """
    inside = visits[subset_ids]
    return {
        "unique": int((visits > 0).sum()),
        "fewest": int(inside.min()),
        "most": int(inside.max()),
        "outside_subset": int(visits.sum() - inside.sum()),
        "unlike_plan": int((inside != planned).sum()),
        "shards_per_pass": shards_per_pass,
    }
