"""What predicts each tensor of a model: a parent's, a formula over several parents, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from hydrafs.bases import Candidate, Choice
from hydrafs.catalog import ModelFacts
from hydrafs.layout import ByteSource
from hydrafs.loras import recognise_lora
from hydrafs.manifest import Operand
from hydrafs.matching import Computed, Match, match
from hydrafs.recognising import Open, recognise


def explained(
    source: ByteSource,
    metadata: Sequence[tuple[str, str]],
    facts: ModelFacts,
    choice: Choice,
    open_model: Open,
    sha256_of: Callable[[Candidate], bytes | None],
) -> tuple[list[Candidate], list[Match | Computed | None]]:
    """The parents that a model needs, and what predicts each of its tensors, ``parent`` counting into them.

    Args:
        metadata: the strings that its container carries.
        choice: what it is stored against where it is neither a merge nor has a LoRA in it, and what else there is.
        sha256_of: what is known of a candidate.

    Raises:
        HydraError: the model itself cannot be read.
    """
    matches = match(facts, [c.facts for c in choice.parents])
    found = recognise(
        source,
        facts,
        choice.parents,
        matches,
        choice.considered,
        open_model,
        metadata=metadata,
        sha256_of=sha256_of,
    )
    if found is None:
        found = recognise_lora(source, facts, choice.parents, matches, choice.considered, open_model)
    if found is None:
        return _only_used(choice.parents, matches)
    return _only_used(found.parents, found.matches)


def _only_used(
    parents: Sequence[Candidate], matches: Sequence[Match | Computed | None]
) -> tuple[list[Candidate], list[Match | Computed | None]]:
    used = sorted({p for m in matches if m for p in _parents_of(m) if p >= 0})
    number = {old: new for new, old in enumerate(used)}
    renumbered: list[Match | Computed | None] = []
    for m in matches:
        if isinstance(m, Computed):
            operands = tuple(Operand(number[o.parent], o.origin, o.dtype) for o in m.operands)
            renumbered.append(replace(m, operands=operands))
        elif m and m.parent >= 0:
            renumbered.append(replace(m, parent=number[m.parent]))
        else:
            renumbered.append(m)
    return [parents[i] for i in used], renumbered


def _parents_of(found: Match | Computed) -> set[int]:
    return {o.parent for o in found.operands} if isinstance(found, Computed) else {found.parent}
