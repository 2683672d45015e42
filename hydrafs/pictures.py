"""Pictures of a store, as SVG that lies in a page: drawn by matplotlib, coloured by the page.

Rule 1: every colour in them is a variable of the page's style sheet, so that one picture serves light and dark.
Rule 2: they are drawn for the width of a telephone, and text stays text.
Matplotlib is an optional dependency (``hydrafs[report]``): whoever imports this needs it.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from html import escape
from typing import Any

import matplotlib
import matplotlib.dates
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hydrafs.changes import Part
from hydrafs.family import Member

LEVELS = (0.0, 0.02, 0.05, 0.10, 0.15, 0.20, 0.30, 0.40, 0.60)
"""Upper bounds of the heat map's levels: what is stored of a layer. The first is exactly nothing, the last is open."""

_POINT = 1 / 72
_WIDTH = 380.0
_COLOURS = {
    "#0a0a01": "var(--ink)",
    "#0a0a02": "var(--quiet)",
    "#0a0a03": "var(--line)",
    "#0a0a04": "var(--base)",
    "#0a0a05": "var(--tune)",
    "#0a0a06": "var(--merge)",
    "#0a0a07": "var(--bad)",
    "#0a0a08": "var(--paper)",
    **{f"#0b0b{level:02x}": f"var(--heat-{level})" for level in range(len(LEVELS) + 1)},
}
_NAMED = {value[6:-1]: key for key, value in _COLOURS.items()}
_STATE_COLOURS = {
    "base": "base", "plain": "quiet", "fine-tune": "tune", "merge": "merge", "missing": "bad", "damaged": "bad",
    "more": "quiet",
}  # fmt: skip
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hydrafs",
    "svg.id": None,
    "font.size": 10.0,
    "text.color": _NAMED["ink"],
    "axes.edgecolor": _NAMED["line"],
    "axes.labelcolor": _NAMED["quiet"],
    "xtick.color": _NAMED["quiet"],
    "ytick.color": _NAMED["quiet"],
    "text.parse_math": False,
    "path.simplify": False,
}


def level_of(share: float) -> int:
    """The level of the heat map that a stored share has."""
    return next((level for level, bound in enumerate(LEVELS) if share <= bound), len(LEVELS))


def shortened(text: str, length: int) -> str:
    """``text`` with its middle left out where it is longer."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def _drawn(height: float, alternative: str, draw: Callable[[Any], None]) -> str:
    """An SVG of the width of a telephone and this height, in points; ``draw(axes)`` fills it, y downwards."""
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        # A name in a script that the measuring font has no glyphs of is drawn all the same: text stays text.
        warnings.simplefilter("ignore", UserWarning)
        figure = Figure(figsize=(_WIDTH * _POINT, height * _POINT), facecolor="none")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="(?!.*clip)[^"]*"', "<g", svg)
    svg = re.sub(r"#0[ab]0[ab][0-9a-f]{2}", lambda found: _COLOURS.get(found[0], found[0]), svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    head = f'<svg viewBox="0 0 {_WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(alternative, quote=True)}"'
    return re.sub(r"<svg [^>]*>", lambda _: head + ' xmlns:xlink="http://www.w3.org/1999/xlink">', svg, count=1).strip()


def _plain_axes(figure: Any, height: float) -> Any:
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, _WIDTH)
    axes.set_ylim(height, 0)
    axes.axis("off")
    return axes


def _rectangles(axes: Any, boxes: Sequence[tuple[float, float, float, float]], colour: str) -> None:
    """Many rectangles as one outline: a heat map is then a few paths, whatever its size."""
    if not boxes:
        return
    points: list[tuple[float, float]] = []
    codes: list[Any] = []
    for x, y, width, height in boxes:
        points += [(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y)]
        codes += [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY]
    axes.add_patch(PathPatch(Outline(points, codes), facecolor=_NAMED[colour], edgecolor="none", clip_on=False))


def heat_map(parts: Sequence[Part], alternative: str) -> str:
    """A grid for each part: a row per block, a column per kind of layer, coloured by what is stored of it."""
    row, left, head, gap = 15.5, 82.0, 66.0, 16.0
    height = sum(head + row * len(part.rows) + gap for part in parts)

    def draw(figure: Any) -> None:
        axes = _plain_axes(figure, height)
        boxes: dict[int, list[tuple[float, float, float, float]]] = {}
        top = 0.0
        for part in parts:
            kinds = part.kinds
            width = min(46.0, (_WIDTH - left - 34) / max(1, len(kinds)))
            axes.text(0, top + head - 8, shortened(part.name, 14), fontsize=11, fontweight="bold", va="bottom")
            for column, kind in enumerate(kinds):
                x = left + (column + 0.5) * width
                axes.text(
                    x - 3, top + head - 4, kind, rotation=38, rotation_mode="anchor", fontsize=10, color=_NAMED["quiet"]
                )
            for number, name in enumerate(part.rows):
                y = top + head + number * row
                axes.text(left - 6, y + row / 2, name, ha="right", va="center", fontsize=10, color=_NAMED["quiet"])
                for column, kind in enumerate(kinds):
                    cell = part.cells.get((name, kind))
                    if cell:
                        box = (left + column * width, y, width - 1, row - 1)
                        boxes.setdefault(level_of(cell.share), []).append(box)
            top += head + row * len(part.rows) + gap
        for level, found in sorted(boxes.items()):
            _rectangles(axes, found, f"heat-{level}")

    return _drawn(height, alternative, draw)


def legend() -> str:
    """What the colours of the heat maps mean."""
    height = 34.0

    def draw(figure: Any) -> None:
        axes = _plain_axes(figure, height)
        width = _WIDTH / (len(LEVELS) + 1)
        names = ["0", *(f"≤{100 * bound:.0f}" for bound in LEVELS[1:]), f">{100 * LEVELS[-1]:.0f}"]
        for level, name in enumerate(names):
            _rectangles(axes, [(level * width, 0, width - 1, 14)], f"heat-{level}")
            axes.text((level + 0.5) * width, 19, name, ha="center", va="top", color=_NAMED["quiet"])

    return _drawn(height, "Colours from nothing stored, to more than 60 % of a layer's size stored", draw)


def family_tree(rows: Sequence[tuple[int, Member]], alternative: str) -> str:
    """The family: a row per model, indented below what predicts most of it; thin lines from a merge's other parents."""
    row, step, left = 22.0, 15.0, 10.0
    height = row * len(rows) + 6
    place = {member.key: (left + min(depth, 8) * step, 14 + row * n) for n, (depth, member) in enumerate(rows)}

    def draw(figure: Any) -> None:
        axes = _plain_axes(figure, height)
        trunk: tuple[list[tuple[float, float]], list[Any]] = ([], [])
        others: tuple[list[tuple[float, float]], list[Any]] = ([], [])
        for _, member in rows:
            x, y = place[member.key]
            for number, (parent, _) in enumerate(member.parents):
                if parent.key not in place:
                    continue
                px, py = place[parent.key]
                points, codes = trunk if number == 0 else others
                if number == 0:
                    points += [(px, py), (px, y), (x, y)]
                    codes += [Outline.MOVETO, Outline.LINETO, Outline.LINETO]
                else:
                    edge = _WIDTH - 4.0 * number
                    points += [(_WIDTH - 26, py), (edge, py), (edge, y), (_WIDTH - 26, y)]
                    codes += [Outline.MOVETO, Outline.CURVE4, Outline.CURVE4, Outline.CURVE4]
        for (points, codes), colour, width in ((others, "merge", 0.8), (trunk, "line", 1.2)):
            if points:
                outline = Outline(points, codes)
                axes.add_patch(PathPatch(outline, facecolor="none", edgecolor=_NAMED[colour], lw=width, clip_on=False))
        for _, member in rows:
            x, y = place[member.key]
            if member.state == "more":
                axes.text(x + 10, y, member.name, va="center", color=_NAMED["quiet"], fontstyle="italic")
                continue
            colour = _NAMED[_STATE_COLOURS[member.state]]
            full = member.state in ("base", "plain")
            axes.plot(
                [x], [y], "s" if full else "o", ms=8 if full else 7, color=colour, mec=_NAMED["paper"], clip_on=False
            )
            room = int((_WIDTH - 36 - x) / 5.6)
            name = shortened(member.name, room)
            axes.text(
                x + 10, y, name, va="center", color=_NAMED["bad" if member.state in ("missing", "damaged") else "ink"]
            )

    return _drawn(height, alternative, draw)


def bars(members: Sequence[Member], human: Callable[[float], str], alternative: str) -> str:
    """For each model its full size, and what it takes, as one bar in another."""
    row = 30.0
    height = row * len(members) + 8
    largest = max((m.size for m in members), default=1) or 1

    def draw(figure: Any) -> None:
        axes = _plain_axes(figure, height)
        scale = (_WIDTH - 70) / largest
        full = [(0.0, 14 + row * n, m.size * scale, 9.0) for n, m in enumerate(members)]
        kept = [(0.0, 14 + row * n, max(1.0, m.stored * scale), 9.0) for n, m in enumerate(members)]
        _rectangles(axes, full, "heat-0")
        _rectangles(axes, kept, "tune")
        for n, member in enumerate(members):
            axes.text(0, 11 + row * n, shortened(member.name, 56), va="bottom")
            saved = f"−{human(member.saved)}"
            axes.text(member.size * scale + 5, 18.5 + row * n, saved, va="center", color=_NAMED["quiet"])

    return _drawn(height, alternative, draw)


def over_time(members: Sequence[Member], human: Callable[[float], str], alternative: str) -> str:
    """What was saved up to each time that a diff was written."""
    height = 190.0
    ordered = sorted((m for m in members if m.stored_ns), key=lambda m: m.stored_ns)

    def draw(figure: Any) -> None:
        axes = figure.add_axes((0.15, 0.16, 0.82, 0.78))
        times = [datetime.fromtimestamp(m.stored_ns / 1e9, timezone.utc) for m in ordered]
        saved, sums = 0, []
        for member in ordered:
            saved += member.saved
            sums.append(saved)
        axes.fill_between(times, sums, step="post", color=_NAMED["heat-2"], linewidth=0)
        axes.step(times, sums, where="post", color=_NAMED["tune"], lw=1.6)
        axes.plot(times[-1:], sums[-1:], "o", color=_NAMED["tune"], ms=5)
        axes.set_ylim(0, max([*sums, 1]) * 1.12)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y", color=_NAMED["line"], lw=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(length=0)
        locator = matplotlib.dates.AutoDateLocator(minticks=2, maxticks=4)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(matplotlib.dates.ConciseDateFormatter(locator))

    return _drawn(height, alternative, draw)
