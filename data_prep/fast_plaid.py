"""The engine fast-plaid: search of token vectors by LightOn's package of that name, where the installed torch allows.

Its wheels are compiled against one release of torch, and end the process under another one. So what it needs is read
from its metadata, and it is imported only where that is what is installed.
"""

import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from torch import Tensor

from setenc_hf.errors import InputError
from setenc_hf.files import atomic_folder

PACKAGE = "fast-plaid"
INDEX_FOLDER = "fast-plaid"


def needed_torch() -> str:
    """Return the versions of torch that the installed fast-plaid needs, as `==2.11.0`.

    A wheel's version ends in the release it is compiled against (1.7.0.2110: torch 2.11.0), whatever it asks for.
    Raises `InputError` where it is not installed.
    """
    try:
        installed = Version(version(PACKAGE))
    except PackageNotFoundError:
        raise InputError(
            "--engine fast-plaid needs the package fast-plaid, built for the installed torch "
            f"{torch.__version__}: pip install fast-plaid, or take --engine plaid"
        ) from None
    if len(installed.release) == 4 and len(built_for := str(installed.release[3])) > 2:
        return f"=={built_for[0]}.{built_for[1:-1]}.{built_for[-1]}"
    needed = (Requirement(line) for line in requires(PACKAGE) or [])
    return next((str(found.specifier) for found in needed if found.name == "torch"), "")


def open_package(torch_version: str | None = None) -> Any:
    """Import fast-plaid's class; raises `InputError` in one line, before any import, where it would end the process."""
    installed, needed = torch_version or str(torch.__version__), needed_torch()
    if not Requirement(f"torch{needed}").specifier.contains(installed, prereleases=True):
        raise InputError(
            f"--engine fast-plaid: fast-plaid {version(PACKAGE)} needs torch {needed} and torch {installed} is "
            "installed, under which it ends the process; install one that is built for it, or take --engine plaid"
        )
    from fast_plaid.search import FastPlaid

    return FastPlaid


def build_index(folder: Path, vectors: Sequence[Tensor], bits: int) -> None:
    """Write fast-plaid's own index in `folder`, whole or not at all.

    Args:
        vectors: of each passage, float16 [tokens, dim]; mapped arrays will do.
        bits: of a dimension's residual.
    """
    engine = open_package()
    shutil.rmtree(folder / INDEX_FOLDER, ignore_errors=True)
    torch.manual_seed(0)  # the passages its centroids are trained on are drawn from torch's own generator
    with atomic_folder(folder / INDEX_FOLDER) as made, engine(index=str(made)) as index:
        index.create(documents_embeddings=list(vectors), nbits=bits, seed=0)


class FastPlaidIndex:
    """An index of `build_index`, open for search."""

    def __init__(self, folder: Path, probes: int, candidates: int) -> None:
        self.probes, self.candidates = probes, candidates
        self.index = open_package()(index=str(folder / INDEX_FOLDER))

    def search(self, queries: Sequence[Tensor], depth: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield, per query of [tokens, dim], the rows found, int64 [found], and their scores, float32 [found]."""
        for found in self.index.search(
            queries_embeddings=list(queries),
            top_k=depth,
            n_full_scores=max(self.candidates, 4 * depth),
            n_ivf_probe=self.probes,
            show_progress=False,
        ):
            yield np.array([row for row, _ in found], np.int64), np.array([score for _, score in found], np.float32)
