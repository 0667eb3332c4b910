"""The classifier: one hidden layer, softmax, stochastic gradient descent with momentum, in plain numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PIXELS = 64
CLASSES = 10


class Classifier:
    """64 pixels -> hidden ReLU units -> 10 digits. The same seed and batches give the same weights."""

    def __init__(self, hidden: int = 64, rate: float = 0.2, momentum: float = 0.9, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.rate, self.momentum = np.float32(rate), np.float32(momentum)
        self.weights = [
            rng.normal(0, (2 / PIXELS) ** 0.5, (PIXELS, hidden)).astype(np.float32),
            np.zeros(hidden, np.float32),
            rng.normal(0, (1 / hidden) ** 0.5, (hidden, CLASSES)).astype(np.float32),
            np.zeros(CLASSES, np.float32),
        ]
        self.velocity = [np.zeros_like(weight) for weight in self.weights]

    def step(self, images: NDArray[np.float32], labels: NDArray[np.int32]) -> None:
        """One step on a batch, images (n, 8, 8) and labels (n,): both are only read, so may be the ring."""
        pixels = images.reshape(len(images), PIXELS)
        hidden, scores = self._forward(pixels)
        error = np.exp(scores - scores.max(axis=1, keepdims=True))
        error /= error.sum(axis=1, keepdims=True)
        error[np.arange(len(labels)), labels] -= 1
        error /= np.float32(len(labels))
        back = error @ self.weights[2].T
        back[hidden <= 0] = 0
        gradients = [pixels.T @ back, back.sum(axis=0), hidden.T @ error, error.sum(axis=0)]
        for weight, velocity, gradient in zip(self.weights, self.velocity, gradients):
            velocity *= self.momentum
            velocity -= self.rate * gradient
            weight += velocity

    def accuracy(self, images: NDArray[np.float32], labels: NDArray[np.int32]) -> float:
        """The share of the images whose digit is found."""
        _, scores = self._forward(images.reshape(len(images), PIXELS))
        return float((scores.argmax(axis=1) == labels).mean())

    def _forward(self, pixels: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        hidden = np.maximum(pixels @ self.weights[0] + self.weights[1], 0)
        return hidden, hidden @ self.weights[2] + self.weights[3]
