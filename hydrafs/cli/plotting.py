"""The heat map of a model's layers in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hydrafs.changes import Part
from hydrafs.errors import printable

_BLOCKS = " ▁▂▃▄▅▆▇█"
_FULL = 0.6
"""The stored share that a full block stands for."""
_STYLES = ("dim", "blue", "blue", "cyan", "cyan", "green", "yellow", "red", "bold red")
_SHORT = {
    "self-attention": "self", "cross-attention": "cross", "attention": "attn", "feed-forward": "ff",
    "convolution": "conv", "projection": "proj", "embedding": "embed",
}  # fmt: skip


def _step(share: float) -> int:
    """Which of the nine blocks: the first for nothing at all, and for nothing else."""
    return 0 if share <= 0 else max(1, min(8, round(8 * share / _FULL)))


def plot(parts: Sequence[Part]) -> None:
    """Print the parts, a row per block and a column per kind of layer. Colours on a terminal only."""
    from rich.console import Console  # noqa: PLC0415 - only here
    from rich.text import Text  # noqa: PLC0415

    console = Console(no_color=None if sys.stdout.isatty() else True, highlight=False, soft_wrap=True)
    for part in parts:
        kinds = part.kinds
        width = max([len(row) for row in part.rows] + [len(part.name)])
        head = Text(printable(part.name).ljust(width), style="bold")
        for kind in kinds:
            head.append(f" {_SHORT.get(kind, kind):>7}", style="default")
        head.append(f" {'stored':>8}")
        console.print(head)
        for row in part.rows:
            line = Text(printable(row).ljust(width))
            nbytes = stored = 0.0
            for kind in kinds:
                cell = part.cells.get((row, kind))
                if cell is None:
                    line.append("        ")
                    continue
                nbytes, stored = nbytes + cell.nbytes, stored + cell.stored
                step = _step(cell.share)
                line.append("  ")
                line.append((_BLOCKS[step] if step else "·") * 2, style=_STYLES[step])
                line.append(f"{100 * cell.share:3.0f}%", style="dim" if not step else "default")
            line.append(f" {100 * stored / nbytes if nbytes else 0:6.1f} %")
            console.print(line)
        console.print()
