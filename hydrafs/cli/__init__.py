"""The command line: the only place that prints or reads the environment. One file per command.

Commands are imported when they are called, so that help answers at once and a mount pays only for itself.
"""

from __future__ import annotations

import importlib
import io
import keyword
import sys
from collections.abc import Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

from hydrafs.errors import HydraError, from_oserror
from hydrafs.limits import raise_open_files
from hydrafs.version import __version__

_COMMANDS = {
    "bases": "What can serve as a base, and who depends on it.",
    "completion": "What a shell needs to complete command lines.",
    "control": "Tell a running daemon what to do.",
    "convert": "Make a model with another VAE, without EMA, or in another precision.",
    "dehydrate": "Turn models into small diffs, each proved before its original goes.",
    "doctor": "What this machine has of what hydrafs needs, and what to do.",
    "export": "Write a model as a diff of the tool that hydrafs grew from.",
    "gc": "Remove what was kept for others and that nobody needs any more.",
    "hashes": "The models' known hashes; tells them to WebUIs.",
    "import": "Store a diff of the tool that hydrafs grew from as one of ours.",
    "info": "What a model is made of, per tensor.",
    "log": "What a mount has said.",
    "ls": "What a store holds, at what cost, against what.",
    "merge": "Make a model out of two or three others.",
    "mount": "Show a store as the full files that it stands for.",
    "rehydrate": "Write a dehydrated model as a full file, or a stronger one.",
    "report": "A page of pictures about a store.",
    "rm": "Remove models; what others need is kept for them, out of sight.",
    "status": "How a mount's daemon is, and what it saved.",
    "top": "The status of all mounts, live in the terminal.",
    "umount": "Take a mount down.",
    "undelete": "List or bring back what was removed through a mount.",
    "uncompress": "Recode a diff without compression, for the fastest reads.",
    "unmerge": "Make the other model of a merge, given one.",
    "verify": "Decode everything and compare SHA-256.",
    "warm": "Read models into the kernel's cache.",
    "watch": "Dehydrate what lands in a store, in the background.",
}


class _Path(click.Path):
    """A path, as it was given: what click does with one is a stat, which would hang in a mount whose daemon hangs."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value


class _AnsweringPath(_Path):
    """A path that is not in a mount whose daemon hangs: whoever touched it would hang as well. ``then``: what else is
    asked of it."""

    def __init__(self, then: click.Path | None = None) -> None:
        super().__init__()
        self._then = then

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from hydrafs.cli.common import check_answers  # noqa: PLC0415 - commands are imported when they are called

        if isinstance(value, str) and value:
            check_answers(value)
        return value if self._then is None else self._then.convert(value, param, ctx)


_PATH = _Path()
_ANSWERING_PATH = _AnsweringPath()
_ABOUT_MOUNTS = frozenset({"control", "doctor", "log", "status", "top", "umount"})
"""Commands that are about a mount, whatever its daemon does; they touch nothing in it."""
_NO_PATHS = ("value",)
_PATH_METAVARS = ("PATH", "DIR", "FILE", "MODEL", "MOUNTPOINT")
_PATH_NAMES = ("c", "name", "to")
"""Options that take a path, or a name that may be one, and say something else of it."""


def _is_path(parameter: click.Parameter) -> bool:
    if isinstance(parameter, click.Argument):
        return parameter.name not in _NO_PATHS
    says = parameter.metavar is not None and parameter.metavar.startswith(_PATH_METAVARS)
    return says or parameter.name in _PATH_NAMES


class _Commands(click.Group):
    """Commands by name, imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = cmd_name + "_" * keyword.iskeyword(cmd_name)
        command = importlib.import_module(f"hydrafs.cli.{module}").command
        assert isinstance(command, click.Command)
        for parameter in command.params:
            # Paths stay text as they were given; a shell that completes them asks for the type.
            if isinstance(parameter.type, click.types.StringParamType) and _is_path(parameter):
                parameter.type = _PATH if cmd_name in _ABOUT_MOUNTS else _ANSWERING_PATH
            elif isinstance(parameter.type, click.Path) and not isinstance(parameter.type, _Path):
                parameter.type = _AnsweringPath(parameter.type)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        # The names are known without importing all commands, which takes a second.
        found = [CompletionItem(n, help=h) for n, h in sorted(_COMMANDS.items()) if n.startswith(incomplete)]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(_COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            raise click.UsageError(f"no such command, {args[0]}; hydrafs --help lists them", ctx) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="hydrafs")
def _root() -> None:
    """hydrafs: the filesystem for model checkpoints.

    A fine-tune is stored as a small exact diff against its base; a mount lists it as the full file that it was.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. One line on stderr says what failed."""
    return run_command(_root, arguments)


def run_command(command: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Run ``command`` with ``arguments`` (default: what the process was called with); its exit code. One line on stderr
    says what failed."""
    raise_open_files()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to fail
    try:
        result = command.main(args=list(arguments) if arguments is not None else None, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except HydraError as error:
        return _failed(str(error), error.exit_code)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        message = error.format_message().rstrip(".")
        return _failed(message[:1].lower() + message[1:], 2)
    except (KeyboardInterrupt, click.Abort):
        return _failed("interrupted; nothing was lost", 130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output is gone; Python would complain about stdout at exit
        return 141
    except OSError as error:
        wrapped = from_oserror(error, "the operating system refused")
        return _failed(str(wrapped), wrapped.exit_code)
    except RecursionError:
        return _failed("a file is nested too deeply; it is left as it is", 4)
    except MemoryError:
        return _failed("not enough memory; use fewer --jobs or a smaller --cache-size", 8)


def _failed(message: str, code: int) -> int:
    print(f"hydrafs: {message}", file=sys.stderr)
    return code
