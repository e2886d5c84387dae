"""The one picture of the demo: the spectrum of the galaxy and the map of its hydrogen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from penstock.demo.imaging import CubeSummary
from penstock.demo.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HALF_WIDTH: Final = 8.0
"""Arc minutes shown on each side of the phase centre."""

INK: Final = "#22303c"
FAINT: Final = "#8b98a5"


def draw(report: Report, cube: CubeSummary, output: str | Path) -> Report:
    """Draw the spectrum and the moment-0 map side by side into one PNG file.

    Parameters
    ----------
    report : Report
    cube : CubeSummary
    output : str or Path
        Its folder is made if need be.

    Returns
    -------
    Report
        The same figures, with the picture's path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(13, 6.2), facecolor="white")
    FigureCanvasAgg(figure)  # not pyplot: no global state, so any thread may draw
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, 0, 1, 0.87), w_pad=0.12))
    found = (
        f"1445+099: {report.calibrator_flux:.3f} ± {report.calibrator_error:.3f} Jy",
        f"rms {report.rms:.3f} mJy/beam",
        f"peak {report.peak:.1f} mJy/beam = {report.peak_sigma:.1f} σ in channel {report.peak_channel}",
    )
    title: dict[str, Any] = {"color": INK, "va": "top", "in_layout": False}
    figure.text(
        0.012, 0.975, "NGC 5921: neutral hydrogen, VLA, 13 April 1995", size=17, weight="bold", **title
    )
    figure.text(0.012, 0.905, "      ".join(found), size=12, **title)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_spectrum(left, report)
    _draw_map(right, cube)
    for axes in (left, right):
        axes.tick_params(colors=INK)
        axes.xaxis.label.set(color=INK, size=11)
        axes.yaxis.label.set(color=INK, size=11)
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)
    return replace(report, picture=path)


def _draw_spectrum(axes: Axes, report: Report) -> None:
    """Brightness against velocity, coloured as the shift of the line: blue approaches, red recedes."""
    import matplotlib as mpl

    order = np.argsort(report.velocity)
    speed, bright = report.velocity[order], report.spectrum[order]
    step = float(np.diff(speed).mean())
    line = speed[bright > 5 * report.rms]
    low, high = (line.min(), line.max()) if line.size > 1 else (speed[0], speed[-1])
    colour: Any = mpl.colormaps["coolwarm"]((speed - low) / (high - low))
    axes.bar(speed, bright, width=step, color=colour, linewidth=0, antialiased=False)
    axes.stairs(bright, np.append(speed - step / 2, speed[-1] + step / 2), color=INK, linewidth=1.3)
    axes.axhline(3 * report.rms, color=FAINT, linestyle="--", linewidth=1)
    axes.text(speed[-1] + step, 3 * report.rms, " 3 σ", color=FAINT, va="center")
    for side in (speed < (low + high) / 2, speed >= (low + high) / 2):
        horn = int(np.flatnonzero(side)[bright[side].argmax()])
        place = (float(speed[horn]), float(bright[horn]))
        label = f"{bright[horn] / report.rms:.1f} σ"
        axes.annotate(
            label, place, (0, 5), textcoords="offset points", ha="center", weight="bold", size=11, color=INK
        )
    axes.set(xlim=(speed[0] - step, speed[-1] + step), ylim=(0, 1.12 * max(bright.max(), 3 * report.rms)))
    axes.set(xlabel="velocity, LSR, radio convention [km/s]", ylabel="brightest pixel [mJy/beam]")
    axes.set_title("The double-horned profile of a rotating disc", loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_map(axes: Axes, cube: CubeSummary) -> None:
    """Line emission summed over velocity, with north up and east to the left."""
    size, cell = cube.moment0.shape[0], cube.cell / 60
    reach = min(size // 2, max(1, round(HALF_WIDTH / cell)))
    shown = slice(size // 2 - reach, size // 2 + reach)
    image = cube.moment0[shown, shown]
    far, near = (reach + 0.5) * cell, (reach - 0.5) * cell  # the outer edges of the first and the last pixel
    extent = (far, -near, -far, near)
    drawn = axes.imshow(image, origin="lower", cmap="inferno", extent=extent, interpolation="bicubic")
    if image.max() > 0:
        levels = image.max() * np.array([0.1, 0.3, 0.5, 0.7, 0.9])
        axes.contour(image, levels, extent=extent, origin="lower", colors="white", linewidths=0.6, alpha=0.7)
    axes.plot(0, 0, "+", color="white", markersize=9, alpha=0.8)
    axes.figure.colorbar(drawn, ax=axes, shrink=0.82, pad=0.02, label="Jy/beam km/s")
    axes.set(xlabel="east  ←  offset [arcmin]", ylabel="offset [arcmin]  →  north")
    axes.set_title("Moment 0, around 15h 22m 00s, +05° 04′ 00″", loc="left", color=INK)
