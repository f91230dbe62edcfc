"""Token vectors in a few bits a dimension: the nearest centroid, and what remains of each dimension in 1, 2 or 4 bits.

The residual compression of Santhanam et al., "ColBERTv2", NAACL 2022, section 3.3, with buckets of least squared error
in place of quantiles.
"""

import math
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from setenc_hf.files import partial_path

SAMPLES_PER_CENTROID = 32
ITERATIONS = 6
BUCKET_ITERATIONS = 20
PRODUCTS_AT_ONCE = 2**25  # of a vector with a centroid: 128 MB


class ResidualCodec:
    """Codes vectors of length 1 and restores them.

    Args:
        centroids: [centroids, dim], of length 1.
        cutoffs: [2**bits - 1], where one bucket of residuals ends and the next begins.
        weights: [2**bits], the residual that a bucket stands for.
    """

    def __init__(self, centroids: Tensor, cutoffs: Tensor, weights: Tensor) -> None:
        self.centroids, self.cutoffs, self.weights = centroids, cutoffs, weights
        self.bits = int(math.log2(len(weights)))
        per_byte = 8 // self.bits
        self._shifts = torch.arange(per_byte, dtype=torch.uint8) * self.bits
        byte = torch.arange(256)[:, None]
        # byte -> the residuals of its dimensions: one look-up restores several dimensions
        self._restored = weights[(byte >> self._shifts.long()) & (2**self.bits - 1)]  # [256, dims a byte]

    @classmethod
    def train(cls, vectors: Tensor, num_centroids: int, bits: int, seed: int = 0) -> "ResidualCodec":
        """Fit centroids (spherical k-means) and buckets (Lloyd's, one dimension) to a sample [vectors, dim]."""
        draw = torch.Generator().manual_seed(seed)
        centroids = vectors[torch.randperm(len(vectors), generator=draw)[:num_centroids]].clone()
        for _ in range(ITERATIONS):
            nearest = _nearest(vectors, centroids)
            sums = torch.zeros_like(centroids).index_add_(0, nearest, vectors)
            met = torch.bincount(nearest, minlength=len(centroids)) > 0
            centroids[met] = normalize(sums[met], dim=-1)  # a centroid without vectors stays where it is
        centroids = centroids.half().float()  # as they are stored
        some = vectors[torch.randperm(len(vectors), generator=draw)[:50_000]]
        residuals = (some - centroids[_nearest(some, centroids)]).flatten()
        residuals = residuals[:: max(len(residuals) // 1_000_000, 1)].sort().values
        weights = residuals[((torch.arange(2**bits) + 0.5) / 2**bits * len(residuals)).long()]
        for _ in range(BUCKET_ITERATIONS):  # Lloyd's: a bucket ends halfway to the next, and stands for its mean
            cutoffs = (weights[1:] + weights[:-1]) / 2
            ends = torch.searchsorted(residuals, cutoffs).tolist()
            weights = torch.stack([part.mean() for part in residuals.tensor_split(ends)]).nan_to_num()
        return cls(centroids, (weights[1:] + weights[:-1]) / 2, weights)

    def encode(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the centroid of each vector, int32 [vectors], and its residuals, uint8 [vectors, dim * bits / 8]."""
        codes = _nearest(vectors, self.centroids)
        buckets = torch.bucketize(vectors - self.centroids[codes], self.cutoffs).to(torch.uint8)
        parts = buckets.view(len(vectors), -1, len(self._shifts)) << self._shifts
        return codes.int(), parts.sum(-1, dtype=torch.uint8)

    def decode(self, codes: Tensor, residuals: Tensor) -> Tensor:
        """Return the vectors [vectors, dim] that codes and residuals stand for, of length 1."""
        restored = self._restored[residuals.int()].flatten(1)
        return normalize(restored.add_(self.centroids[codes]), dim=-1)

    def save(self, path: Path) -> None:
        """Write the codec, whole or not at all."""
        partial = partial_path(path)
        values = {"centroids": self.centroids.half(), "cutoffs": self.cutoffs, "weights": self.weights}
        save_file(values, partial)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> "ResidualCodec":
        """Read what `save` wrote."""
        values = load_file(path)
        return cls(values["centroids"].float(), values["cutoffs"], values["weights"])


def centroids_for(num_vectors: float) -> int:
    """Return how many centroids an index of so many vectors gets: a power of two near 8 times their square root."""
    return 2 ** max(int(math.log2(8 * math.sqrt(max(num_vectors, 1)))), 2)


def _nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Return the index of the centroid of the largest inner product, int64 [vectors]."""
    step = max(PRODUCTS_AT_ONCE // len(centroids), 1)
    return torch.cat([(block @ centroids.T).argmax(1) for block in vectors.split(step)])
