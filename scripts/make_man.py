"""Man pages from the commands' own help: hydrafs(1), one page per command, mount.hydrafs(8).

    python -m scripts.make_man FOLDER

Source of the macros: man(7). Everything comes from click's metadata, so a page cannot say what a command does not.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import click

from hydrafs.cli import _COMMANDS, _root
from hydrafs.cli.fstab import command as mount_helper
from hydrafs.version import __version__

EXIT_CODES = (
    ("0", "success"), ("1", "what was decoded is not what was stored"), ("2", "usage"), ("3", "not found"),
    ("4", "a bad model"), ("5", "a damaged diff"), ("6", "a newer hydrafs is needed"),
    ("7", "a parent is missing or changed"), ("8", "no space, or no memory"), ("9", "permission"),
    ("10", "already there"), ("11", "a mount cannot work, or does not"), ("12", "changed while it was read"),
    ("130", "interrupted"),
)  # fmt: skip
MOUNT_EXIT_CODES = (("0", "success"), ("1", "usage, or an option that is not known"), ("32", "the mount failed"))


def roff(text: str) -> str:
    """``text`` as roff shows it unchanged."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    return re.sub(r"^([.'])", r"\\&\1", escaped, flags=re.MULTILINE)


def _paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(re.split(r"\n\s*\n", text.strip())):
        if number:
            yield ".PP"
        yield roff(" ".join(paragraph.split()))


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Argument):
            continue  # the description speaks of them
        record = parameter.get_help_record(context)
        if record is None:
            continue
        yield ".TP"
        yield f"\\fB{roff(record[0])}\\fR"
        yield roff(" ".join(record[1].split())) or "\\&"


def _codes(codes: tuple[tuple[str, str], ...]) -> Iterator[str]:
    for code, meaning in codes:
        yield from (".TP", f"\\fB{code}\\fR", roff(meaning))


def page(
    name: str, command: click.Command, short: str, *, section: int = 1, codes: tuple[tuple[str, str], ...] = EXIT_CODES
) -> str:
    """The page of one command."""
    settings = {} if command in (_root, mount_helper) else {"parent": click.Context(_root)}
    context = command.context_class(command, info_name=name, **settings, **command.context_settings)
    date = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())))
    usage = " ".join(command.collect_usage_pieces(context))
    title = name.replace(" ", "-")
    lines = [
        f'.TH "{roff(title.upper())}" "{section}" "{date}" "hydrafs {__version__}" "hydrafs"',
        ".SH NAME",
        f"{roff(title)} \\- {roff(short.rstrip('.'))}",
        ".SH SYNOPSIS",
        f"\\fB{roff(name)}\\fR {roff(usage)}",
        ".SH DESCRIPTION",
        *_paragraphs(command.help or short),
    ]
    if command is _root:
        lines.append(".SH COMMANDS")
        for child, text in sorted(_COMMANDS.items()):
            lines += [".TP", f"\\fBhydrafs\\-{roff(child)}\\fR(1)", roff(text)]
    lines += [".SH OPTIONS", *_options(command, context)]
    if command is not mount_helper:
        lines += [".SH ENVIRONMENT", ".TP", "\\fBHYDRAFS_FUSE\\fR"]
        lines += [roff("The binding that mounts: mfusepy or fusepy. Default: the first that works.")]
        lines += [
            ".TP",
            "\\fBHYDRAFS_LOG_LEVEL\\fR",
            roff("What a mount and watch log: debug, info (default), warning, error."),
        ]
    lines += [".SH EXIT STATUS", *_codes(codes), ".SH SEE ALSO"]
    others = ["hydrafs\\-mount(1)", "hydrafs\\-doctor(1)", "mount.hydrafs(8)"]
    lines.append(", ".join(o for o in ["hydrafs(1)", *others] if roff(title) + "(" not in o))
    return "\n".join(lines) + "\n"


def make_pages(folder: Path) -> list[Path]:
    """Write all pages into ``folder/man1`` and ``folder/man8``; which files these are."""
    made = []

    def write(name: str, section: int, text: str) -> None:
        path = folder / f"man{section}" / f"{name}.{section}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        made.append(path)

    write("hydrafs", 1, page("hydrafs", _root, "the filesystem for model checkpoints"))
    context = click.Context(_root)
    for name, short in sorted(_COMMANDS.items()):
        command = _root.get_command(context, name)  # type: ignore[attr-defined]
        write(f"hydrafs-{name}", 1, page(f"hydrafs {name}", command, short))
    text = page("mount.hydrafs", mount_helper, "mount a store of models", section=8, codes=MOUNT_EXIT_CODES)
    write("mount.hydrafs", 8, text)
    return made


def main() -> None:
    """Write the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="man1 and man8 are made in it")
    made = make_pages(parser.parse_args().folder)
    print(f"{len(made)} pages")


if __name__ == "__main__":
    main()
