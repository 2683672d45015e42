"""``hydrafs mount``: show a store as the full files that it stands for."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path

import click

from hydrafs.cli.background import policy_given, policy_options
from hydrafs.cli.common import catalogs, log_format_option, open_store, service_log
from hydrafs.cli.known_stores import check_expected, remember, state_folder
from hydrafs.covered import keep_catalogs_in
from hydrafs.helper import Helper
from hydrafs.logs import log_to
from hydrafs.mounting import mount, parse_options, preflight
from hydrafs.mountpoints import MountInfo, check_mountpoint, clear_stale, resolve
from hydrafs.policy import Policy
from hydrafs.root_identity import read_mark
from hydrafs.service.control import runtime_folders
from hydrafs.service.memory import fitting_cache, limit_nbytes
from hydrafs.service.metrics import parse_address
from hydrafs.service.running import Served, Settings
from hydrafs.service.running import warm as start_warming
from hydrafs.sizes import parse_nbytes

log = logging.getLogger("hydrafs.cli.mount")

_CACHE_HELP = """Decoded tensors to keep; auto for three quarters of the memory that this service or container may
have [default: 4G, less where that is less]."""
_DEFAULT_LOG = "the store's .hydrafs/mount.log, else ~/.local/state/hydrafs/mount.log"


def _default_log(private: Path) -> str | None:
    """The store's log, or the user's own where that cannot be written: a store on a read-only disk, or a log that
    another user's mount has made. What is refused at open must be said somewhere."""
    for folder in (private, state_folder()):
        path = folder / "mount.log"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=folder != private, exist_ok=True)
            # Not access(2), which knows nothing of a full disk.
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644))
            return os.fspath(path)
    log.warning("no place for a log; name one with --log-file")
    return None


@click.command("mount", short_help="Show a store as full files.")
@click.argument("store", metavar="STORE")
@click.argument("mountpoint", metavar="[MOUNTPOINT]", required=False)
@click.option("--read-only", is_flag=True, help="Let nothing be written.")
@click.option("--foreground", "-f", is_flag=True, help="Stay in the foreground and log to the terminal.")
@click.option("--cache-size", default=None, metavar="SIZE", help=" ".join(_CACHE_HELP.split()))
@click.option(
    "-o", "options", multiple=True, metavar="OPTS", help="Options as mount(8) takes them: allow_other,uid=..."
)
@click.option("--existing", is_flag=True, help="Refuse a folder without a model and a mark: its disk is missing.")
@click.option("--new", is_flag=True, help="Make a store of an empty folder, whatever was there before.")
@click.option("--protect", is_flag=True, help="Let dehydrated models not be removed or renamed (EPERM).")
@policy_options
@click.option("--log-file", metavar="PATH", help=f"Where the daemon logs to [default: {_DEFAULT_LOG}].")
@log_format_option
@click.option("--metrics-address", metavar="HOST:PORT", help="Serve Prometheus metrics there.")
@click.option("--warm", is_flag=True, help="Read what was opened lately into the kernel's cache once mounted.")
def command(
    store: str,
    mountpoint: str | None,
    read_only: bool,
    foreground: bool,
    cache_size: str | None,
    options: tuple[str, ...],
    existing: bool,
    new: bool,
    protect: bool,
    dehydrate: str | None,
    settle: float | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    min_size: str | None,
    log_file: str | None,
    log_format: str,
    metrics_address: str | None,
    warm: bool,
) -> None:
    """Show STORE at MOUNTPOINT, each diff as the full file that it stands for; without MOUNTPOINT, over STORE itself.

    Models that have been closed and quiet for a while are dehydrated in the background, unless the mount is read-only
    or --dehydrate is off. Returns when the mount answers; with --foreground, when it is taken down.
    """
    style = service_log(as_json=log_format == "json", to_file=bool(log_file) or not foreground)
    log_to(sys.stderr, style)
    point = resolve(mountpoint if mountpoint is not None else Path(store).expanduser())
    if mountpoint is None:
        # Before the store is looked at: that would be looking at what is mounted there now.
        clear_stale(point)
        check_mountpoint(point, nonempty=True)
    parsed = parse_options(",".join([*options, *(["ro"] if read_only else [])]))
    with contextlib.closing(open_store(store)) as opened:
        check_expected(opened, existing=existing, new=new)
        root, folders, files = opened.root, opened.base_folders, opened.base_files
        private = opened.private
        given = policy_given(dehydrate, settle, include, exclude, min_size)
        Policy.of(opened, **given)  # what is wrong with it is said here
    limit = limit_nbytes()
    nbytes = _cache_nbytes(cache_size, parsed.cache_nbytes, limit)
    helper = None
    if not parsed.read_only and os.access(root, os.W_OK):
        helper = Helper(root, given, style=style, off_limits=point)
    in_place = point == root
    if in_place:
        keep_catalogs_in(catalogs())
    notify = os.environ.get("NOTIFY_SOCKET", "")
    settings = Settings(
        runtime_folders=runtime_folders(os.geteuid(), os.environ.get("XDG_RUNTIME_DIR", "")),
        metrics=parse_address(metrics_address) if metrics_address else None,
        notify_address=notify,
        watchdog_usec=_watchdog_usec(),
        reload_on_hangup=bool(notify),
        memory_limit_nbytes=limit,
    )
    served: list[Served] = []

    def make_tree() -> Served:
        from hydrafs.allocator import tune_allocator  # noqa: PLC0415 - in the process that serves
        from hydrafs.vfs import StoreTree  # noqa: PLC0415
        from hydrafs.writing import WritableTree  # noqa: PLC0415

        tune_allocator()
        if helper is not None:
            helper.remember_stderr()
        kind = StoreTree if parsed.read_only else WritableTree
        tree = kind(root, nbytes, point, helper=helper, protect=protect)
        served.append(Served(tree, point, settings))
        return served[0]

    def ready(found: MountInfo) -> None:
        remember(root, read_mark(private), point, os.path.abspath(log_path) if log_path else None)
        if served:  # in the foreground: here is who serves, and here is who the supervisor knows
            served[0].ready()
        if warm:
            start_warming("--lately", os.fspath(found.mountpoint))

    paths = [root, *folders, *files, *([catalogs()] if in_place else [])]
    binding = os.environ.get("HYDRAFS_FUSE") or None
    log_path = log_file
    if log_path is None and not foreground:
        # What is refused makes no log either.
        preflight(point, store_paths=paths, options=parsed, binding=binding, over_store=in_place)
        log_path = _default_log(private)
    mount(
        make_tree,
        point,
        store_paths=paths,
        over_store=in_place,
        options=parsed,
        foreground=foreground,
        binding=binding,
        log_path=log_path,
        on_ready=ready,
    )


def _cache_nbytes(size: str | None, option: int | None, limit: int | None) -> int:
    """The cache's budget: ``--cache-size``, else ``-o cache_size``, else the default, within the memory limit."""
    wanted = option if size in (None, "") else None if size == "auto" else parse_nbytes(str(size))
    nbytes = fitting_cache(wanted, limit, fill=size == "auto")
    if wanted is not None and nbytes < wanted:
        log.warning(
            "the cache gets %d MiB instead of %d: this service may have %d MiB of memory (MemoryHigh, MemoryMax)",
            nbytes >> 20, wanted >> 20, (limit or 0) >> 20,
        )  # fmt: skip
    return nbytes


def _watchdog_usec() -> int:
    """How often the supervisor wants to hear of this process; 0 where it does not, or means another one."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    return int(usec) if usec.isdigit() and pid in ("", str(os.getpid())) else 0
