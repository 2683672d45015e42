"""A page about a store: its family tree, what it saves, and what each fine-tune changed.

Goal: one file that needs nothing else: no script, no font, no request; light and dark, on a telephone too.
Rule 1: every picture has its text: an alternative, and a table beside it.
Rule 2: names come from files, and are escaped wherever they stand.
Rule 3: what the page holds is bounded, whatever the store does; what was left out is said.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path, PurePath

from hydrafs import pictures
from hydrafs.cache import ChunkCache
from hydrafs.changes import Part, Sample, sample
from hydrafs.errors import HydraError
from hydrafs.family import Member, condensed, family_of, in_order
from hydrafs.opening import Opener
from hydrafs.store import Store
from hydrafs.temporary import TemporaryFile

MAX_HEAT_MAPS = 24
MAX_BARS = 30
MAX_TREE = 400
MAX_MERGES = 20
MAX_GLANCE = 100
MAX_ROWS = 2000
_SAMPLED_CHUNKS = 24
_LEAST_PART = 0.002
"""Smaller parts of a model are tensors that no part of a network has: a schedule, a counter."""
_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

Human = Callable[[float], str]

_STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf7;--card:#fff;--ink:#1d2126;--quiet:#5b636d;--line:#d9d6ce;--base:#30343b;
--tune:#2563a8;--merge:#a0521d;--bad:#b3261e;--above:#fff;
--heat-0:#e9e7e1;--heat-1:#d6e4f2;--heat-2:#b8d2ea;--heat-3:#93bbdf;--heat-4:#6ba1d1;--heat-5:#4786bf;--heat-6:#2c6aa6;
--heat-7:#1c4f86;--heat-8:#123865;--heat-9:#0a2143}
@media (prefers-color-scheme:dark){:root{--paper:#14171b;--card:#1c2025;--ink:#e8e6e1;--quiet:#a2a9b2;--line:#3a4047;
--base:#e8e6e1;--tune:#6fb1f0;--merge:#e79a5c;--bad:#ff8a80;--above:#0d1014;
--heat-0:#353c44;--heat-1:#23384d;--heat-2:#24476a;--heat-3:#275886;--heat-4:#2f6ca5;--heat-5:#4384c0;--heat-6:#629fd6;
--heat-7:#8abbe6;--heat-8:#b5d5f3;--heat-9:#e2f0fd}}
*{box-sizing:border-box}
body{margin:0 auto;padding:clamp(.6rem,3vw,1.2rem);max-width:75rem;background:var(--paper);color:var(--ink);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.6rem;margin:.2rem 0;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:2.2rem 0 .5rem}
h3{font-size:1rem;margin:1.2rem 0 .4rem;overflow-wrap:anywhere}.card h3,.two h3{margin:0 0 .2rem}
p{margin:.3rem 0 .7rem;max-width:46rem;overflow-wrap:anywhere}
.two>*,.cards>*{min-width:0}.quiet{color:var(--quiet)}small{color:var(--quiet)}
svg{display:block;width:100%;height:auto;max-width:38rem;overflow:visible}
.numbers{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.7rem;margin:1rem 0;padding:0}
.numbers div,.card{background:var(--card);border:1px solid var(--line);border-radius:.6rem;
padding:clamp(.5rem,2vw,.8rem)}
.numbers dt{color:var(--quiet);font-size:.85rem}.numbers dd{margin:0;font-size:1.35rem;font-weight:600}
.numbers small{font-size:.85rem;font-weight:400;white-space:nowrap}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:1rem;align-items:start}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,23rem),1fr));gap:1rem;align-items:start}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;width:100%}
th,td{text-align:left;padding:.2rem .6rem .2rem 0;border-bottom:1px solid var(--line);vertical-align:top}
td.n,th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
td.name{overflow-wrap:anywhere;min-width:9rem}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--tune)}
.key{display:flex;flex-wrap:wrap;gap:.3rem 1rem;padding:0;margin:.3rem 0 .8rem;list-style:none;font-size:.85rem}
.key i{display:inline-block;width:.75rem;height:.75rem;border-radius:50%;margin-right:.35rem}
.key i.square{border-radius:.1rem}
.recipes{list-style:none;padding:0;margin:0}
.recipes li{border-left:.2rem solid var(--merge);padding:.1rem 0 .1rem .7rem;margin:0 0 .8rem;overflow-wrap:anywhere}
.recipes strong,.recipes small,.formula{display:block}.formula{color:var(--merge)}
.glance td{border-bottom:.15rem solid var(--paper);border-right:.15rem solid var(--paper);padding:.25rem .5rem}
.glance td.name{padding-left:0}.glance tr:last-child td{border-bottom:0}
.h0{background:var(--heat-0);color:var(--ink)}.h1{background:var(--heat-1);color:var(--ink)}.h2{background:var(--heat-2);color:var(--ink)}.h3{background:var(--heat-3);color:var(--ink)}.h4{background:var(--heat-4);color:var(--ink)}
.h5{background:var(--heat-5);color:var(--above)}.h6{background:var(--heat-6);color:var(--above)}.h7{background:var(--heat-7);color:var(--above)}.h8{background:var(--heat-8);color:var(--above)}.h9{background:var(--heat-9);color:var(--above)}
footer{margin:2.5rem 0 1rem;color:var(--quiet);font-size:.85rem}
"""


def report(store: Store, human: Human, *, title: str = "", max_heat_maps: int = MAX_HEAT_MAPS) -> str:
    """The page about ``store``.

    Args:
        human: a size in bytes as people read it.
        title: the name of the store; default its folder's.
        max_heat_maps: how many models are drawn layer by layer, those that were stored last.
    """
    family = family_of(store)
    rows = in_order(family)
    stored = [member for _, member in rows if member.entry and member.entry.is_diff]
    name = title or store.root.name
    sections = [_numbers(family, stored, human), _tree(rows, human), _savings(stored, human)]
    sections.append(_heat_maps(store, stored, human, max_heat_maps))
    sections.append(_table(rows, human))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<title>{escape(name)}: a store of models</title><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style></head>\n"
        f"<body><main><h1>{escape(name)}</h1>\n" + "\n".join(filter(None, sections)) + "\n</main>"
        "<footer>Made by hydrafs report. This page is all there is: it loads nothing.</footer></body></html>\n"
    )


def _numbers(family: Sequence[Member], stored: Sequence[Member], human: Human) -> str:
    size, taken = sum(m.size for m in stored), sum(m.stored for m in stored)
    full = [m for m in family if m.state in ("base", "plain")]
    facts = [
        ("models", str(sum(m.state != "missing" for m in family)), ""),
        ("saved", human(sum(m.saved for m in stored)), ""),
        ("dehydrated models take", human(taken), f"{100 * taken / size:.1f} % of {human(size)}" if size else ""),
        ("full files", str(len(full)), human(sum(m.size for m in full))),
    ]
    lost = [m for m in family if m.state in ("missing", "damaged")]
    if lost:
        facts.append(("missing or damaged", str(len(lost)), ""))
    return (
        '<dl class="numbers">'
        + "".join(f"<div><dt>{k}</dt><dd>{v} <small>{more}</small></dd></div>" for k, v, more in facts)
        + "</dl>"
    )


def _tree(rows: Sequence[tuple[int, Member]], human: Human) -> str:
    drawn = condensed(list(rows))[:MAX_TREE]
    shown = rows[:MAX_ROWS]
    merges = [m for _, m in drawn if m.state == "merge"][:MAX_MERGES]
    left = sum(m.state == "merge" for _, m in rows) - len(merges)
    more = f"<p class=quiet>{left} more merges are in the table below.</p>" if left else ""
    recipes = "".join(_recipe(member, human) for member in merges)
    if recipes:
        recipes = f"<h3>Merges</h3><ul class=recipes>{recipes}</ul>"
    items = "".join(
        f"<tr><td class=name>{'· ' * depth}{escape(m.name)}<td>{m.state}<td class=name>{escape(m.mixture) or '-'}</tr>"
        for depth, m in shown
    )
    key = "".join(
        f'<li><i class="{shape}" style="background:var(--{colour})"></i>{label}</li>'
        for label, colour, shape in (
            ("base", "base", "square"),
            ("other full file", "quiet", "square"),
            ("fine-tune", "tune", ""),
            ("merge, with lines from its other parents", "merge", ""),
            ("missing or damaged", "bad", ""),
        )
    )
    alternative = f"Family tree of {len(rows)} models; the table below it says the same"
    tree = pictures.family_tree(drawn, lambda member: _about_member(member, human), alternative)
    return (
        "<h2>Family</h2><p>Each model stands below the one that it mostly comes from.</p>"
        f'<ul class="key">{key}</ul><div class="two"><div>{tree}</div>'
        f"<div>{recipes}{more}</div></div>"
        "<details><summary>The family as a table</summary><div class=scroll><table><thead><tr><th>model<th>kind<th>"
        f"made from</tr></thead><tbody>{items}</tbody></table></div></details>"
    )


def _about_member(member: Member, human: Human) -> str:
    if member.state == "merge":
        return f"= {member.mixture_of(_stem)}"
    if member.state in ("missing", "damaged"):
        return member.state
    if member.saved <= 0:
        return f"full file, {human(member.size)}"
    return f"{human(member.stored)}, {100 * member.stored / member.size:.1f} % of {human(member.size)}"


def _stem(name: str) -> str:
    path = PurePath(name)
    return path.stem if path.suffix.lower() in _ENDINGS else path.name


def _recipe(member: Member, human: Human) -> str:
    """A merge: its formula, the programs whose arithmetic it is, and how much of it that gives exactly."""
    notes = []
    for part in member.recipes[:3]:
        exact = f"all {part.tensors}" if part.exact == part.tensors else f"{part.exact} of {part.tensors}"
        notes.append(f"{part.label}, exact for {exact} tensors")
    notes.append(f"{human(member.stored)} instead of {human(member.size)}")
    return (
        f"<li><strong>{escape(member.name)}</strong><span class=formula>= {escape(member.mixture)}</span>"
        f"<small>{escape('; '.join(notes))}</small></li>"
    )


def _savings(stored: Sequence[Member], human: Human) -> str:
    if not stored:
        return "<h2>Saved</h2><p>No model of this store is dehydrated yet: hydrafs dehydrate does that.</p>"
    most = sorted(stored, key=lambda m: -m.saved)[:MAX_BARS]
    note = f" The {len(most)} that save most." if len(most) < len(stored) else ""
    bars = pictures.bars(
        most, human, f"Full and stored size of {len(most)} models; numbers are in the table of all models"
    )
    total = human(sum(m.saved for m in stored))
    time = pictures.over_time(stored, human, f"Bytes saved over time, up to {total}")
    return (
        f'<h2>Saved</h2><div class="two"><div><h3>By model</h3><p class="quiet">The whole bar is the full file, the '
        f"coloured part what is stored.{note}</p>{bars}</div><div><h3>Over time</h3>"
        f'<p class="quiet">By when each diff was written.</p>{time}</div></div>'
    )


def _heat_maps(store: Store, stored: Sequence[Member], human: Human, limit: int) -> str:
    tuned = sorted((m for m in stored if m.state == "fine-tune" and m.parts), key=lambda m: (-m.stored_ns, m.name))
    if not tuned:
        return ""
    cards = []
    with contextlib.closing(Opener(store, ChunkCache(64 << 20))) as opener:
        for member in tuned[:limit]:
            cards.append(_card(opener, member, human))
    left = len(tuned) - len(cards)
    more = (
        f"<p>Drawn are the {len(cards)} that were stored last; <code>hydrafs info NAME --plot</code> shows any of the "
        f"other {left}.</p>"
        if left
        else ""
    )
    return (
        "<h2>What each fine-tune changed</h2><p>A row is a block of the network, a column a kind of layer. The colour "
        "is how much of the layer had to be stored, in % of its size: how far it went from its base.</p>"
        f'{pictures.legend()}{_glance(tuned)}{more}<div class="cards">{"".join(cards)}</div>'
    )


def _glance(tuned: Sequence[Member]) -> str:
    """All fine-tunes in one table: what is stored of each part of the network."""
    shown = tuned[:MAX_GLANCE]
    nbytes: dict[str, int] = {}
    for member in shown:
        for part in member.parts:
            nbytes[part.name] = nbytes.get(part.name, 0) + part.total().nbytes
    least = _LEAST_PART * sum(nbytes.values())
    names = sorted((name for name in nbytes if nbytes[name] >= least), key=lambda name: -nbytes[name])[:6]
    lines = []
    for member in shown:
        parts = {part.name: part.total() for part in member.parts}
        cells = "".join(
            f"<td class='n h{pictures.level_of(parts[name].share)}'>{100 * parts[name].share:.1f} %"
            if name in parts
            else "<td class=n>-"
            for name in names
        )
        lines.append(f"<tr><td class=name>{escape(member.name)}{cells}</tr>")
    left = f"<p class=quiet>{len(tuned) - len(shown)} more are not in it.</p>" if len(tuned) > len(shown) else ""
    head = "".join(f"<th class=n>{escape(name)}" for name in names)
    return (
        f"<h3>At a glance</h3><div class=scroll><table class=glance><thead><tr><th>fine-tune{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>{left}<h3>Block by block</h3>"
    )


def _card(opener: Opener, member: Member, human: Human) -> str:
    samples: dict[str, Sample] = {}
    trouble = ""
    try:
        assert member.entry is not None
        with contextlib.closing(opener.open_diff(member.entry.path)) as model:
            samples = sample(model, _SAMPLED_CHUNKS)
    except HydraError as error:
        trouble = f'<p class="quiet">No samples: {escape(str(error))}</p>'
    parts = member.parts
    whole = sum(p.total().nbytes for p in parts)
    shown = [p for p in parts if p.total().nbytes >= _LEAST_PART * whole][:6]
    rows = "".join(_part_row(part, samples.get(part.name), human) for part in shown)
    lines = "; ".join(f"{p.name} {100 * p.total().share:.1f} %" for p in shown)
    picture = pictures.heat_map(shown, f"What {member.name} stores of each block: {lines}; the tables below say it")
    cells = "".join(
        f"<tr><td>{escape(part.name)}<td>{escape(row)}<td>{kind}"
        f"<td class=n>{100 * part.cells[row, kind].share:.1f} %</tr>"
        for part in shown
        for row in part.rows
        for kind in part.kinds
        if (row, kind) in part.cells
    )
    return (
        f'<article class="card"><h3>{escape(member.name)}</h3><p class="quiet">{human(member.stored)} of '
        f"{human(member.size)}, from {escape(member.mixture) or 'nothing'}</p>{picture}"
        "<div class=scroll><table><thead><tr><th>part<th class=n>stored<th class=n>changed<th class=n>by</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>{trouble}<details><summary>Every block in numbers</summary>"
        "<div class=scroll><table><thead><tr><th>part<th>block<th>layers<th class=n>stored</tr></thead>"
        f"<tbody>{cells}</tbody></table></div></details></article>"
    )


def _part_row(part: Part, found: Sample | None, human: Human) -> str:
    total = part.total()
    changed = by = "-"
    if total.untouched == total.nbytes:
        changed, by = "nothing", ""
    elif found:
        changed = _about(found.changed)
        by = _about(found.relative_norm) if math.isfinite(found.relative_norm) else "-"
    return (
        f"<tr><td>{escape(part.name)} <small>{human(total.nbytes)}</small><td class=n>{100 * total.share:.1f} %"
        f"<td class=n>{changed}<td class=n>{by}</tr>"
    )


def _about(share: float) -> str:
    percent = 100 * share
    return "≈ 0" if not percent else f"≈ {percent:.2g} %" if percent >= 0.01 else "< 0.01 %"


def _table(rows: Sequence[tuple[int, Member]], human: Human) -> str:
    lines = "".join(
        f"<tr><td class=name>{escape(m.name)}<td>{m.state}<td class=n>{human(m.size)}<td class=n>{human(m.stored)}"
        f"<td class=n>{human(m.saved) if m.saved else '-'}</tr>"
        for _, m in rows[:MAX_ROWS]
    )
    more = f"<p>{len(rows) - MAX_ROWS} more: hydrafs ls shows all.</p>" if len(rows) > MAX_ROWS else ""
    return (
        "<h2>All models</h2><p class=quiet>“changed” above is the share of weights that differ from the base, “by” the "
        "size of the difference relative to the weights, both from a few samples.</p>"
        "<details><summary>Names and sizes</summary><div class=scroll><table><thead><tr><th>model<th>kind"
        "<th class=n>size<th class=n>stored<th class=n>saved</tr></thead>"
        f"<tbody>{lines}</tbody></table></div></details>{more}"
    )


def write(path: Path, page: str) -> None:
    """Put the page at ``path``, whole or not at all.

    Raises:
        HydraError: it cannot be written.
    """
    with TemporaryFile(path.parent) as temporary:
        temporary.file.write(page.encode("utf-8", "backslashreplace"))
        temporary.commit(path, replace=True)
