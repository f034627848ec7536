"""Draws a chart as an SVG whose colours the page's style sheet decides, in light and dark."""

import io
import os
import re

from markupsafe import Markup

from page.curves import Chart, Curve

INCHES = (4.7, 2.5)  # at 72 pixels an inch: as wide as a phone, so that text stays readable there
MARGINS = {"left": 0.14, "right": 0.98, "top": 0.955, "bottom": 0.2}
COLOURS = 4  # how many the style sheet has for curves; further curves begin again
DECADES = 3  # up to which a logarithmic axis has room for 1, 2 and 5 of each power of ten
NARROWEST = 1e-3  # a linear axis' extent at least, as a share of its values: labels have 6 digits

# Matplotlib wants real colours. These are replaced by variables of the style sheet.
INK, GRID, PAPER = "#010203", "#010204", "#010205"
VARIABLES = {INK: "--muted", GRID: "--line", PAPER: "--paper"} | {
    f"#0102{number:02x}": f"--curve-{number - 15}" for number in range(16, 16 + COLOURS)
}
SETTINGS = {
    "svg.fonttype": "none",  # text stays text: searchable, and in the page's own font
    "svg.hashsalt": "page",  # the same chart gives the same bytes
    "path.simplify_threshold": 1.0,  # tens of thousands of steps do not make a large file
    "font.size": 11.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}


def draw(chart: Chart, name: str) -> Markup:
    """The chart as an ``svg`` element.

    Args:
        name: unique in the page. It begins the ids inside the element.
    """
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which this environment may lack
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    stream = io.StringIO()
    # Not the settings of the user's matplotlibrc.
    with matplotlib.rc_context(dict(matplotlib.rcParamsDefault) | SETTINGS):
        figure = Figure(figsize=INCHES)
        FigureCanvasSVG(figure)
        figure.subplots_adjust(**MARGINS)
        axes = figure.add_subplot()
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        for curve in chart.curves:
            _add(axes, curve)
        last = max(curve.points[-1][0] for curve in chart.curves)
        axes.set_xlim(0, 1.02 * max(last, 1))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if chart.is_logarithmic:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            within = (1, 2, 5) if high < 10**DECADES * low else (1,)
            axes.yaxis.set_major_locator(LogLocator(subs=within, numticks=8))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(_widened(*axes.get_ylim()))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.set_xlabel("optimizer steps")
        figure.savefig(stream, format="svg", transparent=True)
    return _inline(stream.getvalue(), name)


def _add(axes: "object", curve: Curve) -> None:
    """Add a curve to matplotlib's ``axes``."""
    colour = f"#0102{15 + (curve.colour - 1) % COLOURS + 1:02x}"
    for piece in curve.pieces:
        steps, values = zip(*piece, strict=True)
        dots = {"marker": "o", "markersize": 4.2} if curve.is_dotted or len(steps) == 1 else {}
        axes.plot(
            steps,
            values,
            color=colour,
            linewidth=1.9 if curve.is_dotted else 1.4,
            linestyle=(0, (4, 2)) if curve.is_dashed else "-",
            solid_joinstyle="round",
            zorder=3 if curve.is_dotted else 2,
            **dots,
        )
    if curve.best:
        step, value = curve.best
        axes.axvline(step, color=colour, linewidth=0.9, linestyle=(0, (1, 3)), zorder=1)
        axes.plot(
            [step],
            [value],
            marker="o",
            markersize=9,
            markerfacecolor=PAPER,
            markeredgecolor=colour,
            markeredgewidth=2,
            zorder=4,
        )


def _widened(low: float, high: float) -> tuple[float, float]:
    """The limits of a linear axis, so far apart that its labels differ."""
    lacking = NARROWEST * max(abs(low), abs(high)) - (high - low)
    return (low - lacking / 2, high + lacking / 2) if lacking > 0 else (low, high)


def number(value: float) -> str:
    """A value of an axis, such as ``0.5``, ``12,000``, ``2e6`` or ``2e-5``."""
    return re.sub("e([+-])0*", lambda sign: "e" + sign[1].strip("+"), f"{value:,.6g}")


def _inline(svg: str, name: str) -> Markup:
    """Matplotlib's document as an element that is part of a page."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    opening, _, rest = svg.partition(">")
    box = re.search(r'viewBox="[^"]+"', opening)[0]
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', rest))
    rest = re.sub(
        r' id="([^"]*)"',
        lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "",
        rest,
    )
    rest = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", rest)
    for colour, variable in VARIABLES.items():
        rest = rest.replace(colour, f"var({variable})")
    # The sizes stay, the font is the page's.
    rest = re.sub(r"font: ([0-9.]+px)[^;\"]*", r"font-size: \1", rest)
    rest = re.sub(r"\n\s*", "\n", rest)
    return Markup(
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box} aria-hidden="true" '
        f'focusable="false">{rest}'
    )
