"""The dynamics log against slow loops, interruptions and damage."""

import errno
import json
import math

import numpy as np
import pytest
import torch

from kdlib.cartography.log import QUANTITIES, DynamicsLog
from kdlib.repro import files

#   id 30, label 1: 1/4 always       never right
IDS, LABELS = np.array([10, 20, 30]), np.array([0, 1, 1])
GOLD = np.array([[1, 3, 1], [3, 3, 1], [1, 3, 1], [3, 3, 1]]) / 4
MARGIN = np.log(GOLD / (1 - GOLD))
LOGITS = np.zeros((4, 3, 2))
LOGITS[:, np.arange(3), LABELS] = MARGIN
PROVENANCE = {"data": "d0", "split": "s0"}


def create(folder, **changes):
    arguments = {
        "n_epochs": 4,
        "n_classes": 2,
        "observed": "train",
        "logits": True,
        "provenance": PROVENANCE,
    }
    return DynamicsLog.create(folder, IDS, LABELS, **(arguments | changes))


def record_epoch(log, epoch, positions=(2, 0, 1)):
    positions = np.array(positions)
    log.record(
        np.full(len(positions), epoch), positions, LOGITS[epoch, positions], LABELS[positions]
    )


def finished(folder, **changes):
    log = create(folder, **changes)
    for epoch in range(4):
        record_epoch(log, epoch)
    return log.finish()


def softmax(logits):
    exps = [math.exp(float(v)) for v in logits]
    return [v / sum(exps) for v in exps]


def random_dynamics(seed, n_epochs=9, n_examples=40, n_classes=5):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n_epochs, n_examples, n_classes)).astype(np.float16)
    labels = rng.integers(0, n_classes, n_examples)
    probs = np.exp(logits.astype(np.float64))
    probs /= probs.sum(axis=2, keepdims=True)
    gold = probs[:, np.arange(n_examples), labels].astype(np.float16)
    return logits, labels, gold


# --- recording -----------------------------------------------------------------------------------


def test_recorded_values_equal_a_slow_loop(tmp_path):
    logits, labels, _ = random_dynamics(seed=7, n_epochs=2, n_examples=6)
    log = DynamicsLog.create(
        tmp_path, np.arange(6) * 3, labels, n_epochs=2, n_classes=5, observed="eval", logits=True,
        provenance={},
    )  # fmt: skip
    everything = [(e, r) for e in range(2) for r in range(6)]
    for part in (everything[:7], everything[7:]):  # a batch may span two recorded epochs
        epochs, positions = np.array(part).T
        log.record(epochs, positions, logits[epochs, positions], labels[positions])
    log = log.finish()
    for e, r in everything:
        p, y = softmax(logits[e, r]), labels[r]
        others = [float(v) for k, v in enumerate(logits[e, r]) if k != y]
        expected = {
            "gold_prob": p[y],
            "margin": float(logits[e, r, y]) - max(others),
            "entropy": -sum(v * math.log(v) for v in p),
            "el2n": math.sqrt(sum((v - (k == y)) ** 2 for k, v in enumerate(p))),
            "loss": -math.log(p[y]),
            "correct": int(np.argmax(logits[e, r]) == y),
        }
        for name, value in expected.items():
            assert float(log[name][e, r]) == pytest.approx(value, rel=1e-3, abs=1e-3), name
    np.testing.assert_array_equal(log["logits"], logits)


def test_el2n_and_loss_survive_a_confident_prediction(tmp_path):
    log = create(tmp_path, n_epochs=1)
    logits = np.zeros((3, 2), dtype=np.float32)
    logits[np.arange(3), LABELS] = 8.0  # p[y] = 1 / (1 + exp(-8)) = 1 - 3.35e-4
    log.record(np.zeros(3, dtype=int), np.arange(3), logits, LABELS)
    log = log.finish()
    np.testing.assert_allclose(log["el2n"][0], math.sqrt(2) * 3.3535e-4, rtol=2e-3)
    np.testing.assert_allclose(log["loss"][0], 3.3541e-4, rtol=2e-3)


def test_adding_a_constant_to_the_logits_changes_nothing(tmp_path):
    logs = []
    for name, shift in (("a", 0.0), ("b", 8.0)):
        log = create(tmp_path / name, n_epochs=1, logits=False)
        log.record(np.zeros(3, dtype=int), np.arange(3), LOGITS[0] + shift, LABELS)
        logs.append(log.finish())
    for quantity in QUANTITIES:
        first, second = (np.asarray(log[quantity], dtype=np.float64) for log in logs)
        np.testing.assert_allclose(first, second, atol=1e-3, err_msg=quantity)


def test_interrupted_and_resumed_log_has_the_same_bytes(tmp_path):
    finished(tmp_path / "whole")
    log = create(tmp_path / "parts")
    record_epoch(log, 0)
    record_epoch(log, 1, positions=(1,))
    log.flush()
    del log
    log = create(tmp_path / "parts")
    record_epoch(log, 0)  # a resumed run repeats what came after its last checkpoint
    for epoch in (1, 2, 3):
        record_epoch(log, epoch)
    log.finish()
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "parts").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_finished_log_that_is_resumed_must_be_finished_again(tmp_path):
    whole = finished(tmp_path)
    index = (tmp_path / "index.json").read_bytes()
    log = create(tmp_path)
    with pytest.raises(FileNotFoundError, match="unfinished"):
        DynamicsLog.open(tmp_path)
    np.testing.assert_array_equal(log.finish()["loss"], whole["loss"])
    assert (tmp_path / "index.json").read_bytes() == index


def test_finish_counts_the_cells_that_were_never_recorded(tmp_path):
    log = create(tmp_path)
    record_epoch(log, 0)
    record_epoch(log, 1, positions=(0, 2))
    with pytest.raises(ValueError, match=r"7 of 12 cells.*in 3 of 4 epochs \(first: epoch 1\)"):
        log.finish()
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize("quantity", [*QUANTITIES, "logits"])
def test_finish_notices_a_gap_in_any_single_quantity(tmp_path, quantity):
    log = create(tmp_path)
    for epoch in range(4):
        record_epoch(log, epoch)
    log[quantity][2, 1] = -1 if quantity == "correct" else np.nan
    with pytest.raises(ValueError, match=r"1 of 12 cells.*\(first: epoch 2\)"):
        log.finish()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"observed": "eval"}, "observed: train -> eval"),
        ({"n_epochs": 5}, "n_epochs: 4 -> 5"),
        ({"provenance": PROVENANCE | {"split": "s1"}}, r"provenance\.split: s0 -> s1"),
    ],
)
def test_a_folder_begun_differently_is_refused_and_left_alone(tmp_path, changes, line):
    finished(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=line):
        create(tmp_path, **changes)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_arrays_without_a_header_are_begun_anew(tmp_path):
    finished(tmp_path)
    (tmp_path / "header.json").unlink()
    assert np.isnan(create(tmp_path)["loss"]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([4], [0], [[0.0, 1.0]], [0]), r"epochs span \[4, 4\]; expected \[0, 3\]"),
        (([-1], [0], [[0.0, 1.0]], [0]), r"epochs span \[-1, -1\]"),
        (([0], [3], [[0.0, 1.0]], [0]), r"positions span \[3, 3\]; expected \[0, 2\]"),
        (([0], [-1], [[0.0, 1.0]], [1]), r"positions span \[-1, -1\]"),
        (([0], [0], [[0.0, 1.0, 2.0]], [0]), r"shape \(1, 3\)"),
        (([0, 0], [0], [[0.0, 1.0]], [0]), "2 epochs, 1 positions"),
        (([0], [0.0], [[0.0, 1.0]], [0]), "positions are float64"),
        (([0], [0], [[math.nan, 1.0]], [0]), "float16 cannot hold"),
        (([0], [0], [[1e6, 1.0]], [0]), "float16 cannot hold"),
    ],
)
def test_nothing_of_an_invalid_batch_is_written(tmp_path, arguments, message):
    log = create(tmp_path)
    with pytest.raises(ValueError, match=message):
        log.record(*(np.array(a) for a in arguments))
    assert (log["correct"] == -1).all()
    assert np.isnan(log["loss"]).all()


def test_positions_of_another_split_are_refused_by_their_labels(tmp_path):
    log = create(tmp_path)
    positions = np.array([0, 1, 2])  # as if the loader's order were the log's order
    with pytest.raises(ValueError, match=r"2 of 3 examples \(first: id 10, label 1, expected 0\)"):
        log.record(np.zeros(3, dtype=int), positions, LOGITS[0], np.array([1, 0, 1]))
    assert (log["correct"] == -1).all()


def test_recording_half_precision_logits_of_a_training_pass_keeps_their_graph(tmp_path):
    log = create(tmp_path, n_epochs=1)
    logits = torch.tensor(LOGITS[0], dtype=torch.float16, requires_grad=True)
    log.record(np.zeros(3, dtype=int), np.arange(3), logits, LABELS)
    logits.sum().backward()
    assert torch.equal(logits.grad, torch.ones(3, 2, dtype=torch.float16))


def test_tensors_arrays_and_half_precision_give_one_record(tmp_path):
    logs = []
    for name, convert in (
        ("a", np.asarray),
        ("b", torch.as_tensor),
        ("c", lambda v: torch.as_tensor(v).to(torch.bfloat16 if v.ndim == 2 else torch.int32)),
    ):
        log = create(tmp_path / name, n_epochs=1, logits=False)
        batch = np.zeros(3, dtype=int), np.arange(3), np.array([[1.0, 3], [2, 2], [5, 4]]), LABELS
        log.record(*(convert(v) for v in batch))
        logs.append(log.finish())
    for quantity in QUANTITIES:
        for other in logs[1:]:
            np.testing.assert_array_equal(other[quantity], logs[0][quantity], err_msg=quantity)


def test_a_log_open_for_reading_cannot_be_written(tmp_path):
    log = finished(tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        record_epoch(log, 0)
    with pytest.raises(ValueError, match="read-only"):
        log["loss"][0, 0] = 1


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ([2, 1], [0, 0], "strictly increasing"),
        ([1, 1], [0, 0], "strictly increasing"),
        ([], [], "non-empty"),
        ([1, 2], [0], "1 labels for 2 example ids"),
        ([1, 2], [0, 2], r"example 2 of the log has label 2; expected \[0, 1\]"),
        ([1, 2], [-1, 0], "labelled"),
    ],
)
def test_invalid_ids_and_labels_are_refused(tmp_path, ids, labels, message):
    with pytest.raises(ValueError, match=message):
        DynamicsLog.create(
            tmp_path, np.array(ids), np.array(labels), n_epochs=1, n_classes=2, observed="train",
            logits=False, provenance={},
        )  # fmt: skip
    assert not (tmp_path / "header.json").exists()


# --- reading -------------------------------------------------------------------------------------


def test_opening_an_unfinished_or_absent_log_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no dynamics log; run `python -m kdlib study"):
        DynamicsLog.open(tmp_path)
    create(tmp_path)
    with pytest.raises(FileNotFoundError, match="an unfinished dynamics log"):
        DynamicsLog.open(tmp_path)


def test_loading_with_another_split_raises_and_names_it(tmp_path):
    finished(tmp_path)
    assert DynamicsLog.open(tmp_path, PROVENANCE).provenance == PROVENANCE
    assert DynamicsLog.open(tmp_path, {"split": "s0"}).n_epochs == 4
    with pytest.raises(ValueError, match="split: s0 -> s1"):
        DynamicsLog.open(tmp_path, {"split": "s1"})
    with pytest.raises(ValueError, match=r"weights: \(absent\) -> w"):
        DynamicsLog.open(tmp_path, PROVENANCE | {"weights": "w"})


def test_cut_changed_and_foreign_logs_are_refused(tmp_path):
    finished(tmp_path)
    path = tmp_path / "loss.npy"
    whole = path.read_bytes()
    for size in (len(whole) - 1, 100, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"loss\.npy .*then run `"):
            DynamicsLog.open(tmp_path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=r"loss\.npy is cut or damaged"):
        DynamicsLog.open(tmp_path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    DynamicsLog.open(tmp_path)
    with pytest.raises(ValueError, match=r"loss\.npy has changed"):
        DynamicsLog.open(tmp_path, verify=True)
    path.write_bytes(whole)
    DynamicsLog.open(tmp_path, verify=True)
    index = tmp_path / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"format": 0}))
    with pytest.raises(ValueError, match="format 0; expected 2"):
        DynamicsLog.open(tmp_path)


def test_an_index_that_was_changed_is_refused(tmp_path):
    finished(tmp_path)
    path = tmp_path / "index.json"
    whole = json.loads(path.read_text())
    for change in ({"observed": "eval"}, {"seal": ""}, {"n_classes": 3}):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=r"index\.json was changed .*then run `"):
            DynamicsLog.open(tmp_path)


def test_an_index_from_before_the_seal_is_read(tmp_path):
    finished(tmp_path)
    path = tmp_path / "index.json"
    old = json.loads(path.read_text()) | {"format": 1}
    del old["seal"]
    path.write_text(json.dumps(old))
    assert DynamicsLog.open(tmp_path, verify=True).n_epochs == 4


@pytest.mark.parametrize("kind", ["zip", "shape"])
def test_what_is_no_array_is_refused(tmp_path, kind):
    finished(tmp_path)
    path = tmp_path / "loss.npy"
    path.unlink()
    if kind == "zip":
        with open(path, "wb") as file:
            np.savez(file, loss=np.zeros(3))
    else:
        text = f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({10**30},)}}".encode()
        path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    with pytest.raises(ValueError, match=r"loss\.npy is cut or damaged"):
        DynamicsLog.open(tmp_path)


def test_a_full_disk_is_reported_before_anything_is_mapped(tmp_path, monkeypatch):
    def full(descriptor, start, n_bytes):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(files.DiskError, match=r"cannot write .*gold_prob\.npy \(No space left"):
        create(tmp_path)
    assert not list(tmp_path.glob(".*"))
