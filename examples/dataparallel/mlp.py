"""The model: a multilayer perceptron with tanh, softmax and cross-entropy, its gradients, and momentum, in plain numpy.

Everything is a dict of named arrays, which is what travels: parameters out, gradients of the same names in. Parameters
are only read by :func:`gradients`, so they may be views of shared memory. In float64 the same code is checked against
finite differences. tanh and not ReLU, because it has no edge at which a rounding error becomes a large one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

SIZES = (64, 256, 256, 10)  # pixels, two hidden layers, digits


def initial(seed: int = 0, sizes: tuple[int, ...] = SIZES) -> Arrays:
    """Parameters to begin with, float32: ``layers.N.weight`` (in, out) and ``layers.N.bias`` (out,)."""
    rng = np.random.default_rng(seed)
    parameters: Arrays = {}
    for n, (rows, columns) in enumerate(zip(sizes, sizes[1:])):
        scale = np.sqrt(1 / rows)
        parameters[f"layers.{n}.weight"] = rng.normal(0, scale, (rows, columns)).astype(np.float32)
        parameters[f"layers.{n}.bias"] = np.zeros(columns, np.float32)
    return parameters


def gradients(parameters: Arrays, images: NDArray[Any], labels: NDArray[np.int32]) -> Arrays:
    """Gradients of the mean loss of a batch: images (n, 8, 8), labels (n,)."""
    activations, scores = _forward(parameters, images)
    error = np.exp(scores - scores.max(axis=1, keepdims=True))
    error /= error.sum(axis=1, keepdims=True)
    error[np.arange(len(labels)), labels] -= 1
    error /= error.dtype.type(len(labels))
    out: Arrays = {}
    for n in reversed(range(len(activations))):
        out[f"layers.{n}.weight"] = activations[n].T @ error
        out[f"layers.{n}.bias"] = error.sum(axis=0)
        if n > 0:
            error = error @ parameters[f"layers.{n}.weight"].T
            error *= 1 - activations[n] * activations[n]
    return {name: out[name] for name in parameters}


def loss(parameters: Arrays, images: NDArray[Any], labels: NDArray[np.int32]) -> float:
    """Mean cross-entropy of a batch."""
    _, scores = _forward(parameters, images)
    shifted = scores - scores.max(axis=1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]).mean())


def accuracy(parameters: Arrays, images: NDArray[Any], labels: NDArray[np.int32]) -> float:
    """The share of the images whose digit is found."""
    _, scores = _forward(parameters, images)
    return float((scores.argmax(axis=1) == labels).mean())


def _forward(parameters: Arrays, images: NDArray[Any]) -> tuple[list[NDArray[Any]], NDArray[Any]]:
    """The input of every layer, and the scores."""
    layers = len(parameters) // 2
    activations = [images.reshape(len(images), -1)]
    for n in range(layers):
        out = activations[-1] @ parameters[f"layers.{n}.weight"] + parameters[f"layers.{n}.bias"]
        if n == layers - 1:
            break
        activations.append(np.tanh(out))
    return activations, out


class Momentum:
    """Stochastic gradient descent with momentum; changes the parameters where they are."""

    def __init__(self, parameters: Arrays, rate: float = 0.05, momentum: float = 0.9) -> None:
        self.rate, self.momentum = np.float32(rate), np.float32(momentum)
        self.velocity = {name: np.zeros_like(array) for name, array in parameters.items()}

    def update(self, parameters: Arrays, mean: Arrays) -> None:
        """One step along the mean gradients."""
        for name, parameter in parameters.items():
            velocity = self.velocity[name]
            velocity *= self.momentum
            velocity -= self.rate * mean[name]
            parameter += velocity
