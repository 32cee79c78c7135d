"""`kdlib.models.evaluation`: one evaluator, counted once, that leaves no trace."""

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor, nn

from kdlib.dataset.pixels import Pixels
from kdlib.models.base import Network
from kdlib.models.evaluation import accuracy, all_outputs, evaluate, macro_scores, outputs
from kdlib.models.networks import build_network
from kdlib.models.weights import weights_fingerprint
from kdlib.repro import files
from kdlib.steps import remeasure
from kdlib.study.models import Model

PIXELS = Pixels([0.5, 0.4, 0.3], [0.25, 0.2, 0.3])


class Echo(Network):
    """Its class is the value of the first pixel: logits are one-hot of it."""

    n_features = 1

    def __init__(self, n_classes: int = 3, fails_at: int = -1):
        super().__init__()
        self.n_classes, self.fails_at, self.calls = n_classes, fails_at, 0
        self.dropout, self.linear = nn.Dropout(0.9), nn.Linear(1, n_classes)

    def features(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls - 1 == self.fails_at:
            raise RuntimeError("out of memory")
        return self.dropout(x[:, 0, 0, :1])

    def head(self, features: Tensor) -> Tensor:
        return 10 * torch.eye(self.n_classes)[features[:, 0].round().long()]


RAW = Pixels([0.0], [1 / 255])  # pixels reach the network as they are stored


def pictures(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8).reshape(-1, 1, 1, 1)


def drawn(n: int = 23) -> tuple[Network, Tensor]:
    """A network with BatchNorm whose statistics are not the initial ones, and images."""
    network = build_network(Model(name="tiny_cnn"), n_classes=4, image_shape=(3, 6, 6), seed=0)
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (n, 3, 6, 6), np.uint8))
    network(PIXELS.prepare(images))
    return network, images


def test_first_batch_all_wrong_and_second_all_right_is_one_half():
    # 500 wrong, then 500 right: 500 / 1000; a mean of prefix accuracies would say 0.25
    images = pictures([0] * 1000)
    labels = torch.tensor([1] * 500 + [0] * 500)
    assert evaluate(Echo(), RAW, images, labels)[1] == 0.5


def test_a_short_last_batch_counts_by_its_examples():
    # batches of 500 and 2: 500 right of 502, not the mean of 1 and 0
    images, labels = pictures([1] * 502), torch.tensor([1] * 500 + [0] * 2)
    assert evaluate(Echo(), RAW, images, labels)[1] == 500 / 502


def test_the_loss_is_the_mean_over_examples_in_nats():
    # logits (10, 0, 0): right -> ln(1 + 2 / e**10), wrong -> 10 more
    right = np.log(1 + 2 * np.exp(-10))
    labels = torch.tensor([0] * 501 + [1])
    loss = evaluate(Echo(), RAW, pictures([0] * 502), labels).loss
    assert loss == pytest.approx((502 * right + 10) / 502, rel=1e-6)


def test_outputs_come_in_the_order_of_the_images_whatever_the_batch_size():
    values = np.random.default_rng(0).integers(0, 3, 60).tolist()
    _, logits = all_outputs(Echo(), RAW, pictures(values))
    assert logits.argmax(1).tolist() == values
    for batch_size in (1, 7, 60, 100):
        parts = list(outputs(Echo(), RAW, pictures(values), batch_size=batch_size))
        assert max(len(f) for f, _ in parts) == min(batch_size, 60)
        assert torch.cat([part for _, part in parts]).argmax(1).tolist() == values


def test_outputs_are_those_of_an_ordinary_forward_pass_in_evaluation_mode():
    network, images = drawn()
    features, logits = all_outputs(network, PIXELS, images)
    network.eval()
    mean, std = (torch.tensor(x)[:, None, None] for x in (PIXELS.mean, PIXELS.std))
    with torch.no_grad():
        expected = network.features((images / 255 - mean) / std)
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits, network.head(expected), rtol=1e-4, atol=1e-5)
    assert (features.shape, logits.shape) == ((23, network.n_features), (23, 4))
    assert features.dtype == logits.dtype == torch.float32
    assert not features.requires_grad
    assert not logits.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_weights_statistics_and_mode_are_left_as_they_were(training):
    network, images = drawn()
    network.train(training)
    before = weights_fingerprint(network)
    evaluate(network, PIXELS, images, torch.zeros(23, dtype=torch.int64))
    assert weights_fingerprint(network) == before
    assert {module.training for module in network.modules()} == {training}
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.is_grad_enabled()


def test_a_module_frozen_by_hand_stays_frozen():
    network, images = drawn()
    network.bn1.eval()
    all_outputs(network, PIXELS, images)
    assert [network.training, network.bn1.training, network.bn2.training] == [True, False, True]


@pytest.mark.parametrize("fails_at", [0, 1])
def test_the_mode_comes_back_after_an_error(fails_at):
    network = Echo(fails_at=fails_at)
    with pytest.raises(RuntimeError, match="out of memory"):
        all_outputs(network, RAW, pictures([0] * 900))
    assert all(module.training for module in network.modules())
    assert torch.is_grad_enabled()


def test_the_mode_comes_back_when_reading_stops_early():
    network = Echo()
    reading = outputs(network, RAW, pictures([0] * 10), batch_size=2)
    next(reading)
    assert torch.is_grad_enabled()  # between two batches, too
    reading.close()
    assert all(module.training for module in network.modules())


def test_dropout_is_off_and_the_global_generators_are_left_alone():
    network = Echo()
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    features, _ = all_outputs(network, RAW, pictures([2] * 50))
    assert features.flatten().tolist() == pytest.approx([2] * 50)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)


def test_accuracy_takes_arrays_and_tensors():
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]], np.float32)
    assert accuracy(logits, np.array([0, 1, 1])) == 2 / 3
    assert accuracy(torch.from_numpy(logits), torch.tensor([1, 0, 0])) == 1 / 3


@pytest.mark.parametrize(("n_logits", "n_labels"), [(0, 0), (3, 2), (1, 3)])
def test_rows_without_labels_are_refused(n_logits, n_labels):
    message = f"{n_logits} rows of logits for {n_labels} labels"
    with pytest.raises(ValueError, match=message):
        accuracy(torch.zeros(n_logits, 2), torch.zeros(n_labels, dtype=torch.int64))


def test_pixels_reach_the_network_in_the_memory_format_asked_for():
    _, images = drawn()
    plain = PIXELS.prepare(images)
    last = Pixels(PIXELS.mean, PIXELS.std, channels_last=True).prepare(images)
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, last)


def test_an_evaluation_says_what_it_read():
    images, labels = pictures([0, 1, 1]), torch.tensor([0, 1, 1])
    network = Echo()
    first = evaluate(network, RAW, images, labels)
    assert first.read == {"n": 3, "sha256": files.sha256_array(images.numpy(), labels.numpy())}
    assert evaluate(network, RAW, images.clone(), labels).read == first.read
    assert evaluate(network, RAW, images, labels.flip(0)).sha256 != first.sha256
    images[0] = images[1].clone()  # the same tensor with other values
    assert evaluate(network, RAW, images, labels).sha256 != first.sha256


@pytest.mark.filterwarnings("ignore")  # of sklearn, for a class that is never predicted
def test_macro_scores_are_those_of_sklearn():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 200)
    labels[labels == 2] = 3  # class 2 has no example, and is predicted
    predicted = np.where(rng.random(200) < 0.6, labels, rng.integers(0, 6, 200))
    predicted[predicted == 4] = 1  # class 4 is never predicted: its precision counts 0
    assert 2 in predicted
    expected = precision_recall_fscore_support(labels, predicted, average="macro")[:3]
    assert list(macro_scores(predicted, labels).values()) == pytest.approx(list(expected))
    assert remeasure._macro(predicted.tolist(), labels.tolist()) == pytest.approx(list(expected))
