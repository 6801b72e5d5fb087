"""The studies of pretraining and coactivation: run tables, one computed run of each, what is made of records."""

import numpy as np
import pytest
import torch

from condcomp_lib import published, studies
from condcomp_lib.flow import FORMS, Flow, scores_with_flow
from condcomp_lib.runs import RunSpec, RunStore
from condcomp_lib.studies import (
    coactivation,
    coactivation_results,
    pretraining,
    pretraining_cost,
    pretraining_results,
    pretraining_search,
    pretraining_variance,
)
from condcomp_lib.targets import MLP

FAMILY = ("pretraining", "pretraining-search", "pretraining-cost", "pretraining-variance")


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "artefacts")


@pytest.mark.parametrize("name", [*FAMILY, "coactivation"])
@pytest.mark.parametrize("profile", ["quick", "paper"])
def test_every_run_of_a_table_is_another_one(name, profile):
    names = [spec.name for spec in studies.get(name).specs(profile)]
    assert names
    assert len(set(names)) == len(names)


def test_the_family_is_run_by_one_command():
    assert studies.family("pretraining") == list(FAMILY)


def test_the_search_draws_its_settings_from_the_declared_space_once():
    tried = pretraining_search.sampled("paper")
    assert len(tried) == len(set(tried)) == pretraining_search.SAMPLED
    assert set(tried) <= set(pretraining_search.space())
    assert len(set(pretraining_search.space())) == 27


def test_the_setting_that_is_trained_anew_is_the_one_that_the_search_picks():
    records = studies.records("pretraining-search", "paper", partial=True)
    assert pretraining_search.CHOSEN["paper"] == pretraining_search.chosen(records)
    assert pretraining_search.SEED not in pretraining_search.FRESH["paper"]


def test_every_cell_of_the_paper_has_three_targets_and_two_policies_of_each():
    seeds = {}
    for spec in pretraining.specs("paper"):
        settings = spec.settings
        cell = (settings["pretraining"], settings["method"])
        seeds.setdefault(cell, set()).add((settings["target_seed"], settings["policy_seed"]))
    both = {(target, policy) for target in range(3) for policy in range(2)}
    assert all(seeds[cell] == both for cell in pretraining_results.CELLS)


def test_every_published_cell_is_asked_for_once_the_lost_ones_too():
    ids = [id for pair in pretraining_results.CELLS.values() for id in pair]
    wanted = [id for id in published.load() if id.startswith(("Pt1", "Pt2"))]
    assert sorted([*ids, *pretraining_results.TARGETS.values()]) == wanted


@pytest.mark.parametrize("form", FORMS)
def test_the_naive_step_computes_what_the_factorised_one_does(form):
    model = MLP(12, (7, 6), 3, generator=torch.Generator().manual_seed(0))
    x, y = torch.rand(9, 12), torch.arange(9) % 3
    ours, theirs = scores_with_flow(model, x, y, Flow(form)), pretraining_cost.naive_scores(model, x, y, Flow(form))
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1].item() == pytest.approx(theirs[1].item(), rel=1e-4)


def test_peak_memory_counts_what_a_step_allocates():
    row = {**pretraining_cost.BAR, "widths": "64-50-10"}

    class Allocating:
        def clear(self):
            self.kept = None

        def __call__(self):
            self.kept = torch.ones(250_000)
            torch.ones(500_000)

    assert 3e6 <= pretraining_cost.peak_bytes(Allocating()) < 3.1e6
    plain = pretraining_cost.steps(row)["plain"]
    gradients = 4 * sum(weight.numel() for weight in plain.model.parameters())
    assert gradients <= pretraining_cost.peak_bytes(plain) < 3 * gradients + 1e5


def test_tensors_that_do_not_fit_are_not_tried():
    assert set(pretraining_cost.steps(pretraining_cost.BAR)) == {"plain", "factorised", "naive"}
    large = {**pretraining_cost.BAR, "widths": "3072-1000-1000-10"}
    assert set(pretraining_cost.steps(large)) == {"plain", "factorised"}


def test_a_cost_row_has_all_that_its_bars_need():
    row = {**pretraining_cost.BAR, "widths": "16-8-8-10"}
    found = pretraining_cost.measure(row, 3)
    for name in ("plain", "factorised", "naive"):
        assert found[f"{name}_ms"] > 0
        assert found[f"{name}_mb"] > 0
    assert len(found["factorised_over_plain"]) == len(found["naive_over_factorised"]) == 3


def test_a_lazy_run_holds_its_activity_and_has_the_published_way_beside_it(store):
    spec = next(s for s in pretraining.specs("quick") if s.settings["pretraining"] == "flow")
    spec = _smaller(spec, {"epochs": 2})
    result = pretraining.compute(spec, store).result
    assert result["activity"] == pytest.approx(0.25, abs=0.05)
    assert 0 < result["published"]["valid_accuracy"] <= 1
    assert set(result["published"]) >= {"activity", "accuracy_ratio"}


def test_a_network_of_the_coactivation_study_keeps_its_matrices_and_its_way(store):
    kind = next(s for s in coactivation.specs("quick") if s.settings["network"] == coactivation_results.FLOW)
    training = {"epochs": 2, "snapshots": [1], "batch": 64}
    outcome = coactivation.compute(_smaller(kind, training), store)
    assert {"mean", "hierarchical", "spectral", "partition", "layers", "epoch1", "ingoing9"} <= set(outcome.arrays)
    assert outcome.arrays["mean"].dtype == np.uint8
    assert max(outcome.arrays["mean"].shape) <= 200
    assert outcome.result["on_the_way"][0]["epoch"] == 1
    assert 0 < outcome.result["explained"]["random"] < outcome.result["explained"]["coactivation"] < 1
    assert len(outcome.result["penalty_share"]) == 2


def test_the_variance_study_measures_every_form(store):
    spec = pretraining_variance.specs("quick")[0]
    settings = {**spec.settings, "minibatches": 3}
    settings["target_training"] = {**settings["target_training"], "epochs": 1, "snapshots": [1]}
    rows = pretraining_variance.compute(RunSpec(spec.study, spec.recipe, settings), store).result["varies"]
    assert len(rows) == 2 * len(FORMS) * len(settings["batches"])
    assert all(row["variation"] >= 0 and row["mean"] > 0 for row in rows)


def _smaller(spec, training):
    """The same run with a target that is trained briefly."""
    own = {**spec.settings["target_training"], **training}
    return RunSpec(spec.study, spec.recipe, {**spec.settings, "target_training": own})
