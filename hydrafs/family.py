"""The models of a store as a family: what each was made from, what it takes, what it saves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hydrafs import composition
from hydrafs.changes import Part, Share, parts_of, shares_of
from hydrafs.diff import DiffFile
from hydrafs.errors import HydraError, printable
from hydrafs.identity import FileIdentity
from hydrafs.manifest import PREDICTION_FORMULA
from hydrafs.store import ModelEntry, Store

_MERGED = 0.1


@dataclass(slots=True)
class Member:
    """A model.

    ``state`` is what it is: ``base`` or ``plain`` (full files, needed by others or not), ``fine-tune``, ``merge``,
    ``missing``, ``damaged``, or ``more``: a row that stands for several. ``parents`` are the members that it is
    predicted by, with how much of each; ``stored_ns`` is when its diff was written; ``recipes`` are its formulas.
    """

    key: str
    name: str
    state: str
    size: int
    stored: int
    entry: ModelEntry | None = None
    stored_ns: int = 0
    parents: list[tuple[Member, Share]] = field(default_factory=list)
    children: list[Member] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    recipes: list[composition.Part] = field(default_factory=list)

    @property
    def saved(self) -> int:
        """How many bytes its diff saves."""
        return self.size - self.stored if self.entry and self.entry.is_diff and self.state != "damaged" else 0

    @property
    def mixture(self) -> str:
        """What it is made of, with the weights where they are known."""
        return self.mixture_of(lambda name: name)

    def mixture_of(self, shown: Callable[[str], str]) -> str:
        """The same, each parent's name as ``shown`` shows it."""
        if self.state != "merge":
            return ", ".join(shown(parent.name) for parent, _ in self.parents)
        text = ""
        for parent, share in sorted(self.parents, key=lambda p: p[1].weight < 0):
            name, weight = shown(parent.name), share.weight
            if not math.isnan(weight) and share.most - share.least > 0.005:
                sign, term = "+", f"{share.least:.2f} to {share.most:.2f} × {name}"
            elif math.isnan(weight) or f"{abs(weight):.2f}" == "1.00":
                sign, term = "−" if weight < 0 else "+", name
            else:
                sign, term = "−" if weight < 0 else "+", f"{abs(weight):.2f} × {name}"
            text += f" {sign} {term}" if text else f"−{term}" if sign == "−" else term
        return text


def family_of(store: Store) -> list[Member]:
    """Every model of the store and every model that it needs. ``children`` are those mostly predicted by it."""
    members: dict[str, Member] = {}
    diffs: list[tuple[Member, list[tuple[bytes, str, int]], tuple[Share, ...]]] = []
    for entry in store.candidates():
        member, parents, shares = _member(store, entry)
        if member.key in members or (Path(entry.name).is_absolute() and entry.is_diff):
            continue
        members[member.key] = member
        diffs.append((member, parents, shares))
    by_name = {(Path(m.name).name, m.size): m for m in members.values() if m.state == "plain"}
    for member, parents, shares in diffs:
        for share in shares:
            sha256, name, size = parents[share.parent]
            parent = members.get(sha256.hex()) or by_name.get((Path(name).name, size))
            if parent is None:
                parent = members[sha256.hex()] = Member(sha256.hex(), printable(name), "missing", size, 0)
            member.parents.append((parent, share))
            if parent.state == "plain":
                parent.state = "base"
        if member.parents:
            member.parents[0][0].children.append(member)
    # A full file of a base folder that nothing needs is no member of this store's family.
    return [m for m in members.values() if m.state != "plain" or (m.entry and not Path(m.entry.name).is_absolute())]


def _member(store: Store, entry: ModelEntry) -> tuple[Member, list[tuple[bytes, str, int]], tuple[Share, ...]]:
    name = printable(entry.name)
    try:
        stat = entry.path.stat()
        if not entry.is_diff:
            sha256 = store.catalog.sha256(entry.path.resolve(), FileIdentity.of(stat))
            key = sha256.hex() if sha256 else str(entry.path)
            return Member(key, name, "plain", stat.st_size, stat.st_size, entry), [], ()
        with DiffFile(entry.path) as diff:
            manifest = diff.manifest
            computed = sum(s.nbytes for s in manifest.spans if s.prediction == PREDICTION_FORMULA)
            state = "merge" if computed > _MERGED * manifest.size else "fine-tune"
            member = Member(
                manifest.sha256.hex(),
                name,
                state,
                manifest.size,
                diff.size,
                entry,
                stat.st_mtime_ns,
                parts=parts_of(diff),
                recipes=composition.made_of(diff),
            )
            return member, [(p.sha256, p.name, p.size) for p in manifest.parents], shares_of(diff)
    except (HydraError, OSError):
        return Member(str(entry.path), name, "damaged", 0, 0, entry), [], ()


def in_order(family: list[Member]) -> list[tuple[int, Member]]:
    """The family as a tree, depth first: how deep each stands, and the member. Each once, whatever the links are."""
    seen: set[str] = set()
    found: list[tuple[int, Member]] = []
    starts = [m for m in family if not m.parents] + family
    for start in sorted(starts, key=lambda m: (bool(m.parents), not m.children, m.name)):
        pending = [(0, start)]
        while pending:
            depth, member = pending.pop()
            if member.key in seen:
                continue
            seen.add(member.key)
            found.append((depth, member))
            pending += [(depth + 1, child) for child in sorted(member.children, key=lambda m: m.name, reverse=True)]
    return found


def condensed(rows: list[tuple[int, Member]], most: int = 10) -> list[tuple[int, Member]]:
    """``in_order``'s rows with at most about ``most`` childless children of each parent; a row says how many more."""
    shown: list[tuple[int, Member]] = []
    leaves: dict[str, int] = {}
    for _, member in rows:
        if member.parents and not member.children:
            key = member.parents[0][0].key
            leaves[key] = leaves.get(key, 0) + 1
    seen: dict[str, int] = {}
    for depth, member in rows:
        if not member.parents or member.children or leaves[member.parents[0][0].key] <= most + 2:
            shown.append((depth, member))
            continue
        parent, share = member.parents[0]
        number = seen[parent.key] = seen.get(parent.key, 0) + 1
        if number <= most:
            shown.append((depth, member))
        elif number == leaves[parent.key]:
            rest = Member(f"more of {parent.key}", f"and {number - most} more", "more", 0, 0, parents=[(parent, share)])
            shown.append((depth, rest))
    return shown
