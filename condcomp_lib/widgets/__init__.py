"""Explorers: controls with a picture and numbers that follow them.

What an explorer shows is a pure function of the controls' state, one module for each (`sparsity.shown`, ...), which
tests call without any widget. Where no kernel runs, the picture of the first state stands in its place.
"""

import asyncio
import base64
import contextlib
import html
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ipywidgets
import matplotlib as mpl
import numpy as np
import traitlets
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from condcomp_lib import plots
from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.kernels import timing

State = Mapping[str, Any]
VIEW = "application/vnd.jupyter.widget-view+json"
DPI, REST_SECONDS = 90, 0.3  # controls at rest so long are worth a measurement


class Canvas:
    """A figure of which only the `moving` artists are drawn anew for a picture; all others are drawn once.

    Drawing all axes takes a tenth of a second, the moving artists a few milliseconds: a slider can be followed.
    """

    def __init__(self, figure: Figure, moving: Sequence[Artist]) -> None:
        self.figure, self.moving, self.canvas = figure, list(moving), FigureCanvasAgg(figure)
        for artist in self.moving:
            artist.set_animated(True)
        self.canvas.draw()
        self._still = self.canvas.copy_from_bbox(figure.bbox)

    def png(self) -> bytes:
        """The picture as it is now."""
        self.canvas.restore_region(self._still)
        for artist in self.moving:
            self.figure.draw_artist(artist)
        stream = io.BytesIO()
        image = Image.frombuffer("RGBA", self.canvas.get_width_height(), self.canvas.buffer_rgba(), "raw", "RGBA", 0, 1)
        image.convert("RGB").save(stream, format="PNG", compress_level=1)
        return stream.getvalue()


def styled() -> contextlib.AbstractContextManager[None]:
    """The project's style for a figure that places its axes itself, within the notebook's own settings."""
    return mpl.rc_context({**plots.STYLE, "figure.constrained_layout.use": False, "figure.dpi": DPI})


class Choice(ipywidgets.VBox):
    """One of some options, all to be seen; one that cannot be chosen is grey and says why.

    Arguments: `options` each with the reason why it cannot be chosen, or None; `value` the first one chosen.
    """

    value = traitlets.Unicode()

    def __init__(self, description: str, options: Mapping[str, str | None], value: str | None = None) -> None:
        self.label = ipywidgets.HTML(f"<span style='font-size:13px'>{description}</span>", layout={"width": "96px"})
        self.row = ipywidgets.HBox([], layout={"flex_flow": "row wrap"})
        self.note = ipywidgets.HTML()
        self.buttons: dict[str, ipywidgets.ToggleButton] = {}
        self.options: dict[str, str | None] = {}
        super().__init__([ipywidgets.HBox([self.label, self.row]), self.note])
        self.offer(options, value)

    @traitlets.validate("value")
    def _possible(self, proposal: Any) -> Any:
        wanted = proposal["value"]
        if wanted not in self.options or self.options[wanted]:
            raise unknown("choice", wanted, [name for name, reason in self.options.items() if reason is None])
        return wanted

    def offer(self, options: Mapping[str, str | None], value: str | None = None) -> None:
        """Show other options; the chosen one stays where it is still possible. Raises UsageError where none is, or the
        `value` that is asked for cannot be chosen."""
        possible = [name for name, reason in options.items() if reason is None]
        if not possible:
            raise UsageError(f"nothing can be chosen: {'; '.join(f'{n}: {reason}' for n, reason in options.items())}")
        if value is not None and value not in possible:
            raise unknown("choice", value, possible)
        wanted = value or (self.value if self.value in possible else possible[0])
        if dict(options) != self.options:
            before, self.options = self.row.children, dict(options)
            self.buttons = {name: self._button(name, reason) for name, reason in options.items()}
            self.row.children = tuple(self.buttons.values())
            for button in before:
                button.close()
            reasons = [f"{name}: {reason}" for name, reason in options.items() if reason]
            self.note.value = "<br>".join(note(html.escape(reason)) for reason in reasons)
            self.note.layout.display = None if reasons else "none"
        self.value = wanted
        self._mark()

    def _button(self, name: str, reason: str | None) -> ipywidgets.ToggleButton:
        button = ipywidgets.ToggleButton(
            description=name, disabled=reason is not None, tooltip=reason or name,
            layout={"width": "auto", "min_width": "72px"},
        )  # fmt: skip
        button.observe(lambda change: self._pressed(name, change["new"]), "value")
        return button

    def _pressed(self, name: str, down: bool) -> None:
        try:
            if down:
                self.value = name
        finally:  # also where whoever follows the value fails
            self._mark()

    def _mark(self) -> None:
        for name, button in self.buttons.items():
            button.value = name == self.value
            button.button_style = "info" if name == self.value else ""


class Explorer:
    """Controls with a picture and numbers that follow them.

    Arguments: `controls` by the name that their value has in the state; `show` from a state to a picture (PNG) and
    numbers (HTML); `measure` from a state to more numbers that take longer, a timing for example: asked in a thread of
    its own when the controls have been at rest, never in a notebook that nobody touches, after which the state is shown
    again; `adapt` is told a state before it is shown and may change the controls.

    An error of `adapt`, `show` or `measure` stands in one line in place of the numbers, and is raised.
    """

    def __init__(
        self,
        controls: Mapping[str, Any],
        show: Callable[[State], tuple[bytes, str]],
        measure: Callable[[State], str] | None = None,
        adapt: Callable[[State, Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.controls, self._show, self._measure, self._adapt = controls, show, measure, adapt
        self.picture = ipywidgets.Image(format="png", layout={"max_width": "100%", "align_self": "flex-start"})
        self.numbers, self.measured = ipywidgets.HTML(), ipywidgets.HTML()
        if measure:
            self.measured.value = note("Move a control, and time is measured here, on this machine.")
        below = ipywidgets.HBox([self.numbers, self.measured], layout={"flex_flow": "row wrap", "grid_gap": "0 40px"})
        self.box = ipywidgets.VBox([*controls.values(), self.picture, below])
        self.box.add_class("condcomp-explorer")
        self._waiting: asyncio.TimerHandle | None = None
        self._worker, self._busy, self._adapting, self._moves = ThreadPoolExecutor(1), False, False, 0
        self.update()
        for control in controls.values():
            control.observe(self._moved, "value")

    @property
    def state(self) -> dict[str, Any]:
        """The controls' values by name."""
        return {name: control.value for name, control in self.controls.items()}

    def _moved(self, _: Any) -> None:
        if not self._adapting:
            self.update()
            self._rest()

    def update(self) -> None:
        """Show the state that the controls are in."""
        self._moves += 1
        with self._told(self.numbers):
            if self._adapt:
                self._adapting = True  # controls that it changes are shown once, below
                try:
                    self._adapt(self.state, self.controls)
                finally:
                    self._adapting = False
            self.picture.value, self.numbers.value = self._show(self.state)

    @contextlib.contextmanager
    def _told(self, where: ipywidgets.HTML) -> Iterator[None]:
        """Errors stand in one line where numbers would, and go on."""
        try:
            yield
        except Exception as error:
            where.value = fault(error)
            raise

    def _rest(self) -> None:
        """Measure when the controls have been at rest for a while; at once where no event loop runs."""
        if self._measure is None:
            return
        if self._waiting:
            self._waiting.cancel()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            with self._told(self.measured):
                self._measured(self.state, self._measure(self.state))
            return
        self.measured.value = note("Time is measured when the controls rest.")
        self._waiting = loop.call_later(REST_SECONDS, self._start, loop)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Measure the present state in a thread of its own, one at a time; only the loop's thread touches widgets."""
        if self._busy:
            self._waiting = loop.call_later(REST_SECONDS, self._start, loop)
            return
        assert self._measure is not None
        self._busy, state, moves = True, self.state, self._moves
        self.measured.value = note("Measuring; the first time on a machine the kernels are compiled, some seconds ...")
        done = loop.run_in_executor(self._worker, self._measure, state)
        done.add_done_callback(lambda found: self._finished(found, state, moves))

    def _finished(self, found: "asyncio.Future[str]", state: State, moves: int) -> None:
        self._busy = False
        with self._told(self.measured):
            html_found = found.result()
            if moves == self._moves:
                self._measured(state, html_found)
            else:  # of another state by now, and disturbed by those in between
                self.measured.value = note("Time is measured when the controls rest.")

    def _measured(self, state: State, html: str) -> None:
        """Show what was measured, and the state's picture again, which may have more to show now."""
        self.measured.value = html
        self.picture.value, _ = self._show(state)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """The live explorer, and its picture for whoever cannot show it."""
        view = self.box._repr_mimebundle_()
        return {VIEW: view[VIEW], "image/png": base64.b64encode(self.picture.value).decode(), "text/plain": "explorer"}


def slider(description: str, value: int, least: int, most: int) -> ipywidgets.IntSlider:
    """A slider over whole numbers that tells every step of its way.

    Raises UsageError for a value that is none of them.
    """
    if not isinstance(value, int) or not least <= value <= most:
        raise UsageError(f"{description} is a whole number from {least} to {most}, not {value}")
    return ipywidgets.IntSlider(
        value, least, most, description=description, continuous_update=True, style={"description_width": "120px"},
        layout={"width": "min(560px, 95%)"},
    )  # fmt: skip


def selector(description: str, options: Sequence[int], value: int) -> ipywidgets.SelectionSlider:
    """A slider over some whole numbers; raises UsageError for a value that is none of them."""
    if value not in options:
        raise unknown(description, str(value), list(map(str, options)))
    return ipywidgets.SelectionSlider(
        options=list(options), value=value, description=description, style={"description_width": "120px"},
        layout={"width": "min(560px, 95%)"},
    )  # fmt: skip


def activity_axis(ax: Axes) -> None:
    """Make the x axis one of activity, from 2% to 100%."""
    plots.percent_axis(ax, 1.9, 105)
    ax.set(xlabel="activity (% of hidden neurons evaluated)")


def timed(times: Mapping[str, np.ndarray], engines: Sequence[str], name: str) -> list[tuple[str, str]]:
    """Rows of microseconds (medians of `times`, microseconds by repeat, as from `timing.interleaved`) of "lazy" and of
    the dense `engines`, called `name`, and the speed-up over the fastest of them with its range over the repeats."""
    fastest = timing.fastest(times, engines)
    ratios = times[fastest] / times["lazy"]
    return [
        ("lazy network, compiled", f"{np.median(times['lazy']):.1f}"),
        *((f"{name}, {engine}", f"{np.median(times[engine]):.1f}") for engine in engines),
        (f"times as fast as {fastest} (range of {len(ratios)})",
         f"{np.median(ratios):.1f} ({ratios.min():.1f} to {ratios.max():.1f})"),
    ]  # fmt: skip


def note(text: str) -> str:
    """A remark in small grey letters (HTML)."""
    return f"<span style='color:#666;font-size:12px'>{text}</span>"


def fault(error: Exception) -> str:
    """An error in one line (HTML)."""
    return f"<span style='color:#b00020'>{html.escape(f'{type(error).__name__}: {error}')}</span>"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first row being the head, as HTML."""
    style = "padding:2px 14px 2px 0;text-align:left;font-size:13px;line-height:1.5"
    lines = []
    for index, row in enumerate(rows):
        kind = "td" if index else "th"
        lines.append("<tr>" + "".join(f"<{kind} style='{style}'>{cell}</{kind}>" for cell in row) + "</tr>")
    return f"<table style='border-collapse:collapse'>{''.join(lines)}</table>"
