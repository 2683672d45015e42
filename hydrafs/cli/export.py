"""``hydrafs export``: a model as a diff of the seed tool."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import click

from hydrafs.cache import ChunkCache
from hydrafs.cli.common import (
    default_jobs,
    find_model,
    human,
    jobs_option,
    json_option,
    percent,
    print_json,
    progress_bar,
    real_path,
    say,
)
from hydrafs.errors import AlreadyThere, UsageError, from_oserror
from hydrafs.opening import Opener
from hydrafs.seed.plan import Dehydrated, dehydrated
from hydrafs.seed.states import read_state
from hydrafs.seed.writer import write_compressed, write_plain
from hydrafs.temporary import TemporaryFile, fsync_folder

_CACHE_NBYTES = 96 << 20


@click.command("export", short_help="Write a model as a diff of the seed tool.")
@click.argument("diff", metavar="DIFF")
@click.option("--seed", is_flag=True, help="In the seed tool's format, for its ckpt_add.py; there is no other yet.")
@click.option("--base", required=True, metavar="PATH", help="The model that ckpt_add.py is to add it to.")
@click.option("--output", "-o", metavar="PATH", help="Where to (default: DIFF's name, .pbz2, beside it).")
@click.option("--no-compress", is_flag=True, help="As ckpt_subtract.py --nocompress.")
@jobs_option
@json_option
def command(
    diff: str, seed: bool, base: str, output: str | None, no_compress: bool, jobs: int | None, as_json: bool
) -> None:
    """Write what ckpt_subtract.py would make of DIFF, or of any model, and its base.

    Adding the difference back rounds once more, so the seed tool does not give every number back as it was, and some
    tensors not at all: the output says how many.
    """
    if not seed:
        raise UsageError("no format named", where=diff, remedy="say --seed")
    store, entry = find_model(diff)
    target = _target(entry.path.with_name(Path(entry.name).name), output, no_compress)
    if os.path.lexists(target):
        raise AlreadyThere("a file of that name exists", where=target, remedy="name another with --output")
    base_store, base_entry = find_model(base)
    with contextlib.ExitStack() as stack:
        stack.callback(store.close)
        stack.callback(base_store.close)
        opener = stack.enter_context(contextlib.closing(Opener(store, ChunkCache(_CACHE_NBYTES))))
        base_opener = stack.enter_context(contextlib.closing(Opener(base_store, ChunkCache(_CACHE_NBYTES))))
        model = stack.enter_context(contextlib.closing(opener.open(entry)))
        parent = stack.enter_context(contextlib.closing(base_opener.open(base_entry)))
        model_state, base_state = read_state(model, entry.name), read_state(parent, base_entry.name)
        with progress_bar(f"subtracting {base_entry.name}", sum(r.nbytes for r in model_state.values())) as progress:
            result = dehydrated(model_state, base_state, progress)
        if not result.items:
            raise UsageError(
                "there is nothing to write",
                where=entry.name,
                detail=f'no tensor with "model" in its name differs from {base_entry.name}',
                remedy="name another base",
            )
        nbytes = sum(item.model.nbytes for item in result.items)
        try:
            with TemporaryFile(target.parent) as temporary, progress_bar(f"writing {target.name}", nbytes) as progress:
                if no_compress:
                    write_plain(temporary.file, result.items, progress)
                else:
                    write_compressed(temporary.file, result.items, jobs=default_jobs(jobs), progress=progress)
                os.fchmod(temporary.file.fileno(), model_mode(entry.path))
                temporary.commit(target)
                fsync_folder(target.parent)
        except OSError as error:
            raise from_oserror(error, "cannot write the diff", target) from error
    _tell(result, target, model.size, as_json)


def model_mode(path: Path) -> int:
    """The permissions of a file, those to execute it left out."""
    return path.stat().st_mode & 0o666


def _target(listed: Path, output: str | None, no_compress: bool) -> Path:
    ending = ".dehydrated" if no_compress else ".pbz2"
    if output is None:
        return listed.with_name(listed.stem + ending)
    path = real_path(output)
    # As the tool does: it tells its two forms apart by this ending.
    if no_compress and path.suffix == ".pbz2":
        raise UsageError("ckpt_add.py takes .pbz2 for a compressed diff", where=path, remedy="name it otherwise")
    return path if no_compress or path.suffix == ".pbz2" else path.with_name(path.name + ".pbz2")


def _tell(result: Dehydrated, target: Path, size: int, as_json: bool) -> None:
    stored = target.stat().st_size
    if as_json:
        print_json(
            {
                "path": str(target),
                "stored": stored,
                "size": size,
                "tensors": len(result.items),
                "values": result.values,
                "inexact": result.inexact,
                "inexact_tensors": result.inexact_tensors,
                "retyped": list(result.retyped),
                "refused": list(result.refused),
                "lost": list(result.lost),
                "foreign": list(result.foreign),
            }
        )
        return
    say(
        f"  ckpt_add.py does not bring back {result.inexact} of {result.values} values exactly, "
        f"in {result.inexact_tensors} tensors: adding rounds once more"
    )
    lines = (
        (result.retyped, "come back as another type or shape"),
        (result.refused, "cannot be subtracted, and come back as the base's"),
        (result.lost, 'do not come back: not in the base, or without "model" in their names'),
        (result.foreign, "of the base come with them"),
    )
    for keys, what in lines:
        if keys:
            more = ", ..." if len(keys) > 3 else ""
            say(f"  {len(keys)} tensors {what}: {', '.join(keys[:3])}{more}")
    say(f"{target}: {len(result.items)} tensors, {human(stored)} ({percent(stored, size)} of the model)")
