"""Quality against cost, as a picture for the page (SVG in the page's colours) and for `dvc plots` (PNG)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.evaluation.metrics import Metric
from pipeline.evaluation.wording import SPLITS, duration, title_of

# As drawn in the PNG; the page replaces them by its own, which depend on light or dark.
COLOURS = {"ink": "#23232b", "faint": "#777784", "line": "#dedee6"}
SERIES = {"refined": "#2f55d4", "finetuned": "#b86a00", "champion": "#2c8154"}
# Of labels from their points: right, up, and which share of their width they are moved back by.
OFFSETS = [
    *((dx, dy, back) for dx, back in ((9, 0.0), (-9, 1.0)) for dy in range(-60, 61, 6)),
    *((0, dy, 0.5) for dy in (*range(-90, -11, 6), *range(12, 91, 6))),
]
MARKERS = {"refined": "o", "finetuned": "s", "champion": "D"}


@dataclass(frozen=True)
class Point:
    """A contender on one caption set: what an image costs, and its KID (None where it was refused)."""

    name: str
    multiply_adds: int
    nfe: int
    seconds: float  # per image, of one process
    kid: Metric | None

    @property
    def series(self) -> str:
        """`refined`, `champion` or `finetuned`, of which all other contenders are settings."""
        kind = self.name.partition("_")[0]
        return kind if kind in SERIES else "finetuned"

    @property
    def label(self) -> str:
        """As in `2 calls, 14 ms`."""
        calls = f"{self.nfe} {'call' if self.nfe == 1 else 'calls'}"
        return f"{calls}, {duration(self.seconds)}"


def draw_quality(path: Path, points: Mapping[str, Sequence[Point]], threshold: float) -> None:
    """KID against cost, a panel for each caption set, as PNG. `threshold`: below it, KID is drawn to scale."""
    figure = _figure(points, threshold, (12, 4.8), stacked=False, dpi=110)
    figure.savefig(path, metadata={"Software": None})


def quality_svg(points: Mapping[str, Sequence[Point]], threshold: float, stacked: bool) -> str:
    """The same as an SVG element in CSS colours `--ink`, `--faint`, ...; `stacked` for narrow screens."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": f"quality-{stacked}", "svg.fonttype": "none"}):
        size = (4.0, 3.7 * len(points)) if stacked else (11.4, 4.7)
        figure = _figure(points, threshold, size, stacked, dpi=72)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for name, colour in (COLOURS | SERIES).items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _figure(
    points: Mapping[str, Sequence[Point]],
    threshold: float,
    size: tuple[float, float],
    stacked: bool,
    dpi: int,
) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    shape = (len(points), 1) if stacked else (1, len(points))
    panels = figure.subplots(*shape, squeeze=False).flatten()
    for panel, (split, here) in zip(panels, points.items(), strict=True):
        _draw_panel(panel, [each for each in here if each.kid and each.kid.value is not None], threshold)
        panel.set_title(SPLITS[split].capitalize(), fontsize=11, color=COLOURS["ink"], loc="left")
    figure.draw_without_rendering()
    for panel, here in zip(panels, points.values(), strict=True):
        _place_labels(panel, [each for each in here if each.kid and each.kid.value is not None])
    return figure


def _draw_panel(panel: Any, points: Sequence[Point], threshold: float) -> None:
    panel.set_xscale("log")
    panel.set_yscale("symlog", linthresh=threshold)
    _draw_points(panel, points)
    panel.margins(x=0.2, y=0.16)
    if points:
        _draw_axes(panel)
        return
    panel.text(
        0.5,
        0.5,
        "too few images to measure",
        transform=panel.transAxes,
        ha="center",
        color=COLOURS["faint"],
    )
    panel.set_axis_off()


def _draw_points(panel: Any, points: Sequence[Point]) -> None:
    for series, colour in SERIES.items():
        chain = sorted((p for p in points if p.series == series), key=lambda p: (p.multiply_adds, p.name))
        x, y = [p.multiply_adds for p in chain], [_value(p) for p in chain]
        panel.plot(x, y, color=colour, lw=1, alpha=0.4)
        for p in chain:
            low, high = _ends(p)
            error = [[max(_value(p) - low, 0)], [max(high - _value(p), 0)]]
            panel.errorbar(
                p.multiply_adds, _value(p), error, fmt=MARKERS[series], ms=7, lw=1.8, color=colour, zorder=3
            )
        if chain:
            label = "fine-tuned" if series == "finetuned" else series
            panel.plot([], [], MARKERS[series], color=colour, label=label)


def _draw_axes(panel: Any) -> None:
    from matplotlib.ticker import EngFormatter

    panel.axhline(0, color=COLOURS["faint"], lw=1, ls=(0, (2, 2)))
    panel.xaxis.set_major_formatter(EngFormatter())
    panel.xaxis.set_minor_formatter("")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_xlabel("multiply-adds per image", fontsize=10, color=COLOURS["faint"])
    panel.set_ylabel("KID, lower is better", fontsize=10, color=COLOURS["faint"])
    panel.tick_params(which="both", labelsize=9, color=COLOURS["line"], labelcolor=COLOURS["faint"])
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(COLOURS["line"])
    panel.grid(axis="y", color=COLOURS["line"], lw=0.7)
    panel.set_axisbelow(True)
    panel.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0.2,
        ncols=3,
        columnspacing=1,
        handletextpad=0.1,
        frameon=False,
        fontsize=9,
        labelcolor=COLOURS["ink"],
    )


def _value(point: Point) -> float:
    assert point.kid is not None and point.kid.value is not None
    return point.kid.value


def _ends(point: Point) -> tuple[float, float]:
    """The interval, or the value where there is none."""
    assert point.kid is not None
    if point.kid.low is None or point.kid.high is None:
        return _value(point), _value(point)
    return point.kid.low, point.kid.high


def _place_labels(panel: Any, points: Sequence[Point]) -> None:
    """Write the label of each point where it covers least of what is drawn already."""
    from matplotlib.transforms import Bbox

    legend = panel.get_legend()
    renderer = panel.figure.canvas.get_renderer()
    taken = [] if legend is None else [legend.get_window_extent(renderer)]
    for p in points:
        (x, low), (_, high) = (panel.transData.transform((p.multiply_adds, end)) for end in _ends(p))
        _, middle = panel.transData.transform((p.multiply_adds, _value(p)))
        taken += [Bbox([[x - 3, low], [x + 3, high]]), Bbox([[x - 6, middle - 6], [x + 6, middle + 6]])]
    room = panel.get_window_extent(renderer)
    scale = panel.figure.dpi / 72
    for p in sorted(points, key=lambda p: (p.multiply_adds, p.name)):
        text = panel.annotate(
            p.label if p.name == "eight_calls" else f"{_short(p.name)}: {p.label}",
            (p.multiply_adds, _value(p)),
            (0, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=SERIES[p.series],
        )
        start = text.get_window_extent(renderer)
        places = {offset: _moved(start, offset, scale) for offset in OFFSETS}
        costs = {offset: _cost_of_place(box, offset, taken, room) for offset, box in places.items()}
        dx, dy, back = best = min(OFFSETS, key=costs.__getitem__)
        text.set(position=(dx, dy), ha={0.0: "left", 0.5: "center", 1.0: "right"}[back])
        taken.append(places[best])


def _moved(box: Any, offset: tuple[int, int, float], scale: float) -> Any:
    """A box of a label, moved by one of OFFSETS; `scale`: pixels of a point."""
    dx, dy, back = offset
    return box.translated(scale * dx - back * box.width, scale * dy)


def _cost_of_place(box: Any, offset: tuple[int, int, float], taken: Sequence[Any], room: Any) -> float:
    """How much of `taken` a label covers and how much of it is outside `room`, in square pixels; and its way."""
    dx, dy, _ = offset
    outside = box.width * box.height - _overlap(box, room)
    return sum(_overlap(box.padded(3), other) for other in taken) + 4 * outside + 6 * (abs(dx) + abs(dy))


def _overlap(a: Any, b: Any) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(width, 0.0) * max(height, 0.0)


def _short(name: str) -> str:
    title = title_of(name)
    for long, short in (("refined, ", ""), ("fine-tuned, cost of ", "cost of "), ("fine-tuned, ", "")):
        title = title.replace(long, short)
    return title
