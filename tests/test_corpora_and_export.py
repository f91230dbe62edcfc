"""What builds share, what they export, and what is said of them."""

import json
import multiprocessing
import pickle

import numpy as np
import pyarrow as pa
import pytest
from datasets import load_dataset
from huggingface_hub.utils import filter_repo_objects

import setenc_hf.tokens
from conftest import make_backend
from data_prep import describe
from data_prep.build_samples import main
from data_prep.export_samples import Rows
from setenc_hf.errors import InputError
from setenc_hf.files import shared_folder
from setenc_hf.samples import ListwiseSamples
from setenc_hf.tokens import SampleTokens
from small_collection import make_collection, make_run


@pytest.fixture
def words(tmp_path):
    make_backend().save_pretrained(tmp_path / "tokenizer")
    collection = make_collection(tmp_path / "collection")
    return ["--collection", str(collection), "--labels", "relevance", "--tokenizer", str(tmp_path / "tokenizer")]


def build(tmp_path, words, name, run, *more):
    main([*words, "--run", str(run), "--output", str(tmp_path / name), *more])
    return ListwiseSamples.open(tmp_path / name)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check_tokens(samples):
    backend = make_backend()
    tokens = SampleTokens.of(samples, backend)
    for texts, table in ((samples.corpus["text"], tokens.passages), (samples.samples["query"], tokens.queries)):
        assert len(table) == len(texts)
        for row, text in enumerate(texts):
            expected = backend(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            assert table[row].tolist() == expected


@pytest.mark.parametrize("corpus", ["referenced", "full"])
def test_tokens_are_taken_over_and_the_bytes_are_those_of_a_build_of_its_own(tmp_path, words, capsys, corpus):
    first = make_run(tmp_path, "first.run", depth=12, queries=2)
    second = make_run(tmp_path, "second.run", depth=20, seed=5)
    build(tmp_path, words, "first", first, "--corpus", corpus, "--no-add-relevant")
    capsys.readouterr()
    shared = build(tmp_path, words, "shared", second, "--corpus", corpus, "--no-add-relevant")
    said = capsys.readouterr().out
    alone = build(tmp_path, words, "alone", second, "--corpus", corpus, "--no-add-relevant", "--corpus-dir",
                  str(tmp_path / "other"))  # fmt: skip
    assert contents(shared.folder) == contents(alone.folder)
    assert "passages whose tokens were there, 0 tokenised" in said or corpus == "referenced"
    check_tokens(shared)
    if corpus == "full":
        assert len(shared.corpus) == 40
        inodes = {
            (tmp_path / name / "corpus" / "data-00000-of-00001.arrow").stat().st_ino for name in ("first", "shared")
        }
        assert len(inodes) == 1


def test_a_known_passage_is_never_tokenised_again(tmp_path, words, monkeypatch, capsys):
    run = make_run(tmp_path)
    build(tmp_path, words, "first", run)
    made = []
    encode = setenc_hf.tokens._encode
    monkeypatch.setattr("setenc_hf.tokens._encode", lambda texts, *a: (made.extend(texts), encode(texts, *a))[1])
    samples = build(tmp_path, words, "second", run, "--depth", "5")
    assert sorted(made) == sorted(samples.samples["query"])  # the queries alone
    (collection := tmp_path / "collection" / "corpus.jsonl").write_text(collection_of_other_texts(collection))
    check_tokens(build(tmp_path, words, "third", run))
    assert "0  passages whose tokens were there" in capsys.readouterr().out


def collection_of_other_texts(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return "".join(json.dumps({**row, "text": f"[SEP] {row['text']} [INT] paper"}) + "\n" for row in rows)


def test_rows_are_those_of_the_data_set_and_travel_as_paths(tmp_path, words):
    samples = build(tmp_path, words, "samples", make_run(tmp_path), "--depth", "3")
    rows, tokens = samples.rows, SampleTokens.of(samples, make_backend()).passages
    for opened, table in ((rows, tokens), (pickle.loads(pickle.dumps(rows)), pickle.loads(pickle.dumps(tokens)))):
        for number, sample in enumerate(samples.samples):
            row = opened[number]
            assert row["query_id"] == sample["query_id"]
            assert all(row[name].tolist() == sample[name] for name in ("passages", "labels", "ranks"))
        assert [table[n].tolist() for n in range(3)] == [tokens[n].tolist() for n in range(3)]
    assert len(pickle.dumps([rows, tokens])) < 1_000  # no data


def test_processes_make_the_tokens_that_one_makes(tmp_path, words, monkeypatch):
    monkeypatch.setattr("setenc_hf.tokens.TEXTS_PER_BATCH", 7)
    check_tokens(build(tmp_path, words, "samples", make_run(tmp_path), "--num-proc", "2"))


def test_who_comes_second_finds_the_folder_of_the_first(tmp_path):
    with shared_folder(tmp_path / "tokens") as late, shared_folder(tmp_path / "other"):
        (tmp_path / "tokens").mkdir()
        (tmp_path / "tokens" / "first").write_text("")
        (late / "second").write_text("")
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["first"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "tokens"]


def fill(folder, barrier):
    with shared_folder(folder) as partial:
        (partial / "a").write_text("same")
        barrier.wait()


def test_processes_that_fill_a_folder_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    workers = [context.Process(target=fill, args=(tmp_path / "x", barrier)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_collection_with_a_document_twice_is_refused(tmp_path, words):
    with open(tmp_path / "collection" / "corpus.jsonl", "a") as corpus:
        corpus.write('{"doc_id": "d1", "text": "again"}\n')
    with pytest.raises(InputError, match=r"corpus.jsonl:41: document 'd1' stands twice"):
        build(tmp_path, words, "samples", make_run(tmp_path), "--corpus", "full")
    assert not (tmp_path / "samples").exists()


def test_an_export_says_all_that_samples_say(tmp_path, words, monkeypatch):
    monkeypatch.setattr("data_prep.export_samples.LISTS_PER_BATCH", 2)
    monkeypatch.setattr("data_prep.export_samples.BYTES_PER_FILE", 1)
    samples = build(tmp_path, words, "samples", make_run(tmp_path), "--export", str(tmp_path / "export"))
    assert len(list((tmp_path / "export" / "data").iterdir())) == 3
    rows = load_dataset(str(tmp_path / "export"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == len(samples) == 6
    for row, sample in zip(rows, samples.samples):
        picked = samples.corpus[sample["passages"]]
        assert (row["doc_ids"], row["passages"]) == (picked["doc_id"], picked["text"])
        assert all(row[name] == sample[name] for name in ("query_id", "query", "labels", "ranks", "scores"))
    card = (tmp_path / "export" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "6 lists of" in card


def test_an_export_leaves_out_nothing_behind_lists_that_were_left_out(tmp_path, words, monkeypatch):
    monkeypatch.setattr("data_prep.run_spill.LISTS_PER_BUCKET", 2)
    unknown = [f"x{number} Q0 d{number} 1 1 t\n" for number in range(4)]
    run = make_run(tmp_path)
    run.write_text("".join(unknown) + run.read_text())
    samples = build(tmp_path, words, "samples", run, "--export", str(tmp_path / "export"))
    rows = load_dataset(str(tmp_path / "export"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["query_id"] == samples.samples["query_id"]
    assert len(rows) == 6


def test_a_card_names_files_and_hashes_and_no_folder(tmp_path, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "customer-x").mkdir()
    (tmp_path / "collection").rename(tmp_path / "customer-x" / "texts")
    words = ["--collection", "customer-x/texts", *words[2:]]
    samples = build(tmp_path, words, "samples", make_run(tmp_path), "--export", "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "customer-x" not in card
    corpus = samples.meta["sources"]["collection"]["customer-x/texts"]["corpus.jsonl"]
    assert f"- from `texts/corpus.jsonl`, SHA-256 `{corpus}`" in card
    assert "- from `first.run`, SHA-256 `" in card


def test_what_would_fail_at_the_end_fails_before_a_line_is_read(tmp_path, words):
    run = make_run(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for more, message in (
        (["--tokenizer", str(tmp_path / "nowhere")], "nowhere: no such folder"),
        (["--tokenizer", str(tmp_path / "full")], "--tokenizer .*full: "),
        (["--export", str(tmp_path / "full")], "full: exists and is not empty"),
    ):
        with pytest.raises(InputError, match=message):
            build(tmp_path, words, "samples", run, *more)
        assert not (tmp_path / "samples").exists()
    (tmp_path / "collection" / "queries.tsv").unlink()
    with pytest.raises(InputError, match="queries"):
        build(tmp_path, words, "samples", run)


def test_containers_with_one_number_for_their_processes_do_not_share_partial_names(tmp_path, monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 1)
    with shared_folder(tmp_path / "tokens") as first:
        (first / "a").write_text("whole")
        monkeypatch.setattr("setenc_hf.files.OF_PROCESS", "other")
        with shared_folder(tmp_path / "tokens") as second:
            (second / "a").write_text("whole")
        assert (first / "a").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_rows_of_several_chunks_are_those_that_arrow_takes():
    parts = [pa.table({"doc_id": [f"d{n}" for n in range(first, first + 5)]}) for first in (0, 5, 10)]
    table = pa.concat_tables(parts)
    rows = np.array([14, 0, 7, 7, 4, 5, 14])
    assert Rows(table).take(rows).to_pydict() == table.take(pa.array(rows)).to_pydict()


@pytest.mark.parametrize("flag", ["--push-to-hub", "--push_to_hub"])
def test_an_export_is_uploaded(tmp_path, words, monkeypatch, flag, capsys):
    from huggingface_hub import HfApi

    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **more: calls.append((repo, more)) or "hub/me/x")
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **more: calls.append(more))
    build(tmp_path, words, "samples", make_run(tmp_path), flag, "me/x", "--private")
    (repo, made), uploaded = calls
    assert (repo, made["repo_type"], made["private"]) == ("me/x", "dataset", True)
    doomed = list(filter_repo_objects(
        ["data/train-00003.parquet", "qrels.txt", "data/dev/a.parquet", "data/train-00000-of-00001.parquet", "a.txt"],
        allow_patterns=uploaded["delete_patterns"],
    ))  # fmt: skip
    assert doomed == ["data/train-00003.parquet", "qrels.txt"]  # of an upload before, and nobody else's
    assert uploaded["folder_path"] == str(tmp_path / "samples-export")
    assert 'load_dataset("me/x"' in (tmp_path / "samples-export" / "README.md").read_text()
    assert "Uploaded them to hub/me/x" in capsys.readouterr().out

    def refuse(self, *_, **__):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(InputError, match=r"me/x: the hub did not take it \(no network\)"):
        build(tmp_path, words, "samples", make_run(tmp_path), flag, "me/x", "--overwrite")


def test_a_description_counts_and_draws(tmp_path, words, capsys):
    make_run(tmp_path, depth=12)
    samples = build(tmp_path, words, "samples", tmp_path / "first.run", "--no-add-relevant")
    capsys.readouterr()
    describe.main([str(samples.folder), "--plot", str(tmp_path / "a.png"), "--lists", "1", "--passages", "3"])
    said = capsys.readouterr().out
    labels = np.concatenate(samples.samples["labels"])
    assert "6 lists, labels of relevance" in said
    assert f"0: {(labels == 0).sum()} " in said
    assert "list lengths    mean 12; least, quartiles, most: 12  12  12  12  12" in said
    assert "and 9 more" in said
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="a.xyz"):
        describe.main([str(samples.folder), "--plot", str(tmp_path / "a.xyz")])
