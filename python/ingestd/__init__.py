"""Push samples to ingestd and read its batches as numpy arrays, without a copy; send gradients, and sum them.

=====================  =================================================================================
:class:`Spec`          what one sample is: names, dtypes and shapes of its leaves
:class:`Producer`      pushes samples over ``tcp://``, ``tls://``, ``quic://`` or ``unix://``
:class:`FillProducer`  writes samples where trainers read them, on the daemon's machine
:class:`Reader`        leases batches over ``unix://`` as a trainer in a process of its own
:class:`Batch`         one leased batch: read-only arrays over the shared memory, until its release
:class:`Publisher`     publishes generations of a model's tensors
:class:`Subscription`  reads the newest one, mapped over ``unix://`` or received over ``tcp://``
:class:`Weights`       one generation, pinned: read-only arrays by name, which keep the pin
:class:`Manifest`      which tensors there are: names, dtypes, shapes, encodings
:class:`StepProducer`  sends steps of named tensors, such as gradients: each complete, or absent
:class:`GradReader`    reads the steps of all producers, and sums them from where they lie
:class:`Token`         who a client is to a daemon that asks for it
:class:`TLS`           whom it trusts over ``tls://`` and ``quic://``, and its certificate
:mod:`ingestd.torch`   the batches as a dataset for torch's DataLoader
:mod:`ingestd.errors`  what is raised, and when
=====================  =================================================================================

The numpy arrays of a batch are valid until its release. What ``Batch.torch``, ``Batch.jax`` and ``Batch.dlpack`` make
keeps the batch leased as long as it lives. ``torch.from_numpy`` and ``jax.numpy.asarray`` share the memory of the numpy
array that they are given, so what they make must be used before the release, or be made of ``batch.copy()``.
"""

from .auth import Token
from .batch import Batch
from .errors import (
    AllHeld,
    BadSum,
    Banned,
    ChunkError,
    Closed,
    DaemonUnproven,
    Difference,
    Ended,
    EndOfStream,
    Error,
    FormatError,
    Full,
    Lost,
    LostBatches,
    NoGeneration,
    NotAuthenticated,
    NotChallenged,
    Note,
    NotWritten,
    OldGeneration,
    PeerClosed,
    Pin,
    Pinned,
    Refused,
    Released,
    SessionTaken,
    ShuttingDown,
    SpecError,
    StepIncomplete,
    StepOrder,
    StepRefused,
    StepTimeout,
    TensorMismatch,
    Timeout,
    TLSError,
)
from .fill import FillProducer, Slots
from .grads import GradReader, GradStats, GradStep
from .manifest import Manifest, Tensor
from .producer import Producer
from .reader import Reader
from .spec import Leaf, Spec, diff
from .steps import StepProducer, StepTx
from .tls import TLS
from .version import __version__
from .weights import Draft, Published, Publisher, Subscription, Weights, subscribe

__all__ = [
    "TLS",
    "AllHeld",
    "BadSum",
    "Banned",
    "Batch",
    "ChunkError",
    "Closed",
    "DaemonUnproven",
    "Difference",
    "Draft",
    "EndOfStream",
    "Ended",
    "Error",
    "FillProducer",
    "FormatError",
    "Full",
    "GradReader",
    "GradStats",
    "GradStep",
    "Leaf",
    "Lost",
    "LostBatches",
    "Manifest",
    "NoGeneration",
    "NotAuthenticated",
    "NotChallenged",
    "NotWritten",
    "Note",
    "OldGeneration",
    "PeerClosed",
    "Pin",
    "Pinned",
    "Producer",
    "Published",
    "Publisher",
    "Reader",
    "Refused",
    "Released",
    "SessionTaken",
    "ShuttingDown",
    "Slots",
    "Spec",
    "SpecError",
    "StepIncomplete",
    "StepOrder",
    "StepProducer",
    "StepRefused",
    "StepTimeout",
    "StepTx",
    "Subscription",
    "TLSError",
    "Tensor",
    "TensorMismatch",
    "Timeout",
    "Token",
    "Weights",
    "__version__",
    "diff",
    "subscribe",
]
