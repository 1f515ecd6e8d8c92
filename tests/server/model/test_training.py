"""What a layer, and a model, learn from a batch."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from semid_server.model import (
    KMeansPlusPlusInitInitializer,
    MiniBatchKMeans,
    ResidualQuantization,
    SquaredEuclideanDistance,
    VectorQuantization,
    WeightedSquaredError,
)
from semid_server.training.trainer import Trainer


def rows(n, dim=3, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def take_step(layer, batch):
    """A step of the layer alone, with its own optimizer."""
    optimizer = layer.optimizer(layer.parameters())
    outcome = layer.model_step(batch)
    if outcome.loss is not None:
        outcome.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return outcome


def fitted_layer(update_manually=False, seed=0):
    torch.manual_seed(seed)
    layer = MiniBatchKMeans(4, 3, init_buffer_size=16, update_manually=update_manually)
    take_step(layer, rows(16))
    return layer


def test_the_published_defaults_hold():
    layer = MiniBatchKMeans(n_clusters=4, n_features=3)
    assert isinstance(layer.distance_function, SquaredEuclideanDistance)
    assert isinstance(layer.initializer, KMeansPlusPlusInitInitializer)
    assert isinstance(layer.loss_function, WeightedSquaredError)
    assert layer.init_buffer_size == 3072
    assert not layer.update_manually
    assert not layer.initializer.initialize_on_cpu
    optimizer = layer.optimizer(layer.parameters())
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["lr"] == 0.5
    model = ResidualQuantization(n_layers=3, quantization_layer=layer)
    assert (model.quantization_loss_weight, model.reconstruction_loss_weight) == (1.0, 0.0)
    assert model.normalize_residuals
    assert model.train_layer_wise
    assert model.track_residuals
    assert model.verbose
    assert [own.init_buffer_size for own in model.layers] == [3072] * 3


@settings(deadline=None)
@given(n=st.integers(0, 5), m=st.integers(1, 5), seed=st.integers(0, 1000))
def test_the_distance_is_the_squared_one(n, m, seed):
    x, y = rows(n, seed=seed), rows(m, seed=seed + 1)
    expected = ((x[:, None] - y[None]) ** 2).sum(-1)
    torch.testing.assert_close(SquaredEuclideanDistance().compute(x, y), expected)


def test_the_error_is_a_weighted_sum_over_rows_and_features():
    x, y, w = rows(5), rows(5, seed=1), torch.tensor([1.0, 2, 0, 0.5, 3])
    each = ((x - y) ** 2).sum(dim=1)
    torch.testing.assert_close(WeightedSquaredError()(x, y), each.sum())
    torch.testing.assert_close(WeightedSquaredError()(x, y, w), (w * each).sum())


def test_while_the_buffer_fills_nothing_moves_and_every_code_is_zero():
    layer = MiniBatchKMeans(4, 3, init_buffer_size=16)
    outcome = take_step(layer, rows(15))
    assert not layer.is_initialized
    assert layer.buffered_rows == 15
    assert not outcome.codes.any()
    assert outcome.embeddings.shape == (15, 3)
    assert not outcome.embeddings.any()
    assert outcome.loss.item() == 0
    assert not layer.centroids.any()


def test_rows_beyond_the_buffer_are_not_drawn_from():
    layer = MiniBatchKMeans(4, 3, init_buffer_size=5)
    batch = rows(50)
    seen = []
    layer.initializer = lambda points, k: seen.append(points) or points[:k]
    take_step(layer, batch[:3])
    take_step(layer, batch[3:])
    assert torch.equal(seen[0], batch[:5])
    assert layer.buffered_rows == 0


@pytest.mark.parametrize("layer_type", [MiniBatchKMeans, VectorQuantization])
def test_the_initial_step_puts_the_centroids_exactly_where_they_were_drawn(layer_type):
    drawn = rows(4, seed=9)
    layer = layer_type(4, 3, initializer=lambda points, k: drawn, init_buffer_size=16)
    layer.optimizer = MiniBatchKMeans(4, 3).optimizer
    outcome = take_step(layer, rows(16))
    assert torch.equal(layer.centroids, drawn)
    torch.testing.assert_close(outcome.loss, drawn.square().sum())
    nearest = ((rows(16)[:, None] - drawn) ** 2).sum(-1).argmin(1)
    assert torch.equal(outcome.codes, nearest)
    assert torch.equal(outcome.embeddings, drawn[nearest])


def test_the_initial_step_counts_no_rows():
    assert not fitted_layer().counts.any()


def test_updated_manually_the_initial_step_has_no_loss():
    drawn = rows(4, seed=9)
    layer = MiniBatchKMeans(
        4, 3, initializer=lambda points, k: drawn, init_buffer_size=8, update_manually=True
    )
    assert layer.model_step(rows(8)).loss is None
    assert torch.equal(layer.centroids, drawn)


def test_fewer_rows_than_centroids_is_an_error_that_names_both():
    layer = MiniBatchKMeans(7, 3, init_buffer_size=5)
    with pytest.raises(ValueError, match="7 centroids from 5 rows"):
        layer.model_step(rows(6))


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_every_later_step_is_mini_batch_k_means(seed, sizes):
    layer = fitted_layer()
    manual = fitted_layer(update_manually=True)
    centroids = layer.centroids.detach().double().numpy().copy()
    assert torch.equal(layer.centroids, manual.centroids)
    counts = np.zeros(4)
    for number, size in enumerate(sizes):
        batch = rows(size, seed=seed + number)
        before = centroids.copy()
        codes = ((batch.double().numpy()[:, None] - centroids) ** 2).sum(-1).argmin(1)
        loss = 0.0
        for j in range(4):
            mine = batch.double().numpy()[codes == j]
            if len(mine):
                counts[j] += len(mine)
                weight = len(mine) / counts[j]
                loss += weight * ((centroids[j] - mine.mean(0)) ** 2).sum()
                centroids[j] -= weight * (centroids[j] - mine.mean(0))
        outcome = take_step(layer, batch)
        by_hand = take_step(manual, batch)
        assert np.array_equal(outcome.codes.numpy(), codes)
        np.testing.assert_allclose(outcome.embeddings, before[codes], atol=1e-5)
        assert outcome.loss.item() == pytest.approx(loss, rel=1e-4, abs=1e-6)
        assert by_hand.loss is None
        for own in (layer, manual):
            np.testing.assert_allclose(own.centroids.detach(), centroids, atol=1e-5)
            assert np.array_equal(own.counts, counts)


def test_a_vector_quantised_embedding_is_a_centroid_whose_gradient_goes_straight_through():
    layer = VectorQuantization(4, 3, init_buffer_size=16)
    take_step(layer, rows(16))
    batch = rows(8, seed=2).requires_grad_()
    outcome = layer.model_step(batch)
    torch.testing.assert_close(outcome.embeddings, layer.centroids[outcome.codes])
    weights = rows(8, seed=3)
    (gradient,) = torch.autograd.grad((weights * outcome.embeddings).sum(), batch)
    assert torch.equal(gradient, weights)
    expected = 1.25 * (batch - layer.centroids[outcome.codes]).square().sum()
    torch.testing.assert_close(outcome.loss, expected)


def chi_squared(observed, expected):
    """Pearson's statistic."""
    return sum((observed[key] - count) ** 2 / count for key, count in expected.items())


class TestKMeansPlusPlus:
    """A small set on a line, whose second centroid is counted over many draws."""

    points = torch.tensor([[0.0], [1.0], [2.0], [4.0]])
    draws = 4000

    def chances(self, power):
        """Probability of each pair (first, second): uniform, then distance to the power given."""
        result = {}
        for first in range(4):
            distance = (self.points - self.points[first]).abs().squeeze(1).double() ** power
            for second, chance in enumerate((distance / distance.sum()).tolist()):
                if first != second:
                    result[first, second] = chance / 4
        return result

    def statistic(self, power):
        torch.manual_seed(1)
        draw = KMeansPlusPlusInitInitializer()
        index = {value: i for i, value in enumerate(self.points.flatten().tolist())}
        seen = Counter(
            tuple(index[value] for value in draw(self.points, 2).flatten().tolist())
            for _ in range(self.draws)
        )
        chances = self.chances(power)
        assert set(seen) <= set(chances)
        return chi_squared(seen, {pair: self.draws * c for pair, c in chances.items()})

    def test_draws_follow_the_squared_distance(self):
        assert self.statistic(power=2) < 24.7  # 11 degrees of freedom: 1 in 100 is larger

    def test_draws_do_not_follow_the_distance_squared_again(self):
        assert self.statistic(power=4) > 100

    def test_a_layer_draws_the_same_way(self):
        torch.manual_seed(3)
        seconds = Counter()
        for _ in range(600):
            layer = MiniBatchKMeans(2, 1, init_buffer_size=3)
            take_step(layer, torch.tensor([[0.0], [1.0], [3.0]]))
            seconds[tuple(layer.centroids.flatten().tolist())] += 1
        expected = {(0, 1): 0.1, (0, 3): 0.9, (1, 0): 0.2, (1, 3): 0.8}
        expected |= {(3, 0): 9 / 13, (3, 1): 4 / 13}
        assert set(seconds) <= set(expected)
        statistic = chi_squared(seconds, {pair: 200 * chance for pair, chance in expected.items()})
        assert statistic < 15.1  # 5 degrees of freedom: 1 in 100 is larger

    def test_once_all_rows_lie_on_centroids_the_rest_are_uniform_rows(self):
        torch.manual_seed(0)
        points = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(3, 1)
        drawn = KMeansPlusPlusInitInitializer()(points, 6)
        assert set(map(tuple, drawn[:2].tolist())) == {(1.0, 2.0), (3.0, 4.0)}
        assert set(map(tuple, drawn.tolist())) == {(1.0, 2.0), (3.0, 4.0)}

    def test_a_row_on_a_centroid_is_not_drawn_while_others_are_left(self):
        torch.manual_seed(0)
        points = torch.cat([torch.ones(50, 2), torch.arange(6.0).reshape(3, 2)])
        for _ in range(20):
            assert len(torch.unique(KMeansPlusPlusInitInitializer()(points, 4), dim=0)) == 4

    def test_on_the_cpu_the_same_draws_come_back_on_the_rows_device(self):
        torch.manual_seed(0)
        here = KMeansPlusPlusInitInitializer()(self.points, 3)
        torch.manual_seed(0)
        there = KMeansPlusPlusInitInitializer(initialize_on_cpu=True)(self.points, 3)
        assert torch.equal(here, there)
        assert there.device == self.points.device


def kmeans_model(n_layers=3, **settings):
    layer = MiniBatchKMeans(4, 3, init_buffer_size=16)
    return ResidualQuantization(n_layers, layer, **settings)


def test_only_the_current_layer_learns_and_initial_steps_are_not_counted():
    torch.manual_seed(0)
    trainer = Trainer(kmeans_model(), max_steps=10)
    trail = []
    while not trainer.done:
        before = copy.deepcopy(trainer.model.state_dict())
        layer = trainer.model.current_layer
        trainer.step(rows(8, seed=trainer.steps))
        after = trainer.model.state_dict()
        moved = [i for i, key in enumerate(before) if not torch.equal(before[key], after[key])]
        assert moved in ([], [layer])
        trail.append((layer, trainer.counted_steps))
    # Two batches fill a buffer; 10 // 3 counted steps a layer, the last takes what is left.
    expected = [(0, 0), (0, 0), (0, 1), (0, 2), (0, 3), (1, 3), (1, 3), (1, 4), (1, 5), (1, 6)]
    assert trail == [*expected, (2, 6), (2, 6), (2, 7), (2, 8), (2, 9), (2, 10)]


def test_with_a_reconstruction_loss_a_stage_comes_before_the_first_layer():
    torch.manual_seed(0)
    model = kmeans_model(
        1, reconstruction_loss_function=nn.MSELoss(), reconstruction_loss_weight=2.0
    )
    assert model.current_layer == -1
    trainer = Trainer(model, max_steps=4)
    outcomes = []
    trail = []
    while not trainer.done:
        trail.append(model.current_layer)
        outcomes.append(trainer.step(rows(16, seed=trainer.steps)))
    assert trail == [-1, -1, 0, 0, 0]
    assert [o.reconstruction_loss is not None for o in outcomes] == [
        False,
        False,
        False,
        True,
        True,
    ]
    last = outcomes[-1]
    torch.testing.assert_close(last.loss, last.quantization_loss + 2 * last.reconstruction_loss)


def test_layers_trained_together_wait_until_all_are_initialised():
    torch.manual_seed(0)
    layer = VectorQuantization(4, 3, init_buffer_size=16)
    model = ResidualQuantization(3, layer, train_layer_wise=False, normalize_residuals=False)
    trainer = Trainer(model, max_steps=3)
    moved, initialized, counted = [], [], []
    while not trainer.done:
        before = [own.centroids.detach().clone() for own in model.layers]
        trainer.step(rows(8, seed=trainer.steps))
        after = [own.centroids.detach() for own in model.layers]
        pairs = zip(before, after, strict=True)
        moved.append([not torch.equal(old, new) for old, new in pairs])
        initialized.append(sum(model.layers_initialized))
        counted.append(trainer.counted_steps)
    assert initialized == [0, 1, 2, 3, 3, 3, 3]
    assert counted == [0, 0, 0, 0, 1, 2, 3]
    assert moved == [
        [False, False, False],
        [True, False, False],
        [True, True, False],  # the first layer learns once after its initial step, then waits
        [False, True, True],
        [False, False, True],
        [True, True, True],
        [True, True, True],
    ]


def test_the_weights_of_the_losses_multiply_them():
    torch.manual_seed(0)
    one, half = kmeans_model(1), kmeans_model(1, quantization_loss_weight=0.5)
    for model in (one, half):
        torch.manual_seed(0)
        trainer = Trainer(model, max_steps=1)
        trainer.step(rows(16))
        model.weighted = trainer.step(rows(16, seed=1))
    # The initial step goes only half the way, so the centroids differ: the loss is its own.
    assert half.weighted.loss == 0.5 * half.weighted.quantization_loss
    assert one.weighted.loss == one.weighted.quantization_loss


def test_a_scheduler_steps_with_the_counted_steps():
    model = kmeans_model(
        1, scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)
    )
    trainer = Trainer(model, max_steps=4)
    rates = []
    while not trainer.done:
        rates.append(trainer._scheduler.get_last_lr()[0])
        trainer.step(rows(8, seed=trainer.steps))
    assert rates == pytest.approx([0.5, 0.5, 0.5, 0.5, 0.05, 0.05])


def test_verbose_steps_report_codes_and_residuals():
    torch.manual_seed(0)
    trainer = Trainer(kmeans_model(2, normalize_residuals=False), max_steps=4)
    while not trainer.done:
        batch = rows(16, seed=trainer.steps)
        before = copy.deepcopy(trainer.model)
        outcome = trainer.step(batch)
    metrics = outcome.metrics
    codes = outcome.codes
    assert torch.equal(codes, before.predict_step(batch).codes)
    residual = batch - outcome.quantized
    assert metrics["loss"] == pytest.approx(outcome.loss.item())
    assert metrics["distinct_ids"] == len(torch.unique(codes, dim=0)) / 16
    for layer in range(2):
        _, counts = torch.unique(codes[:, layer], return_counts=True)
        assert metrics[f"coverage_{layer}"] == pytest.approx(len(counts) / 4)
        share = counts / 16
        entropy = -(share * share.log()).sum().item()
        assert metrics[f"entropy_{layer}"] == pytest.approx(entropy, abs=1e-5)
    assert metrics["residual_mse"] == pytest.approx(residual.square().mean().item(), rel=1e-5)
    ratio = (residual.norm(dim=1) / batch.norm(dim=1)).mean().item()
    assert metrics["last_residual_norm_ratio"] == pytest.approx(ratio, rel=1e-5)
    assert metrics["first_residual_norm_ratio"] > metrics["last_residual_norm_ratio"]


def test_metrics_can_be_left_out():
    quiet = Trainer(kmeans_model(1, verbose=False), max_steps=1)
    assert quiet.step(rows(16)).metrics == {}
    untracked = Trainer(kmeans_model(1, track_residuals=False), max_steps=1)
    assert set(untracked.step(rows(16)).metrics) == {
        "loss",
        "distinct_ids",
        "coverage_0",
        "entropy_0",
    }


@pytest.mark.parametrize(
    ("of_model", "of_layer", "expected"),
    [(None, None, 3072), (64, None, 64), (None, 64, 64), (64, 64, 64), (9000, None, 9000)],
)
def test_the_size_of_the_buffer_may_be_given_to_the_model_or_to_its_layer(
    of_model, of_layer, expected
):
    layer = MiniBatchKMeans(4, 3, **({"init_buffer_size": of_layer} if of_layer else {}))
    given = {"init_buffer_size": of_model} if of_model else {}
    model = ResidualQuantization(2, layer, **given)
    assert [own.init_buffer_size for own in model.layers] == [expected, expected]


def test_two_sizes_of_the_buffer_are_an_error_that_names_both():
    with pytest.raises(ValueError, match="32 for the model and 64 for its layer"):
        ResidualQuantization(2, MiniBatchKMeans(4, 3, init_buffer_size=64), init_buffer_size=32)


def test_predict_step_leaves_training_as_it_was_at_every_stage():
    torch.manual_seed(0)
    trainer = Trainer(kmeans_model(2), max_steps=4)
    while not trainer.done:
        trainer.step(rows(8, seed=trainer.steps))
        before = copy.deepcopy(trainer.state())
        trainer.model.predict_step(rows(5, seed=99))
        after = trainer.state()
        assert str(before) == str(after)
        assert trainer.model.training
