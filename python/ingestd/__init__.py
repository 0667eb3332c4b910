"""Push samples to ingestd and read its batches as numpy arrays, without a copy.

====================  ==================================================================================
:class:`Spec`         what one sample is: names, dtypes and shapes of its leaves
:class:`Producer`     pushes samples over ``tcp://`` or ``unix://``
:class:`Reader`       leases batches over ``unix://`` as a trainer in a process of its own
:class:`Batch`        one leased batch: read-only arrays over the shared memory, until its release
:mod:`ingestd.errors` what is raised, and when
====================  ==================================================================================

Arrays of a batch are valid until its release. ``torch.from_numpy`` and ``jax.numpy.asarray`` share the memory of the
array that they are given (torch even lets it look writable), so what they make of a batch must either be used before
the release or be made of ``batch.copy()``.
"""

from .batch import Batch
from .errors import (
    AllHeld,
    Closed,
    Difference,
    Ended,
    EndOfStream,
    Error,
    FormatError,
    Full,
    Lost,
    LostBatches,
    Note,
    PeerClosed,
    Refused,
    Released,
    SessionTaken,
    ShuttingDown,
    SpecError,
    Timeout,
)
from .producer import Producer
from .reader import Reader
from .spec import Leaf, Spec, diff
from .version import __version__

__all__ = [
    "AllHeld",
    "Batch",
    "Closed",
    "Difference",
    "EndOfStream",
    "Ended",
    "Error",
    "FormatError",
    "Full",
    "Leaf",
    "Lost",
    "LostBatches",
    "Note",
    "PeerClosed",
    "Producer",
    "Reader",
    "Refused",
    "Released",
    "SessionTaken",
    "ShuttingDown",
    "Spec",
    "SpecError",
    "Timeout",
    "__version__",
    "diff",
]
