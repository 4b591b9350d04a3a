"""Buffers whose values must not be rounded when a module is cast."""

from __future__ import annotations

from typing import Any

from torch import nn


class ExactBuffers(nn.Module):
    """A module whose own buffers keep their dtypes under `half()`, `to(dtype)` and the like, and still change device.

    Codebooks are such buffers: ids, and the hash of the codebooks, depend on every bit. Buffers of submodules are cast
    as usual.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> ExactBuffers:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self
