"""The formats that models come in. ``parse`` gives any file its layout; content decides, not the file's name.

Each format has a module with ``parse(source) -> Layout``, which raises ``BadModel`` for a file that breaks its rules.
Nothing is unpickled, imported or executed, and no file takes more than a bounded amount of memory to be read.
"""

from __future__ import annotations

import logging

from hydrafs.containers import opaque, safetensors, torch_legacy, torch_zip
from hydrafs.errors import BadModel, HydraError
from hydrafs.layout import ByteSource, Layout

_log = logging.getLogger(__name__)
_HEAD_NBYTES = 64


def parse(source: ByteSource, name: str = "") -> Layout:
    """The layout of any file; opaque where its format is unknown or its own rules are broken.

    Args:
        source: the file's bytes.
        name: what to call the file in messages; it does not decide the format.

    Raises:
        HydraError: the source could not be read.
    """
    try:
        return parse_strict(source, name)
    except BadModel as error:
        _log.debug("taken as opaque bytes: %s", error)
        return opaque.parse(source)


def parse_strict(source: ByteSource, name: str = "") -> Layout:
    """As ``parse``, for those who want to know why a file is opaque.

    Raises:
        BadModel: the file looks like a known format and breaks its rules. A file of no known format is no error.
        HydraError: the source could not be read.
    """
    head = source.pread(0, _HEAD_NBYTES)
    if head.startswith(torch_zip.SIGNATURE):
        parser = torch_zip.parse
    elif safetensors.sniff(head, source.size):
        parser = safetensors.parse
    elif torch_legacy.sniff(head):
        parser = torch_legacy.parse
    else:
        parser = opaque.parse
    try:
        return parser(source)
    except BadModel as error:
        if error.where or not name:
            raise
        raise BadModel(error.what, where=name, detail=error.detail, remedy=error.remedy) from error
    except HydraError:
        raise
    except Exception as error:  # whatever a library makes of a hostile file
        detail = f"{type(error).__name__}: {error}"[:200]
        raise BadModel("a model cannot be parsed", where=name, detail=detail) from error
