"""The batches of a table for ``torch.utils.data.DataLoader``: :class:`IngestDataset`. Needs torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from .arrays import imported
from .auth import Token
from .errors import EndOfStream
from .reader import Reader
from .spec import Spec

__all__ = ["IngestDataset"]

if TYPE_CHECKING:

    class _IterableDataset:
        pass

else:
    _IterableDataset = imported("torch.utils.data", "torch").IterableDataset


class IngestDataset(_IterableDataset):
    """The batches of one table as trees of tensors, each with a leading axis of at most the table's batch size.

    ::

        dataset = IngestDataset("unix:///run/user/1000/ingestd.sock", "digits", prefetch=4)
        for batch in DataLoader(dataset, batch_size=None, num_workers=2):
            train(batch["image"], batch["label"])

    Each iteration attaches a reader of its own, in the process that iterates: in the main process, or in each worker of
    a DataLoader, forked or spawned. All read for one ``group``, so each batch goes to exactly one of them. Iterations
    end at the end of the stream. Give ``batch_size=None``: the samples are in batches already.

    Tensors share the daemon's memory and keep their batch leased as long as they live, as those of ``Batch.torch``: a
    write into one ends the process with SIGSEGV. When the last lease of the reader would be kept that way, its batch is
    copied instead, so holding many of them never stops the reading; ``copy=True`` copies all of them. What a worker
    hands to the main process is copied by torch in any case, and the batch is released then.

    Give ``copy=True`` where daemons are restarted on segments that they keep: a copy that such a restart may have torn
    raises PeerClosed (see ``Batch.intact``), while tensors that share the memory would show other samples.

    Args:
        address, table, spec, group, prefetch, on_lost: as for :class:`Reader`.
        copy: make tensors of their own, writable.
        token: as for :class:`Reader`; the workers' environment counts where there is none.
        deadline: seconds to wait for each batch before Timeout; None waits without limit.
    """

    def __init__(
        self,
        address: str,
        table: str,
        spec: Spec | str | None = None,
        *,
        group: str | None = None,
        prefetch: int | None = None,
        on_lost: Literal["raise", "count"] = "raise",
        copy: bool = False,
        token: Token | str | None = None,
        deadline: float | None = None,
    ) -> None:
        super().__init__()
        self.address = address
        self.table = table
        self.spec = spec
        self.group = group
        self.prefetch = prefetch
        self.on_lost = on_lost
        self.copy = copy
        self.token = Token.parse(token) if isinstance(token, str) else token
        self.deadline = deadline

    def __iter__(self) -> Iterator[Any]:
        reader = Reader(
            self.address, self.table, self.spec,
            group=self.group, prefetch=self.prefetch, on_lost=self.on_lost, token=self.token,
        )  # fmt: skip
        try:
            while True:
                try:
                    batch = reader.next(self.deadline)
                except EndOfStream:
                    return
                with batch:
                    tree = batch.torch(copy=self.copy or reader.held >= reader.prefetch)
                yield tree
                del tree  # the next step must not wait for what only this frame holds
        finally:
            reader.retire()
