"""Pictures of a store, as SVG that lies in a page: drawn by matplotlib, coloured by the page.

Rule 1: every colour in them is a variable of the page's style sheet, so that one picture serves light and dark.
Rule 2: they are drawn for the width of a telephone, and text stays text.
Matplotlib is an optional dependency (``hydrafs[report]``): whoever imports this needs it.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
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
        names = ["0", *(f"≤{100 * bound:.0f}" for bound in LEVELS[1:]), f">{100 * LEVELS[-1]:.0f} %"]
        for level, name in enumerate(names):
            _rectangles(axes, [(level * width, 0, width - 1, 14)], f"heat-{level}")
            axes.text((level + 0.5) * width, 19, name, ha="center", va="top", color=_NAMED["quiet"])

    return _drawn(height, "Colours from nothing stored, to more than 60 % of a layer's size stored", draw)


def family_tree(rows: Sequence[tuple[int, Member]], about: Callable[[Member], str], alternative: str) -> str:
    """The family: two lines per model, its name and what there is to say ``about`` it, below what predicts most of it.

    On the right are lines to a merge from its other parents, the thicker the more of them is in it.
    """
    row, step, left, gutter = 36.0, 15.0, 10.0, _WIDTH - 34.0
    height = row * len(rows) + 4
    place = {member.key: (left + min(depth, 6) * step, 12 + row * n) for n, (depth, member) in enumerate(rows)}

    def draw(figure: Any) -> None:
        axes = _plain_axes(figure, height)

        def line(points: Sequence[tuple[float, float]], code: Any, colour: str, width: float, style: str = "-") -> None:
            outline = Outline(points, [Outline.MOVETO, *[code] * (len(points) - 1)])
            axes.add_patch(
                PathPatch(outline, facecolor="none", edgecolor=_NAMED[colour], lw=width, ls=style, clip_on=False)
            )

        joined: set[str] = set()
        for _, member in rows:
            x, y = place[member.key]
            for number, (parent, share) in enumerate(member.parents):
                if parent.key not in place:
                    continue
                px, py = place[parent.key]
                if number == 0:
                    line([(px, py + 6), (px, y), (x - 5, y)], Outline.LINETO, "line", 1.2)
                    continue
                joined |= {parent.key, member.key}
                bend = gutter + min(36.0, 9 + abs(y - py) / 9)
                weight = 0.5 if math.isnan(share.weight) else min(1.0, abs(share.weight))
                start, end = (gutter, py), (gutter + 3, y)
                line([start, (bend, py), (bend, y), end], Outline.CURVE4, "merge", 0.6 + 1.8 * weight)
                axes.plot(*start, "o", ms=3, color=_NAMED["merge"], clip_on=False)
                axes.plot(gutter + 1.5, y, "<", ms=5, color=_NAMED["merge"], clip_on=False)
        for _, member in rows:
            x, y = place[member.key]
            if member.state == "more":
                axes.text(x + 10, y, member.name, va="center", color=_NAMED["quiet"], fontstyle="italic")
                continue
            full = member.state in ("base", "plain")
            axes.plot(
                [x], [y], "s" if full else "o", ms=8 if full else 7, color=_NAMED[_STATE_COLOURS[member.state]],
                mec=_NAMED["paper"], clip_on=False,
            )  # fmt: skip
            name = shortened(member.name, int((gutter - 14 - x) / 5.7))
            bad = member.state in ("missing", "damaged")
            axes.text(x + 10, y, name, va="center", color=_NAMED["bad" if bad else "ink"])
            what = shortened(about(member), int((gutter - 14 - x) / 4.9))
            colour = {"merge": "merge", "missing": "bad", "damaged": "bad"}.get(member.state, "quiet")
            axes.text(x + 10, y + 13, what, va="center", fontsize=8.5, color=_NAMED[colour])
            if member.key in joined:
                begin = x + 18 + 5.7 * len(name)
                if begin < gutter - 4:
                    line([(begin, y), (gutter - 3, y)], Outline.LINETO, "line", 0.9, ":")

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
        _rectangles(axes, full, "heat-0")
        for colour in ("tune", "merge"):
            kept = [
                (0.0, 14 + row * n, max(1.5, m.stored * scale), 9.0)
                for n, m in enumerate(members)
                if _STATE_COLOURS[m.state] == colour
            ]
            _rectangles(axes, kept, colour)
        for n, member in enumerate(members):
            axes.text(0, 11 + row * n, shortened(member.name, 56), va="bottom")
            saved = f"−{human(member.saved)}"
            axes.text(member.size * scale + 5, 18.5 + row * n, saved, va="center", color=_NAMED["quiet"])

    return _drawn(height, alternative, draw)


def over_time(members: Sequence[Member], human: Callable[[float], str], alternative: str) -> str:
    """What was saved up to each time that a diff was written."""
    height = 200.0
    ordered = sorted((m for m in members if m.stored_ns), key=lambda m: m.stored_ns)

    def draw(figure: Any) -> None:
        axes = figure.add_axes((0.16, 0.14, 0.76, 0.76))
        times = [datetime.fromtimestamp(m.stored_ns / 1e9, timezone.utc) for m in ordered]
        saved, sums = 0, []
        for member in ordered:
            saved += member.saved
            sums.append(saved)
        # From nothing at the left edge, so that one model alone is a step as well.
        span = (times[-1] - times[0]) if times else timedelta()
        edge = max(span / 25, timedelta(minutes=1))
        times, sums = [times[0] - edge, *times, times[-1] + edge], [0, *sums, sums[-1]]
        axes.fill_between(times, sums, step="post", color=_NAMED["heat-2"], linewidth=0)
        axes.step(times, sums, where="post", color=_NAMED["tune"], lw=1.8)
        axes.plot(times[1:-1], sums[1:-1], "o", color=_NAMED["tune"], ms=3)
        axes.text(times[-1], sums[-1], human(sums[-1]), va="bottom", ha="right", fontweight="bold")
        axes.set_xlim(times[0], times[-1])
        axes.set_ylim(0, max([*sums, 1]) * 1.1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value) if value else "0"))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y", color=_NAMED["line"], lw=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(length=0, pad=6)
        axes.xaxis.set_major_locator(matplotlib.dates.AutoDateLocator(minticks=2, maxticks=4))
        form = "%b %Y" if span.days > 120 else "%d %b" if span.days > 3 else "%d %b %H:%M"
        axes.xaxis.set_major_formatter(matplotlib.dates.DateFormatter(form))

    return _drawn(height, alternative, draw)
