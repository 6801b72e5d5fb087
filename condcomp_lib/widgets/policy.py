"""The policy explorer: how far one estimate of a policy's gradient lies from the exact one."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from condcomp_lib import datasets, paths, studies, widgets
from condcomp_lib.estimators import Estimator, Minibatch
from condcomp_lib.estimators.exact import compare, exact_cost, gradient
from condcomp_lib.estimators.pathwise import GaussianNoise, GumbelSigmoid, Pathwise
from condcomp_lib.plots import BLUE, GREY, VERMILION
from condcomp_lib.runs import RunStore
from condcomp_lib.studies import policies_bias as study
from condcomp_lib.widgets import Canvas, Choice, Explorer, State

ESTIMATES = 400
EDGES = (-2.0, 4.0)  # of what is shown along the gradient; points beyond are drawn there
POINTS = 100  # averages that are drawn
NOISY: dict[str, tuple[str, Any]] = {  # what the temperature means to those that have one
    "Gumbel-sigmoid": ("temperature", lambda value: lambda draws: GumbelSigmoid(draws, temperature=value)),
    "Gaussian noise": ("deviation", lambda value: lambda draws: GaussianNoise(draws, deviation=value)),
}
SHOWN = tuple(name for name in study.ESTIMATORS if "DPG" not in name)  # a critic would have to learn first


@dataclass(frozen=True)
class Estimated:
    """Averages of so many estimates of one gradient, in parts of the exact one's length: `along` its direction
    (averages), where 1 is right, and how far off it `across` (averages); `mean` of all estimates in the same two
    numbers; `bias` with what `noise` alone makes of it taken out; `spread` of single estimates, of averages `narrow`.
    """

    along: np.ndarray
    across: np.ndarray
    mean: tuple[float, float]
    bias: float
    noise: float
    cosine: float
    spread: float
    narrow: float


@functools.cache
def minibatch() -> tuple[Minibatch, np.ndarray]:
    """What study `policies-bias` measures estimators on, with a gate for each layer, and the exact gradient of its cost
    in the policy's weights."""
    settings = study.specs("quick")[-1].settings
    draws, artefacts = torch.Generator().manual_seed(settings["policy_seed"]), RunStore(paths.artefacts("quick"))
    made, _ = study.small_minibatch(settings, datasets.load(settings["dataset"]), artefacts, draws)
    return made, gradient(exact_cost(made), made)


def estimator(name: str, temperature: float) -> Estimator:
    """An estimator by the name that the study gives it; the temperature is left aside by those that have none."""
    if name not in NOISY:
        return study.ESTIMATORS[name]()
    return Pathwise(NOISY[name][1](temperature))


@functools.lru_cache(maxsize=64)
def estimates(name: str, temperature: int) -> np.ndarray:
    """ESTIMATES of the gradient (float64, estimates x weights) in parts of the exact one's length, the temperature in
    hundredths."""
    made, exact = minibatch()
    own, draws = estimator(name, temperature / 100), torch.Generator().manual_seed(0)
    found = np.stack([gradient(own(made, draws).loss, made) for _ in range(ESTIMATES)])
    return found / np.linalg.norm(exact)


def estimated(state: State) -> Estimated:
    """What the state comes to: "estimator", "temperature" (hundredths), "average" of so many estimates."""
    exact = minibatch()[1]
    unit = exact / np.linalg.norm(exact)
    found = estimates(state["estimator"], state["temperature"] if state["estimator"] in NOISY else 0)
    picked = np.random.default_rng(0).integers(len(found), size=(POINTS, state["average"]))
    averages, own, mean = found[picked].mean(1), compare(found, unit), found.mean(0)
    along, off = averages @ unit, averages - (averages @ unit)[:, None] * unit
    return Estimated(
        along=along,
        across=np.linalg.norm(off, axis=1),
        mean=(float(mean @ unit), float(np.linalg.norm(mean - (mean @ unit) * unit))),
        bias=max(own.bias**2 - own.noise**2, 0.0) ** 0.5,
        noise=own.noise,
        cosine=own.cosine,
        spread=own.deviation,
        narrow=own.deviation / state["average"] ** 0.5,
    )


class Scene:
    """The explorer's figure: single estimates about the exact gradient, and bias against spread of all estimators."""

    def __init__(self) -> None:
        with widgets.styled():
            self.figure = Figure(figsize=(9.4, 4.1))
            left, right = self.figure.subplots(1, 2)
            self.figure.subplots_adjust(left=0.07, right=0.985, bottom=0.13, top=0.86, wspace=0.22)
            left.plot([1], [0], "*", color="black", markersize=13, label="exact gradient", clip_on=False)
            left.axvline(0, color=GREY, linewidth=0.8)
            (self.points,) = left.plot([0], [0], "o", color=BLUE, markersize=4, alpha=0.5, label="an average")
            (self.mean,) = left.plot([0], [0], "D", color=VERMILION, markersize=8, label="mean of all estimates")
            left.set(xlim=EDGES, ylim=(-0.12, 4), xlabel="along the exact gradient (its length is 1)")
            left.set(ylabel="off its direction")
            left.legend(loc="upper right", fontsize=8)
            for record in studies.records("policies-bias", "paper", partial=True):
                result, name = record.result, record.spec.settings["estimator"]
                if record.spec.settings["scope"] == "layer" and name in SHOWN and result["deviation"]:
                    right.plot(result["deviation"], result["bias"], "o", color=GREY, markersize=4)
                    low = name == "REINFORCE, mean"  # its point lies on that of the normalised one
                    right.annotate(name, (result["deviation"], result["bias"]), (4, -9 if low else 3),
                                   textcoords="offset points", fontsize=7, color=GREY)  # fmt: skip
            (self.here,) = right.plot([1], [1], "o", color=VERMILION, markersize=9, clip_on=False)
            right.set(xscale="log", yscale="log", xlim=(0.03, 20), ylim=(0.005, 4))
            right.set(xlabel="standard deviation of an average", ylabel="bias (averaging does not lower it)")
            for axis in (right.xaxis, right.yaxis):
                axis.set_major_formatter("{x:g}")
            right.set_title("grey: stored, single estimates (temperature 0.5, deviation 0.1)", fontsize=8)
            self.title = self.figure.text(0.012, 0.985, "", va="top", fontsize=11, weight="bold")
            self.canvas = Canvas(self.figure, [self.points, self.mean, self.here, self.title])

    def png(self, found: Estimated, title: str) -> bytes:
        """The picture of these estimates."""
        self.points.set_data(found.along.clip(*EDGES), found.across.clip(max=4.0))
        self.mean.set_data([found.mean[0]], [found.mean[1]])
        self.here.set_data([max(found.narrow, 0.03)], [max(found.bias, 0.005)])
        self.title.set_text(title)
        return self.canvas.png()


_scene = functools.cache(Scene)


def shown(state: State) -> tuple[bytes, str]:
    """The picture and the numbers of a state."""
    found = estimated(state)
    name = state["estimator"]
    noisy = f", {NOISY[name][0]} {state['temperature'] / 100:.2f}" if name in NOISY else ""
    rows = [
        (f"{ESTIMATES} estimates of one gradient", "in parts of its length"),
        (
            "bias of their mean, noise taken out",
            f"{found.bias:.2f} (the noise was {found.noise:.2f})",
        ),
        ("standard deviation of one", f"{found.spread:.2f}"),
        (f"standard deviation of an average of {state['average']}", f"{found.narrow:.2f}"),
        ("cosine of mean and exact gradient", f"{found.cosine:.3f}"),
        ("mean along the exact gradient", f"{found.mean[0]:.2f} (1 is right)"),
    ]
    title = f"{name}{noisy}, averages of {state['average']}: bias {found.bias:.2f}, spread {found.narrow:.2f}"
    return _scene().png(found, title), widgets.table(rows)


def adapt(state: State, controls: Mapping[str, Any]) -> None:
    """The temperature can be moved where the estimator has one."""
    controls["temperature"].disabled = state["estimator"] not in NOISY


def explore(estimator: str = "Gumbel-sigmoid", temperature: int = 50, average: int = 1) -> Explorer:
    """The policy explorer at an estimator, a temperature (hundredths) and an average of so many estimates."""
    controls = {
        "estimator": Choice("estimator", dict.fromkeys(SHOWN), estimator),
        "temperature": widgets.slider("temperature / 100", temperature, 5, 300),
        "average": widgets.slider("averaged", average, 1, 64),
    }
    return Explorer(controls, shown, adapt=adapt)
