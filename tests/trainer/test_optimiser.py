"""`kdlib.trainer.optimiser`: schedules by hand, decayed weights, the running mean of weights."""

import pytest
import torch
from torch import nn

from kdlib.study.training import Training
from kdlib.trainer.optimiser import Ema, Patience, learning_rate, make_optimiser


def training(**changes) -> Training:
    return Training(**({"steps": 14, "batch_size": 1, "lr_peak": 0.8, "warmup_steps": 4} | changes))


def rates(steps, n_steps=14, **changes) -> list[float]:
    return [learning_rate(training(**changes), step, n_steps) for step in steps]


def test_learning_rate_warms_up_and_then_falls_along_a_cosine():
    # steps 0..3 climb by quarters; step 4 starts the cosine at its peak, step 9 is half-way
    assert rates((0, 1, 3, 4, 9)) == pytest.approx([0.2, 0.4, 0.8, 0.8, 0.4])


def test_one_cycle_rises_and_falls_along_straight_lines():
    # ten steps down from 0.8 at step 4: a tenth of it each
    found = rates((0, 3, 4, 5, 9, 13), schedule="one_cycle")
    assert found == pytest.approx([0.2, 0.8, 0.8, 0.72, 0.4, 0.08])


@pytest.mark.parametrize(
    ("schedule", "found"),
    # half-way down from 0.8 to 0.2 is 0.5, and the step after the last is at the floor
    [("cosine", [0.8, 0.5, 0.2]), ("one_cycle", [0.8, 0.5, 0.2])],
)
def test_a_schedule_falls_to_its_floor(schedule, found):
    assert rates((4, 9, 14), schedule=schedule, lr_floor=0.2) == pytest.approx(found)


def test_the_first_steps_of_adam_by_hand():
    # the decay 0.1 * 2 joins the gradient 1; a first step of Adam has the length lr whatever its
    # gradient, so that w = 2 - 0.8; AdamW takes the decay first: 2 * (1 - 0.8 * 0.1) - 0.8
    moved = {}
    for optimiser in ("adam", "adamw"):
        weight = nn.Parameter(torch.tensor([[2.0]]))
        settings = training(optimiser=optimiser, weight_decay=0.1, betas=(0.5, 0.9))
        made = make_optimiser([weight], settings)
        weight.grad = torch.ones_like(weight)
        made.step()
        moved[optimiser] = weight.item()
        state = made.state[weight]
        gradient = 1.2 if optimiser == "adam" else 1.0  # means begin at 0
        assert state["exp_avg"].item() == pytest.approx(0.5 * gradient)
        assert state["exp_avg_sq"].item() == pytest.approx(0.1 * gradient**2)
    assert moved == pytest.approx({"adam": 1.2, "adamw": 2 * 0.92 - 0.8})


def test_steps_multiply_at_their_milestones():
    # milestones at steps 7 and 10.5, so that step 11 is the first behind the second one
    found = rates((4, 6, 7, 10, 11), schedule="step", milestones=(0.5, 0.75), decay=0.1)
    assert found == pytest.approx([0.8, 0.8, 0.08, 0.08, 0.008])


@pytest.mark.parametrize("schedule", ["constant", "plateau"])
def test_constant_and_plateau_stay_at_the_peak(schedule):
    assert rates((3, 4, 13), schedule=schedule) == [0.8, 0.8, 0.8]


@pytest.mark.parametrize("optimiser", ["sgd", "adam", "adamw"])
def test_biases_and_normalisation_weights_are_not_decayed(optimiser):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    made = make_optimiser(network.parameters(), training(optimiser=optimiser, weight_decay=0.1))
    decayed, free = made.param_groups
    assert [p.ndim for p in decayed["params"]] == [4, 2]
    assert [p.ndim for p in free["params"]] == [1, 1, 1, 1]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)


def test_parameters_that_are_not_trained_stay_out():
    network = nn.Linear(2, 2)
    network.bias.requires_grad_(False)
    made = make_optimiser(network.parameters(), training())
    assert sum(len(group["params"]) for group in made.param_groups) == 1


def test_a_running_mean_by_hand():
    # decays are min(0.5, 1/10), min(0.5, 2/11), ...: 0 -> 0.9 * 1 -> 0.9 * 2/11 + 2 * 9/11
    network = nn.BatchNorm1d(1)
    with torch.no_grad():
        network.weight.zero_()
    ema = Ema(network, 0.5)
    for value in (1.0, 2.0):
        with torch.no_grad():
            network.weight.fill_(value)
            network.num_batches_tracked += 1
        ema.update(network)
    assert ema.weights["weight"].item() == pytest.approx(0.9 * 2 / 11 + 2 * 9 / 11)
    assert ema.weights["num_batches_tracked"].item() == 2
    assert network.weight.item() == 2.0  # untouched


def test_a_running_mean_goes_on_from_what_was_saved():
    network = nn.Linear(2, 2)
    whole, first = Ema(network, 0.9), Ema(network, 0.9)
    second = Ema(nn.Linear(2, 2), 0.9)
    for number in range(6):
        with torch.no_grad():
            network.weight += number
        whole.update(network)
        if number == 3:
            second.load(first.weights, first.n_updates)
        (first if number < 3 else second).update(network)
    assert torch.equal(whole.weights["weight"], second.weights["weight"])


def test_patience_bears_so_many_evaluations_without_a_better_loss():
    patience = Patience(2)
    spent = [patience.spent(loss) for loss in (1.0, 0.9, 0.9, 0.95, 0.91, 0.9, 0.9, 0.9)]
    #       best, best, 1, 2, spent; then 1, 2, spent again
    assert spent == [False, False, False, False, True, False, False, True]


def test_patience_does_not_take_a_loss_that_is_no_number_for_a_better_one():
    patience = Patience(0)
    assert patience.spent(float("nan"))
