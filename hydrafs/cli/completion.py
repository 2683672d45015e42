"""``hydrafs completion``: what a shell needs to complete hydrafs' command lines."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_VARIABLE = "_HYDRAFS_COMPLETE"  # what click looks for in the environment, by the name of the command


@click.command("completion", short_help="What a shell needs to complete command lines.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print what SHELL needs to complete the command lines of hydrafs: commands, options, files.

    bash: eval "$(hydrafs completion bash)" in ~/.bashrc. zsh: the same in ~/.zshrc. fish: hydrafs completion fish >
    ~/.config/fish/completions/hydrafs.fish.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    made = kind(root, {}, "hydrafs", _VARIABLE)
    # Not made.source(): that one runs bash to refuse old ones, here, where no bash may be.
    print(made.source_template % made.source_vars())
