"""The tree that the user owns: names, lookup, configuration, and who may change it now.

Rule 1: ``NAME.hydra`` is listed as ``NAME``; where a plain ``NAME`` stands beside it, the plain file is the model.
Rule 2: names that hydrafs keeps for itself begin with ``.hydrafs`` and are in no listing.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from hydrafs.catalog import Catalog
from hydrafs.covered import catalog_of, is_covered, named, real_path
from hydrafs.diff import SUFFIX, Trailer, read_trailer
from hydrafs.errors import HydraError, NoSpace, NotFound, UsageError, from_oserror
from hydrafs.marks import PRIVATE, find_root, is_marked
from hydrafs.mounttable import fuse_mountpoints
from hydrafs.root_identity import RootIdentity
from hydrafs.store_lock import StoreLock
from hydrafs.submounts import lead_astray
from hydrafs.temporary import TemporaryFile
from hydrafs.walk import Folder, Report, walk

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - depends on the interpreter
    import tomli as tomllib

__all__ = ["MODEL_SUFFIXES", "PRIVATE", "ModelEntry", "Store", "find_root", "is_marked", "is_private", "leads_into",
           "listed_name", "looks_like_model", "trailer_of"]  # fmt: skip

MODEL_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".sft")
_MAX_LINKS = 40  # as path_resolution(7) has it
_LOOKER_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model of a store: ``name`` relative to the root, as listed; ``path`` is the file that holds it."""

    name: str
    path: Path
    is_diff: bool


def is_private(name: str) -> bool:
    """Whether a file name is hydrafs' own, and so in no listing."""
    return name.startswith(PRIVATE)


def looks_like_model(name: str) -> bool:
    """Whether a file of this name is taken for a model when one is looked for."""
    return name.lower().endswith(MODEL_SUFFIXES)


def listed_name(name: str) -> str:
    """The name that a file is listed under: without the ending where it is a diff's."""
    return name[: -len(SUFFIX)] if name.endswith(SUFFIX) and len(name) > len(SUFFIX) else name


def leads_into(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Whether ``path``, links followed, is ``folder`` or in it; asks the filesystem about nothing in ``folder``.

    Args:
        path: absolute.
        folder: absolute, without links.
    """
    target, current, links = os.fspath(folder), "/", 0
    text, root = os.fspath(path), ""
    if is_covered(text):  # the descriptor leads below the mount, where the path goes on
        root = current = "/".join(text.split("/")[:5])
        text = text[len(root) :]
    pending = text.split("/")[::-1]
    while pending:
        part = pending.pop()
        if part in ("", ".", ".."):
            if part == "..":
                current = os.path.dirname(named(current) if current == root else current)
            continue
        step = os.path.join(current, part)
        if step == target:
            return True
        try:
            link = os.readlink(step)
        except (OSError, ValueError):
            current = step
            continue
        links += 1
        if links > _MAX_LINKS:
            return False  # a loop: it leads nowhere
        current = "/" if link.startswith("/") else current
        pending.extend(link.split("/")[::-1])
    return False


class Store:
    """A directory tree of models, diffs and other files, and what hydrafs knows of it.

    ``begin``, which ``lock`` calls, is the moment from which on the store is acted on. Before it nothing is changed on
    the disk: what is learnt is kept in memory.

    Thread safety: lookups from any number of threads; the configuration is changed by one at a time.
    """

    off_limits: Path | None = None
    """The mount that a daemon serves, resolved: a link of the store may lead there, and the daemon must not follow."""
    always_protect: bool = False
    """``protect``, whatever the configuration says."""
    lock_seconds: float | None = None
    """How long ``lock`` waits where its caller does not say; None for as long as it takes."""

    def __init__(self, root: str | os.PathLike[str], *, create: bool = False, looks: bool = False) -> None:
        """Open the store at ``root``.

        Args:
            create: make its ``.hydrafs`` folder at once.
            looks: change nothing before ``begin``. Else what is learnt is kept at once where there is a ``.hydrafs``.

        Raises:
            NotFound, Denied: there is no such folder, or it may not be read or written.
        """
        path = Path(root).expanduser()
        try:
            self.root = Path(os.path.abspath(path) if is_covered(path) else os.path.realpath(path, strict=True))
            if not self.root.is_dir():
                raise UsageError("a store is a folder", where=path, remedy="name the folder that holds the models")
            os.scandir(self.root).close()
            self.identity = RootIdentity(self.root, self.private)
        except OSError as error:
            raise from_oserror(error, "cannot open the store", path) from error
        self._lock = StoreLock(self.root, self.identity, f"{PRIVATE}/lock")
        self._begun = False
        self._beginning = threading.Lock()
        self._pins_of = (0, 0)
        try:
            self.catalog = Catalog(self._catalog_path(looks=True), read_only=True, root=self.root)
        except BaseException:
            self.identity.close()
            raise
        try:
            self._configure()
            if create or (not looks and self.private.is_dir()):
                self.begin()
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        """Act on the store from now on: make its ``.hydrafs`` where there is none, and keep what is known in the
        catalog there. To be called once nothing can be refused any more; again it does nothing.

        Raises:
            HydraError: the store cannot be written to.
        """
        with self._beginning:
            if self._begun:
                return
            try:
                self.private.mkdir(exist_ok=True)
            except FileExistsError:
                raise UsageError(
                    "a store cannot be made here",
                    where=self.private,
                    detail="something of that name stands there",
                    remedy="move it away, or name another folder",
                ) from None
            except OSError as error:
                raise from_oserror(error, "cannot open the store", self.root) from error
            self.identity.mark_now()
            self.catalog.keep_in(self._catalog_path())
            self._begun = True

    def _catalog_path(self, *, looks: bool = False) -> Path | None:
        own = self.private / "catalog.sqlite"
        if not is_covered(self.root):
            return own
        elsewhere = catalog_of(self.root, make=not looks)
        if elsewhere is not None and not looks:
            with contextlib.suppress(OSError):
                if not elsewhere.exists() or elsewhere.stat().st_mtime_ns < own.stat().st_mtime_ns:
                    elsewhere.write_bytes(own.read_bytes())
        return elsewhere

    @property
    def private(self) -> Path:
        """The folder of hydrafs' own files."""
        return self.root / PRIVATE

    @property
    def held(self) -> Path:
        """The folder of hard links to the parents in use, by SHA-256 (``hydrafs.keeping``)."""
        return self.private / "held"

    @property
    def retired(self) -> Path:
        """The folder of models that are listed no more and that others need, by SHA-256."""
        return self.private / "retired"

    @property
    def trash(self) -> Path:
        """The folder of what was removed through a mount and can be had back for a while (``hydrafs.trash``)."""
        return self.private / "trash"

    def close(self) -> None:
        """Close the catalog, and let go of the folder."""
        self.catalog.close()
        self.identity.close()

    # Configuration

    @property
    def _config_path(self) -> Path:
        return self.private / "config.toml"

    def _config(self) -> dict[str, object]:
        try:
            with self._config_path.open("rb") as file:
                return tomllib.load(file)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(
                "the store's configuration cannot be read",
                where=self._config_path,
                detail=str(error),
                remedy="mend the file or remove it",
            ) from None
        except OSError as error:
            raise from_oserror(error, "cannot read the store's configuration", self._config_path) from error

    def _configure(self) -> None:
        config = self._config()
        folders = self._texts(config, "base_folders", '["/path"]')
        pinned = frozenset(self._texts(config, "pinned", '["sd15.safetensors"]'))
        protect = config.get("protect", False)
        if not isinstance(protect, bool):
            raise UsageError(
                "protect is neither true nor false", where=self._config_path, remedy="write protect = true"
            )
        files = self._texts(config, "base_files", '["/path/sd15.safetensors"]')
        self.base_folders = tuple(real_path(self.root / Path(f).expanduser()) for f in folders)
        self.base_files = tuple(real_path(self.root / Path(f).expanduser()) for f in files)
        self.pinned = pinned
        self.protect = protect or self.always_protect

    def _texts(self, config: dict[str, object], key: str, example: str) -> list[str]:
        values = config.get(key, [])
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise UsageError(f"{key} is no list of texts", where=self._config_path, remedy=f"write {key} = {example}")
        return values

    def setting(self, name: str, default: object) -> object:
        """What the configuration says of ``name``, as it stands in the file now; ``default`` where it says nothing."""
        return self._config().get(name, default)

    def section(self, name: str) -> dict[str, object]:
        """A table of the configuration, as it stands in the file now; empty where there is none."""
        table = self._config().get(name, {})
        if not isinstance(table, dict):
            raise UsageError(f"{name} is no table", where=self._config_path, remedy=f"write [{name}]")
        return table

    def _change_config(self, change: Callable[[dict[str, object]], None]) -> None:
        config = self._config()
        change(config)
        with TemporaryFile(self.private) as temporary:
            temporary.file.write(tomli_w.dumps(config).encode())
            temporary.commit(self._config_path, replace=True)
        self._configure()

    def reload(self) -> None:
        """Read the configuration again.

        Raises:
            UsageError: it is damaged; what was read before still holds.
        """
        self._configure()

    def add_base_folder(self, folder: Path) -> None:
        """Search ``folder`` for bases and parents from now on; kept in ``.hydrafs/config.toml``."""
        with self.lock():
            self.add_base_folders([folder])

    def add_base_folders(self, folders: Collection[Path]) -> None:
        """``add_base_folder`` of several, for a caller that holds the lock."""
        resolved = dict.fromkeys(real_path(folder) for folder in folders)
        new = [f for f in resolved if f not in self.base_folders and not f.is_relative_to(self.root)]
        if not new:
            return

        def add(config: dict[str, object]) -> None:
            known = self._texts(config, "base_folders", "")
            config["base_folders"] = [*known, *(os.fspath(f) for f in new if os.fspath(f) not in known)]

        self._change_config(add)

    def add_base_files(self, files: Collection[Path]) -> None:
        """Find parents in these files from now on, those that are not in the store already; kept in
        ``.hydrafs/config.toml``. What else stands in their folders is not looked at. The caller holds the lock."""
        resolved = dict.fromkeys(real_path(file) for file in files)
        places = (self.root, *self.base_folders)
        new = [f for f in resolved if f not in self.base_files and not any(f.is_relative_to(p) for p in places)]
        if not new:
            return

        def add(config: dict[str, object]) -> None:
            known = self._texts(config, "base_files", "")
            config["base_files"] = [*known, *(os.fspath(f) for f in new if os.fspath(f) not in known)]

        self._change_config(add)

    def pin(self, names: Collection[str], *, unpin: Collection[str] = ()) -> None:
        """Keep the models of these names whole from now on; kept in ``.hydrafs/config.toml``. No other names are
        checked than those given. Under ``lock`` already: ``repin``."""
        with self.lock():
            self.repin(names, unpin=unpin)

    def repin(self, names: Collection[str], *, unpin: Collection[str] = ()) -> None:
        """``pin`` for a caller that holds the lock."""

        def change(config: dict[str, object]) -> None:
            pinned = {*self._texts(config, "pinned", ""), *names} - set(unpin)
            config["pinned"] = sorted(pinned)

        self._change_config(change)

    def is_pinned(self, path: Path) -> bool:
        """Whether the model at the absolute ``path`` is to stay whole, as the configuration says now."""
        return self.relative(path) in self._pins_now()

    def pins_in(self, path: Path) -> list[str]:
        """The pinned names that a renaming of the absolute ``path`` changes: its own, and those in the folder."""
        name = self.relative(path)
        return sorted(p for p in self._pins_now() if p == name or p.startswith(f"{name}/"))

    def _pins_now(self) -> frozenset[str]:
        # Another process may have pinned a model since.
        with contextlib.suppress(OSError, UsageError):
            stat = os.stat(self._config_path)
            if self._pins_of != (stat.st_ino, stat.st_mtime_ns):
                self.pinned = frozenset(self._texts(self._config(), "pinned", '["sd15.safetensors"]'))
                self._pins_of = stat.st_ino, stat.st_mtime_ns
        return self.pinned

    def check_root(self) -> None:
        """Make sure that the folder under the store's name is the store. A stat.

        Raises:
            StoreGone: its disk is not there.
        """
        if self.identity.check() and self._begun:
            self.catalog.keep_in(self._catalog_path())  # on the disk that is there now

    @contextlib.contextmanager
    def lock(self, seconds: float | None = None) -> Iterator[None]:
        """Hold the store's lock: one process at a time changes what the store says of itself. A crash lets go of it.

        Args:
            seconds: how long to wait for who has it; None for ``lock_seconds``.

        Raises:
            StoreLocked: somebody had it for longer.
            StoreGone: another folder stands where the store was.
            NoLocks: the filesystem has none.
            HydraError: the store cannot be written to.
        """
        self.check_root()
        if not self._begun:
            self._lock.check()  # before anything is made
        with contextlib.suppress(NoSpace):  # what makes room needs the lock, and no more of hydrafs' own
            self.begin()
        with self._lock.held(self.lock_seconds if seconds is None else seconds):
            yield

    def check_locks(self) -> None:
        """Make sure that the store's filesystem has locks; makes nothing, and waits for nobody.

        Raises:
            NoLocks: it has none: nothing of the store can be changed.
        """
        self._lock.check()

    @contextlib.contextmanager
    def rest(self, seconds: float | None = None) -> Iterator[None]:
        """Keep others from changing the store, as ``lock`` does, where it is acted on. Who only looks makes no lock,
        and waits two seconds at most for who has one: then he sees the store as it is.

        Raises:
            StoreLocked: somebody had it for longer than whoever acts waits.
            HydraError: the store cannot be written to.
        """
        if self._begun:
            with self.lock(seconds):
                yield
            return
        with contextlib.ExitStack() as stack:
            # No lock: nobody has changed this store yet. Locks may be unknown to its filesystem, or want to write.
            with contextlib.suppress(OSError, HydraError):
                fd = os.open(self.private / "lock", os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                self._lock.wait(fd, min(_LOOKER_SECONDS, seconds or _LOOKER_SECONDS))
            yield

    # Names

    def folders(
        self,
        folder: Path | None = None,
        *,
        entered: Callable[[Path, os.stat_result], object] | None = None,
        trouble: Report | None = None,
    ) -> Iterator[Folder]:
        """Every folder under ``folder`` (default: the whole store) as ``hydrafs.walk`` has it, without hydrafs' own
        files and what this process must not enter. ``trouble`` is told what could not be listed or looked at.

        Outside the store nothing is needed by anybody: of a base folder what is mounted below it by FUSE is left out,
        since it may be a mount of this very store.
        """
        top = folder or self.root
        mounts = frozenset() if top.is_relative_to(self.root) else fuse_mountpoints()

        def leave_out(entry: os.DirEntry[str]) -> bool:
            return (
                is_private(entry.name)
                or entry.path in mounts
                or (self.off_limits is not None and entry.is_symlink() and leads_into(entry.path, self.off_limits))
            )

        return walk(top, leave_out=leave_out, report=trouble, entered=entered)

    def models(
        self,
        folder: Path | None = None,
        *,
        entered: Callable[[Path, os.stat_result], object] | None = None,
        trouble: Report | None = None,
    ) -> Iterator[ModelEntry]:
        """Every model under ``folder`` (default: the whole store), folders in name order. Links to folders are
        followed once; hydrafs' own files are left out.

        Args:
            entered: is told of each folder, before it is read.
            trouble: is told of each folder that could not be listed and each entry that could not be looked at.
        """
        for listed in self.folders(folder, entered=entered, trouble=trouble):
            for entry in listed.files:
                name = listed_name(entry.name)
                is_diff = name != entry.name
                if is_diff and name in listed.names:
                    continue
                if is_diff or looks_like_model(name):
                    path = Path(entry.path)
                    yield ModelEntry(self.relative(path.with_name(name)), path, is_diff)

    def candidates(self) -> Iterator[ModelEntry]:
        """Every model that may serve as a parent: those of the store, of its base folders, and its base files."""
        for folder in (self.root, *self.base_folders):
            if folder == self.root or not self.is_off_limits(folder):
                yield from self.models(folder)
        for file in self.base_files:
            entry = None if self.is_off_limits(file) else self.entry(file)
            if entry is not None:
                yield entry

    def paths_of(self, sha256: bytes) -> list[Path]:
        """Where plain files of this SHA-256 were seen in the store, its base folders and files; whether they still are
        is for the caller to check. What the catalog says of files elsewhere, as one that came with another store does,
        counts for nothing."""
        paths = map(Path, map(os.path.normpath, self.catalog.paths_of(sha256)))
        return [path for path in paths if self._may_serve(path) and not self.is_off_limits(path)]

    def _may_serve(self, path: Path) -> bool:
        if path in self.base_files:
            return True
        folder = next((f for f in (self.root, *self.base_folders) if path.is_relative_to(f)), None)
        return folder is not None and not any(is_private(part) for part in path.relative_to(folder).parts)

    def is_off_limits(self, path: str | os.PathLike[str]) -> bool:
        """Whether the absolute ``path`` leads to where this process must not go: ``off_limits``, or a filesystem that
        does not answer."""
        if lead_astray(path, self.off_limits):
            return True
        return self.off_limits is not None and leads_into(path, self.off_limits)

    def relative(self, path: Path) -> str:
        """``path`` relative to the root where it is below it, else absolute."""
        try:
            return os.fspath(path.relative_to(self.root))
        except ValueError:
            return os.fspath(path)

    def locate(self, name: str | os.PathLike[str]) -> ModelEntry:
        """The model of that name: a path, or a name relative to the root, with or without the diff's ending.

        Raises:
            NotFound: no such model.
        """
        path = Path(name).expanduser()
        for base in (path, self.root / path):
            entry = self.entry(Path(os.path.abspath(base)))
            if entry:
                return entry
        raise NotFound("no such model", where=path, remedy=f"hydrafs ls {self.root} lists what there is")

    def entry(self, path: Path) -> ModelEntry | None:
        """The model that stands at the absolute ``path`` (its listed name or its diff), if any."""
        if not path.name:
            return None
        listed = path.with_name(listed_name(path.name))
        for candidate in (listed, listed.with_name(listed.name + SUFFIX)):
            if os.path.isfile(candidate):
                if path != listed and candidate == listed and os.path.isfile(path):
                    continue  # the diff was named outright, though a plain file hides it
                return ModelEntry(self.relative(listed), candidate, candidate != listed)
        return None


def trailer_of(path: Path) -> Trailer:
    """The trailer of the diff at ``path``; see ``hydrafs.diff.read_trailer``."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise from_oserror(error, "cannot open the diff", path) from error
    try:
        return read_trailer(fd, os.fspath(path))
    finally:
        os.close(fd)
