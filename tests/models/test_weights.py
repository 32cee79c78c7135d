"""Weight files: whole, ours, and never executed."""

import pickle
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models.test_networks import build, images
from torch import nn

from kdlib.models.base import Network
from kdlib.models.weights import load_weights, read_weights, save_weights, weights_fingerprint


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Network, Path, str]:
    network, path = build("tiny_cnn", (1, 8, 8)), tmp_path / "w.safetensors"
    network(images((1, 8, 8)))  # BatchNorm's buffers are no longer those of a new network
    return network, path, save_weights(network, path, {"model": "tiny_cnn"})


def test_weights_return_from_their_file(saved):
    network, path, fingerprint = saved
    other = build("tiny_cnn", (1, 8, 8), seed=1)
    assert load_weights(other, path) == fingerprint == weights_fingerprint(network)
    x = images((1, 8, 8))
    assert torch.equal(other.eval()(x), network.eval()(x))
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "model": "tiny_cnn"}


def test_equal_content_gives_equal_bytes_whatever_the_memory_format(saved, tmp_path):
    network, path, _ = saved
    metadata = {f"key {i}": str(i) for i in range(8)}
    contents = set()
    for i in range(6):
        if i == 3:
            network.to(memory_format=torch.channels_last)
            metadata = dict(reversed(metadata.items()))
        save_weights(network, path, metadata)
        contents.add(path.read_bytes())
    assert len(contents) == 1


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_any_changed_value_changes_the_fingerprint(data):
    state = build("tiny_cnn", (1, 8, 8)).state_dict()
    before = weights_fingerprint(state)
    shuffled = dict(data.draw(st.permutations(list(state.items()))))
    assert weights_fingerprint(shuffled) == before
    key = data.draw(st.sampled_from(sorted(state)))
    position = data.draw(st.integers(0, state[key].numel() - 1))
    state[key].view(-1)[position] += 1
    assert weights_fingerprint(state) != before


def test_names_dtypes_and_shapes_are_part_of_the_fingerprint():
    states = [
        {"a": torch.zeros(4)},
        {"b": torch.zeros(4)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.zeros(8, dtype=torch.bfloat16)},
        {"a": torch.zeros(())},
        {"a": torch.zeros(1)},
        {"a": torch.zeros(2), "b": torch.zeros(2)},
    ]
    assert len({weights_fingerprint(state) for state in states}) == len(states)


def test_batch_counters_may_be_absent_and_become_zero(saved):
    network, path, _ = saved
    state = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    safetensors.torch.save_file(state, path)
    used = build("tiny_cnn", (1, 8, 8), seed=3)
    used(images((1, 8, 8)))
    assert load_weights(used, path) == load_weights(build("tiny_cnn", (1, 8, 8)), path)
    assert used.bn1.num_batches_tracked == 0
    assert torch.equal(used.bn1.running_mean, network.bn1.running_mean)


class Bomb:
    """Unpickling this leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["pickle", "torch", "cut", "empty", "header", "flipped header"])
def test_a_file_that_is_not_whole_safetensors_is_refused_and_runs_nothing(kind, saved, tmp_path):
    network, path, fingerprint = saved
    content = path.read_bytes()
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    elif kind == "torch":
        torch.save({"conv1.weight": Bomb(tmp_path / "exploded")}, path)
    else:
        path.write_bytes(
            {
                "cut": content[:-7],
                "empty": b"",
                "header": content[:50],
                "flipped header": b"\xff" * 8 + content[8:],
            }[kind]
        )
    with pytest.raises(
        ValueError, match=r"w\.safetensors is not a whole safetensors file .*checkpoint"
    ):
        load_weights(network, path)
    assert not (tmp_path / "exploded").exists()
    assert weights_fingerprint(network) == fingerprint


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".tar"])
@pytest.mark.parametrize("wrapped", [None, "state_dict", "model", "model_state_dict", "net"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_pytorch_checkpoint_of_tensors_is_read(saved, tmp_path, suffix, wrapped, prefix):
    network, path, _ = saved
    state = {prefix + k: v for k, v in safetensors.torch.load_file(path).items()}
    kept = tmp_path / f"w{suffix}"
    torch.save({wrapped: state, "epoch": 3} if wrapped else state, kept)
    other = build("tiny_cnn", (1, 8, 8), seed=9)
    assert load_weights(other, kept) == load_weights(network, path)


@pytest.mark.parametrize("kind", ["bomb", "cut", "pickle", "number"])
def test_a_checkpoint_of_more_than_tensors_is_refused_and_runs_nothing(kind, saved, tmp_path):
    network, _, fingerprint = saved
    kept = tmp_path / "w.pth"
    bomb = Bomb(tmp_path / "exploded")
    torch.save({"w": bomb} if kind == "bomb" else {"w": 1}, kept)
    if kind == "cut":
        kept.write_bytes(kept.read_bytes()[:-40])
    if kind == "pickle":
        kept.write_bytes(pickle.dumps(bomb))
    with pytest.raises(
        ValueError, match=r"w\.pth (is cut, or holds more than tensors|holds no tensors \(dict\))"
    ) as refused:
        load_weights(network, kept)
    assert "weights_only" not in str(refused.value)  # torch advises to execute the file's code
    assert not (tmp_path / "exploded").exists()
    assert weights_fingerprint(network) == fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("conv1.weight"), r"1 keys .*conv1\.weight: \(absent\) -> torch\.float32"),
        (lambda s: s.update(foreign=torch.zeros(2)), r"foreign: .*\(2,\) -> \(absent\)"),
        (
            lambda s: s.update({"linear.bias": torch.zeros(3)}),
            r"linear\.bias: torch\.float32 \(3,\) -> torch\.float32 \(10,\)",
        ),
        (
            lambda s: s.update({"linear.bias": s["linear.bias"].long()}),
            r"linear\.bias: torch\.int64 \(10,\) -> torch\.float32 \(10,\)",
        ),
    ],
)
def test_weights_of_another_network_are_refused_and_change_nothing(change, message, saved):
    _, path, _ = saved
    state = build("tiny_cnn", (1, 8, 8), seed=7).state_dict()
    change(state)
    safetensors.torch.save_file(state, path)
    network = build("tiny_cnn", (1, 8, 8), seed=8)
    before = weights_fingerprint(network)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(network, path)
    assert str(path) in str(caught.value)
    assert weights_fingerprint(network) == before


def test_a_foreign_architecture_is_refused_in_a_short_message(saved):
    with pytest.raises(
        ValueError, match=r"does not fit this CifarResNet.*\.\.\.; name the model"
    ) as caught:
        load_weights(build("cifar_resnet20"), saved[1])
    assert len(str(caught.value)) < 1000


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weight file .*none\.safetensors"):
        load_weights(build("tiny_cnn"), tmp_path / "none.safetensors")


def _under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def _half(state):
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (dict, ""),
        (lambda s: _under("module.", s), "read 14 tensors; removed the prefix module."),
        (lambda s: _under("_orig_mod.module.", s), "; removed the prefix _orig_mod.module."),
        (
            lambda s: {"state_dict": _under("model.", s), "epoch": 3, "best": torch.tensor(0.9)},
            "took `state_dict`; removed the prefix model.",
        ),
        (lambda s: {"nets": {"student": s}, "optimiser": {"state": {0: s}}}, "took `nets.student`"),
        (
            lambda s: {"model_state": s, "ema": {"decay": torch.ones(1)}},
            "read 14 tensors; took `model_state`",
        ),
        (_half, "read 14 tensors; converted 12 from float16"),
        (
            lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
            "read 12 tensors; set 2 missing counters of BatchNorm to 0",
        ),
    ],
)
def test_what_is_changed_on_reading_is_said_in_one_line(content, line, saved, tmp_path, capsys):
    network, _, fingerprint = saved
    torch.save(content(network.state_dict()), tmp_path / "w.pt")
    other = build("tiny_cnn", (1, 8, 8), seed=9)
    found = load_weights(other, tmp_path / "w.pt")
    said = capsys.readouterr().out
    assert line in said
    assert said.count("\n") == bool(line)
    assert (found == fingerprint) == ("float16" not in line and "BatchNorm" not in line)
    x = images((1, 8, 8))
    torch.testing.assert_close(other.eval()(x), network.eval()(x), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda s: s | _under("module.", s), "14 with no prefix, 14 with module.;"),
        (
            lambda s: _under("student.", s) | {"teacher.linear.bias": s["linear.bias"]},
            "14 with student., 1 with teacher.;",
        ),
        (lambda s: {"model": s, "ema": s}, "at 2 places: `model`, `ema`;"),
        (lambda s: s | {"state_dict": s}, "at 2 places: the top, `state_dict`;"),
    ],
)
def test_a_file_with_the_weights_of_two_networks_is_refused(content, message, saved, tmp_path):
    network, _, fingerprint = saved
    torch.save(content(network.state_dict()), tmp_path / "w.pt")
    other = build("tiny_cnn", (1, 8, 8), seed=9)
    with pytest.raises(
        ValueError, match=f"w.pt holds .*{message} expected one.*save the state_dict"
    ):
        load_weights(other, tmp_path / "w.pt")
    torch.save(network.state_dict(), tmp_path / "w.pt")  # as the message says
    assert load_weights(other, tmp_path / "w.pt") == fingerprint


def test_weights_for_another_number_of_classes_are_named_as_such(tmp_path):
    three = build("tiny_cnn", (1, 8, 8), n_classes=3)
    save_weights(three, tmp_path / "w.safetensors", {})
    with pytest.raises(ValueError, match="weights for 3 classes, and this study has 10: train"):
        load_weights(build("tiny_cnn", (1, 8, 8)), tmp_path / "w.safetensors")


def test_a_classifier_is_left_out_where_the_network_has_none(tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    whole, bare = (build("tiny_cnn", (1, 8, 8), n_classes=n, seed=n) for n in (3, 0))
    save_weights(whole, path, {})
    load_weights(bare, path)
    assert "left out the last layer, linear.bias, linear.weight" in capsys.readouterr().out
    image = torch.ones(2, 1, 8, 8)
    assert torch.equal(bare.eval().features(image), whole.eval().features(image))
    save_weights(whole.state_dict() | {"more": torch.zeros(1)}, path, {})
    with pytest.raises(ValueError, match="in 3 keys the file differs"):
        load_weights(bare, path)


def test_a_checkpoint_named_safetensors_is_read_after_the_renaming_that_is_asked_for(
    saved, tmp_path
):
    network, path, fingerprint = saved
    torch.save(network.state_dict(), path)
    with pytest.raises(ValueError, match=r"begins as a PyTorch checkpoint: rename it to w\.pt"):
        load_weights(network, path)
    assert load_weights(network, path.rename(tmp_path / "w.pt")) == fingerprint


def test_a_file_of_timm_fits_timm_s_network(tmp_path, capsys):
    network = build("timm/resnet10t", (3, 16, 16))
    torch.save(network.body.state_dict(), tmp_path / "w.pt")
    other = build("timm/resnet10t", (3, 16, 16), seed=4)
    assert load_weights(other, tmp_path / "w.pt") == weights_fingerprint(network)
    assert "added the prefix body." in capsys.readouterr().out


@pytest.mark.parametrize("n_bytes", [0, 40, 300])
def test_a_cut_checkpoint_is_refused_in_words(tmp_path, n_bytes):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(40)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(ValueError, match="is cut, or holds more than tensors"):
        load_weights(nn.Linear(1, 1), path)


LAST = ("linear.weight", "linear.bias")


@pytest.mark.parametrize(
    ("content", "head", "notes"),
    [
        (lambda s: {k: v for k, v in s.items() if k not in LAST}, "optional", ("no last layer",)),
        (
            lambda s: {"student": _under("_orig_mod.", _half(s) | {LAST[0]: torch.ones(7, 16),
                                                                 LAST[1]: torch.ones(7)})},
            "any",
            ("took `student`", "removed the prefix _orig_mod.",
             "left out the last layer, of 7 classes", "converted 10 from float16"),
        ),
        (
            lambda s: _under("model.", s) | {"projector.weight": torch.ones(3)},
            "needed",
            ("removed the prefix model.", "left out 1 without it (projector.weight)"),
        ),
    ],
)  # fmt: skip
def test_a_last_layer_that_is_missing_or_another_stays_drawn(content, head, notes, saved, tmp_path):
    network, _, _ = saved
    torch.save(content(network.state_dict()), tmp_path / "w.pt")
    other, drawn = (build("tiny_cnn", (1, 8, 8), seed=9) for _ in range(2))
    read = read_weights(other, tmp_path / "w.pt", head)
    assert (read.notes, read.head) == (notes, head == "needed")
    assert read.weights_sha256 == weights_fingerprint(other)
    torch.testing.assert_close(other.conv1.weight, network.conv1.weight, rtol=0, atol=1e-3)
    assert torch.equal(other.linear.weight, (network if read.head else drawn).linear.weight)


@pytest.mark.parametrize("head", ["needed", "optional"])
def test_a_last_layer_for_other_classes_is_refused_where_it_is_needed(head, tmp_path):
    save_weights(build("tiny_cnn", (1, 8, 8), n_classes=3), tmp_path / "w.safetensors", {})
    with pytest.raises(ValueError, match=r"weights for 3 classes.* without their last layer"):
        read_weights(build("tiny_cnn", (1, 8, 8)), tmp_path / "w.safetensors", head)


@pytest.mark.parametrize("head", ["optional", "any"])
def test_another_network_s_names_are_no_missing_last_layer(head, saved, tmp_path):
    state = saved[0].state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith("conv2")}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"in 1 keys the file .*conv2\.weight"):
        read_weights(build("tiny_cnn", (1, 8, 8)), tmp_path / "w.pt", head)
