"""Users' networks made lazy: what is read, what is promised, what is saved, and what is refused."""

import concurrent.futures
import copy
import dataclasses
import json
import multiprocessing
import pickle

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from condcomp_lib import datasets, paths, policies, time_plots
from condcomp_lib.conversion import choice, export, install, lazify, load, report, save
from condcomp_lib.conversion.examples import collect
from condcomp_lib.conversion.reading import read
from condcomp_lib.conversion.saving import LoadError
from condcomp_lib.errors import UsageError

QUICK = {"epochs": 2, "control": False, "progress": False}


def model(*hidden, inputs=20, classes=4, seed=0):
    torch.manual_seed(seed)
    layers = []
    for below, width in zip([inputs, *hidden], hidden, strict=False):
        layers += [nn.Linear(below, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], classes))


def inputs(count=400, features=20):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def digits():
    """A trained model of odd widths, and its data: images and labels."""
    data = datasets.load("digits")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 127), nn.BatchNorm1d(127), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(127, 93), nn.BatchNorm1d(93), nn.ReLU(), nn.Linear(93, 10),
    )  # fmt: skip
    x, y = torch.from_numpy(data.train.x).reshape(-1, 1, 8, 8), torch.from_numpy(data.train.y)
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(25):
        for rows in torch.randperm(len(x)).split(32):
            optimiser.zero_grad()
            functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimiser.step()
    return net.eval(), data, (x, y)


@pytest.fixture(scope="module")
def converted(digits):
    return lazify(digits[0], digits[2], 0.25, epochs=40, progress=False)


class Functional(nn.Module):
    """As many users write a network."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(20, 16, bias=False), nn.Linear(16, 12), nn.Dropout()
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = x.view(x.size(0), -1)
        x = torch.relu(self.first(x))
        x = self.drop(functional.relu(self.second(x)))
        return self.head(x)


class Rectified(Functional):
    """ReLU in two other ways that it is written."""

    def __init__(self, first=torch.relu_, second=lambda x: x.clamp(min=0)):
        super().__init__()
        self.rectify = (first, second)

    def forward(self, x):
        return self.head(self.rectify[1](self.second(self.rectify[0](self.first(x)))))


class Named(Functional):
    def forward(self, x):
        return self.head(self.second(torch.relu(input=self.first(x))))


class Capped(Functional):
    def forward(self, x):
        return self.head(self.second(self.first(x).clamp(0, 6)))


class Cut(Functional):
    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x[:, :20])))))


class Residual(Functional):
    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.head(self.second(h) + self.second(h))


def moved(layer):
    """Normalisation with statistics and weights that are not those of the start."""
    draws = torch.Generator().manual_seed(3)
    for tensor, low in ((layer.running_mean, -1.0), (layer.running_var, 0.5), (layer.weight, -1.0), (layer.bias, -1.0)):
        tensor.data = low + 2 * torch.rand(tensor.shape, generator=draws)
    return layer


@pytest.mark.parametrize(
    "net",
    [
        model(16, 12),
        nn.Sequential(nn.Flatten(), nn.Linear(20, 16), moved(nn.BatchNorm1d(16)), nn.ReLU(), nn.Dropout(),
                      nn.Linear(16, 4)),
        nn.Sequential(nn.Linear(20, 16), nn.Tanh(), moved(nn.BatchNorm1d(16)), nn.Linear(16, 8), nn.Tanh(),
                      nn.Linear(8, 4)),
        nn.Sequential(moved(nn.BatchNorm1d(20)), nn.Linear(20, 16), nn.ReLU(), nn.Identity(), nn.Linear(16, 4)),
        nn.Sequential(moved(nn.BatchNorm1d(20)), moved(nn.BatchNorm1d(20)), nn.Linear(20, 16), nn.ReLU(),
                      moved(nn.BatchNorm1d(16)), moved(nn.BatchNorm1d(16)), nn.Linear(16, 4)),
        nn.Sequential(nn.Sequential(nn.Linear(20, 16), nn.ReLU()), nn.Sequential(nn.Linear(16, 4))),
        Functional(),
        Rectified(),
        Rectified(lambda x: torch.clamp(x, 0.0), lambda x: functional.relu(x, inplace=True)),
        Rectified(lambda x: x.clamp_min(0), lambda x: torch.clip(x, min=0)),
    ],
    ids=["plain", "normalised before", "normalised after", "first", "twice", "nested", "functional", "in place",
         "clamped", "clipped"],
)  # fmt: skip
def test_a_network_is_read_as_it_computes(net):
    net, x = net.eval(), inputs(50)
    with torch.no_grad():
        torch.testing.assert_close(read(net).target(x), net(x), rtol=1e-4, atol=1e-5)


def test_shared_weights_and_half_precision_are_read():
    net = model(16, 16, inputs=16)
    net[2].weight = net[0].weight
    x = inputs(20, 16)
    with torch.no_grad():
        torch.testing.assert_close(read(net).target(x), net(x), rtol=1e-4, atol=1e-5)
        half = copy.deepcopy(net).to(torch.bfloat16)
        target = read(half).target
        torch.testing.assert_close(target(x), half(x.bfloat16()).float(), rtol=0.1, atol=0.1)
        assert target.linears[0].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("net", "path", "says"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(4, 2)), "", r"layer '0' is Conv2d.* not supported"),
        (nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)), "", r"layer '1' is GELU.* supported are Linear"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "", "'1' follows a Linear directly"),
        (nn.Sequential(nn.Linear(4, 2)), "", "at least one hidden layer"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), "",
         "must be the same"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(5, 2)), "", "reads 5 features where 4 lie below"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.ReLU(), nn.Linear(4, 2)), "",
         "keeps no running statistics"),
        (model(8).to("meta"), "", "has no numbers"),
        (nn.Sequential(*model(8), nn.Softmax(1)), "", "'3' is Softmax.*up to its scores"),
        (nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2)), "", "'1' is Sigmoid.*supported are Linear"),
        (Named(), "", "no chain of layers: relu .* not supported"),
        (Capped(), "", "clamp .* not supported; supported are Linear"),
        (Residual(), "", "no chain of layers"),
        (Cut(), "", "no chain of layers: getitem"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(4, 2)), "", "normalises 5 features"),
        (model(8), "encoder.0", r"no layer 'encoder.0'; at its top there are: 0, 1, 2"),
        (nn.TransformerEncoderLayer(8, 2, 16, activation="gelu"), "", "activation is gelu"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(net, path, says):
    with pytest.raises(UsageError, match=says):
        read(net, path)


def test_a_weight_that_is_no_number_is_refused():
    net = model(8)
    net[0].weight.data[0, 0] = torch.nan
    with pytest.raises(UsageError, match="not finite"):
        read(net)


def test_the_promises_on_digits(digits, converted):
    net, data, _ = digits
    x = torch.from_numpy(data.test.x)
    scores, mask = converted.evaluate(x)
    with torch.no_grad():
        full = net(x.reshape(-1, 1, 8, 8)).argmax(1)
    y = torch.from_numpy(data.test.y)
    ratio = (scores.argmax(1) == y).double().mean() / (full == y).double().mean()
    assert ratio >= 0.95
    assert abs(converted.lazy.partition.activity(mask).mean().item() - 0.25) < 0.02  # 215 examples to calibrate on
    assert torch.allclose(scores, converted.lazy.evaluate(x).scores, atol=1e-4)
    # Images as the model takes them.
    assert torch.equal(converted(x.reshape(-1, 1, 8, 8)), converted(x))


def test_it_is_reported_on_the_examples_given_for_that(digits):
    net, data, given = digits
    test = (torch.from_numpy(data.test.x).reshape(-1, 1, 8, 8), torch.from_numpy(data.test.y))
    fast = lazify(net, given, 0.3, test=test, **{**QUICK, "control": True})
    found, (scores, mask) = fast.report, fast.evaluate(test[0].flatten(1))
    assert found["examples"] == {"train": len(data.train) - len(data.train) // 5, "valid": len(data.train) // 5,
                                 "test": len(data.test)}  # fmt: skip
    assert found["lazy"] == pytest.approx((scores.argmax(1) == test[1]).double().mean().item())
    assert found["activity"]["found"] == pytest.approx(fast.lazy.partition.activity(mask).mean().item())
    with torch.no_grad():
        assert found["full"] == pytest.approx((net(test[0]).argmax(1) == test[1]).double().mean().item())
    # Nothing is learned from them, and their labels are as they come.
    other = lazify(net, given, 0.3, test=(test[0][:40], (test[1][:40] + 1) % 10), **QUICK)
    assert torch.equal(other(test[0]), fast(test[0]))
    assert other.report["full"] < 0.1
    assert lazify(net, given, 0.3, test=test[0], **QUICK).report["measure"] == "agreement"
    assert lazify(net, given[0], 0.3, test=test, **QUICK).report["measure"] == "accuracy"


def test_a_narrow_layer_has_fewer_groups_and_the_others_as_many_as_before(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    net, x = model(120, 9, 90), inputs(600)
    for options in ({}, {"groups": (30, 3, 20)}):
        fast = lazify(net, x, 0.4, **options, **QUICK)
        counts = list(fast.lazy.partition.groups_by_layer)
        assert counts == fast.report["chosen"]["groups"]
        assert counts == list(options.get("groups", (25, 2, 22)))
        assert [int(groups.max()) + 1 for groups in fast.lazy.partition.membership] == counts
        own = fast.lazy.evaluate(x)
        torch.testing.assert_close(fast(x), own.scores, rtol=1e-4, atol=1e-5)
        again = load(save(fast, tmp_path / "net"))
        assert torch.equal(again(x), fast(x))
        assert again.lazy.partition.groups_by_layer == tuple(counts)
        session = onnxruntime.InferenceSession(str(export(fast, tmp_path / "net.onnx")))
        assert np.abs(session.run(None, {"x": x.numpy()})[0] - own.scores.numpy()).max() < 1e-4


def test_epochs_are_those_that_are_asked_for():
    assert lazify(model(40), inputs(), 0.4, **{**QUICK, "epochs": 1}).report["chosen"]["epochs"] == 2
    told = lazify(model(40), inputs(), 0.4, **{**QUICK, "epochs": 31, "control": True}).report
    assert told["chosen"]["epochs"] == 31 + 2  # two after the oracle
    assert told["control"]["epochs"] == 31 + 2
    assert told["chosen"]["ended"] == "epochs"


def test_pictures_are_moved_as_asked_and_for_the_control_too(monkeypatch):
    net = nn.Sequential(nn.Flatten(), *model(40, inputs=256))
    x = torch.randn(200, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    seen = []
    shift = report.shifted
    monkeypatch.setattr(
        report, "shifted", lambda x, shape, most, draws: seen.append(most) or shift(x, shape, most, draws)
    )
    for options, moved in (
        ({"finetune": True}, 1),
        ({"finetune": True, "moved": 3}, 3),
        ({"finetune": True, "moved": 0}, 0),
        ({}, 0),
    ):
        seen.clear()
        found = lazify(net, x, 0.4, **options, **{**QUICK, "control": True}).report
        assert found["chosen"]["moved"] == moved
        assert set(seen) == ({moved} if moved else set())
        assert ("pictures that weights learned from" in dict(report.rows(found))) == bool(moved)


def test_outputs_of_moved_pictures_are_weighed_by_their_variance():
    net = nn.Sequential(nn.Flatten(), *model(40, inputs=256))
    x = torch.randn(200, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    examples = collect(net, read(net), x, 0, scores=False)
    chosen = choice.prepared(read(net).target, examples, 0.4, None, 0)[0]
    draws, settings = torch.Generator(), [phase[1] for phase in choice._phases(chosen, examples, True, 2)]
    first = choice._made(chosen.lazy, examples, settings[0], draws, None)
    second = choice._made(chosen.lazy, examples, settings[1], draws, first)
    assert second.wanted is None
    wanted = first.known.var(correction=0).item()
    assert first.scale == second.scale == pytest.approx(wanted)


def test_rows_with_four_dimensions_are_no_pictures_where_a_layer_reads_only_the_last():
    net, x = model(32), torch.randn(100, 2, 16, 20, generator=torch.Generator().manual_seed(0))
    fast = lazify(net, x, 0.5, finetune=True, **QUICK)
    assert fast.report["chosen"]["moved"] == 0
    assert fast.report["examples"]["train"] == 60 * 32


def test_labels_that_play_no_part_are_not_looked_at():
    x = inputs()
    found = lazify(model(32, classes=3), (x, torch.rand(400)), 0.5, scores=False, **QUICK).report
    assert found["measure"] == "variance kept"


def test_examples_to_report_on_come_in_every_form(digits):
    net, x, y = model(32), inputs(), torch.arange(400) % 4
    given = torch.utils.data.TensorDataset(x[:90], y[:90])
    forms = ((x[:90], y[:90]), given, torch.utils.data.DataLoader(given, batch_size=32), [(x[:90], y[:90])])
    found = [lazify(net, (x, y), 0.5, test=form, **QUICK).report for form in forms]
    assert {(one["examples"]["test"], one["lazy"], one["measure"]) for one in found} == {
        (90, found[0]["lazy"], "accuracy")
    }
    one = lazify(net, (x, y), 0.5, test=(x[:1], y[:1]), **QUICK).report
    assert one["examples"]["test"] == 1
    json.dumps(one, allow_nan=False)
    layer = nn.TransformerEncoderLayer(8, 2, 32, 0.0, batch_first=True).eval()
    tokens = lazify(layer, torch.randn(40, 5, 8), 0.5, test=torch.randn(7, 3, 8), **QUICK).report
    assert tokens["examples"]["test"] == 21


@pytest.mark.parametrize(("hidden", "least"), [((60, 60), 3), ((60,), 1)])
def test_every_spread_that_is_tried_has_the_asked_activity(hidden, least):
    net = model(*hidden)
    block = read(net)
    found = [one.rates for one in choice.prepared(block.target, collect(net, block, inputs(), 0), 0.3, None, 0)]
    assert len(found) == len({tuple(rates) for rates in found}) >= least
    assert all(np.mean(rates) == pytest.approx(0.3, abs=1e-5) for rates in found)


def test_of_the_spreads_the_one_with_which_a_policy_loses_least_is_taken():
    net = model(60, 60)
    block = read(net)
    examples = collect(net, block, inputs(2000), 0)
    low, even = ([0.02, 0.58], [0.3, 0.3])
    one = choice.prepared(block.target, examples, 0.3, None, 0)[0]
    found = [dataclasses.replace(one, rates=rates) for rates in (low, even)]
    for order in (found, found[::-1]):
        assert choice._best(order, block.target, examples, 1.0, 1, 0).rates == even


def test_the_model_is_left_as_it_is(digits):
    net, _, given = digits
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fast = lazify(net, given, 0.5, finetune=True, **QUICK)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    net.eval()


def test_the_same_seed_gives_the_same_network():
    x = inputs()
    one, two = (lazify(model(64, 48), x, 0.3, seed=5, **QUICK) for _ in range(2))
    assert torch.equal(one(x), two(x))


@pytest.mark.parametrize("activity", [0.02, 0.1, 0.4, 0.8, 1.0])
def test_asked_activity_is_met_on_held_out_data(activity):
    fast = lazify(model(120, 90), inputs(20_000), activity, **{**QUICK, "epochs": 1})
    held_out = torch.randn(4000, 20, generator=torch.Generator().manual_seed(9))
    found = fast.lazy.partition.activity(fast.evaluate(held_out)[1]).mean().item()
    assert found == pytest.approx(activity, abs=0.01)
    assert fast.report["activity"]["found"] == pytest.approx(activity, abs=0.01)


@pytest.mark.parametrize("finetune", [False, True])
def test_hard_cases_are_converted(finetune):
    x = inputs(300)
    ten, one_class, sparse, dead = model(32), model(32), model(32, 24), model(32, 24)
    one_class[-1].bias.data = torch.tensor([100.0, 0, 0, 0])
    for layer in (sparse[0], sparse[2]):
        layer.weight.data[torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.9] = 0
    dead[0].weight.data.zero_()
    dead[0].bias.data.fill_(-1.0)  # no neuron of the first layer ever fires
    for net, given in ((ten, x[:10]), (one_class, x), (sparse, x), (dead, x), (model(32), (x, torch.zeros(300)))):
        fast = lazify(net, given, 0.5, finetune=finetune, **QUICK)
        assert fast(x).isfinite().all()
        assert report.rows(fast.report)


def test_labels_datasets_loaders_and_arrays_are_the_same_data():
    net, x = model(40), inputs()
    y = net(x).argmax(1)
    dataset = torch.utils.data.TensorDataset(x, y)
    ways = ((x, y), torch.utils.data.DataLoader(dataset, 64), (x.numpy(), y.numpy()[:, None]), dataset)
    found = [lazify(net, given, 0.4, **QUICK) for given in ways]
    assert all(torch.equal(one(x), found[0](x)) for one in found[:-1])  # a Dataset is drawn from, in another order
    assert {one.report["measure"] for one in found} == {"accuracy"}
    assert lazify(net, torch.utils.data.TensorDataset(x), 0.4, **QUICK).report["measure"] == "agreement"
    assert found[0].report["measure"] == "accuracy"
    assert lazify(net, x, 0.4, **QUICK).report["measure"] == "agreement"


@pytest.mark.parametrize(
    ("given", "options", "says"),
    [
        (inputs(), {"activity": 0.0}, "activity is a share"),
        (inputs(), {"activity": 25}, "activity is a share"),
        (inputs(), {"activity": 0.5, "seconds": 0.0}, "give training some time"),
        (inputs(), {"activity": 0.5, "groups": 1000}, r"groups must be from 2 to a layer's neurons \(32\)"),
        (inputs(4), {"activity": 0.5}, "at least 5 examples"),
        (inputs(50, 19), {"activity": 0.5}, "the model does not take these data"),
        ((inputs(50), torch.zeros(49)), {"activity": 0.5}, "one number for each of 50 examples"),
        ((inputs(50), torch.full((50,), 7)), {"activity": 0.5}, "labels must be from 0 to 3"),
        (7, {"activity": 0.5}, "data are inputs, a pair"),
        ((inputs(50), torch.rand(50)), {"activity": 0.5}, "labels must be whole numbers"),
        ([{"x": inputs(50)}], {"activity": 0.5}, "a minibatch is a tensor of inputs, or inputs and labels; not dict"),
        (inputs(), {"activity": "half"}, "activity is a share"),
        (inputs(), {"activity": 0.5, "groups": 2.5}, "groups must be from 2"),
        (inputs(), {"activity": 0.5, "groups": 0}, "groups must be from 2"),
        (inputs(), {"activity": 0.5, "groups": (4, 4)}, r"one for each, not \(4, 4\)"),
        (inputs(), {"activity": 0.5, "groups": "many"}, "groups must be from 2"),
        (inputs(), {"activity": 0.5, "test": inputs(50, 19)}, "the model does not take these data"),
        (inputs(), {"activity": 0.5, "test": inputs(0)}, "at least one example is needed to report on"),
        (inputs(), {"activity": 0.5, "batch": "shared"}, "unknown batch 'shared'; known: one, per-example"),
        (inputs(), {"activity": 0.5, "finetune": True, "moved": 2}, r"moved is by how many pixels.*\[1, 1, 20\]"),
        (inputs(), {"activity": 0.5, "moved": -1}, "moved is by how many pixels"),
        (inputs(), {"activity": 0.5, "batch": "many"}, "unknown batch 'many'"),
    ],
)
def test_bad_input_is_one_clear_line(given, options, says):
    with pytest.raises(UsageError, match=says):
        lazify(model(32), given, **{**QUICK, **options})


def test_a_sorted_dataset_is_drawn_from_and_not_cut_off(monkeypatch):
    monkeypatch.setattr("condcomp_lib.conversion.examples.MOST_ROWS", 300)
    x, y = inputs(3000), torch.arange(4).repeat_interleave(750)
    net = model(32)
    block = read(net)
    found = collect(net, block, torch.utils.data.TensorDataset(x, y), 0)
    assert np.bincount(found.data.train.y).min() > 20


def test_rows_of_one_sentence_stay_together():
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(8, 2, 32, 0.0, batch_first=True).eval()
    x = torch.randn(40, 5, 8)
    found = collect(net, read(net), x, 0)
    assert [len(part) for part in (found.data.train, found.data.valid, found.data.test)] == [120, 40, 40]
    assert not found.scores
    fast = lazify(net, x, 1.0, **QUICK)
    with torch.no_grad():
        torch.testing.assert_close(install(net, "", fast)(x), net(x), rtol=1e-3, atol=1e-4)


def test_an_answer_that_is_never_right_is_reported_and_not_fatal():
    net, x = model(32), inputs()
    wrong = (net(x).argmax(1) + 1) % 4
    found = lazify(net, (x, wrong), 0.5, **QUICK).report
    assert found["full"] == 0
    assert found["ratio"]["estimate"] is None
    assert "look at their labels" in " ".join(found["next"])
    assert dict(report.rows(found))["ratio"] == "none"
    json.dumps(found, allow_nan=False)
    time_plots.converted(found, plt.subplots(1, 2)[1])
    plt.close()


def test_outputs_that_are_no_scores_are_kept_in_the_mean_square():
    net, x = model(64, classes=3), inputs(2000)
    found = lazify(net, x, 0.8, scores=False, **{**QUICK, "epochs": 10}).report
    assert found["measure"] == "variance kept"
    assert 0.3 < found["lazy"] <= 1
    assert lazify(model(64, classes=1), x, 0.8, **QUICK).report["measure"] == "variance kept"


def test_half_precision_goes_in_and_comes_out():
    net, x = model(32).to(torch.bfloat16), inputs()
    fast = lazify(net, x, 0.9, **QUICK)
    assert fast(x.bfloat16()).dtype == torch.bfloat16
    assert fast(x.double()).dtype == torch.float32
    around = nn.Sequential(nn.Linear(5, 20), net).to(torch.bfloat16)
    inner = lazify(around, torch.randn(200, 5), 0.9, path="1", **QUICK)
    with torch.no_grad():
        assert install(around, "1", inner)(torch.randn(3, 5).bfloat16()).dtype == torch.bfloat16


def test_examples_that_are_mixed_are_refused():
    net = nn.Sequential(nn.Flatten(0, 1), *model(32))
    with pytest.raises(UsageError, match="it mixes them"):
        lazify(net, torch.randn(50, 3, 20), 0.5, **QUICK)


def test_a_forward_that_does_more_than_its_layers_is_found_out():
    class Scaled(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(UsageError, match="its forward does more than its layers say"):
        lazify(Scaled(*model(32)), inputs(), 0.5, **QUICK)


def test_the_report_says_what_is_measured(digits, converted):
    found = converted.report
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found["latency"]) >= {"1", "128"}
    assert found["ladder"]["blind"] < found["ladder"]["learned"]
    assert found["ratio"]["low"] <= found["ratio"]["estimate"] <= found["ratio"]["high"]
    assert found["ratio"]["estimate"] == pytest.approx(found["lazy"] / found["full"])
    assert 0 < found["control"]["ratio"] <= 1.1
    told = dict(report.rows(found))
    assert told["activity"].endswith("(asked: 25%)")
    # 21,000 weights are too few for time to be gained: it says so where the measurement does.
    fastest = max(found["latency"][batch]["speedup"] for batch in ("1", "128"))
    assert any("nothing is to be gained in time" in line for line in found["next"]) == (fastest < 1.1)


def test_advice_follows_the_numbers():
    chosen = {"groups": [7, 9], "finetuned": False, "ended": "seconds"}
    base = {"weights": 10, "chosen": chosen, "ratio": {"estimate": 0.9},
            "activity": {"asked": 0.25, "found": 0.251}, "latency": {"1": {"speedup": 2.0}}}  # fmt: skip

    def told(neurons, groups, **more):
        ladder = {"oracle, neurons": neurons, "oracle, groups": groups, "learned": 0.9}
        return " ".join(report.advice({**base, "ladder": ladder, **more}))

    assert "more examples or more seconds" in told(1.0, 0.98)
    assert "try more groups than 9" in told(1.0, 0.91)
    assert "the policy keeps as much as the oracles" in told(0.91, 0.9)
    slow = {"latency": {"1": {"speedup": 0.9}}}
    assert "too small" in told(1.0, 0.98, **slow)
    assert "too much of it is evaluated" in told(1.0, 0.98, **slow, weights=2_000_000)
    assert "a dense net of 5 neurons" in told(1.0, 0.98, control={"width": 5, "ratio": 0.95})
    assert "ask for less" in told(1.0, 1.0, ratio={"estimate": 0.995})
    assert "finetune=True" in told(1.0, 0.98)
    tuned = told(0.91, 0.9, chosen={"groups": [9], "finetuned": True, "ended": "epochs"})
    assert "more epochs, in which the weights go on learning" in tuned
    assert "finetune=True" not in tuned
    nothing = report.advice({**base, "ladder": dict.fromkeys(("oracle, neurons", "oracle, groups", "learned"))})
    assert "look at their labels" in nothing[-1]
    off = told(1.0, 1.0, ratio={"estimate": 0.995}, activity={"asked": 0.25, "found": 0.28})
    assert off.startswith("28.0% of the neurons are evaluated where 25% were asked for: give more examples")


def test_shares_are_spread_over_layers_so_that_their_mean_is_what_is_asked():
    for activity in (0.02, 0.3, 0.9, 1.0):
        for factors in ([1, 1, 1], [3, 1, 0.1], [0.0, 0.0, 1.0]):
            rates = policies.spread_over(activity, factors, (50, 70, 30))
            assert np.dot(rates, (50, 70, 30)) / 150 == pytest.approx(activity, abs=1e-5)
            assert max(rates) <= 1


def test_saved_and_loaded_it_is_the_same_to_the_bit(tmp_path, digits, converted):
    x = torch.from_numpy(digits[1].test.x)
    again = load(save(converted, tmp_path / "net.safetensors"))
    assert torch.equal(again(x), converted(x))
    assert torch.equal(again.evaluate(x)[1], converted.evaluate(x)[1])
    assert again.report == converted.report
    other = lazify(model(40), inputs(), 0.4, batch="per-example", **QUICK)
    loaded = load(save(other, tmp_path / "other.safetensors"))
    assert loaded.batch == "per-example"
    assert torch.equal(loaded(inputs()), other(inputs()))


def test_what_lazify_does_not_make_is_not_saved(tmp_path, converted):
    from condcomp_lib import kernels
    from condcomp_lib.lazy import LazyNetwork
    from condcomp_lib.policies import Budget, Policy

    lazy = converted.lazy
    policy = Policy(lazy.partition, 64, None, torch.Generator(), always_on=True)
    other = kernels.compile(LazyNetwork(lazy.target, lazy.partition, policy, Budget((3, 3))), "one")
    with pytest.raises(UsageError, match="only networks as `lazify` makes them"):
        save(other, tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_a_foreign_or_damaged_file_is_refused_in_one_line(tmp_path, converted):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    whole = save(converted, tmp_path / "net.safetensors").read_bytes()
    bad = tmp_path / "bad.safetensors"
    for content in (
        b"",
        b"no network",
        whole[: len(whole) // 2],
        whole[:40] + b"\x00" * 8 + whole[48:],
        pickle.dumps(1),
    ):
        bad.write_bytes(content)
        with pytest.raises(LoadError, match=r"bad.safetensors: ") as caught:
            load(bad)
        assert "\n" not in str(caught.value)
    save_file({"weight": torch.zeros(3)}, bad)
    with pytest.raises(LoadError, match="no converted network"):
        load(bad)
    with pytest.raises(LoadError, match="no such file"):
        load(tmp_path / "absent")
    head = json.loads(safe_open(tmp_path / "net.safetensors", "pt").metadata()["condcomp"])
    tensors = load_file(tmp_path / "net.safetensors")
    compiled = {"batch": "one", "threads": 10**9, "dtype": "float32"}
    hostile = ([], {"groups": [-3, 5]}, {"groups": [1.5, 2]}, {"groups": 3}, {"groups": [5]},
               {"decision": {"counts": [1.5, 2]}}, {"activation": "gelu"},
               {"decision": {"levels": ["nan", 0.0]}}, {"decision": {"levels": [0.0]}}, {"compiled": compiled},
               {"pool": {"shape": [1, -4, -5], "size": 1}}, {"report": 3})  # fmt: skip
    for change in hostile:
        wrong = change if isinstance(change, list) else {**head, **change}
        save_file(tensors, bad, {"condcomp": json.dumps(wrong)})
        with pytest.raises(LoadError, match=r"bad.safetensors: "):
            load(bad)
    save_file({"partition.0": tensors["partition.0"]}, bad, {"condcomp": json.dumps(head)})
    with pytest.raises(LoadError, match=r"bad.safetensors: "):
        load(bad)
    later = whole.replace(b'\\"version\\": 2', b'\\"version\\": 9', 1)
    assert later != whole
    bad.write_bytes(later)
    with pytest.raises(LoadError, match="version 9"):
        load(bad)


def scores_of(fast, x):
    return fast(x)


def test_it_is_a_module_for_processes_threads_and_inference_mode(digits, converted):
    x = torch.from_numpy(digits[1].test.x)
    wanted = converted(x)
    assert isinstance(converted, nn.Module)
    assert torch.equal(pickle.loads(pickle.dumps(converted))(x), wanted)
    assert pickle.loads(pickle.dumps(converted)).report == converted.report
    with torch.inference_mode():
        assert torch.equal(converted(x), wanted)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found in pool.map(converted, [x] * 16):
            assert torch.equal(found, wanted)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert torch.equal(pool.submit(scores_of, converted, x).result(), wanted)
    assert torch.equal(nn.Sequential(converted)(x), wanted)
    assert torch.equal(copy.deepcopy(converted)(x), wanted)
    assert torch.equal(copy.deepcopy(converted).half()(x), wanted)  # its numbers are packed
    with pytest.raises(RuntimeError, match="Unexpected key"):
        converted.load_state_dict(converted.lazy.state_dict())


@pytest.mark.parametrize("decision", ["threshold", "budget"])
def test_exported_to_onnx_it_gives_the_references_scores(tmp_path, digits, converted, decision):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from condcomp_lib import kernels
    from condcomp_lib.lazy import calibrated, decided_by
    from condcomp_lib.policies import Budget

    x = torch.from_numpy(digits[1].test.x)
    lazy = converted.lazy
    lazy = calibrated(lazy, x, 0.3) if decision == "threshold" else decided_by(lazy, Budget((7, 3)))
    path = export(kernels.compile(lazy, "one"), tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x.numpy()})[0]
    assert np.abs(found - lazy.evaluate(x).scores.numpy()).max() < 1e-4


def test_a_picture_is_pooled_for_the_policy_also_in_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    net = nn.Sequential(nn.Flatten(), *model(40, inputs=3 * 20 * 20))
    x = torch.randn(200, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    fast = lazify(net, x, 0.3, **QUICK)
    assert fast.report["chosen"]["pool"] == 4
    session = onnxruntime.InferenceSession(str(export(fast, tmp_path / "net.onnx")))
    found = session.run(None, {"x": x.flatten(1).numpy()})[0]
    assert np.abs(found - fast(x).numpy()).max() < 1e-4
    assert torch.equal(load(save(fast, tmp_path / "n"))(x), fast(x))


@pytest.mark.parametrize("first", [False, True])
def test_feed_forward_blocks_inside_a_transformer(first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 64, 0.1, batch_first=True, norm_first=first)
    net = nn.Sequential(nn.Linear(5, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3))
    net.eval()
    x = torch.randn(80, 7, 5, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = net(x)
    same = lazify(net, x, 1.0, path="1.layers.0", **QUICK)
    with torch.no_grad():
        torch.testing.assert_close(install(net, "1.layers.0", same)(x), wanted, rtol=1e-3, atol=1e-4)
    half = lazify(net, x, 0.5, path="1.layers.1", **QUICK)
    assert half.report["measure"] == "variance kept"
    assert half.report["examples"]["train"] > 80  # tokens, not sentences
    with torch.no_grad():
        found = install(net, "1.layers.1", half)(x)
    assert found.shape == wanted.shape
    assert not torch.equal(found, wanted)
    with torch.no_grad():
        assert torch.equal(net(x), wanted)  # the user's own is as it was


def test_readmes_ten_lines_run_as_printed(tmp_path, monkeypatch, capsys):
    text = (paths.root() / "README.md").read_text(encoding="utf-8")
    lines = text.split("<!-- begin ten lines -->")[1].split("```python\n")[1].split("```")[0]
    ours = lines.split("# From here on, ten lines.")[1].splitlines()
    assert len([line for line in ours if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(lines.replace("seconds=30", "epochs=20, progress=False"), "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "the same to the bit: True" in said
    assert "activity by layer" in said
    assert float(said.split("test accuracy: tensor(")[1].split(",")[0]) > 0.85
    assert sorted(path.name for path in tmp_path.glob("fast.*")) == ["fast.onnx", "fast.safetensors"]


def test_a_time_budget_is_kept():
    import time

    net, x = model(300, 300, inputs=100), inputs(20_000, 100)
    lazify(net, x[:300], 0.3, **QUICK)  # compiled before
    started = time.perf_counter()
    fast = lazify(net, x, 0.3, seconds=6.0, progress=False)
    assert time.perf_counter() - started < 30  # loose: measuring time comes on top, and machines are shared
    assert fast.report["chosen"]["epochs"] >= 1
