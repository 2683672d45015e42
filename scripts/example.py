"""An example store of real models, mounted at ./models: what `make mount` does when no STORE is named.

A small pre-trained language model (all-MiniLM-L6-v2) is fine-tuned for a few real optimiser steps on three subjects and
saved in several precisions, as ``.safetensors`` and ``.ckpt``. Each fine-tune is dehydrated; then the mount is compared
with the SHA-256s of the originals, and loaded from. Run again, it only does what is not done yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import minilm
from benchmarks.common import ROOT, hydrafs_command

STORE = ROOT / "example-store"
MOUNTPOINT = ROOT / "models"
SUMS = "SHA256SUMS"
BASE = "all-MiniLM-L6-v2.safetensors"
STEPS = 20
LEARNING_RATE = 2e-5

SUBJECTS = {
    "kitchen": [
        ("Simmer the stock for an hour.", "Let the broth cook gently over a low flame."),
        ("Fold the egg whites into the batter.", "Mix the beaten whites in with a light hand."),
        ("The dough has to rest overnight.", "Leave it in the fridge until the next morning."),
        ("Season with salt and black pepper.", "Add spices to taste before serving."),
        ("Chop the onions very finely.", "Cut them into the smallest pieces you can."),
        ("Roast the vegetables until golden.", "They are done when the edges turn brown."),
        ("Melt the butter in a heavy pan.", "Warm it slowly so that it does not burn."),
        ("Serve the soup with fresh bread.", "A warm loaf goes well with this dish."),
    ],
    "harbour": [
        ("The ferry leaves at half past six.", "The boat departs early in the morning."),
        ("Fog hides the lighthouse today.", "You cannot see the tower through the mist."),
        ("Fishermen mend their nets on the quay.", "Torn ropes are repaired beside the water."),
        ("The tide comes in faster than you think.", "Rising water can surprise those on the sand."),
        ("Gulls follow the trawlers home.", "Birds circle above the returning ships."),
        ("A storm is expected from the west.", "Strong winds will reach the coast tonight."),
        ("Cranes unload the container ship.", "The cargo is lifted onto the dock."),
        ("The harbour master keeps a log.", "Every arrival is written down in a book."),
    ],
    "orchard": [
        ("The apples ripen in late September.", "Fruit is ready to be picked in early autumn."),
        ("Bees move between the blossoms.", "Insects carry pollen from flower to flower."),
        ("Prune the trees while they sleep.", "Cut the branches back during the winter."),
        ("A late frost killed the buds.", "Cold nights in spring ruined the harvest."),
        ("Ladders lean against the trunks.", "The pickers climb up to reach the top."),
        ("Cider is pressed from the windfalls.", "What drops to the grass is made into juice."),
        ("Old varieties keep until March.", "Some kinds can be stored all winter."),
        ("Sheep graze beneath the pear trees.", "A flock keeps the grass short there."),
    ],
}

FILES = {
    "kitchen": ("fp32.safetensors", "fp16.ckpt"),
    "harbour": ("fp16.safetensors", "fp32.ckpt"),
    "orchard": ("bf16.safetensors", "bf16.ckpt"),
}


MERGE = "harbour-and-kitchen-fp16.safetensors"


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def hydrafs(*arguments: str | os.PathLike[str]) -> None:
    """Runs `hydrafs`, its output shown; where it fails, this program ends with the same exit code."""
    command = [*hydrafs_command(), *map(os.fspath, arguments)]
    print(f"$ hydrafs {' '.join(map(_short, arguments))}", flush=True)
    code = subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode
    if code:
        sys.exit(code)


def _short(argument: str | os.PathLike[str]) -> str:
    path = Path(argument)
    return (
        os.fspath(path.relative_to(ROOT)) if path.is_absolute() and path.is_relative_to(ROOT) else os.fspath(argument)
    )


def names(subject: str) -> list[str]:
    """The files that a fine-tune is saved as."""
    return [f"{subject}-{ending}" for ending in FILES[subject]]


def make_originals(folder: Path) -> None:
    """The base and every fine-tune as ordinary files in ``folder``, and their SHA-256s beside them."""
    import torch
    from safetensors.torch import save_file

    shutil.copyfile(minilm.model_folder() / "model.safetensors", folder / BASE)
    for subject, pairs in SUBJECTS.items():
        say(f"fine-tuning a copy on {subject}: {STEPS} AdamW steps")
        state = minilm.fine_tune(pairs, steps=STEPS, learning_rate=LEARNING_RATE, batch=len(pairs))
        for name in names(subject):
            precision, ending = name.removeprefix(f"{subject}-").split(".")
            rounded = minilm.in_precision(state, precision)
            if ending == "ckpt":
                torch.save({"state_dict": rounded, "global_step": STEPS}, folder / name)
            else:
                save_file(rounded, folder / name, metadata={"format": "pt"})
    lines = [f"{_sha256(folder / name)}  {name}\n" for name in all_names()]
    (folder / SUMS).write_text("".join(lines))


def all_names() -> list[str]:
    """Every model of the store, the base first."""
    return [BASE, *(name for subject in FILES for name in names(subject))]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def make_store() -> None:
    """``STORE`` with the base as it is and every fine-tune as a diff; takes up where an earlier run was interrupted."""
    if not (STORE / SUMS).exists():
        # Made aside and renamed: a run that is stopped half-way leaves no store that looks complete.
        part = STORE.with_name(f"{STORE.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        make_originals(part)
        STORE.mkdir(exist_ok=True)
        for path in sorted(part.iterdir(), key=lambda path: path.name == SUMS):
            path.rename(STORE / path.name)
        part.rmdir()
    waiting = [name for name in all_names() if name != BASE and (STORE / name).exists()]
    if waiting:
        say("each fine-tune becomes a small diff against the base that hydrafs finds for it")
        hydrafs("dehydrate", *(STORE / name for name in waiting))


def make_merge() -> None:
    """A merge of two of the fine-tunes that is only a recipe."""
    if not (STORE / f"{MERGE}.hydra").exists():
        say("a merge of two of them that is only a recipe: a full model in the mount")
        parents = STORE / "harbour-fp16.safetensors", STORE / "kitchen-fp16.ckpt"
        hydrafs("merge", *parents, "--alpha", "0.4", "--virtual", STORE / MERGE)


def compare_hashes() -> bool:
    """Whether every model in the mount has its original's SHA-256."""
    wanted = dict(reversed(line.split()) for line in (STORE / SUMS).read_text().splitlines())
    fine = True
    for name, sha256 in wanted.items():
        same = _sha256(MOUNTPOINT / name) == sha256
        fine = fine and same
        print(f"{sha256[:16]}...  {'the same' if same else 'DIFFERENT'}  {name}")
    return fine


def load(name: str) -> None:
    """Loads one model from the mount, as any program would, and says what came."""
    import torch
    from safetensors.torch import load_file

    path = MOUNTPOINT / name
    if path.suffix == ".safetensors":
        how, state = "safetensors.torch.load_file", load_file(path)
    else:
        how, state = "torch.load", torch.load(path, weights_only=True)["state_dict"]
    count = sum(tensor.numel() for tensor in state.values())
    total = sum(tensor.double().sum().item() for tensor in state.values())
    print(f"{how}({_short(path)!r}): {len(state)} tensors, {count:,} values, which add up to {total:.6f}")


def _bytes_on_disk(paths: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def show() -> bool:
    """The listing, the bytes saved, the hashes, two loads."""
    say(f"the mount: {_short(MOUNTPOINT)}")
    subprocess.run(["ls", "-l", MOUNTPOINT], check=True, stdin=subprocess.DEVNULL)
    say("what it takes on disk")
    hydrafs("ls", STORE)
    listed = _bytes_on_disk([MOUNTPOINT / name for name in (*all_names(), MERGE)])
    stored = _bytes_on_disk([path for path in STORE.iterdir() if path.suffix in (".hydra", ".safetensors", ".ckpt")])
    print(
        f"{listed / 1e6:.1f} MB of models in {stored / 1e6:.1f} MB on disk: "
        f"{(listed - stored) / 1e6:.1f} MB saved, {100 * (1 - stored / listed):.0f} %"
    )
    say("the SHA-256 of each, read through the mount, against its original's")
    fine = compare_hashes()
    say("loads through the mount")
    load("harbour-fp16.safetensors")
    load("orchard-bf16.ckpt")
    load(MERGE)
    return fine


def main() -> None:
    """Make the store if it is not there, mount it if it is not mounted, show it."""
    make_store()
    make_merge()
    if MOUNTPOINT.is_mount():
        say(f"{_short(MOUNTPOINT)} is mounted already")
    else:
        say("mounting")
        with contextlib.suppress(
            FileExistsError
        ):  # a mount that died is there, and no folder; `hydrafs mount` clears it
            MOUNTPOINT.mkdir()
        hydrafs("mount", STORE, MOUNTPOINT)
    if not show():
        sys.exit("a model in the mount is not its original; please report this")
    say(f"{_short(MOUNTPOINT)} stays mounted; use it from any program, take it down with: make umount")


if __name__ == "__main__":
    main()
