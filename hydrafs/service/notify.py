"""Telling systemd that the service is ready, what it does, and that it is alive.

Source: sd_notify(3): datagrams of ``NAME=value`` lines to the socket that ``NOTIFY_SOCKET`` names, an abstract one
where it begins with ``@``. The protocol is ten lines; the libraries for it are a C extension, or not kept.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class Notifier:
    """Sends to a supervisor's socket; does nothing without one. Thread safety: any number of threads.

    Args:
        address: the value of ``NOTIFY_SOCKET``; empty for none.
        watchdog_usec: the value of ``WATCHDOG_USEC``: how often the supervisor wants to hear of us; 0 for never.
    """

    def __init__(self, address: str = "", watchdog_usec: int = 0) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._interval = watchdog_usec / 2e6
        self._stop = threading.Event()

    def send(self, **fields: str | int) -> None:
        """One message: ``READY=1``, ``STATUS=...``. A supervisor that is gone is no reason to fail."""
        if not self._address:
            return
        text = "\n".join(f"{name}={str(value).replace(os.linesep, ' ')}" for name, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
                out.connect(self._address)
                out.sendall(text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            log.debug("the supervisor does not listen: %s", error)

    def ready(self, status: str) -> None:
        """The mount answers."""
        self.send(READY=1, STATUS=status, MAINPID=os.getpid())

    def reloading(self) -> None:
        """The configuration is being read again."""
        self.send(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)

    def stopping(self) -> None:
        """The mount is being taken down."""
        self._stop.set()
        self.send(STOPPING=1, STATUS="unmounting")

    def keep_alive(self, status: Callable[[], str], is_alive: Callable[[], bool]) -> None:
        """Tell the watchdog, twice in each of its intervals, that we are alive, as long as ``is_alive`` says so; the
        status line goes with it. Returns at once. Without a watchdog nothing runs."""
        if not self._address or not self._interval:
            return

        def run() -> None:
            while not self._stop.wait(self._interval):
                if is_alive():
                    self.send(WATCHDOG=1, STATUS=status())

        threading.Thread(target=run, name="hydrafs-watchdog", daemon=True).start()
