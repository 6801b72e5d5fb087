"""The studies of notebook 01: what a run of `targets` and `partitioning` holds, and the bookkeeping of all."""

import itertools

import numpy as np
import pytest
import torch

from condcomp_lib import datasets, published, studies
from condcomp_lib.runs import Record, RunSpec, RunStore
from condcomp_lib.studies import lazy_results, partitioning, partitioning_ladder, partitioning_splits, targets
from condcomp_lib.training import build, obtain_target


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    return tmp_path_factory.mktemp("artefacts")


@pytest.fixture(scope="module")
def specs():
    """A sampled and a calibrated run of one policy, on few digits' epochs."""
    found = [spec for spec in partitioning.specs("quick") if spec.settings["target_seed"] == 0]
    return [s for s in found if s.settings["pretraining"] == "none" and s.settings["activity_asked"] != 0.35]


@pytest.fixture(scope="module")
def outcomes(specs, artefacts):
    return [partitioning.compute(spec, RunStore(artefacts)) for spec in specs]


@pytest.mark.parametrize("study", [targets, partitioning, partitioning_splits, partitioning_ladder])
@pytest.mark.parametrize("profile", ["quick", "paper"])
def test_every_run_of_the_table_is_named_once(study, profile):
    names = [spec.name for spec in study.specs(profile)]
    assert len(set(names)) == len(names) > 0


def test_all_decisions_of_one_policy_share_its_training():
    specs = partitioning.specs("paper")
    policies = {spec.name: partitioning.policy_of(spec.settings).name for spec in specs}
    decisions = len(partitioning.DECISIONS)
    assert len(set(policies.values())) * decisions == len(specs)
    part = len(specs) // decisions
    assert all(list(policies.values())[:part] == list(policies.values())[i * part : (i + 1) * part] for i in (1, 2))


def test_each_pair_of_seeds_has_its_own_partition_and_policy():
    data = datasets.load("digits")
    settings = partitioning.specs("quick")[0].settings
    target = build(targets.target_of(settings), data)
    found = {}
    for target_seed, seed in itertools.product(range(3), range(2)):
        seeds = {"target_seed": target_seed, "partition_seed": seed, "policy_seed": seed}
        own = {**settings, **seeds}
        lazy, again = (partitioning.untrained(own, target, data, partitioning.drawn(own, target)) for _ in range(2))
        assert torch.equal(lazy.policy.gates[0].weight, again.policy.gates[0].weight)
        found[target_seed, seed] = (torch.cat(lazy.partition.membership), lazy.policy.gates[0].weight)
    for one, other in itertools.combinations(found, 2):
        assert not torch.equal(found[one][0], found[other][0])
        assert not torch.equal(found[one][1], found[other][1])


def test_a_run_is_consistent_with_itself(specs, outcomes):
    for spec, outcome in zip(specs, outcomes, strict=True):
        result = outcome.result
        assert result["accuracy_ratio"] == pytest.approx(result["accuracy"] / result["target_accuracy"])
        sizes, rates = np.array(result["group_sizes"]), np.array(result["group_firing"])
        assert result["activity"] == pytest.approx((sizes * rates).sum() / sizes.sum())
        assert result["activity"] == pytest.approx(np.mean(result["activity_by_layer"]))  # layers of equal width
        assert 0 < result["compute"] < 1
        assert set(outcome.uses) == {"target", "policy", "control"}
        assert len(result["accuracy_curve"]) == len(result["activity_curve"]) == spec.settings["max_epochs"]


def test_the_same_seed_twice_gives_the_same_run(specs, outcomes, tmp_path):
    again = partitioning.compute(specs[0], RunStore(tmp_path))
    assert again.result == outcomes[0].result


def test_decisions_share_target_and_policy_but_not_the_mask(outcomes):
    sampled, calibrated = outcomes
    assert sampled.uses["policy"] == calibrated.uses["policy"]
    assert sampled.result["target_accuracy"] == calibrated.result["target_accuracy"]
    assert sampled.result["group_firing"] != calibrated.result["group_firing"]
    assert calibrated.result["valid_activity"] == pytest.approx(partitioning.TAU, abs=0.005)


def test_keeping_everything_is_the_target_and_dropping_costs_accuracy(artefacts):
    spec = targets.specs("quick")[0]
    result = targets.compute(spec, RunStore(artefacts)).result
    _, trained = obtain_target(targets.target_of(spec.settings), datasets.load("digits"), RunStore(artefacts))
    assert result["accuracy"] == trained.result["test_accuracy"]
    assert result["dropped_ratio"] == sorted(set(result["dropped_ratio"]))


def test_answers_are_about_known_ids_and_claims_have_unique_names():
    for study in (targets, partitioning, partitioning_splits, partitioning_ladder):
        records = studies.records(study.STUDY.name, "paper", partial=True)
        assert {answer.id for answer in study.answers(records)} <= set(published.load())
        names = [claim.id for claim in study.claims(records)]
        assert len(set(names)) == len(names)


def test_published_ratios_stand_beside_kinds_of_the_run_table():
    known = {lazy_results.label(kind) for kind in partitioning.KINDS["paper"]}
    assert set(partitioning.published_ratios()) <= known
    assert set(partitioning.published_ratios().values()) == {0.273, 0.858}


def record(target_seed, policy_seed, **result):
    seeds = {"target_seed": target_seed, "policy_seed": policy_seed, "control": "control_ratio" in result}
    return Record(RunSpec("toy", 1, seeds), result, {})


def test_runs_are_paired_by_their_seeds_whatever_their_order_and_number():
    ours = [record(t, p, accuracy=0.1 * t + 0.01 * p + 0.5) for t, p in ((0, 0), (1, 0), (2, 1))]
    theirs = [record(t, p, accuracy=0.1 * t + 0.01 * p) for t, p in ((2, 1), (0, 0), (3, 0))]
    gain = lazy_results.gains(ours, theirs, lambda result: result["accuracy"])
    assert (gain.estimate, gain.n) == (pytest.approx(0.5), 2)
    assert lazy_results.gains(ours[1:2], theirs, lambda result: result["accuracy"]) is None


def test_runs_without_a_control_are_left_out_of_its_numbers():
    group = [record(0, 0, control_ratio=0.9), record(0, 1), record(1, 0, control_ratio=0.8)]
    assert lazy_results.over_controls(group, lambda result: result["control_ratio"]).n == 2
    assert lazy_results.over_controls(group[1:2], lambda result: result["control_ratio"]) is None
