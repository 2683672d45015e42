"""docs/FORMAT.md is enough to write a reader from: what the code can write stands there, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from conftest import Filled

from hydrafs import manifest
from hydrafs.codecs import registry
from hydrafs.dehydrate import Options
from hydrafs.diff import DiffFile

PAGE = (Path(__file__).parent.parent / "docs" / "FORMAT.md").read_text()


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def rows(title: str) -> list[list[str]]:
    """The cells of the first table of a section, without its head."""
    table = section(title).partition("\n|")[2].partition("\n\n")[0]
    lines = [f"|{line}".replace("||", "|") for line in table.splitlines()]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_feature_stands_on_the_page() -> None:
    named = [re.sub("`", "", row[0]) for row in rows("Features")]
    assert sorted(named) == sorted(manifest.KNOWN_FEATURES)
    assert set(registry.FEATURES.values()) <= set(named)


def test_every_codec_stands_on_the_page() -> None:
    on_the_page = {int(row[0]): row[1].strip("`") for row in rows("Codecs") if row[0].isdigit()}
    known = {registry.by_name(name).id: name for name in registry.names()}
    assert on_the_page == {registry.NONE: "none", **known}
    for codec_id, feature in registry.FEATURES.items():
        row = next(row for row in rows("Codecs") if row[0] == str(codec_id))
        assert f"`{feature}`" in row[2]


def test_every_prediction_and_field_stands_on_the_page() -> None:
    text = PAGE
    kinds = [getattr(manifest, name) for name in dir(manifest) if name.startswith("PREDICTION_")]
    for kind in kinds:
        assert re.search(rf"prediction {kind}\b|\b{kind}\b[^\n]*\b(none|same|tensor|formula)\b", text), kind
    for struct in (manifest.Manifest, manifest.Parent, manifest.Section, manifest.SpanRecord):
        for field in msgspec.structs.fields(struct):
            assert f"`{field.name}`" in text, (struct.__name__, field.name)


@pytest.mark.parametrize("codec", registry.names())
def test_what_a_diff_requires_is_what_the_page_says(filled: Filled, codec: str) -> None:
    filled.dehydrate(Options(codec=codec, jobs=1, chunk_nbytes=32 << 10))
    with DiffFile(filled.diff) as diff:
        sections = {section.codec for section in diff.manifest.sections}
        used = set(diff.chunk_codec) | sections
        wanted = {registry.feature(number) for number in used} - {""}
        assert set(diff.manifest.required) == wanted
        assert wanted <= {re.sub("`", "", row[0]) for row in rows("Features")}
