"""Late interaction: the encoder is the format's definition, MaxSim is exact, the index resumes and appends."""

import json
import os
import random
import shutil
import signal
import string
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizer

from data_prep.colbert import ColbertSearcher, max_sim, overlap, search_collection
from data_prep.colbert_index import build_colbert
from data_prep.late_interaction import LateInteractionEncoder
from data_prep.residual_codec import ResidualCodec, _deal, centroids_for
from data_prep.retrieve import main
from setenc_hf.collection import open_collection
from setenc_hf.errors import InputError
from setenc_hf.trec import read_lists

ROOT = Path(__file__).parents[1]
WORDS = [f"w{number}" for number in range(60)]
TEXTS = ["w1 w2, w3! (w4)", "", "w5 " * 40, "[unused0] w6 unknown . w7"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random model in ColBERTv2's own format."""
    folder = tmp_path_factory.mktemp("model") / "colbert"
    folder.mkdir()
    special = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[Q]", "[D]"]
    vocabulary = [*special, *string.punctuation, *WORDS, "unused", "##0", "w"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, initializer_range=0.5, architectures=["HF_ColBERT"],
    )  # fmt: skip
    weights = {f"bert.{name}": value for name, value in BertModel(config).state_dict().items()}
    weights["linear.weight"] = torch.randn(16, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    metadata = {"query_maxlen": 12, "doc_maxlen": 20, "query_token_id": "[unused0]", "doc_token_id": "[unused1]"}
    (folder / "artifact.metadata").write_text(json.dumps(metadata))
    config_json = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config_json | {"architectures": ["HF_ColBERT"]}))
    return folder


@pytest.fixture(scope="module")
def encoder(checkpoint):
    torch.set_num_threads(1)  # the bits of a product depend on the threads that share it
    return LateInteractionEncoder(str(checkpoint))


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return open_collection(str(write_collection(tmp_path_factory.mktemp("c"), range(400))))


def write_collection(folder, rows):
    folder.mkdir(exist_ok=True)
    with open(folder / "corpus.jsonl", "w") as corpus:
        for row in rows:
            draw = random.Random(row)
            text = " ".join(draw.choices(WORDS, k=draw.randint(1, 16)))
            corpus.write(json.dumps({"doc_id": f"D-{row}/1", "text": text}) + "\n")
    queries = (f"{row:04d}\t{' '.join(random.Random(-row - 1).choices(WORDS, k=4))}\n" for row in range(30))
    (folder / "queries.tsv").write_text("".join(queries))
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def build(collection, folder, encoder, **options):
    folder.mkdir(exist_ok=True)
    build_colbert(collection, folder, encoder, **options)
    return ColbertSearcher(folder)


def test_vectors_are_those_the_format_defines(checkpoint, encoder):
    weights = load_file(checkpoint / "model.safetensors")
    bert = BertModel(BertConfig.from_pretrained(checkpoint)).eval()
    bert.load_state_dict({name.removeprefix("bert."): value for name, value in weights.items() if "bert." in name})
    tokenizer = BertTokenizer(str(checkpoint / "vocab.txt"))
    skipped = {tokenizer.convert_tokens_to_ids(mark) for mark in string.punctuation}

    def vectors(ids, attended):
        with torch.no_grad():
            states = bert(torch.tensor([ids]), attention_mask=torch.tensor([attended])).last_hidden_state
        return torch.nn.functional.normalize(states[0] @ weights["linear.weight"].T, dim=-1)

    for text, query, passage in zip(TEXTS, encoder.encode_queries(TEXTS), encoder.encode_passages(TEXTS)):
        ids = tokenizer.encode(text, add_special_tokens=False)
        cls, sep, mask = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id
        asked = [cls, 1, *ids[:9], sep]
        full = asked + [mask] * (12 - len(asked))
        torch.testing.assert_close(query, vectors(full, [1] * len(asked) + [0] * (12 - len(asked))), atol=1e-5, rtol=0)
        told = [cls, 2, *ids[:17], sep]
        kept = [place for place, token in enumerate(told) if token not in skipped]
        torch.testing.assert_close(passage, vectors(told, [1] * len(told))[kept], atol=1e-5, rtol=0)
        assert encoder.count_vectors([text]) == [len(passage)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["HF_ColBERT", "MultiVectorEncoder", "PyLate", "min"])
def test_vectors_equal_sentence_transformers(checkpoint, tmp_path, kind):
    library = pytest.importorskip("sentence_transformers")
    folder = checkpoint
    if kind == "MultiVectorEncoder":
        folder = tmp_path / "saved"
        library.MultiVectorEncoder(str(checkpoint)).save_pretrained(str(folder))
    if kind == "min":  # at least 12 tokens, at most 20
        folder = tmp_path / "saved"
        saved = library.MultiVectorEncoder(str(checkpoint))
        saved[0].query_expansion = {"strategy": "min", "length": 12}
        saved[0].query_length = 20
        saved.save_pretrained(str(folder))
    if kind == "PyLate":
        folder = pylate_folder(checkpoint, tmp_path / "pylate")
    ours, theirs = LateInteractionEncoder(str(folder)), library.MultiVectorEncoder(str(folder))
    texts = TEXTS[:3]
    for mine, other in zip(ours.encode_queries(texts), theirs.encode_query(texts)):
        torch.testing.assert_close(mine, torch.as_tensor(other), atol=1e-5, rtol=0)
    for mine, other in zip(ours.encode_passages(texts), theirs.encode_document(texts)):
        torch.testing.assert_close(mine, torch.as_tensor(other), atol=1e-5, rtol=0)


def pylate_folder(checkpoint, folder):
    """Write the checkpoint as PyLate lays it out."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("artifact.metadata"))
    weights = load_file(checkpoint / "model.safetensors")
    projection = weights.pop("linear.weight")
    save_file({name.removeprefix("bert."): value for name, value in weights.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    config = json.loads((checkpoint / "config.json").read_text()) | {"architectures": ["BertModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "1_Dense").mkdir()
    save_file({"linear.weight": projection}, folder / "1_Dense" / "model.safetensors")
    dense = {"in_features": 32, "out_features": 16, "bias": False}
    dense["activation_function"] = "torch.nn.modules.linear.Identity"
    (folder / "1_Dense" / "config.json").write_text(json.dumps(dense))
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Dense", "type": "pylate.models.Dense.Dense"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 19, "do_lower_case": False}))
    settings = {"query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 12, "document_length": 20}
    settings |= {"attend_to_expansion_tokens": True, "skiplist_words": [",", "!"], "model_type": "ColBERT"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return folder


def test_checkpoints_that_cannot_work_are_refused_by_name(checkpoint, tmp_path):
    folder = pylate_folder(checkpoint, tmp_path / "pylate")
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules, {"path": "2_X", "type": "library.TokenPooling"}]))
    with pytest.raises(InputError, match=r"modules.json: the module TokenPooling is not supported"):
        LateInteractionEncoder(str(folder))
    with pytest.raises(InputError, match="texts of 65 tokens do not fit the encoder's 64 positions"):
        LateInteractionEncoder(str(checkpoint), doc_length=65)
    plain = tmp_path / "plain"
    shutil.copytree(checkpoint, plain)
    (plain / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        LateInteractionEncoder(str(plain))
    (plain / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(InputError, match="no late-interaction checkpoint"):
        LateInteractionEncoder(str(plain))


def test_max_sim_is_the_sum_of_maxima():
    draw = torch.Generator().manual_seed(1)
    passages = [torch.randn(length, 8, generator=draw) for length in (1, 5, 3, 1)]
    queries = [torch.randn(length, 8, generator=draw) for length in (4, 1)]
    found = max_sim(torch.cat(passages), np.array([len(rows) for rows in passages]), queries)
    expected = [[float((query @ passage.T).max(1).values.sum()) for passage in passages] for query in queries]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_name_the_codeword_of_the_smallest_error(bits):
    draw = torch.Generator().manual_seed(2)
    vectors = torch.nn.functional.normalize(torch.randn(2000, 16, generator=draw) * torch.linspace(1, 3, 16), dim=-1)
    codec = ResidualCodec.train(vectors, 8, bits)
    codes, residuals, scales = codec.encode(vectors)
    assert residuals.shape == (2000, 16 * bits // 8)
    assert torch.equal(codes.long(), (vectors @ codec.centroids.T).argmax(1))
    mapped = (vectors - codec.centroids[codes]) @ codec.transform.T
    decoded = codec.decode(codes, residuals, scales)
    lengths = (decoded @ torch.linalg.inv(codec.transform).T).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(2000), atol=1e-3, rtol=0)
    restored = decoded / scales[:, None].float() - codec.centroids[codes] @ codec.transform.T
    size = 8 // bits
    for place, words in enumerate(codec.codewords):
        part = slice(place * size, (place + 1) * size)
        errors = (mapped[:, part, None] - words.T).norm(dim=1)  # [vectors, codewords]
        torch.testing.assert_close((mapped - restored)[:, part].norm(dim=1), errors.amin(1), atol=1e-5, rtol=0)
    queries = vectors[:50]
    found = codec.map_queries(queries) @ decoded.T
    exact = queries @ vectors.T
    assert float((found - exact).square().mean().sqrt()) < {1: 0.12, 2: 0.075, 4: 0.02, 8: 0.002}[bits]


def test_each_byte_gets_about_the_same_product_of_variances():
    values = [float(value) for value in range(64, 0, -1)]
    order = _deal(values, 4)
    assert sorted(order) == list(range(64))
    sums = [sum(values[place] for place in order[start : start + 4]) for start in range(0, 64, 4)]
    assert max(sums) - min(sums) <= 2
    assert all(order[start] < 16 for start in range(0, 64, 4))  # the first dimension of a byte varies most


def test_centroids_grow_with_the_root_of_the_vectors():
    assert [centroids_for(count) for count in (1, 1_000_000, 637_000_000)] == [8, 4096, 131072]


def test_exact_search_equals_scoring_every_passage(collection, encoder, tmp_path):
    searcher = build(collection, tmp_path / "i", encoder, engine="exact", chunk_passages=150)
    vectors = encoder.encode_queries(list(collection.queries().values())[:10])
    docs = list(collection.docs())
    passages = encoder.encode_passages([doc.text for doc in docs])
    for query, found, streamed in zip(
        vectors, searcher.search(vectors, 50), search_collection(collection, encoder, vectors, 50)
    ):
        scores = {doc.doc_id: float((query @ rows.T).max(1).values.sum()) for doc, rows in zip(docs, passages)}
        assert len(found) == 50
        assert dict(found) == pytest.approx({doc_id: scores[doc_id] for doc_id, _ in found}, abs=2e-2)  # 16 bits
        assert overlap(streamed, found) >= 0.98
        assert dict(streamed) == pytest.approx({doc_id: scores[doc_id] for doc_id, _ in streamed}, abs=1e-4)


def test_compressed_search_overlaps_exact_search(collection, encoder, tmp_path):
    searcher = build(collection, tmp_path / "i", encoder, chunk_passages=150)
    vectors = encoder.encode_queries(list(collection.queries().values()))
    exact = search_collection(collection, encoder, vectors, 100)
    parts = [overlap(found, best) for found, best in zip(searcher.search(vectors, 100), exact)]
    assert sum(parts) / len(parts) >= 0.97


def test_appended_passages_are_found_as_if_indexed_together(collection, encoder, tmp_path):
    more = open_collection(str(write_collection(tmp_path / "more", range(300, 450))))  # 100 of them are known
    both = open_collection(str(write_collection(tmp_path / "both", range(450))))
    for engine in ("exact", "plaid"):
        folder = tmp_path / engine
        build(collection, folder, encoder, engine=engine, chunk_passages=150)
        with pytest.raises(InputError, match="pass --append"):
            build(more, folder, encoder, engine=engine)
        grown = build(more, folder, encoder, engine=engine, append=True)
        before = contents(folder)
        build(more, folder, encoder, engine=engine, append=True)
        assert contents(folder) == before
        vectors = encoder.encode_queries(list(collection.queries().values())[:5])
        exact = search_collection(both, encoder, vectors, 50)
        assert len(grown.doc_ids) == 450
        assert all(overlap(found, best) >= 0.9 for found, best in zip(grown.search(vectors, 50), exact))


def test_an_id_that_stands_twice_is_named_before_anything_is_encoded(encoder, tmp_path, monkeypatch):
    twice = open_collection(str(write_collection(tmp_path / "c", [*range(20), 7])))
    monkeypatch.setattr(encoder, "encode_passages", None)
    with pytest.raises(InputError, match=r"document 'D-7/1' stands 2 times .* \(passages 8 and 21\)"):
        build(twice, tmp_path / "index", encoder)
    assert contents(tmp_path / "index").keys() == {".lock"}


def test_a_killed_append_is_gone_on_with_and_nothing_else_is(collection, encoder, tmp_path, monkeypatch):
    from data_prep import colbert_index

    more = open_collection(str(write_collection(tmp_path / "more", range(300, 500))))
    folder = tmp_path / "i"
    build(collection, folder, encoder, engine="exact", chunk_passages=50)
    write, written = colbert_index.write_chunk, []

    def killed(path, *rest):
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt
        write(path, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(colbert_index, "write_chunk", killed)
        build(more, folder, encoder, engine="exact", append=True)
    assert colbert_index.unfinished_chunks(folder) == written[:1]
    for append in (False, True):
        with pytest.raises(InputError, match="its last collection is not indexed to the end"):
            build(collection, folder, encoder, engine="exact", append=append)
    assert len(build(more, folder, encoder, engine="exact", append=True).doc_ids) == 500
    assert colbert_index.unfinished_chunks(folder) == []
    assert len(build(collection, folder, encoder, engine="exact").doc_ids) == 500


def test_what_an_interrupted_build_has_made_needs_no_room_again(tmp_path, monkeypatch):
    from data_prep.estimates import Estimate, check_disk

    (tmp_path / "part").write_bytes(bytes(600))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=500))
    estimate = Estimate(passages=1, disk=1000, peak_disk=1000, memory=0)
    check_disk(tmp_path, estimate, [tmp_path])
    with pytest.raises(InputError, match="500 bytes are free and about 1.0 KB are needed"):
        check_disk(tmp_path, estimate, [])


CHILD = """
import sys, torch
from pathlib import Path
from data_prep.colbert_index import build_colbert
from data_prep.late_interaction import LateInteractionEncoder
from setenc_hf.collection import open_collection
torch.set_num_threads(1)
model, collection, folder = sys.argv[1:]
Path(folder).mkdir(exist_ok=True)
build_colbert(open_collection(collection), Path(folder), LateInteractionEncoder(model), chunk_passages=10)
"""


@pytest.mark.slow
def test_processes_that_share_a_build_give_the_same_bytes(checkpoint, collection, encoder, tmp_path):
    build(collection, tmp_path / "whole", encoder, chunk_passages=10)

    def start(folder, **rank):
        return subprocess.Popen([sys.executable, "-c", CHILD, str(checkpoint), collection.name, str(folder)], cwd=ROOT,
                                env=os.environ | rank)  # fmt: skip

    shared = [start(tmp_path / "shared", RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    assert [process.wait() for process in shared] == [0, 0]
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "shared") == whole


def test_the_command_writes_a_run_and_reports_recall(checkpoint, collection, tmp_path, capsys):
    arguments = ["--collection", collection.name, "--retriever", "colbert", "--model", str(checkpoint), "--depth", "20",
                 "--index-dir", str(tmp_path / "i"), "--output", str(tmp_path / "c.run"), "--num-proc=1"]  # fmt: skip
    main([*arguments, "--engine", "plaid", "--bits", "2", "--check-recall", "5"])
    assert "over 5 queries" in capsys.readouterr().out
    lists = list(read_lists(tmp_path / "c.run"))
    assert [found.query_id for found in lists] == list(collection.queries())
    assert all(len(found.lines) == 20 for found in lists)
    with pytest.raises(InputError, match="made with bits 2, this command has 8"):
        main([*arguments, "--engine", "plaid"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.json").write_text('{"format": "bm25", "version": 1}')
    with pytest.raises(InputError, match="made with format 'bm25', this command has 'late-interaction'"):
        main([*arguments, "--index-dir", str(tmp_path / "other")])
    assert {path.name for path in (tmp_path / "other").iterdir()} == {".lock", "index.json"}
    with pytest.raises(InputError, match="--probes is at least 1, got 0"):
        main([*arguments, "--probes", "0"])


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_bytes(checkpoint, tmp_path):
    """Killed twice, with `kill -9`: between two chunks of passages, and between two blocks of queries."""
    folder = write_collection(tmp_path / "c", range(5300))
    words = random.Random(4)
    rows = (f"{row}\t{' '.join(words.choices(WORDS, k=4))}\n" for row in range(1050))
    (folder / "queries.tsv").write_text("".join(rows))

    def start(name):
        asked = ["--collection", str(folder), "--retriever", "colbert", "--model", str(checkpoint), "--engine", "plaid",
                 "--bits", "2", "--doc-length", "8", "--depth", "5", "--probes", "2", "--candidates", "50",
                 "--num-proc", "1", "--index-dir", str(tmp_path / f"index-{name}"),
                 "--output", str(tmp_path / f"{name}.run")]  # fmt: skip
        return subprocess.Popen([sys.executable, "-m", "data_prep.retrieve", *asked], cwd=ROOT)

    assert start("whole").wait() == 0
    for begun in ("index-cut/chunks/000000", ".cut.run.blocks/000000000.run"):
        process = start("cut")
        while not (tmp_path / begun).exists() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "cut.run").exists()
        assert (tmp_path / "index-cut" / "index.json").exists() == begun.startswith(".cut")
    assert start("cut").wait() == 0
    assert contents(tmp_path / "index-cut") == contents(tmp_path / "index-whole")
    assert (tmp_path / "cut.run").read_bytes() == (tmp_path / "whole.run").read_bytes()
    assert not (tmp_path / ".cut.run.blocks").exists()
