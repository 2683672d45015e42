"""An automounter, for a test: mounts what a command mounts, when somebody looks into a folder.

    python automounter.py MOUNTPOINT COMMAND...

Source: the kernel's include/uapi/linux/auto_fs.h, protocol 5; Documentation/filesystems/autofs.rst. As systemd does,
it runs the command in its own process group, which alone may walk through the trigger while everybody else waits. Says
"waiting" once the trigger is there; ends, and takes it away, when its stdin is closed.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys

READY, FAIL, CATATONIC = 0x9360, 0x9361, 0x9362
PACKET = struct.Struct("@iiIIQIIIII256s")
MISSING_DIRECT = 5
MNT_DETACH = 2
libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def main(mountpoint: str, *command: str) -> None:
    os.setpgid(0, 0)
    receive, send = os.pipe2(os.O_DIRECT)
    options = f"fd={send},pgrp={os.getpgrp()},minproto=5,maxproto=5,direct"
    checked(libc.mount(b"test", mountpoint.encode(), b"autofs", 0, options.encode()))
    try:
        os.close(send)
        trigger = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
        print("waiting", flush=True)
        while True:
            readable, _, _ = select.select([receive, 0], [], [])
            if 0 in readable:
                break
            _, kind, token, *_ = PACKET.unpack(os.read(receive, 1024)[: PACKET.size])
            assert kind == MISSING_DIRECT
            done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
            fcntl.ioctl(trigger, READY if done.returncode == 0 else FAIL, token)
        fcntl.ioctl(trigger, CATATONIC, 0)
        os.close(trigger)
    finally:
        libc.umount2(mountpoint.encode(), MNT_DETACH)


if __name__ == "__main__":
    main(*sys.argv[1:])
