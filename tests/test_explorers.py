"""The explorers without a browser: every state of every control, and what each shows against plain code."""

import asyncio
import io
import socket
import time

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from condcomp_lib import datasets, studies, widgets
from condcomp_lib.errors import UsageError
from condcomp_lib.lazy import evaluate
from condcomp_lib.studies import explorer
from condcomp_lib.widgets import coactivation, partition, policy, sparsity, sparsity_data, speed

DIGITS = "digits, 2x200"
SPARSITY = {"dataset": DIGITS, "pretraining": "none", "partitioner": "coactivation", "decision": "budget",
            "activity": 25, "example": 3}  # fmt: skip
SPLIT = {"dataset": DIGITS, "pretraining": "none", "split": "coactivation", "groups": 16, "activity": 25}
SPEED = {"width": 200, "groups": 16, "batch": 1, "activity": 25}


def opened(png):
    """The picture, which must be whole and of more than one colour."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    assert min(image.size) > 200
    assert len(image.getcolors(image.size[0] * image.size[1])) > 20
    return np.asarray(image)


CACHED = (explorer.available, sparsity_data.network, sparsity._scene, partition.target, partition.split,
          partition.neurons, partition._scene, policy.minibatch, policy.estimates, policy._scene,
          coactivation.course, coactivation._scene, speed._network, speed._scene)  # fmt: skip


@pytest.fixture
def no_store(tmp_path, monkeypatch):
    """No stored run, no data set, no network."""
    monkeypatch.setenv("CONDCOMP_STORE", str(tmp_path / "empty"))
    monkeypatch.setenv("CONDCOMP_DATA", str(tmp_path / "none"))

    def refused(*_):
        raise AssertionError("something asks the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    for cached in CACHED:
        cached.cache_clear()
    yield
    for cached in CACHED:  # what was made without a store must not reach other tests
        cached.cache_clear()


@pytest.mark.parametrize("decision", explorer.DECISIONS)
@pytest.mark.parametrize("partitioner", explorer.PARTITIONERS)
def test_every_activity_is_met_and_shown(decision, partitioner):
    for activity in (*range(2, 100, 9), 100):
        state = {**SPARSITY, "decision": decision, "partitioner": partitioner, "activity": activity}
        found = sparsity_data.explored(state)
        # Budgets are whole groups of four neurons, at least one of each layer.
        assert found.activity == pytest.approx(activity / 100, abs=0.021 if decision == "budget" else 0.012)
        png, numbers = sparsity.shown(state)
        opened(png)
        assert f"{found.accuracy:.3f}" in numbers


@pytest.mark.parametrize("pretraining", ["none", "dropout-uniform"])
def test_what_is_explored_is_what_a_plain_evaluation_gives(pretraining):
    state, data = {**SPARSITY, "pretraining": pretraining, "activity": 20}, datasets.load("digits")
    record = sparsity_data.pretrainings("digits")[pretraining]
    lazy = explorer.network(record, "coactivation", data.shape)
    x, y = (torch.from_numpy(part) for part in (data.valid.x, data.valid.y))
    found = sparsity_data.explored(state)
    plain = explorer.decided(lazy, "budget", 0.2, x).evaluate(x)
    assert found.accuracy == pytest.approx((plain.scores.argmax(1) == y).double().mean().item())
    assert found.full == pytest.approx((lazy.target(x).argmax(1) == y).double().mean().item())
    assert found.compute == pytest.approx(lazy.compute(plain.mask))
    assert found.activity == pytest.approx(lazy.partition.activity(plain.mask).mean().item())
    assert (found.answer, found.label) == (int(plain.scores[3].argmax()), int(y[3]))
    for on, fires, columns, hidden in zip(found.on, found.fires, lazy.partition.columns, plain.hidden, strict=True):
        assert np.array_equal(on, plain.mask[3, columns].numpy())
        assert np.allclose(fires, hidden[3].numpy(), atol=1e-5)
    for label in range(10):
        assert np.allclose(found.by_class[label], plain.mask[y == label].float().mean(0).numpy())


def test_rounded_weights_are_the_codes_times_their_scale_and_keep_the_accuracy():
    record = sparsity_data.pretrainings("digits")["none"]
    lazy, arrays = explorer.network(record, "random", (1, 8, 8)), record.arrays()
    for index, layer in enumerate(lazy.target.linears):
        wanted = arrays[f"target.{index}"].astype(np.float32) * arrays[f"target.{index}.scale"][:, None]
        assert np.array_equal(layer.weight.numpy(), wanted)
    data = datasets.load("digits")
    right = evaluate(lazy, torch.from_numpy(data.valid.x)).scores.argmax(1) == torch.from_numpy(data.valid.y)
    assert right.double().mean().item() == pytest.approx(record.result["accuracy"], abs=0.01)


def test_the_shipped_networks_weigh_less_than_a_megabyte():
    files = [record.arrays_file for record in explorer.available() if record.arrays_file]
    assert len(files) == 4
    assert sum(file.stat().st_size for file in files) < 1_000_000


def test_a_shift_gives_the_probability_asked_for():
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) * 3
    for rate in (0.02, 0.5, 0.98):
        assert (logits + explorer.shift_for(logits, rate)).sigmoid().mean().item() == pytest.approx(rate, abs=1e-4)


def test_time_is_measured_where_a_network_can_be_compiled():
    assert "times as fast as" in sparsity.measured(SPARSITY)
    assert "not timed" in sparsity.measured({**SPARSITY, "decision": "sample"})


@pytest.mark.parametrize("split", partition.SPLITS)
def test_every_split_is_shown_over_the_whole_range(split):
    for groups, activity in ((2, 2), (16, 25), (partition.MOST, 100)):
        png, numbers = partition.shown({**SPLIT, "split": split, "groups": groups, "activity": activity})
        opened(png)
        assert "coactivation explained" in numbers
    own, whole = partition.target("digits", "none"), partition.split("digits", "none", split, 16)
    full = (own.target(own.x).argmax(1) == own.y).double().mean().item()
    assert len(whole.activity) == 16
    assert whole.activity[-1] == 1
    assert whole.accuracy[-1] == pytest.approx(full)  # with all groups the oracle is the network itself


@pytest.mark.parametrize("name", policy.SHOWN)
def test_every_estimator_is_shown_over_the_whole_range(name):
    for temperature, average in ((5, 1), (50, 8), (300, 64)):
        png, numbers = policy.shown({"estimator": name, "temperature": temperature, "average": average})
        opened(png)
        assert "standard deviation" in numbers


def test_averages_lower_the_spread_and_leave_the_bias():
    state = {"estimator": "straight-through", "temperature": 50, "average": 1}
    one, many = (policy.estimated({**state, "average": average}) for average in (1, 64))
    assert (many.bias, many.mean) == (one.bias, one.mean)
    assert many.narrow == pytest.approx(one.narrow / 8)
    assert many.along.std() < one.along.std() / 4
    error = np.hypot(one.mean[0] - 1, one.mean[1])  # the mean error has a part along the gradient and one across it
    assert one.bias**2 == pytest.approx(error**2 - one.noise**2)


def test_an_unbiased_estimator_shows_no_bias_beyond_its_noise():
    for name in ("DisARM", "REINFORCE, leave-one-out", "REINFORCE, no baseline"):
        found = policy.estimated({"estimator": name, "temperature": 50, "average": 1})
        assert found.bias < 2 * found.noise


def test_coactivation_is_shown_after_every_epoch_in_every_order():
    name = coactivation.names()[0]
    for epoch, then in coactivation.course(name).items():
        for order in then.matrices:
            png, numbers = coactivation.shown({"network": name, "epoch": epoch, "order": order})
            opened(png)
            assert f"after epoch {epoch}" in numbers
    stored = next(iter(coactivation.stored()))
    early, best = min(coactivation.course(stored)), coactivation.kept_epoch(stored)
    explored = coactivation.explore([stored])
    assert explored.controls["epoch"].value == best
    explored.controls["epoch"].value = early
    assert explored.controls["order"].options["hierarchical"] == f"stored after epoch {best} only"
    assert explored.state["order"] == "mean"


def test_the_kept_network_is_that_of_the_best_epoch():
    for name, record in coactivation.stored().items():
        best = coactivation.kept_epoch(name)
        assert best == record.result["best_epoch"]
        assert coactivation.course(name)[best].accuracy == pytest.approx(max(record.result["learning_curve"]))
        assert set(coactivation.course(name)[best].matrices) == set(coactivation.ORDERS)


def test_speed_is_shown_for_every_choice_and_measured_points_are_added():
    for width in speed.WIDTHS[:2]:
        for groups in speed.GROUPS:
            opened(speed.shown({**SPEED, "width": width, "groups": groups})[0])
    for batch in speed.BATCHES:
        for activity in (2, 100):
            opened(speed.shown({**SPEED, "batch": batch, "activity": activity})[0])
    speed.MEASURED.clear()
    before = speed.shown(SPEED)[0]
    assert "roofline" in speed.measured(SPEED)
    assert not np.array_equal(opened(speed.shown(SPEED)[0]), opened(before))
    assert list(speed.MEASURED) == [(200, 16, 1)]
    assert list(speed.MEASURED[200, 16, 1]) == [0.25]


def test_the_line_of_multiply_adds_is_what_a_count_says():
    lazy = speed.network({**SPEED, "activity": 25})
    found = lazy.evaluate(torch.randn(256, 3072, generator=torch.Generator().manual_seed(0)))
    counted = lazy.target_cost().total_multiply_adds / lazy.cost(found.mask).total_multiply_adds
    # Groups span the layers and are no equal parts of each.
    assert float(speed.by_multiply_adds(200, 16, np.array([0.25]))[0]) == pytest.approx(counted, rel=0.07)


def test_an_explorer_shows_what_its_controls_say_and_its_picture_where_no_kernel_runs():
    explored = sparsity.explore(activity=10)
    before = explored.picture.value
    bundle = explored._repr_mimebundle_()
    assert set(bundle) == {widgets.VIEW, "image/png", "text/plain"}
    explored._measure = None
    explored.controls["activity"].value = 60
    assert explored.picture.value != before
    assert explored.picture.value == sparsity.shown(explored.state)[0]
    explored.controls["pretraining"].value = "dropout-uniform"
    explored.controls["partitioner"].buttons["random"].value = True  # as a click
    assert explored.state["partitioner"] == "random"
    explored.controls["partitioner"].buttons["random"].value = False  # the chosen one cannot be let go
    assert explored.state["partitioner"] == "random"
    assert explored.controls["partitioner"].buttons["random"].value


def test_no_callback_swallows_an_error():
    def broken(state):
        if state["activity"] > 50:
            raise UsageError("too much")
        return sparsity.shown(SPARSITY)

    explored = widgets.Explorer({"activity": widgets.slider("activity", 10, 0, 100)}, broken)
    with pytest.raises(UsageError, match="too much"):
        explored.controls["activity"].value = 60
    assert "UsageError: too much" in explored.numbers.value
    explored = widgets.Explorer(
        {"activity": widgets.slider("activity", 10, 0, 100)}, lambda _: sparsity.shown(SPARSITY), broken
    )
    with pytest.raises(UsageError, match="too much"):
        explored.controls["activity"].value = 60
    assert "too much" in explored.measured.value


def slow(state):
    time.sleep(0.2)
    if state["activity"] == 13:
        raise UsageError("unlucky")
    return f"measured at {state['activity']}"


def in_a_loop(*moves, wait=0.8):
    """What an explorer says after moves so many seconds apart, and the errors that reached its event loop."""
    errors = []

    async def play():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context["exception"]))
        explored = widgets.Explorer(
            {"activity": widgets.slider("activity", 10, 0, 100)}, lambda _: sparsity.shown(SPARSITY), slow
        )
        for pause, value in moves:
            await asyncio.sleep(pause)
            explored.controls["activity"].value = value
        await asyncio.sleep(widgets.REST_SECONDS + wait)
        return explored.measured.value

    return asyncio.run(play()), errors


def test_only_the_state_at_rest_is_measured_and_told():
    assert in_a_loop((0, 20), (0.05, 30), (0.05, 40)) == ("measured at 40", [])
    # Moved while a measurement is under way: that one is dropped, the next one is told.
    assert in_a_loop((0, 20), (widgets.REST_SECONDS + 0.1, 50), wait=1.5) == ("measured at 50", [])


def test_an_error_of_a_measurement_is_told_and_reaches_the_loop():
    told, errors = in_a_loop((0, 13))
    assert "UsageError: unlucky" in told
    assert [str(error) for error in errors] == ["unlucky"]


def test_controls_are_made_once_and_changed_only_where_they_must():
    explored = sparsity.explore()
    explored._measure = None
    before = dict(explored.controls["pretraining"].buttons)
    for activity in (30, 31, 32):
        explored.controls["activity"].value = activity
    assert explored.controls["pretraining"].buttons == before


def test_a_choice_stays_in_order_when_whoever_follows_it_fails():
    choice = widgets.Choice("network", {"a": None, "b": None})
    choice.observe(lambda _: 1 / 0, "value")
    with pytest.raises(ZeroDivisionError):
        choice.buttons["b"].value = True
    assert (choice.value, choice.buttons["a"].value, choice.buttons["b"].value) == ("b", False, True)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: sparsity.explore(activity=0.25), "activity, % is a whole number from 2 to 100, not 0.25"),
        (lambda: sparsity.explore(activity=1000), "from 2 to 100, not 1000"),
        (lambda: policy.explore("DPG"), "unknown choice 'DPG'; known: DisARM"),
        (lambda: coactivation.explore(["x"]), "unknown network 'x'"),
        (lambda: speed.explore(width=300), "unknown width '300'; known: 1600, 200, 400, 800"),
        (lambda: widgets.Choice("network", {"a": "gone"}), "nothing can be chosen: a: gone"),
    ],
)
def test_bad_input_is_one_clear_line(make, says):
    with pytest.raises(UsageError, match=says):
        make()


def test_what_cannot_be_chosen_is_grey_and_says_why():
    choice = widgets.Choice("network", {"a": None, "b": "needs <pictures>", "c": None})
    assert choice.value == "a"
    assert choice.buttons["b"].disabled
    assert choice.buttons["b"].tooltip == "needs <pictures>"
    assert "needs &lt;pictures&gt;" in choice.note.value
    with pytest.raises(UsageError, match="unknown choice 'b'; known: a, c"):
        choice.value = "b"
    choice.offer({"a": "gone", "c": None})
    assert choice.value == "c"


def test_a_picture_is_the_same_as_when_all_of_it_is_drawn():
    def figure():
        with widgets.styled():
            made = Figure(figsize=(4, 3))
            ax = made.subplots()
            (line,) = ax.plot([0, 1], [0, 1])
            return made, line

    made, line = figure()
    canvas = widgets.Canvas(made, [line])
    line.set_ydata([1, 0])
    whole, moved = figure()
    moved.set_ydata([1, 0])
    stream = io.BytesIO()
    with widgets.styled():
        whole.savefig(stream, format="png", dpi=widgets.DPI)
    assert np.array_equal(opened_any(canvas.png()), opened_any(stream.getvalue()))


def opened_any(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@pytest.mark.usefixtures("no_store")
def test_every_explorer_opens_without_store_data_and_network():
    assert sparsity_data.networks()[DIGITS] is None
    reasons = [reason for name, reason in sparsity_data.networks().items() if name != DIGITS]
    assert all("condcomp data fetch" in reason for reason in reasons)
    for open_one in (sparsity.explore, partition.explore, policy.explore, coactivation.explore, speed.explore):
        opened(open_one().picture.value)
    assert [record.spec.settings["dataset"] for record in studies.records("explorer", "quick")] == ["digits"]
