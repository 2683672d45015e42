"""The ``-o`` options of a mount, as users of mount(8) and mount.fuse3(8) know them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hydrafs.errors import UsageError
from hydrafs.sizes import parse_nbytes

__all__ = ["MountOptions", "parse_options"]


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What a user may ask of a mount. ``uid``, ``gid`` and ``umask`` replace what the files say."""

    allow_other: bool = False
    allow_root: bool = False
    default_permissions: bool = False
    read_only: bool = False
    nonempty: bool = False
    uid: int | None = None
    gid: int | None = None
    umask: int | None = None
    fsname: str | None = None
    cache_nbytes: int | None = None
    flags: tuple[str, ...] = ()
    """Flags for mount(2), by name."""

    def __post_init__(self) -> None:
        if self.allow_other and self.allow_root:
            raise UsageError("mount options exclude each other", where="allow_other, allow_root", remedy="drop one")
        if self.fsname is not None and (self.fsname.startswith("/") or set(self.fsname) & set(",\\")):
            raise UsageError(
                "bad mount option",
                where=f"fsname={self.fsname}",
                detail="expected a name without comma or backslash that does not look like a device",
                remedy="choose another name",
            )

    def arguments(self) -> list[str]:
        """These options as libfuse takes them. nosuid and nodev are in it whatever was asked for."""
        # Where nothing is to be written, the kernel says so sooner and more cheaply than we can.
        given = [*(["ro"] if self.read_only else []), "nosuid", "nodev", *self.flags]
        # Without default_permissions the kernel would let every user read everything.
        checked = self.allow_other or self.allow_root or self.default_permissions
        for name, wanted in (("allow_other", self.allow_other), ("allow_root", self.allow_root)):
            if wanted:
                given.append(name)
        if checked:
            given.append("default_permissions")
        for name, number in (("uid", self.uid), ("gid", self.gid)):
            if number is not None:
                given.append(f"{name}={number}")
        if self.umask is not None:
            given.append(f"umask={self.umask:o}")
        return given


_SWITCHES = {
    "allow_other": {"allow_other": True},
    "allow_root": {"allow_root": True},
    "default_permissions": {"default_permissions": True},
    "ro": {"read_only": True},
    "rw": {"read_only": False},
    "nonempty": {"nonempty": True},
}
_FLAGS = frozenset({"noexec", "noatime", "sync", "async", "dirsync"})
# mount(8) and its helpers put these in by themselves (suid and dev too, as root), or they are for fstab's readers.
# Others say when times of access are kept: that is up to the store's filesystem, and libfuse does not know all of them.
_ACCEPTED = frozenset(
    {
        "defaults", "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "owner", "group", "exec", "atime",
        "relatime", "norelatime", "strictatime", "nostrictatime", "diratime", "nodiratime", "lazytime", "nolazytime",
        "iversion", "noiversion", "mand", "nomand", "symfollow", "suid", "nosuid", "dev", "nodev", "loud", "silent",
        "nogroup", "noowner", "nousers", "_rnetdev", "bg", "fg",
    }
)  # fmt: skip
_VALUED = ("uid", "gid", "umask", "fsname", "cache_size")
_IGNORED_PREFIXES = ("x-", "X-", "comment=", "helper=", "uhelper=", "subtype=", "user=", "retry=")


def parse_options(text: str) -> MountOptions:
    """Read a comma-separated list of mount options; the last of two that disagree counts.

    Raises:
        UsageError: an option that is unknown, or a value that it cannot have.
    """
    fields: dict[str, Any] = {}
    flags: list[str] = []
    for option in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = option.partition("=")
        if option == "remount":
            raise UsageError(
                "a mount that is up keeps its options",
                where=text,
                remedy="take it down with hydrafs umount, and mount it again with the options that it is to have",
            )
        if option in _SWITCHES:
            fields.update(_SWITCHES[option])
        elif option in _FLAGS:
            flags.append(option)
        elif equals and name in _VALUED:
            try:
                fields.update(_value(name, value))
            except (ValueError, UsageError) as error:
                detail = "expected a size as 512M or 4G" if isinstance(error, UsageError) else str(error)
                raise UsageError(
                    "bad mount option", where=option, detail=detail, remedy="give a value of that kind"
                ) from None
        elif option not in _ACCEPTED and not option.startswith(_IGNORED_PREFIXES):
            known = ", ".join([*_SWITCHES, *sorted(_FLAGS), *(f"{name}=" for name in _VALUED)])
            raise UsageError("unknown mount option", where=option, remedy=f"known ones: {known}")
    return MountOptions(**fields, flags=tuple(dict.fromkeys(flags)))


def _value(name: str, value: str) -> dict[str, object]:
    if name == "cache_size":
        return {"cache_nbytes": parse_nbytes(value)}
    if name == "fsname":
        if not value:
            raise ValueError("expected a name")
        return {name: value}
    highest = 0o777 if name == "umask" else (1 << 32) - 2
    expected = "expected an octal number up to 777" if name == "umask" else "expected a number"
    digits = "01234567" if name == "umask" else "0123456789"
    if not value or len(value) > 12 or set(value) - set(digits):
        raise ValueError(expected)
    number = int(value, 8 if name == "umask" else 10)
    if number > highest:
        raise ValueError(expected)
    return {name: number}
