"""The hash caches of WebUIs, filled with what a store knows, so that they read no model to list or to load it.

Goal: after it, stable-diffusion-webui (A1111), Forge and SD.Next find in their caches what they would have computed.
Plan: walk the folders that the program lists, as it does; name each model of the store as it does; put the entries
where it looks for them.
Rule 1: what other files have in a cache stays. A JSON file is replaced whole or not at all; a ``diskcache`` folder is
        written by its own library, in transactions, whoever else has it open.
Rule 2: no value of a cache is ever read back: ``diskcache`` keeps them pickled.
Sources: A1111 ``modules/{hashes,cache,sd_models}.py`` and ``extensions-builtin/Lora/network*.py``, the same of Forge,
SD.Next ``modules/{hashes,sd_checkpoint,json_helpers}.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat as stat_module
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hydrafs.cache import ChunkCache
from hydrafs.digests import ADDNET, PARTIAL, SHA256
from hydrafs.errors import HydraError, UsageError, from_oserror
from hydrafs.hashing import KnownHashes, keep_block
from hydrafs.layout import ByteSource
from hydrafs.mountpoints import our_mounts
from hydrafs.opening import Opener
from hydrafs.store import ModelEntry, Store, is_private, listed_name, trailer_of
from hydrafs.temporary import TemporaryFile

Kind = Literal["a1111", "forge", "sdnext"]
Entries = dict[str, dict[str, dict[str, Any]]]
"""By section of the cache and by key: what is kept."""

CHECKPOINT_ENDINGS = (".safetensors", ".ckpt")
LORA_ENDINGS = (".safetensors", ".ckpt", ".pt")
_MAX_HEADER_NBYTES = 100_000_000
_CACHE_SETTINGS = {"size_limit": 2**32, "disk_min_file_size": 2**18}  # those of modules/cache.py
_SAFETENSORS = ".safetensors"
_XATTR_PATH = "user.hydrafs.path"  # of a file or folder in a mount: where it stands in the store


@dataclass(frozen=True, slots=True)
class Found:
    """A model as a WebUI lists it: its path there, relative to the listed folder too, and what it is in the store."""

    filename: str
    relative: str
    entry: ModelEntry
    size: int
    mtime_ns: int

    @property
    def mtime(self) -> float:
        """What ``os.path.getmtime`` says of it, to the last bit."""
        seconds, nanoseconds = divmod(self.mtime_ns, 1_000_000_000)
        return seconds + 1e-9 * nanoseconds


@dataclass(slots=True)
class Seeded:
    """What was put where: how many ``checkpoints`` and ``loras`` were given, which models have hashes that are not
    known, of how many the ``blocks`` at 0x100000 were kept, and the files and folders that were written."""

    checkpoints: int = 0
    loras: int = 0
    blocks: int = 0
    unknown: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)


def kind_of(folder: Path) -> Kind:
    """Which program ``folder`` belongs to, by what only it has there; A1111 where nothing tells."""
    if (folder / "modules_forge").is_dir():
        return "forge"
    if (folder / "installer.py").is_file() or (folder / "html" / "locale_en.json").is_file():
        return "sdnext"
    return "a1111"


def find_models(store: Store, folder: Path, endings: Sequence[str]) -> Iterator[Found]:
    """The models of ``store`` that a program lists that walks ``folder``, links followed, by their paths there.

    The folder, or any below it, may be a mount of the store, a link to one, or the store itself, mounted now or not.
    """
    mountpoints = [mount.mountpoint for mount in our_mounts()]
    pending = [(os.path.abspath(folder), frozenset[str]())]
    while pending:
        shown, above = pending.pop()
        real = os.path.realpath(shown)
        if any(Path(real).is_relative_to(point) for point in mountpoints):
            with contextlib.suppress(OSError):  # a mount that does not answer shows no models
                real = os.fsdecode(os.getxattr(real, _XATTR_PATH))
        if real in above:
            continue
        try:
            entries = sorted(os.scandir(real), key=lambda e: e.name)
        except OSError:
            continue
        for entry in entries:
            path = os.path.join(shown, entry.name)
            if is_private(entry.name):
                continue
            if _is_folder(entry):
                pending.append((path, above | {real}))
                continue
            name = listed_name(entry.name)
            if not name.lower().endswith(tuple(endings)) or not Path(real).is_relative_to(store.root):
                continue
            if entry.is_symlink():  # in a mount it leads to the model, where in the store it may lead nowhere
                found = store.entry(Path(os.path.realpath(entry.path)))
            else:
                found = store.entry(Path(real) / name)
            # A plain file hides its diff, and is found itself.
            if found and (entry.is_symlink() or found.path.name == entry.name):
                with contextlib.suppress(OSError, HydraError):
                    size, mtime_ns = _size_and_time(found)
                    shown_path = os.path.join(shown, name)
                    relative = os.path.relpath(shown_path, os.path.abspath(folder))
                    yield Found(shown_path, relative, found, size, mtime_ns)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _size_and_time(entry: ModelEntry) -> tuple[int, int]:
    if entry.is_diff:
        trailer = trailer_of(entry.path)
        return trailer.size, trailer.mtime_ns
    stat = entry.path.stat()
    return stat.st_size, stat.st_mtime_ns


def entries_of(store: Store, kind: Kind, checkpoints: Sequence[Path], loras: Sequence[Path]) -> tuple[Entries, Seeded]:
    """What the caches of a program are to hold of the models of ``store`` in the folders that it lists.

    Args:
        checkpoints: the folders of checkpoints, absolute or as the program was told of them.
        loras: the folders of LoRAs.
    """
    known = KnownHashes(store)
    entries: Entries = {}
    told = Seeded()
    opener = Opener(store, ChunkCache(8 << 20))
    with contextlib.closing(opener):
        if kind != "sdnext":
            store.catalog.forget_blocks(_contents(store))
        for folder in checkpoints:
            # SD.Next lists no others, and leaves the ending out of the key.
            endings = CHECKPOINT_ENDINGS if kind != "sdnext" else (_SAFETENSORS,)
            for found in find_models(store, folder, endings):
                name = os.path.splitext(found.relative)[0] if kind == "sdnext" else found.relative
                hashes = known.of_model(found.entry)
                if SHA256 in hashes:
                    told.checkpoints += 1
                    _put(entries, "hashes", f"checkpoint/{name}", _hash(found, hashes[SHA256], kind))
                else:
                    told.unknown.append(found.entry.name)
                if kind != "sdnext":
                    if PARTIAL in hashes:
                        value = {"mtime": found.mtime, "hash": hashes[PARTIAL].hex()}
                        _put(entries, "partial-hash", found.filename, value)
                    _put_metadata(entries, opener, f"checkpoint/{name}", found, without="modelspec.thumbnail")
                    told.blocks += _keep_block(store, opener, found)
        for folder in loras:
            for found in find_models(store, folder, LORA_ENDINGS):
                key = "lora/" + os.path.splitext(os.path.basename(found.filename))[0]
                hashes = known.of_model(found.entry)
                is_safetensors = found.filename.lower().endswith(_SAFETENSORS)
                # Forge keeps the hash of the whole file in the place of the other.
                name = ADDNET if is_safetensors and kind != "forge" else SHA256
                if name in hashes:
                    told.loras += 1
                    section = "hashes-addnet" if is_safetensors else "hashes"
                    _put(entries, section, key, _hash(found, hashes[name], kind))
                else:
                    told.unknown.append(found.entry.name)
                if kind == "sdnext" and SHA256 in hashes:  # where it looks first
                    _put(entries, "hashes", key, _hash(found, hashes[SHA256], kind))
                if kind != "sdnext":
                    _put_metadata(entries, opener, key, found)
    return entries, told


def _contents(store: Store) -> Iterator[bytes]:
    """The SHA-256s of the dehydrated models."""
    for entry in store.models():
        if entry.is_diff:
            with contextlib.suppress(HydraError):
                yield trailer_of(entry.path).sha256


def _keep_block(store: Store, opener: Opener, found: Found) -> bool:
    """A1111 1.10 and Forge read these 64 KiB at every listing, whatever their caches hold."""
    if found.entry.is_diff:
        with contextlib.suppress(HydraError), contextlib.closing(opener.open_diff(found.entry.path)) as model:
            return keep_block(store, model)
    return False


def _hash(found: Found, value: bytes, kind: Kind) -> dict[str, Any]:
    entry: dict[str, Any] = {"mtime": found.mtime, "sha256": value.hex()}
    if kind == "forge":  # Forge Neo compares these two instead, where they are there
        entry |= {"mtime_ns": found.mtime_ns, "size": found.size}
    return entry


def _put(entries: Entries, section: str, key: str, value: dict[str, Any]) -> None:
    entries.setdefault(section, {})[key] = value


def _put_metadata(entries: Entries, opener: Opener, key: str, found: Found, without: str = "") -> None:
    """The strings of a safetensors header, as ``read_metadata_from_safetensors`` has them."""
    if not found.filename.lower().endswith(_SAFETENSORS):
        return
    with (
        contextlib.suppress(HydraError, ValueError, RecursionError),
        contextlib.closing(opener.open(found.entry)) as source,
    ):
        value = _metadata(source)
        value.pop(without, None)
        _put(entries, "safetensors-metadata", key, {"mtime": found.mtime, "value": value})


def _metadata(source: ByteSource) -> dict[str, Any]:
    nbytes = int.from_bytes(source.pread(0, 8), "little")
    if not 2 < nbytes <= min(source.size - 8, _MAX_HEADER_NBYTES):
        raise ValueError("no safetensors header")
    found: dict[str, Any] = {}
    for name, value in json.loads(source.pread(8, nbytes)).get("__metadata__", {}).items():
        found[name] = value
        if isinstance(value, str) and value.startswith("{"):
            with contextlib.suppress(ValueError, RecursionError):
                found[name] = json.loads(value)
    return found


def seed(folder: Path, kind: Kind, entries: Entries, told: Seeded) -> None:
    """Put ``entries`` where the program of ``folder`` looks for them, and note it in ``told``.

    A program with a folder ``cache`` reads that; without one it reads ``cache.json``, and A1111 and Forge turn that
    into the folder when they start, so an older or newer version finds it as well.

    Raises:
        UsageError: there is no such folder, its cache is damaged, or the library to write it is not installed.
        HydraError: it cannot be written; it is as it was.
    """
    if not folder.is_dir():
        raise UsageError("no such folder", where=folder, remedy="name the folder that the WebUI keeps its data in")
    cache = folder / "cache"
    has_folder = kind != "sdnext" and cache.is_dir()
    if has_folder:
        _seed_folder(cache, entries, told)
    if not has_folder or (folder / "cache.json").exists():
        _seed_json(folder / "cache.json", entries, told)


def _seed_folder(cache: Path, entries: Entries, told: Seeded) -> None:
    try:
        import diskcache  # noqa: PLC0415 - only where such a cache is to be written
    except ImportError:
        raise UsageError(
            "diskcache is not installed",
            where=cache,
            detail="this WebUI keeps its cache with it",
            remedy="pip install 'hydrafs[webui]'",
        ) from None
    for section, values in entries.items():
        path = cache / section
        try:
            with diskcache.Cache(os.fspath(path), **_CACHE_SETTINGS) as opened, opened.transact():
                for key, value in values.items():
                    opened.set(key, value)
        except OSError as error:
            raise from_oserror(error, "cannot write the cache", path) from error
        except Exception as error:  # sqlite3's, and diskcache.Timeout
            raise UsageError(
                "a cache cannot be written", where=path, detail=str(error) or type(error).__name__,
                remedy="stop the WebUI, or move that folder away",
            ) from error  # fmt: skip
        told.written.append(os.fspath(path))


def _seed_json(path: Path, entries: Entries, told: Seeded) -> None:
    path = Path(os.path.realpath(path))
    try:
        data: Any = {}
        mode = 0o644
        if path.exists():
            mode = stat_module.S_IMODE(path.stat().st_mode)
            data = json.loads(path.read_bytes())
        if not isinstance(data, dict) or not all(isinstance(data.get(section, {}), dict) for section in entries):
            raise ValueError("not an object of objects")
        for section, values in entries.items():
            data[section] = {**data.get(section, {}), **values}
        with TemporaryFile(path.parent) as temporary:
            temporary.file.write(json.dumps(data, indent=4).encode("utf-8", "surrogatepass"))
            os.fchmod(temporary.file.fileno(), mode)
            temporary.commit(path, replace=True)
    except OSError as error:
        raise from_oserror(error, "cannot write the cache", path) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(
            "a cache cannot be read",
            where=path,
            detail=str(error)[:200],
            remedy="move it away: the WebUI makes another",
        ) from None
    told.written.append(os.fspath(path))


__all__ = ["Entries", "Found", "Kind", "Seeded", "entries_of", "find_models", "kind_of", "seed"]
