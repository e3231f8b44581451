"""The average of the weights."""

from __future__ import annotations

import torch

from napari_convlora.training.weight_average import WeightAverage


def test_weights_of_an_average_grow_with_the_step() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    average = WeightAverage([weight])
    for value in (1.0, 2.0, 3.0, 4.0):
        weight.data.fill_(value)
        average.update()
    with average.shown():
        expected = (1 * 0 + 2 * 1 + 3 * 2 + 4 * 3 + 5 * 4) / (1 + 2 + 3 + 4 + 5)
        torch.testing.assert_close(weight.data, torch.tensor([expected]))
    assert weight.item() == 4.0


def test_an_average_forgets_what_it_is_told_to() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    average = WeightAverage([weight])
    weight.data.fill_(9.0)
    average.update()
    average.restart()
    average.install()
    assert (weight == 9.0).all()


def test_a_long_round_forgets_its_start() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    average = WeightAverage([weight])
    for step in range(1000):
        weight.data.fill_(float(step > 500))
        average.update()
    average.install()
    assert weight.item() > 0.999
