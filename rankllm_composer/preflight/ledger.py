"""What live memory is for: each tensor storage that is made is entered under a purpose, and leaves when it is freed."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")


class Ledger(TorchDispatchMode):
    """Bytes of all live tensor storages that were made while it is entered, by what they are for.

    Attributes:
        part: one of PARTS, to which new storages are booked.
        bytes_of: live bytes by part.
        at_peak: `bytes_of` when the sum was highest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "activations"
        self.bytes_of: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._total = self._highest = 0
        self._entries: dict[int, tuple[str, int, Any]] = {}
        self._undo: contextlib.ExitStack | None = None

    def __enter__(self) -> Ledger:
        resize = torch.UntypedStorage.resize_

        @wraps(resize)
        def booked_resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = resize(storage, size)
            if id(storage) in self._entries:
                self._book(storage, self._entries[id(storage)][0])
            return result

        self._undo = contextlib.ExitStack()
        self._undo.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", booked_resize))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        assert self._undo is not None
        self._undo.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # so that its local tensors come by
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in self._entries:
                    self._book(storage, self.part)
        return result

    def book(self, tensor: torch.Tensor | None, part: str) -> None:
        """Enter a tensor, or move it from its part to another."""
        if tensor is not None:
            local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            self._book(local.untyped_storage(), part)

    @contextlib.contextmanager
    def booking(self, part: str) -> Iterator[None]:
        """While open, new storages are booked to `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def _book(self, storage: torch.UntypedStorage, part: str) -> None:
        key, size = id(storage), storage.nbytes()
        reference = self._entries[key][2] if key in self._entries else weakref.ref(storage, lambda _: self._drop(key))
        self._drop(key)
        self._entries[key] = (part, size, reference)
        self.bytes_of[part] += size
        self._total += size
        if self._total > self._highest:
            self._highest, self.at_peak = self._total, Counter(self.bytes_of)

    def _drop(self, key: int) -> None:
        if key in self._entries:
            part, size, _ = self._entries.pop(key)
            self.bytes_of[part] -= size
            self._total -= size
