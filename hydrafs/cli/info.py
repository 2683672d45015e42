"""``hydrafs info``: what a model is made of."""

from __future__ import annotations

import contextlib
from typing import Any

import click

from hydrafs import containers
from hydrafs.bases import MAX_PARENTS
from hydrafs.changes import parts_of
from hydrafs.cli.common import find_model, human, json_option, percent, print_json, print_table, say
from hydrafs.cli.plotting import plot
from hydrafs.composition import formula_text, made_of, span_costs
from hydrafs.diff import DiffFile
from hydrafs.digests import SHA256, TITLES
from hydrafs.errors import UsageError
from hydrafs.hashing import KnownHashes
from hydrafs.layout import FileSource
from hydrafs.manifest import PREDICTION_FORMULA, PREDICTION_NONE, PREDICTION_SAME, SELF, Manifest
from hydrafs.needs import census
from hydrafs.retained import kept
from hydrafs.store import ModelEntry


@click.command("info", short_help="What a model is made of, per tensor.")
@click.argument("model", metavar="MODEL")
@click.option("--plot", "as_plot", is_flag=True, help="Show which layers differ from the base, block by block.")
@json_option
def command(model: str, as_plot: bool, as_json: bool) -> None:
    """Show what MODEL holds: sizes, parents, and for each tensor what predicts it and what it costs.

    --plot shows instead, for each block of the network and each kind of layer, how much of it had to be stored.
    """
    store, entry = find_model(model)
    with contextlib.closing(store):
        facts = _diff_facts(entry) if entry.is_diff else _plain_facts(entry)
        known = KnownHashes(store).of(entry.path, entry.path.stat(), is_diff=entry.is_diff)
        facts["hashes"] = {name: value.hex() for name, value in known.items()}
        facts["sha256"] = facts["hashes"].get(SHA256, "")
        besides = {k.sha256.hex(): k for k in kept(store, census(store))}
        for parent in facts["parents"]:
            parent["kept"] = parent["sha256"] in besides
        facts["kept"] = sum(besides[p["sha256"]].nbytes for p in facts["parents"] if p["kept"])
    if as_json:
        print_json(facts)
        return
    say(f"{facts['name']}: {facts['container']}, {human(facts['size'])}, {facts['state']}")
    for name, value in facts["hashes"].items():
        say(f"{TITLES[name]} {value}")
    if entry.is_diff:
        say(f"stored in {facts['diff']}: {human(facts['stored'])} ({percent(facts['stored'], facts['size'])})")
        for line in facts["made_of"]:
            say(f"made of {line}")
        for parent in facts["parents"]:
            only = ", in no listing: kept for what needs it" if parent["kept"] else ""
            say(f"parent {parent['name']}, {human(parent['size'])}, SHA-256 {parent['sha256']}{only}")
        for line in facts["notes"]:
            say(line)
    if as_plot:
        if not entry.is_diff:
            raise UsageError("a full file differs from nothing", where=entry.path, remedy="name a dehydrated model")
        with DiffFile(entry.path) as diff:
            plot(parts_of(diff))
        return
    rows = [
        [
            t["name"] or "(literal bytes)",
            t["dtype"],
            "x".join(map(str, t["shape"])),
            human(t["size"]),
            human(t["stored"]),
            percent(t["stored"], t["size"]),
            t["prediction"],
            t["codec"],
        ]
        for t in facts["spans"]
    ]
    print_table(["tensor", "dtype", "shape", "size", "stored", "ratio", "prediction", "codec"], rows, right=(3, 4, 5))


def _plain_facts(entry: ModelEntry) -> dict[str, Any]:
    with FileSource(entry.path) as source:
        layout = containers.parse(source, entry.path.name)
    return {
        "name": entry.name,
        "state": "plain",
        "container": layout.container,
        "size": layout.size,
        "stored": layout.size,
        "parents": [],
        "made_of": [],
        "notes": [],
        "spans": [_span(s.name, s.dtype, s.shape, s.nbytes, s.nbytes, "-", "-") for s in layout.tensors],
    }


def _diff_facts(entry: ModelEntry) -> dict[str, Any]:
    with DiffFile(entry.path) as diff:
        manifest = diff.manifest
        spans = []
        literal_size = literal_stored = 0
        for number, cost in enumerate(span_costs(diff)):
            stored, codecs = round(cost.stored), ", ".join(cost.codecs)
            span = manifest.spans[number]
            section = manifest.sections[span.section]
            if not section.dtype:
                literal_size += span.nbytes
                literal_stored += stored
                continue
            if span.prediction == PREDICTION_NONE:
                prediction = "none"
            elif span.prediction == PREDICTION_FORMULA:
                prediction = f"formula, {formula_text(manifest, span)}"
            else:
                parent = "itself" if span.parent == SELF else manifest.parents[span.parent].name
                kind = "same" if span.prediction == PREDICTION_SAME else "tensor"
                prediction = f"{kind}, {parent}" + (f" as {span.origin_dtype}" if span.origin_dtype else "")
            spans.append(_span(span.name, section.dtype, span.shape, span.nbytes, stored, prediction, codecs))
        if literal_size:
            spans.append(_span("", "", (), literal_size, literal_stored, "none", "zstd"))
        return {
            "name": entry.name,
            "state": "dehydrated",
            "container": manifest.container,
            "diff": str(entry.path),
            "size": manifest.size,
            "stored": diff.size,
            "mode": manifest.mode,
            "mtime_ns": manifest.mtime_ns,
            "chunk_size": manifest.chunk_nbytes,
            "writer": manifest.writer,
            "parents": [{"name": p.name, "sha256": p.sha256.hex(), "size": p.size} for p in manifest.parents],
            "made_of": [str(part) for part in made_of(diff)],
            "notes": _notes(manifest),
            "spans": spans,
        }


def _notes(manifest: Manifest) -> list[str]:
    """Why it is no smaller, where that can be told from the diff."""
    tensors = [span for span in manifest.spans if manifest.sections[span.section].dtype]
    lacking = sum(span.prediction == PREDICTION_NONE for span in tensors)
    if lacking and len(manifest.parents) >= MAX_PARENTS:
        return [f"{lacking} of {len(tensors)} tensors have no parent: at most {MAX_PARENTS} parents"]
    return []


def _span(
    name: str, dtype: str, shape: tuple[int, ...], size: int, stored: int, how: str, codec: str
) -> dict[str, Any]:
    return {
        "name": name,
        "dtype": dtype,
        "shape": list(shape),
        "size": size,
        "stored": stored,
        "prediction": how,
        "codec": codec,
    }
