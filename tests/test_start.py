"""The study `start`: skipping neurons against plain loops, and the study's own bookkeeping."""

import numpy as np
import pytest
import torch

from condcomp_lib import datasets, published, studies
from condcomp_lib.errors import UsageError
from condcomp_lib.runs import Outcome, RunStore
from condcomp_lib.studies import MissingRuns, start
from condcomp_lib.targets import MLP


@torch.no_grad()
def masked_by_loops(net, x, share):
    """Scores of one example, neuron by neuron: keep those with the largest contribution, zero for the rest."""
    for layer, following in zip(net.linears, net.linears[1:], strict=False):
        h = [max(0.0, float(layer.weight[i] @ x + layer.bias[i])) for i in range(layer.out_features)]
        worth = [h[i] * float(following.weight[:, i].norm()) for i in range(len(h))]
        kept = sorted(range(len(h)), key=lambda i: -worth[i])[: max(1, round(share * len(h)))]
        x = torch.tensor([h[i] if i in kept else 0.0 for i in range(len(h))])
    return net.linears[-1](x)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75, 1.0])
def test_keeping_the_best_equals_a_loop_over_neurons(share):
    torch.manual_seed(0)
    net, x = MLP(6, (9, 8), 4), torch.randn(5, 6)
    expected = torch.stack([masked_by_loops(net, row, share) for row in x])
    torch.testing.assert_close(start.skipped_scores(net, x, share, "best"), expected)


def test_keeping_everything_is_the_target_itself():
    net, x = MLP(6, (9, 8), 4), torch.randn(5, 6)
    for rule in ("best", "random"):
        torch.testing.assert_close(start.skipped_scores(net, x, 1.0, rule), net(x).detach())


def test_a_random_choice_keeps_the_right_number_and_follows_its_generator():
    net = MLP(6, (40,), 40)
    with torch.no_grad():  # outputs are the hidden values themselves, all of them positive
        net.linears[0].bias.fill_(100.0)
        net.linears[1].weight.copy_(torch.eye(40))
        net.linears[1].bias.zero_()
    x = torch.randn(50, 6)
    scores = [start.skipped_scores(net, x, 0.25, "random", torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert ((scores[0] > 0).sum(1) == 10).all()
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])
    assert ((scores[0] > 0).sum(0) > 0).all()


def test_firing_rates_equal_a_direct_count():
    data = datasets.load("digits")
    net = MLP(64, (10, 7), 10)
    first = torch.relu(net.linears[0](torch.from_numpy(data.test.x)))
    second = torch.relu(net.linears[1](first))
    for rates, h in zip(start.firing_rates(net, data.test), (first, second), strict=True):
        np.testing.assert_allclose(rates, (h > 0).double().mean(0).numpy())


@pytest.mark.parametrize("profile", ["quick", "paper"])
def test_every_run_of_the_table_is_named_once(profile):
    specs = start.specs(profile)
    assert len({spec.name for spec in specs}) == len(specs)


def test_answers_are_about_known_ids_and_claims_have_unique_names():
    records = studies.records("start", "paper", partial=True)
    ids = [answer.id for answer in start.answers(records)]
    assert set(ids) <= set(published.load())
    names = [claim.id for claim in start.claims(records)]
    assert len(set(names)) == len(names) > 0


def test_missing_paper_runs_are_an_error_with_the_command_that_computes_them(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDCOMP_STORE", str(tmp_path))
    count = len(start.specs("paper"))
    with pytest.raises(MissingRuns, match=rf"{count} of {count} runs.*condcomp run start --profile paper"):
        studies.records("start", "paper")
    assert studies.records("start", "paper", partial=True) == []
    store = RunStore(tmp_path)
    store.put(start.specs("paper")[0], Outcome({"accuracy": 0.9}), seconds=1.0)
    assert len(studies.records("start", "paper", partial=True)) == 1
    assert len(studies.missing("start", "paper")) == count - 1
    assert studies.progress().startswith(f"Runs missing from the store: {count - 1} of {count} of start, ")


def test_unknown_names_list_the_known_ones():
    with pytest.raises(
        UsageError,
        match="unknown study 'strat'; known: blocks, ",
    ):
        studies.get("strat")
    with pytest.raises(UsageError, match="unknown profile 'fast'; known: paper, quick"):
        studies.records("start", "fast")


def test_every_published_id_has_a_notebook_and_every_part_a_row():
    ids = list(published.load())
    assert all(any(id.startswith(beginning) for beginning in studies.NOTEBOOKS) for id in ids)
    rows = studies.items()
    counted = [int(row["answered"].split(" of ")[1]) for row in rows]
    assert sum(counted) == len(ids)


def test_committed_runs_come_from_committed_code():
    for record in studies.everything("paper"):
        assert record.provenance["dirty"] is False, record.name
        for used in record.provenance["uses"].values():
            assert used["dirty"] is False, record.name
            assert record.provenance["data_checksum"] == used["data_checksum"]
