"""The files and the arithmetic of the tool that hydrafs grew from: https://github.com/bmaltais/dehydrate.

``ckpt_subtract`` saves, for each key of a fine-tune that has "model" in it and is in the base too, the difference of
the two tensors unless they are equal: ``NAME.pbz2`` is a bz2-compressed pickle of that dict, the tensors pickled in
line; with ``--nocompress`` it is ``torch.save({"state_dict": dict})``. ``ckpt_add`` adds the base to the keys that have
"model" in them and are in the base, leaves the diff's other keys as they are, appends the base's keys that have "model"
in them and are not in the diff, and saves ``{"state_dict": ...}``.

``states``      state dicts of any model, tensor by tensor, read from where they stand
``reader``      the tool's diffs
``arithmetic``  what torch computes when it adds and subtracts tensors, to the bit
``plan``        what ``ckpt_add`` makes of a diff and a base, and ``ckpt_subtract`` of a model and a base
``checkpoint``  ``torch.save`` of a plan; the only place of hydrafs that imports torch
``writer``      the tool's diffs, written

Nothing is unpickled. Sources: the scripts of that repository, ``torch/serialization.py``, ``torch/storage.py``.
"""
