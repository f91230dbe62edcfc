"""The engine fast-plaid, with a stand-in for the package: what is refused before any import, and what it is given."""

import importlib.metadata
import json
import sys
import types

import numpy as np
import pytest
import torch

from data_prep import fast_plaid
from data_prep.colbert import max_sim
from data_prep.retrieve import main
from setenc_hf.errors import InputError
from setenc_hf.trec import read_lists
from test_colbert import checkpoint, write_collection  # noqa: F401, a fixture


class FastPlaid:
    """Keeps what it is given and scores every passage, under the signatures of fast-plaid 1.5."""

    def __init__(self, index, device=None, low_memory=True):
        self.path = f"{index}/vectors.pt"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def create(self, documents_embeddings, kmeans_niters=4, nbits=4, batch_size=50_000, seed=42):
        assert nbits == 2
        assert all(vectors.dtype == torch.float16 for vectors in documents_embeddings)
        torch.save([vectors.clone() for vectors in documents_embeddings], self.path)

    def search(self, queries_embeddings, top_k=10, n_full_scores=4096, n_ivf_probe=8, show_progress=True):
        assert (n_full_scores, n_ivf_probe, show_progress) == (80, 3, False)
        vectors = torch.load(self.path)
        lengths = np.array([len(rows) for rows in vectors])
        for row in max_sim(torch.cat(vectors).float(), lengths, queries_embeddings):
            best = np.argsort(-row, kind="stable")[:top_k]
            yield [(int(place), float(row[place])) for place in best]


@pytest.fixture
def installed(monkeypatch):
    """Pretend that a version of fast-plaid is installed, with what it requires."""

    def pretend(version, *needs):
        def found(name):
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(fast_plaid, "version", found)
        monkeypatch.setattr(fast_plaid, "requires", lambda name: list(needs))

    return pretend


@pytest.mark.parametrize(
    ("version", "needs", "torch_version", "fits"),
    [
        ("1.7.0.2110", "torch==2.11.0", "2.11.0+cu128", True),
        ("1.7.0.2110", "torch==2.11.0", "2.13.0+cpu", False),
        ("1.7.0.2110", "torch>=2.7", "2.13.0", False),  # the wheel decides, not what it asks for
        ("1.7.0.271", "torch>=2.7", "2.7.1", True),
        ("1.7.0", "torch (<2.12,>=2.7)", "2.11.0", True),
        ("1.7.0", "torch (<2.12,>=2.7)", "2.13.0", False),
    ],
)
def test_what_is_not_built_for_the_installed_torch_is_never_imported(
    installed, monkeypatch, version, needs, torch_version, fits
):
    installed(version, "numpy>=1.26", needs)
    monkeypatch.setitem(sys.modules, "fast_plaid", None)  # an import would raise ImportError
    if fits:
        with pytest.raises(ImportError):
            fast_plaid.open_package(torch_version)
    else:
        with pytest.raises(InputError, match=rf"fast-plaid {version} needs torch .* and torch 2\.13"):
            fast_plaid.open_package(torch_version)


def test_the_command_ends_before_any_work(installed, checkpoint, tmp_path):  # noqa: F811
    folder = write_collection(tmp_path / "c", range(40))
    arguments = ["--collection", str(folder), "--retriever", "colbert", "--model", str(checkpoint), "--engine",
                 "fast-plaid", "--index-dir", str(tmp_path / "i"), "--output", str(tmp_path / "c.run")]  # fmt: skip
    installed(None)
    with pytest.raises(InputError, match="needs the package fast-plaid, built for the installed torch"):
        main(arguments)
    installed("1.7.0.270")
    with pytest.raises(InputError, match="needs torch ==2.7.0"):
        main(arguments)
    assert not (tmp_path / "i").exists()


def test_runs_are_those_of_exact_search(installed, monkeypatch, checkpoint, tmp_path):  # noqa: F811
    release = torch.__version__.partition("+")[0]
    installed("9.9", f"torch=={release}")
    search = types.ModuleType("fast_plaid.search")
    search.FastPlaid = FastPlaid
    monkeypatch.setitem(sys.modules, "fast_plaid", types.ModuleType("fast_plaid"))
    monkeypatch.setitem(sys.modules, "fast_plaid.search", search)
    folder, more = write_collection(tmp_path / "c", range(40)), write_collection(tmp_path / "d", range(30, 60))
    both = write_collection(tmp_path / "e", range(60))

    def lists(collection, engine, *options, index=None):
        output = tmp_path / f"{engine}.run"
        main(["--collection", str(collection), "--retriever", "colbert", "--model", str(checkpoint), "--num-proc=1",
              "--depth=20", "--index-dir", str(tmp_path / (index or engine)), "--output", str(output),
              "--engine", engine, *options])  # fmt: skip
        return {found.query_id: [line.doc_id for line in found.lines] for found in read_lists(output)}

    options = ["--bits", "2", "--probes", "3", "--candidates", "80"]
    assert lists(folder, "fast-plaid", *options) == lists(folder, "exact")
    assert json.loads((tmp_path / "fast-plaid" / "index.json").read_text())["bits"] == 2
    grown = lists(more, "fast-plaid", *options, "--append")
    assert grown == lists(both, "exact", index="both")
