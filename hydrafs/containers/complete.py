"""Whether a model file is all there, as far as the file itself can tell: a cut download looks like a model.

Rule 1: nothing is said of a file whose format keeps no account of its length; what is said is sure enough to leave a
        file alone for, and no more than that.
Rule 2: only headers, directories and pickles are read.
"""

from __future__ import annotations

import errno
import os
import struct

from hydrafs.containers import safetensors, torch_legacy, torch_zip
from hydrafs.errors import BadModel
from hydrafs.layout import ByteSource, FileSource

__all__ = ["cut_short"]

_HEAD_NBYTES = 64
_END = struct.Struct("<4s4H2IH")
_END_SIGNATURE, _LOCATOR_SIGNATURE, _END64_SIGNATURE = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"
_DIRECTORY_SIGNATURE = b"PK\x01\x02"
_COMMENT_NBYTES = 0xFFFF
_LOCATOR_NBYTES = 20


def cut_short(source: ByteSource) -> str:
    """Why the file is not all there, in a few words; empty where nothing says so.

    Args:
        source: the file's bytes. Of a plain file it is asked too whether its end was ever written.

    Raises:
        HydraError: it could not be read.
    """
    size = source.size
    if size == 0:
        return "it is empty"
    head = source.pread(0, _HEAD_NBYTES)
    if not any(head):
        return "it begins with zeros"
    if isinstance(source, FileSource) and _ends_in_a_hole(source):
        return "its end was never written"
    if head.startswith(torch_zip.SIGNATURE):
        return _zip(source)
    if torch_legacy.sniff(head):
        return _legacy(source)
    # Not as ``safetensors.sniff`` has it: the header itself may be cut.
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= safetensors.MAX_HEADER_NBYTES:
        return _safetensors(source)
    return ""


def _ends_in_a_hole(source: FileSource) -> bool:
    """Whether the last byte was never written: room that a downloader took beforehand (lseek(2), ``SEEK_DATA``)."""
    try:
        os.lseek(source.fd, source.size - 1, os.SEEK_DATA)
    except OSError as error:
        return error.errno == errno.ENXIO  # others: this filesystem knows no holes
    return False


def _safetensors(source: ByteSource) -> str:
    try:
        header = safetensors.read_header(source)
    except BadModel:
        return "its header cannot be read"
    end = header.data_offset + max((entry.data_offsets[1] for entry in header.entries.values()), default=0)
    return f"its tensors end at byte {end}, the file at {source.size}" if end > source.size else ""


def _legacy(source: ByteSource) -> str:
    try:
        end = torch_legacy.expected_size(source)
    except BadModel as error:
        # Other things that this walk refuses are no sign of a file that was cut.
        return "its pickle is not all there" if error.what == "a pickle ends early" else ""
    return f"its tensors end at byte {end}, the file at {source.size}" if end > source.size else ""


def _zip(source: ByteSource) -> str:
    """The end of a zip's directory is in the last 64 KiB, the directory before it (APPNOTE 4.3.12 to 4.3.16)."""
    missing = "its zip directory is missing"
    start = max(0, source.size - _COMMENT_NBYTES - _END.size)
    tail = source.pread(start, source.size - start)
    at = tail.rfind(_END_SIGNATURE)
    if at < 0 or at + _END.size > len(tail):
        return missing
    _, _, _, _, count, nbytes, _, comment_nbytes = _END.unpack_from(tail, at)
    end = start + at
    if end + _END.size + comment_nbytes > source.size:
        return missing
    locator = source.pread(end - _LOCATOR_NBYTES, _LOCATOR_NBYTES) if end >= _LOCATOR_NBYTES else b""
    if locator.startswith(_LOCATOR_SIGNATURE):
        place = int.from_bytes(locator[8:16], "little")
        record = source.pread(place, 56) if place <= end else b""
        if len(record) < 56 or not record.startswith(_END64_SIGNATURE):
            return missing
        count, nbytes = int.from_bytes(record[32:40], "little"), int.from_bytes(record[40:48], "little")
        end = place
    if count and (nbytes > end or source.pread(end - nbytes, 4) != _DIRECTORY_SIGNATURE):
        return missing
    return ""
