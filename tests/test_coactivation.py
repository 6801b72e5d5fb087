"""Coactivation: the matrix by its definition, orders that are permutations, measures of known matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condcomp_lib.coactivation import (
    ORDERINGS,
    beyond_rates,
    block_means,
    coactivation,
    communities,
    explained,
    firing_patterns,
    gini,
    ingoing_flow,
    measures,
    modularity,
    network_coactivation,
    ordering,
)
from condcomp_lib.errors import UsageError
from condcomp_lib.targets import MLP


def network(seed=0, hidden=(30, 20)):
    return MLP(8, hidden, 3, generator=torch.Generator().manual_seed(seed))


def inputs(count=100):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(1))


def two_blocks(within=0.5, between=0.1):
    """Neurons 0, 2, 4, ... fire together, and so do 1, 3, 5, ..."""
    same = torch.arange(20) % 2
    return torch.where(same[:, None] == same, within, between)


@given(seed=st.integers(0, 100), examples=st.integers(1, 300), batch=st.integers(1, 128), width=st.integers(1, 450))
def test_coactivation_is_what_its_definition_says(seed, examples, batch, width):
    target, x = network(seed, (width, 7)), inputs(examples)
    fired = firing_patterns(target, x).double()
    found = network_coactivation(target, x, batch)
    torch.testing.assert_close(found.double(), fired.T @ fired / examples, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found, coactivation(firing_patterns(target, x)))
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found.diagonal(), firing_patterns(target, x).float().mean(0))


def test_ingoing_flow_is_summed_over_connections():
    target, x = network(), inputs(5)
    h = target.activation(target.linears[0](x))
    expected = (h[:, :, None].abs() * target.linears[1].weight.T.abs()).sum(1)
    torch.testing.assert_close(ingoing_flow(target, x)[:, 30:], expected)
    assert ingoing_flow(target, x).shape == (5, 50)


@pytest.mark.parametrize("how", ORDERINGS)
@pytest.mark.parametrize(
    "c", [two_blocks(), network_coactivation(network(), inputs()), torch.zeros(4, 4), torch.eye(2)]
)
def test_orders_are_permutations(how, c):
    assert torch.equal(ordering(c, how).sort().values, torch.arange(len(c)))


@pytest.mark.parametrize("how", ["hierarchical", "spectral"])
def test_orders_put_neurons_that_fire_together_side_by_side(how):
    sides = ordering(two_blocks(), how) % 2
    assert (sides.diff() != 0).sum() == 1


def test_the_most_coactive_come_first():
    c = network_coactivation(network(), inputs())
    means = c.mean(1)[ordering(c, "mean")]
    assert (means.diff() <= 0).all()


@given(neurons=st.integers(2, 40), most=st.integers(1, 50))
def test_block_means_keep_the_mean(neurons, most):
    c = torch.rand(neurons, neurons, generator=torch.Generator().manual_seed(neurons))
    found = block_means(c, most)
    assert found.shape == (min(neurons, most),) * 2
    if neurons % len(found) == 0:
        assert found.mean().item() == pytest.approx(c.mean().item(), abs=1e-5)
    if most >= neurons:
        torch.testing.assert_close(found, c)


def test_measures_of_neurons_that_fire_independently():
    fires = torch.rand(20_000, 30, generator=torch.Generator().manual_seed(0)) < 0.4
    found = measures(coactivation(fires))
    assert found.mean == pytest.approx(0.16, abs=0.005)
    assert found.lift == pytest.approx(1, abs=0.02)
    assert found.firing == pytest.approx(0.4, abs=0.01)
    assert found.above == found.partners == 1
    assert found.gini < 0.05
    assert found.modularity < 0.02


def test_measures_of_two_groups_that_take_turns():
    turn = torch.rand(1000, 1, generator=torch.Generator().manual_seed(0)) < 0.5
    found = measures(coactivation(torch.cat([turn.expand(-1, 10), ~turn.expand(-1, 10)], 1)))
    assert found.modularity == pytest.approx(0.5, abs=0.01)
    assert found.above == pytest.approx(90 / 190)
    assert found.partners == pytest.approx(9 / 19)
    assert found.lift == pytest.approx(2 * 90 / 190, abs=0.05)


def test_the_best_split_found_is_the_planted_one():
    truth = torch.arange(20) % 2
    best = max(communities(two_blocks()), key=lambda split: modularity(two_blocks(), split))
    assert modularity(two_blocks(), best) == pytest.approx(modularity(two_blocks(), truth))
    assert explained(two_blocks(), truth) == pytest.approx(1)
    assert explained(two_blocks(), torch.arange(20) // 10) < 0.1


def test_groups_by_rate_explain_independent_neurons_but_nothing_beyond_their_rates():
    generator = torch.Generator().manual_seed(0)
    rates = torch.linspace(0.05, 0.95, 40)
    c = coactivation(torch.rand(20_000, 40, generator=generator) < rates)
    by_rate = torch.arange(40) // 5
    assert explained(c, by_rate) > 0.9
    assert explained(beyond_rates(c), by_rate) < 0.2
    assert explained(beyond_rates(two_blocks()), torch.arange(20) % 2) == pytest.approx(1)


def test_gini_knows_its_ends():
    assert gini(torch.ones(9)) == 0
    assert gini(torch.tensor([0.0] * 99 + [1.0])) == pytest.approx(0.99)
    assert gini(torch.zeros(3)) == 0


def test_a_network_that_never_fires_has_no_communities():
    found = measures(torch.zeros(5, 5))
    assert (found.mean, found.modularity, found.partners, found.lift) == (0, 0, 0, 1)


def test_bad_input_is_refused_in_one_line():
    with pytest.raises(UsageError, match=r"^there are no examples to look at$"):
        network_coactivation(network(), torch.zeros(0, 8))
    with pytest.raises(UsageError, match=r"^the examples hold a number that is not finite$"):
        network_coactivation(network(), torch.full((2, 8), float("nan")))
    for wrong in (measures, block_means, beyond_rates):
        with pytest.raises(UsageError, match=r"^coactivation must be neurons x neurons"):
            wrong(torch.zeros(3, 4))
    for wrong in (explained, modularity):
        with pytest.raises(UsageError, match=r"^20 neurons need as many groups, not 3$"):
            wrong(two_blocks(), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UsageError, match=r"^coactivation holds a number that is not finite$"):
        ordering(torch.full((3, 3), float("nan")), "mean")
    with pytest.raises(UsageError, match="ordering"):
        ordering(two_blocks(), "random")
    with pytest.raises(UsageError, match=r"^at least one block a side is needed, not 0$"):
        block_means(two_blocks(), 0)
