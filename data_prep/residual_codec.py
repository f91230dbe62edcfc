"""Token vectors in a few bits a dimension: the nearest centroid, and a byte for 1, 2, 4 or 8 dimensions of the rest.

The residual compression of Santhanam et al., "ColBERTv2", NAACL 2022, section 3.3, with another code for the residuals.
There each dimension has the same buckets; here a byte names one of 256 codewords for several dimensions together, which
are first rotated so that a dimension of much variance shares its byte with those of little (the eigenvalue allocation
of Ge et al., "Optimized Product Quantization", CVPR 2013). What is kept small is not the error of the vectors but that
of their inner products, with a query's vectors spread as the passages' are: the rotation follows a linear map by the
root of their second moment.
"""

import math
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from setenc_hf.files import partial_path

SAMPLES_PER_CENTROID = 32
ITERATIONS = 6
CODEWORDS = 256
CODEWORD_SAMPLES = 40_000
CODEWORD_ITERATIONS = 10
PRODUCTS_AT_ONCE = 2**25  # of a vector with a centroid: 128 MB
POINTS_AT_ONCE = 2**11  # whose products with the codewords, 2 MB, stay in a processor's cache


class ResidualCodec:
    """Codes vectors of length 1, and restores them mapped: inner products are with queries that `map_queries` maps.

    Args:
        centroids: [centroids, dim], of length 1.
        transform: [dim, dim], maps a residual to the coordinates of the codewords.
        codewords: [bytes a vector, 256, dims a byte].
    """

    def __init__(self, centroids: Tensor, transform: Tensor, codewords: Tensor) -> None:
        self.centroids, self.transform, self.codewords = centroids, transform, codewords
        self._inverse = torch.linalg.inv(transform.double()).to(transform.dtype)
        self._mapped_centroids = centroids @ transform.T
        # each codeword as one item, [bytes * 256]: numpy takes them several times as fast as torch takes rows of floats
        item = np.dtype((np.void, 4 * codewords.shape[2]))
        self._codeword_items = codewords.cpu().flatten(0, 1).contiguous().numpy().view(item).ravel()
        self._first_items = np.arange(len(codewords)) * CODEWORDS

    @classmethod
    def train(cls, vectors: Tensor, num_centroids: int, bits: int, seed: int = 0) -> "ResidualCodec":
        """Fit centroids (spherical k-means), rotation and codewords (k-means) to a sample [vectors, dim]."""
        draw = torch.Generator().manual_seed(seed)
        centroids = vectors[torch.randperm(len(vectors), generator=draw)[:num_centroids]].clone()
        for _ in range(ITERATIONS):
            nearest = _nearest(vectors, centroids)
            sums = torch.zeros_like(centroids).index_add_(0, nearest, vectors)
            met = torch.bincount(nearest, minlength=len(centroids)) > 0
            centroids[met] = normalize(sums[met], dim=-1)  # a centroid without vectors stays where it is
        centroids = centroids.half().float()  # as they are stored
        some = vectors[torch.randperm(len(vectors), generator=draw)[:CODEWORD_SAMPLES]]
        residuals = some - centroids[_nearest(some, centroids)]
        transform = _transform(some, residuals, 8 // bits)
        groups = (residuals @ transform.T).view(len(some), -1, 8 // bits).unbind(1)  # each [some, dims a byte]
        return cls(centroids, transform, torch.stack([_codewords(group.contiguous()) for group in groups]))

    def to(self, device: torch.device | str) -> "ResidualCodec":
        """Return the codec on another device."""
        return ResidualCodec(self.centroids.to(device), self.transform.to(device), self.codewords.to(device))

    def encode(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return, per vector, its centroid, int32, residual, uint8 [vectors, dim * bits / 8], and scale, float16."""
        codes = _nearest(vectors, self.centroids)
        mapped = (vectors - self.centroids[codes]) @ self.transform.T
        groups = mapped.view(len(vectors), len(self.codewords), -1).unbind(1)
        chosen = [_nearest_codeword(group.contiguous(), words) for group, words in zip(groups, self.codewords)]
        residuals = torch.stack(chosen, dim=1).to(torch.uint8)
        restored = torch.cat([words[places] for words, places in zip(self.codewords, chosen)], dim=1)
        restored = self.centroids[codes] + restored @ self._inverse.T
        return codes.int(), residuals, (1 / restored.norm(dim=1)).half()

    def decode(self, codes: Tensor, residuals: Tensor, scales: Tensor) -> Tensor:
        """Return, on the CPU, the mapped vectors [vectors, dim] that `encode` coded, those of unit vectors."""
        items = np.take(self._codeword_items, residuals.numpy() + self._first_items, mode="clip")
        restored = torch.from_numpy(items.view(np.float32))
        return restored.add_(self._mapped_centroids[codes]).mul_(scales[:, None].float())

    def map_queries(self, vectors: Tensor) -> Tensor:
        """Return vectors [..., dim] whose inner products with mapped vectors are those of the plain ones."""
        return vectors @ self._inverse

    def save(self, path: Path) -> None:
        """Write the codec, whole or not at all."""
        partial = partial_path(path)
        values = {"centroids": self.centroids.half(), "transform": self.transform, "codewords": self.codewords}
        save_file({name: value.contiguous() for name, value in values.items()}, partial)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> "ResidualCodec":
        """Read what `save` wrote."""
        values = load_file(path)
        return cls(values["centroids"].float(), values["transform"], values["codewords"])


def centroids_for(num_vectors: float) -> int:
    """Return how many centroids an index of so many vectors gets: a power of two near 8 times their square root."""
    return 2 ** max(int(math.log2(8 * math.sqrt(max(num_vectors, 1)))), 2)


def _nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Return the index of the centroid of the largest inner product, int64 [vectors]."""
    step = max(PRODUCTS_AT_ONCE // len(centroids), 1)
    return torch.cat([(block @ centroids.T).argmax(1) for block in vectors.split(step)])


def _transform(vectors: Tensor, residuals: Tensor, dims_a_byte: int) -> Tensor:
    """Return the map [dim, dim] after which the squared error of residuals is that of inner products.

    Its rows are in the order of the bytes: dimensions are uncorrelated, and dealt out so that the product of their
    variances is about the same in every byte.
    """
    moment = (vectors.T @ vectors).double() / len(vectors)
    values, directions = torch.linalg.eigh(moment)
    root = (directions * values.clamp_min(1e-6 * values.max()).sqrt()) @ directions.T
    spread = root @ (residuals.T @ residuals).double() @ root / len(residuals)
    variances, axes = torch.linalg.eigh(spread)  # ascending
    order = _deal(variances.clamp_min(1e-12 * variances.max()).log().flip(0).tolist(), dims_a_byte)
    return (axes.flip(1)[:, order].T @ root).float()


def _deal(values: list[float], size: int) -> list[int]:
    """Deal the places of descending `values` into groups of `size` of about equal sums; return them group by group."""
    groups: list[list[int]] = [[] for _ in range(len(values) // size)]
    sums = [0.0] * len(groups)
    for deal in range(size):
        places = range(deal * len(groups), (deal + 1) * len(groups))
        # the group with the smallest sum so far gets the largest value of this deal
        for place, group in zip(places, sorted(range(len(groups)), key=lambda group: (sums[group], group))):
            groups[group].append(place)
            sums[group] += values[place]
    return [place for group in groups for place in group]


def _codewords(points: Tensor) -> Tensor:
    """Return 256 codewords [256, dims] of least squared error for points [points, dims] (k-means)."""
    # begin evenly along the first dimension, the one of the largest variance; the best codewords of normal points lie
    # as those points do, farther from their mean: Gersho, "Asymptotically optimal block quantization", 1979
    order = points[:, 0].argsort(stable=True)
    words = points[order[((torch.arange(CODEWORDS) + 0.5) / CODEWORDS * len(points)).long()]]
    words = points.mean(0) + math.sqrt(1 + 2 / points.shape[1]) * (words - points.mean(0))
    for _ in range(CODEWORD_ITERATIONS):
        nearest = _nearest_codeword(points, words)
        counts = torch.bincount(nearest, minlength=CODEWORDS)
        sums = torch.zeros_like(words).index_add_(0, nearest, points)
        words = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), words)
        words = words[words[:, 0].argsort(stable=True)]
    return words


def _nearest_codeword(points: Tensor, words: Tensor) -> Tensor:
    """Return the index of the nearest codeword of each point, int64 [points]; words ascend in their first dimension."""
    if points.shape[1] == 1:
        return torch.bucketize(points[:, 0], (words[1:, 0] + words[:-1, 0]) / 2)
    half = words.square().sum(1) / 2
    blocks = points.split(POINTS_AT_ONCE)
    return torch.cat([torch.addmm(half, block, words.T, beta=-1).argmax(1) for block in blocks])
