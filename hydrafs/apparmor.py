"""Where AppArmor lets fusermount3 mount: Ubuntu 25.04 and later confine it to a few folders ("Permission denied").

Source: apparmor.d(5), mount rules, ``mount fstype=... SOURCE -> TARGET,``; the profile is
``/etc/apparmor.d/fusermount3``, which includes ``local/fusermount3`` for what an administrator adds. Root mounts
without fusermount3 and is not concerned.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["PROFILE", "REMEDY", "is_allowed", "is_confined"]

PROFILE = Path("/etc/apparmor.d/fusermount3")
_LOADED = Path("/sys/kernel/security/apparmor/profiles")
_ENABLED = Path("/sys/module/apparmor/parameters/enabled")
REMEDY = (
    "choose a mountpoint in your home, /mnt, /media or /tmp, or as root write a line such as "
    '"mount fstype=fuse.* options=(nosuid,nodev,rw) -> /data/**/," into /etc/apparmor.d/local/fusermount3 and call '
    "apparmor_parser -r /etc/apparmor.d/fusermount3"
)
_USUAL = ("@{HOME}/**", "/mnt/**", "/media/**", "/tmp/**", "/run/user/*/**", "/cvmfs/**")
_TARGET = re.compile(r"^\s*(?:allow\s+|audit\s+)*mount\b[^#\n]*?->\s*\"?(\S+?)\"?\s*,\s*(?:#.*)?$", re.M)


def is_confined() -> bool:
    """Whether AppArmor confines fusermount3 here. What is loaded can be seen by root alone; the file, by everybody."""
    try:
        return "fusermount3" in _LOADED.read_text()
    except OSError:
        pass
    try:
        return PROFILE.is_file() and _ENABLED.read_text().strip() == "Y"
    except OSError:
        return False


def is_allowed(mountpoint: Path) -> bool:
    """Whether the profile, with what was added to it locally, lets fusermount3 mount at ``mountpoint`` (resolved)."""
    targets: list[str] = []
    for path in (PROFILE, PROFILE.parent / "local" / PROFILE.name):
        try:
            targets += _TARGET.findall(path.read_text(errors="replace"))
        except OSError:
            continue
    name = os.fspath(mountpoint).rstrip("/") + "/"
    return any(_matches(target, name) for target in targets or _USUAL)


def _matches(target: str, name: str) -> bool:
    target, pattern = target.replace("@{HOME}", "@{HOMES}"), ""
    depth, rest = 0, target
    while rest:
        for text, meaning in _GLOBS:
            if rest.startswith(text):
                pattern, rest = pattern + meaning, rest[len(text) :]
                break
        else:
            character, rest = rest[0], rest[1:]
            if character == "{":
                pattern, depth = pattern + "(?:", depth + 1
            elif character == "}" and depth:
                pattern, depth = pattern + ")", depth - 1
            elif character == "," and depth:
                pattern += "|"
            else:
                pattern += re.escape(character)
    try:
        # AppArmor writes folders with a slash behind; who adds a line by hand may not.
        return any(re.fullmatch(pattern, written) for written in (name, name.rstrip("/")))
    except re.error:
        return False


_GLOBS = (
    ("@{HOMES}", "(?:/home/[^/]+|/root)"), ("@{run}", "(?:/var)?/run"), ("@{uid}", "[0-9]+"),
    ("[0-9]*", "[0-9]+"), ("**", ".*"), ("*", "[^/]*"), ("?", "[^/]"),
)  # fmt: skip
