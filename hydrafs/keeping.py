"""What must not be lost: removing, renaming and overwriting models that others need.

Goal: whatever happens to the name of a parent, the diffs that need it go on being served.
Plan: a parent in use has a second hard link, ``.hydrafs/held/SHA256``; a model that is removed or replaced while others
need it moves to ``.hydrafs/retired/SHA256``, where it is in no listing (``.hydra`` behind it where it is a diff).
Rule 1: a parent goes nowhere before it has its place among the retired; each step is one rename(2) or link(2).
Rule 2: where two names must change, the order is such that a kill in between shows the old state or the new one, or
        a journal says how to go on; ``recover`` does, at the next start.
Rule 3: who changes names holds the store's lock; a lock of a dead process is none.
Rule 4: a place promises nothing of what is in it: who opens a parent proves it, wherever it stands.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import stat as stat_module
import time
from collections.abc import Iterator
from pathlib import Path

from hydrafs.covered import real_path
from hydrafs.diff import SUFFIX
from hydrafs.errors import HydraError, Protected
from hydrafs.identity import FileIdentity, probe
from hydrafs.layout import FileSource
from hydrafs.manifest import Parent
from hydrafs.needs import Need, needs
from hydrafs.store import TEMPORARY, Store, TemporaryFile, fsync_folder, looks_like_model, trailer_of

__all__ = ["KeptLinks", "before_overwrite", "hold", "is_parent", "is_proven", "let_go", "needed_as", "place_of",
           "recover", "remove_diff", "remove_model", "rename_model"]  # fmt: skip

log = logging.getLogger(__name__)

_JOURNAL = "renaming-"
_FICLONE = 0x40049409
_COPY_NBYTES = 8 << 20
_SIDECAR_SECONDS = 1.0
"""How old the sizes of the parents may be when a file that is not called like a model is looked at."""
_SETTLED_NS = 100_000_000


def place_of(folder: Path, sha256: bytes, *, is_diff: bool) -> Path:
    """Where a model of this SHA-256 is kept in ``folder``, which is ``Store.held`` or ``Store.retired``."""
    return folder / (sha256.hex() + (SUFFIX if is_diff else ""))


def is_proven(store: Store, path: Path, sha256: bytes) -> bool:
    """Whether the file at ``path`` is known to have this SHA-256, without reading it."""
    try:
        return store.catalog.sha256(path, FileIdentity.of(os.stat(path))) == sha256
    except OSError:
        return False


def is_parent(store: Store, path: Path, parent: Parent) -> bool:
    """Whether the plain file at ``path`` is that parent, as far as the catalog, or its size and a probe, can tell.

    Raises:
        HydraError, OSError: it cannot be read.
    """
    stat = os.stat(path)
    if stat.st_size != parent.size:
        return False
    known = store.catalog.sha256(path, FileIdentity.of(stat))
    if known is not None:
        return known == parent.sha256
    with FileSource(path) as source:
        return probe(source) == parent.probe


# Holding


def hold(store: Store, path: Path, sha256: bytes) -> bool:
    """Give the parent at ``path`` a second link under ``Store.held``, so that it outlives its name.

    Returns:
        Whether a link is there; not where the filesystem is another one, or has no links, or forbids it.
    """
    is_diff = path.name.endswith(SUFFIX)
    target = place_of(store.held, sha256, is_diff=is_diff)
    source = real_path(path)
    try:
        store.held.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target):
            if os.path.samestat(os.stat(source), os.lstat(target)):
                return True
            if not is_diff and is_proven(store, target, sha256) and not is_proven(store, path, sha256):
                return True
        with _carried(store, path, source, target):
            _link_over(source, target)
    except OSError as error:
        log.debug("%s is not held: %s", path, error)
        return False
    return True


def _link_over(source: Path, target: Path) -> None:
    """``target`` is a link to ``source``, whatever it was."""
    try:
        os.link(source, target)
    except FileExistsError:
        temporary = target.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
        os.link(source, temporary)
        try:
            os.replace(temporary, target)
        finally:
            # rename(2) leaves both names where they are links to one file.
            with contextlib.suppress(OSError):
                temporary.unlink()


@contextlib.contextmanager
def _carried(store: Store, path: Path, *to: Path) -> Iterator[None]:
    """What is known of the file at ``path`` is known of it under ``path`` and ``to`` afterwards.

    A link or a rename changes the ctime of a file, and with it its identity, and nothing of what is in it.
    """
    before = FileIdentity.of(os.stat(path))
    yield
    for place in dict.fromkeys((path, *to)):
        with contextlib.suppress(OSError):
            after = FileIdentity.of(os.stat(place))
            same = (before.inode, before.device, before.size, before.mtime_ns)
            if same == (after.inode, after.device, after.size, after.mtime_ns):
                store.catalog.carry(path, before, place, after)


def let_go(store: Store, stat: os.stat_result, needed: dict[bytes, Need]) -> None:
    """Remove the links to a file that is held or retired and that nobody needs, so that its space is freed."""
    if stat.st_nlink < 2:
        return
    for folder in (store.held, store.retired):
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.inode() != stat.st_ino or not os.path.samestat(entry.stat(follow_symlinks=False), stat):
                    continue
                digest = entry.name.removesuffix(SUFFIX)
                if not any(sha256.hex() == digest for sha256 in needed):
                    os.unlink(entry.path)


class KeptLinks:
    """How many links of a file are hydrafs' own: a listing counts them not. Thread safety: any number of threads."""

    def __init__(self, store: Store) -> None:
        self._folders = (store.held, store.retired)
        self._known: tuple[tuple[int, ...], dict[tuple[int, int], int]] = ((), {})

    def count(self, stat: os.stat_result) -> int:
        """How many of the links that ``stat`` counts are under ``held`` and ``retired``; no scan while they rest."""
        if stat.st_nlink < 1 or not stat_module.S_ISREG(stat.st_mode):
            return 0
        times = []
        for folder in self._folders:
            try:
                times.append(os.stat(folder).st_mtime_ns)
            except OSError:
                times.append(0)
        key = tuple(times)
        if self._known[0] != key:
            links: dict[tuple[int, int], int] = {}
            for folder in self._folders:
                with contextlib.suppress(OSError), os.scandir(folder) as entries:
                    for entry in entries:
                        found = entry.stat(follow_symlinks=False)
                        links[found.st_dev, found.st_ino] = links.get((found.st_dev, found.st_ino), 0) + 1
            if time.time_ns() - max(key) < _SETTLED_NS:
                return links.get((stat.st_dev, stat.st_ino), 0)
            self._known = (key, links)
        return self._known[1].get((stat.st_dev, stat.st_ino), 0)


# Who is needed

_sizes: dict[Path, tuple[float, set[int]]] = {}


def needed_as(store: Store, path: Path, *, is_diff: bool) -> bytes | None:
    """The SHA-256 under which other diffs need the file at ``path``; ``None`` where nobody does. Hashes nothing: a file
    whose SHA-256 is unknown is needed where its size and a probe are those of a parent."""
    if is_diff:
        try:
            sha256 = trailer_of(path).sha256
        except HydraError:
            return None
        return sha256 if sha256 in needs(store, without=path) else None
    stat = os.stat(path)
    if stat.st_size == 0 or not _may_be_needed(store, path, stat):
        return None
    found = needs(store)
    _sizes[store.root] = time.monotonic(), {need.parent.size for need in found.values()}
    alike = [need.parent for need in found.values() if need.parent.size == stat.st_size]
    if not alike:
        return None
    known = store.catalog.sha256(path, FileIdentity.of(stat))
    if known is not None:
        return known if known in found else None
    for parent in alike:
        with contextlib.suppress(OSError):
            if os.path.samestat(stat, os.lstat(place_of(store.held, parent.sha256, is_diff=False))):
                return parent.sha256
    with contextlib.suppress(HydraError):
        return next((parent.sha256 for parent in alike if is_parent(store, path, parent)), None)
    return None


def _may_be_needed(store: Store, path: Path, stat: os.stat_result) -> bool:
    # Sidecars come and go by the hundred, and a look at every diff of the store for each would be felt. A parent of
    # another name than a model's is held, and so has a second link.
    if looks_like_model(path.name) or stat.st_nlink > 1:
        return True
    when, sizes = _sizes.get(store.root, (-_SIDECAR_SECONDS, set()))
    return time.monotonic() - when >= _SIDECAR_SECONDS or stat.st_size in sizes


# Retiring


def _retire(store: Store, path: Path, sha256: bytes, *, is_diff: bool, move: bool) -> None:
    """Keep the file at ``path`` among the retired; with ``move`` it leaves its name, else it has both."""
    target = place_of(store.retired, sha256, is_diff=is_diff)
    held = place_of(store.held, sha256, is_diff=is_diff)
    if not store.retired.is_dir():
        store.retired.mkdir(parents=True)
        fsync_folder(store.private)
    there = _lstat(target)
    here = os.lstat(path)
    same = there is not None and os.path.samestat(there, here)
    kept = same or (there is not None and not is_diff and is_proven(store, target, sha256))
    with _carried(store, path, target, held):
        if not kept:
            try:
                if move:
                    os.replace(path, target)
                else:
                    _link_over(path, target)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                    raise
                _copy(path, target, here)
                kept = True
        if kept and move:
            os.unlink(path)
    fsync_folder(store.retired)
    if move:
        fsync_folder(path.parent)


def _copy(path: Path, target: Path, stat: os.stat_result) -> None:
    """A copy of the file at ``path`` under ``target``, with its mode, owner, times and attributes, in one step."""
    with TemporaryFile(target.parent) as temporary:
        fd = temporary.file.fileno()
        with open(path, "rb", buffering=0) as source:
            try:
                fcntl.ioctl(fd, _FICLONE, source.fileno())
            except OSError:
                offset = 0
                while count := _copy_some(source.fileno(), fd, offset):
                    offset += count
        _like(fd, path, stat)
        os.utime(fd, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        temporary.flush_to_disk()
        os.replace(temporary.path, target)
        fsync_folder(target.parent)


def _copy_some(source: int, to: int, offset: int) -> int:
    try:
        return os.copy_file_range(source, to, _COPY_NBYTES, offset, offset)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return os.pwrite(to, os.pread(source, _COPY_NBYTES, offset), offset)


def _like(fd: int, path: Path, stat: os.stat_result) -> None:
    with contextlib.suppress(PermissionError):
        os.fchown(fd, stat.st_uid, stat.st_gid)
    os.fchmod(fd, stat_module.S_IMODE(stat.st_mode))
    with contextlib.suppress(OSError):
        for name in os.listxattr(path):
            with contextlib.suppress(OSError):
                os.setxattr(fd, name, os.getxattr(path, name))


# Names


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # a name that has no room for the ending has no diff
            return None
        raise


def _diff_of(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def _standing(path: Path) -> tuple[os.stat_result | None, os.stat_result | None]:
    """What stands under a listed name: the file of that name, and its diff."""
    diff = _lstat(_diff_of(path))
    return _lstat(path), diff if diff is not None and stat_module.S_ISREG(diff.st_mode) else None


def _is_regular(stat: os.stat_result | None) -> bool:
    return stat is not None and stat_module.S_ISREG(stat.st_mode)


def _drop(store: Store, path: Path, *, is_diff: bool) -> None:
    """Take a file's name away; it is retired where others need it."""
    stat = os.lstat(path)
    if not stat_module.S_ISREG(stat.st_mode):
        os.unlink(path)
        return
    sha256 = needed_as(store, path, is_diff=is_diff)
    if sha256 is not None:
        log.info("%s is needed by others and is kept among the retired", path)
        _retire(store, path, sha256, is_diff=is_diff, move=True)
        return
    os.unlink(path)
    if stat.st_nlink > 1:
        let_go(store, stat, needs(store))


def _keep(store: Store, path: Path, *, is_diff: bool) -> bool:
    """Retire the file at ``path`` where others need it, and leave it its name; whether they do."""
    sha256 = needed_as(store, path, is_diff=is_diff)
    if sha256 is not None:
        _retire(store, path, sha256, is_diff=is_diff, move=False)
    return sha256 is not None


def remove_diff(store: Store, path: Path) -> None:
    """Take away the diff that a plain file of the listed name ``path`` hides, if there is one."""
    with store.lock():
        if _standing(path)[1] is not None:
            _drop(store, _diff_of(path), is_diff=True)


def remove_model(store: Store, path: Path, *, protect: bool | None = None) -> None:
    """Take a listed name away, as unlink(2) does: the plain file or the diff, and a diff that hides behind the file.

    Args:
        path: the listed name in the store, absolute.
        protect: whether a dehydrated model is refused (default: the store's policy).

    Raises:
        OSError: as unlink(2).
        Protected: the policy forbids it.
    """
    with store.lock():
        plain, diff = _standing(path)
        if plain is None and diff is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
        if plain is not None and stat_module.S_ISDIR(plain.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if plain is None and (store.protect if protect is None else protect):
            raise Protected("a dehydrated model may not be removed", where=path)
        if diff is not None:  # the hidden one first: nobody sees it go
            _drop(store, _diff_of(path), is_diff=True)
        if plain is not None:
            _drop(store, path, is_diff=False)


def before_overwrite(store: Store, path: Path, *, truncate: bool = False) -> None:
    """To be called before the file of a listed name is opened for writing, truncated or replaced.

    Where others need a plain file, a new file takes its name, with its content (a reflink where the filesystem can,
    empty with ``truncate``), and the old one stands among the retired, as it was: who has it open goes on reading it. A
    diff that others need is retired, and keeps its name until the caller takes it (``remove_diff``).

    Raises:
        OSError: the old content cannot be kept, so it must not be written to.
    """
    with store.lock():
        plain, diff = _standing(path)
        if diff is not None:
            _keep(store, _diff_of(path), is_diff=True)
        if plain is None or not _is_regular(plain):
            return
        needed = _keep(store, path, is_diff=False)
        if not needed and plain.st_nlink > 1:
            let_go(store, plain, needs(store))
        if not needed:
            return
        if not truncate:
            _copy(path, path, plain)
            return
        with TemporaryFile(path.parent) as temporary:
            _like(temporary.file.fileno(), path, plain)
            os.replace(temporary.path, path)


def rename_model(store: Store, old: Path, new: Path, *, replace: bool = True, protect: bool | None = None) -> None:
    """Rename a listed name over another, as rename(2) does; either may be a plain file, a diff or a folder.

    Args:
        old, new: listed names in the store, absolute.
        replace: whether ``new`` may exist.
        protect: whether to refuse that a dehydrated model is renamed (default: the store's policy).

    Raises:
        OSError: as rename(2).
        Protected: the policy forbids it.
    """
    with store.lock():
        (plain, diff), (target, target_diff) = _standing(old), _standing(new)
        if plain is None and diff is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(old))
        if not replace and (target is not None or target_diff is not None):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(new))
        if old == new or (plain is not None and target is not None and os.path.samestat(plain, target)):
            return
        if plain is None and (store.protect if protect is None else protect):
            raise Protected("a dehydrated model may not be renamed", where=old)
        moves = store.is_pinned(old)
        if moves:
            store.repin([store.relative(new)])
        if plain is None:
            _rename_diff(store, old, new, target, target_diff)
        else:
            _rename_plain(store, old, new, plain, diff, target, target_diff)
        if moves:
            store.repin([], unpin=[store.relative(old)])


def _rename_plain(
    store: Store,
    old: Path,
    new: Path,
    plain: os.stat_result,
    diff: os.stat_result | None,
    target: os.stat_result | None,
    target_diff: os.stat_result | None,
) -> None:
    if stat_module.S_ISDIR(plain.st_mode):
        if target is None and target_diff is not None:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(new))
        os.rename(old, new)
        return
    if target is not None and stat_module.S_ISDIR(target.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(new))
    needed = False
    if target is not None and _is_regular(target):
        needed = _keep(store, new, is_diff=False)
    if diff is not None:  # it would be seen under the old name once the file that hides it is gone
        _drop(store, _diff_of(old), is_diff=True)
    if stat_module.S_ISREG(plain.st_mode):
        with _carried(store, old, new, *_links_of(store, plain)):
            os.rename(old, new)
    else:
        os.rename(old, new)
    if target is not None and not needed and target.st_nlink > 1:
        let_go(store, target, needs(store))
    if target_diff is not None:
        _drop(store, _diff_of(new), is_diff=True)


def _links_of(store: Store, stat: os.stat_result) -> list[Path]:
    """Where a file is held."""
    found = []
    if stat.st_nlink > 1:
        for folder in (store.held, store.retired):
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                found += [Path(e.path) for e in entries if e.inode() == stat.st_ino]
    return found


def _rename_diff(
    store: Store, old: Path, new: Path, target: os.stat_result | None, target_diff: os.stat_result | None
) -> None:
    source, destination = _diff_of(old), _diff_of(new)
    if target is not None and stat_module.S_ISDIR(target.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(new))
    if target is None:
        if target_diff is not None:
            kept = _keep(store, destination, is_diff=True)
        with _carried(store, source, destination):
            os.rename(source, destination)
        if target_diff is not None and not kept and target_diff.st_nlink > 1:
            let_go(store, target_diff, needs(store))
        return
    if target_diff is not None:
        _drop(store, destination, is_diff=True)
    journal = _write_journal(store, old, new, os.lstat(source), target)
    try:
        with _carried(store, source, destination):
            try:
                os.link(source, destination)
            except OSError:
                os.rename(source, destination)
        _finish(store, old, new)
    except OSError:
        _undo(old, new)
        raise
    finally:
        # After a failure that could not be undone either, the next start tries again.
        if not (_lstat(source) and _lstat(destination)):
            journal.unlink()


def _finish(store: Store, old: Path, new: Path) -> None:
    """The diff stands under the new name, behind the file that it replaces: from here on it can only go forward."""
    _drop(store, new, is_diff=False)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_diff_of(old))


def _undo(old: Path, new: Path) -> None:
    with contextlib.suppress(OSError):
        if _lstat(new) is None:
            return  # the file that was replaced is gone: the new name is the diff's
        if _lstat(_diff_of(old)) is None:
            os.rename(_diff_of(new), _diff_of(old))
        else:
            os.unlink(_diff_of(new))


def _write_journal(store: Store, old: Path, new: Path, diff: os.stat_result, plain: os.stat_result) -> Path:
    path = store.private / f"{_JOURNAL}{secrets.token_hex(8)}"
    entry = {
        "old": os.fsencode(old.relative_to(store.root)).hex(),
        "new": os.fsencode(new.relative_to(store.root)).hex(),
        "diff": [diff.st_dev, diff.st_ino],
        "plain": [plain.st_dev, plain.st_ino],
    }
    with TemporaryFile(store.private) as temporary:
        temporary.file.write(json.dumps(entry).encode())
        temporary.commit(path)
    return path


def recover(store: Store) -> None:
    """End what a killed process began, and remove its temporary files under ``.hydrafs``. Called at every start."""
    with store.lock():  # whoever wrote a journal held it: one that is there now is of the dead
        for journal in sorted(store.private.glob(f"{_JOURNAL}*")):
            try:
                entry = json.loads(journal.read_bytes())
                old = store.root / os.fsdecode(bytes.fromhex(entry["old"]))
                new = store.root / os.fsdecode(bytes.fromhex(entry["new"]))
                _recover(store, old, new, entry["diff"], entry["plain"])
            except (ValueError, KeyError, TypeError):
                log.warning("a journal that cannot be read is removed: %s", journal)
            except OSError as error:
                log.error("cannot end the renaming that %s tells of: %s", journal, error)
                continue
            journal.unlink(missing_ok=True)
        for folder in (store.private, store.held, store.retired):
            store.remove_leftovers(folder)


def _recover(store: Store, old: Path, new: Path, diff: list[int], plain: list[int]) -> None:
    moved = _lstat(_diff_of(new))
    if moved is None or [moved.st_dev, moved.st_ino] != diff:
        return
    target = _lstat(new)
    if target is not None and [target.st_dev, target.st_ino] != plain:
        _undo(old, new)  # somebody gave the new name to another file since
        return
    if target is not None:
        _drop(store, new, is_diff=False)
    there = _lstat(_diff_of(old))
    if there is not None and os.path.samestat(there, moved):
        os.unlink(_diff_of(old))
