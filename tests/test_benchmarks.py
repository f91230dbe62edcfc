"""The pure parts of the benchmarks: work by hand-computed numbers, spreads and tables; nothing here is timed."""

import json
import runpy
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.environments import PEERS, fingerprint, torch_requirement
from benchmarks.flops import count_tokens, cut_texts, linear_flops, open_tokenizer, packed_tokens
from benchmarks.folders import save_lightning_ir, save_set_encoder
from benchmarks.report import Spread, marks, ratios, table, write_report
from benchmarks.speed import parse
from benchmarks.speed_report import draw_cost, render
from demo.run import commands
from setenc_hf.errors import InputError
from small_collection import make_collection

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_demo_takes_folders_with_a_blank_in_their_names(tmp_path):
    folder = tmp_path / "my demo"
    words = [word for _, command in commands(folder, "/a b/model", (1, 1), 5) for word in shlex.split(command)]
    assert "/a b/model" in words
    assert all(word.startswith(str(folder)) or word == "/a b/model" for word in words if " " in word)
    assert not {"demo", "b/model"} & set(words)


def test_linear_flops_by_hand():
    config = {"hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 3}
    # a layer: 4 * 4 * 4 = 64 multiplications for the attention, 2 * 4 * 8 = 64 for the feed-forward part, a token
    assert linear_flops(config, tokens=10, passages=2) == 2 * (10 * 3 * 128 + 2 * 4)


def test_linear_flops_are_those_of_the_modules(backbones):
    from setenc_hf import SetEncoderForReranking

    model = SetEncoderForReranking.from_pretrained(backbones["bert"])
    weights = sum(
        module.weight.numel() for name, module in model.encoder.named_modules() if isinstance(module, torch.nn.Linear)
    )
    assert linear_flops(model.config.encoder_config.to_dict(), tokens=1, passages=0) == 2 * weights


def test_minilm_costs_what_is_known_of_it():
    config = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
    assert linear_flops(config, tokens=9_300, passages=100) == pytest.approx(0.2e12, rel=0.02)


def test_packed_tokens_are_cut_each_to_its_length():
    assert packed_tokens(5, [3, 300], query_length=4, passage_length=256) == (4 + 4 + 3) + (4 + 4 + 256)


def test_counted_tokens_are_those_that_the_model_sees(backbones, tmp_path):
    from setenc_hf import SetEncoderTokenizer

    folder = save_set_encoder(backbones["bert"], tmp_path / "ours", passage_length=6)
    query, passages = "life cycle of the flea", ["a flea", "the cat is in the water, 12 days and weeks", ""]
    packed = SetEncoderTokenizer.from_pretrained(str(folder))(query, passages)
    assert count_tokens(folder, query, passages, 32, 6) == packed["input_ids"].shape[1]


def test_texts_are_cut_to_a_number_of_tokens(backbones):
    folder, texts = Path(backbones["bert"]), ["the cat is in the blue water", "a flea", "stonelamps and rivers"]
    cut = cut_texts(folder, texts, 3)
    assert cut[:2] == ["the cat is", "a flea"]
    lengths = [len(tokens.ids) for tokens in open_tokenizer(folder).encode_batch(cut, add_special_tokens=False)]
    assert lengths == [3, 2, 3]


def test_a_folder_for_lightning_ir_opens_with_the_same_scores(backbones, tmp_path):
    from setenc_hf import SetEncoderForReranking

    ours = save_set_encoder(backbones["bert"], tmp_path / "ours", passage_length=20)
    theirs = save_lightning_ir(ours, tmp_path / "theirs", depth=10)
    config = json.loads((theirs / "config.json").read_text())
    assert config["sample_missing_docs"] is False
    assert (config["doc_length"], config["depth"], config["add_extra_token"]) == (20, 10, True)
    passages = ["a flea is green", "the cat", "stone paper lamp in the river water"]
    scores = [
        [row["score"] for row in SetEncoderForReranking.from_pretrained(str(folder)).rank("life cycle", passages)]
        for folder in (ours, theirs)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert max(scores[0]) - min(scores[0]) > 0.1


def test_lightning_ir_cannot_have_what_it_does_not_know(backbones, tmp_path):
    ours = save_set_encoder(backbones["bert"], tmp_path / "ours", normalize_interaction=True)
    with pytest.raises(InputError, match="normalize_interaction"):
        save_lightning_ir(ours, tmp_path / "theirs")


def test_ratios_are_of_measurements_that_belong_together():
    assert ratios([4.0, 9.0, 5.0], [2.0, 3.0, 5.0]) == Spread(1.0, 2.0, 3.0)
    assert Spread.of([3.0, 1.0, 2.0, 10.0]).show("{:.1f}") == "2.5 (1.0 to 10.0)"


def test_table():
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    with pytest.raises(ValueError, match="3 cells for 2 columns"):
        table(["a", "b"], [["1", "2", "3"]])


def test_a_report_goes_between_the_marks_and_nowhere_else(tmp_path):
    document = tmp_path / "README.md"
    begin, end = marks("speed.py")
    document.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    write_report(document, "new", "speed.py")
    write_report(document, "newer", "speed.py")
    assert document.read_text() == f"before\n{begin}\nnewer\n{end}\nafter\n"
    with pytest.raises(InputError, match="memory.py"):  # another report's place is not this one's
        write_report(document, "new", "memory.py")
    (tmp_path / "other.md").write_text("someone's text\n")
    with pytest.raises(InputError, match="write between"):
        write_report(tmp_path / "other.md", "new", "speed.py")
    assert (tmp_path / "other.md").read_text() == "someone's text\n"


def found() -> dict:
    """What a run finds, with figures that are easy to check."""
    seconds = {"setenc_hf float32": 1.0, "lightning-ir float32": 3.0, "sentence-transformers float32": 1.5}
    row = {
        "passages": 100,
        "tokens": 9_000,
        "flops": 1e11,
        "seconds": seconds,
        "difference": dict.fromkeys(seconds, 2e-7),
        "score_range": 3.0,
    }
    worker = {"torch": "2", "threads": 2}
    memory = {"peak": 3 << 30, "now": 2 << 30, "loaded": 1 << 30}
    return {
        "rerank": {
            "lists": [row, {**row, "seconds": {name: 2 * value for name, value in seconds.items()}}],
            "peaks": {"float32": 2e11, "bfloat16": 4e11},
            "memory": dict.fromkeys(seconds, 1 << 30),
            "about": dict.fromkeys(seconds, worker),
            "auto": "float32",
        },
        "train": {
            "shapes": [
                {
                    "lists": 16,
                    "size": 8,
                    "dtype": "float32",
                    "seconds": {"setenc_hf": [1.0, 2.0], "lightning-ir": [3.0, 5.0]},
                    "memory": {"setenc_hf": memory, "lightning-ir": {**memory, "peak": 5 << 30}},
                    "losses": {"setenc_hf": 0.5, "lightning-ir": 0.5},
                }
            ]
        },
        "quality": {"run": "bm25.run", "nDCG@10": {"float32": 0.65, "bfloat16": 0.6489}},
        "cost": {
            "sizes": [
                {"passages": size, "tokens": 90 * size, "seconds": {"setenc_hf float32": [size * 0.01 * factor]}}
                for size, factor in ((100, 1.0), (1000, 1.2))
            ],
            "lengths": [{"length": 32, "passages": 100, "tokens": 4_000, "seconds": {"setenc_hf float32": [0.4, 0.5]}}],
        },
    }


def test_tables_say_what_was_found():
    text = render(found())
    ours = next(line for line in text.splitlines() if line.startswith("| setenc_hf float32 |"))
    assert "| 1.500 (1.000 to 2.000) |" in ours
    assert "| 38% (25% to 50%) |" in ours  # 1e11 operations in 1 or 2 s, of 2e11 a second
    assert "| 3.00 (3.00 to 3.00) | 1.50 (1.50 to 1.50) | 2.0e-07 |" in ours
    assert "2.75 (2.50 to 3.00)" in text  # training: 3 / 1 and 5 / 2
    assert "3.00 / 5.00 = 0.60" in text
    assert "2.00 / 4.00 = 0.50" in text
    assert "| bfloat16 | 0.6489 | -0.0011 |" in text
    assert "against one in a list of 100, setenc_hf float32: x 1.20" in text


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    draw_cost(found()["cost"], tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_arguments(tmp_path):
    assert parse([]).what == ["rerank", "train", "cost"]  # quality needs a trained model
    assert parse(["--model", "m"]).what == ["rerank", "train", "cost", "quality"]
    with pytest.raises(InputError, match="'fast' is nothing to measure"):
        parse(["fast"])


def test_environments_are_pinned():
    assert torch_requirement().startswith("torch==")
    assert len({fingerprint(name) for name in PEERS}) == len(PEERS)
    pinned = (BENCHMARKS / "requirements-lightning-ir.txt").read_text().splitlines()
    assert "lightning-ir==0.0.6" in pinned
    assert all("==" in line for line in pinned if not line.startswith("#"))
    assert not any("://" in path.read_text() for path in BENCHMARKS.glob("requirements-*.txt"))


@pytest.mark.parametrize("module", ["environments", "speed", "worker"])
def test_help(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module(f"benchmarks.{module}", run_name="__main__")
    assert "usage:" in capsys.readouterr().out


@pytest.fixture
def samples(tmp_path):
    """A folder of samples made by the real command, over the collection of the other tests."""
    from data_prep import build_samples

    collection = tmp_path / "collection"
    collection.mkdir()
    texts = [f"passage {number} the flea" for number in range(12)]
    rows = [json.dumps({"doc_id": f"d{number}", "text": text}) for number, text in enumerate(texts)]
    (collection / "corpus.jsonl").write_text("\n".join(rows) + "\n")
    (collection / "queries.tsv").write_text("1\tflea\n2\tcat\n3\tdog\n")
    (collection / "qrels.txt").write_text("1 0 d1 1\n2 0 d5 1\n3 0 d9 1\n")
    lines = [
        f"{query} Q0 d{(place + 4 * (query - 1)) % 12} {place + 1} {20 - place} t"
        for query in (1, 2, 3)
        for place in range(10)
    ]
    (tmp_path / "a.run").write_text("\n".join(lines) + "\n")
    output = tmp_path / "samples"
    build_samples.main(
        f"--run {tmp_path / 'a.run'} --collection {collection} --labels relevance --output {output}".split()
    )
    return output


def test_a_bi_encoder_teaches_its_cosines_and_the_judgements(backbones, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    from benchmarks.bi_encoder import encode
    from benchmarks.bi_encoder_teacher import BONUS, SCALE, main
    from setenc_hf.cpu_linear import is_bfloat16_fast
    from setenc_hf.trec import read_lists

    folder = make_collection(tmp_path)
    texts = {row["doc_id"]: row["text"] for row in map(json.loads, (folder / "corpus.jsonl").read_text().splitlines())}
    queries = dict(line.split("\t") for line in (folder / "queries.tsv").read_text().splitlines())
    taught, evaluated = list(queries)[:2]
    relevant, other, *_ = texts
    (tmp_path / "q.txt").write_text(f"{taught} 0 {relevant} 1\n{taught} 0 {other} 0\n{evaluated} 0 {other} 1\n")
    (tmp_path / "e.txt").write_text(f"{evaluated} 0 {other} 1\n")
    (tmp_path / "r.run").write_text(f"{taught} Q0 {other} 1 2 t\n{evaluated} Q0 {other} 1 2 t\n")
    words = f"--model {backbones['bert']} --collection {folder} --qrels {tmp_path / 'q.txt'} --run {tmp_path / 'r.run'}"
    words += f" --exclude {tmp_path / 'e.txt'} --depth 3 --output {tmp_path / 'out'}"
    main(words.split())

    model, tokenizer = (kind.from_pretrained(backbones["bert"]) for kind in (AutoModel, AutoTokenizer))
    model.eval()
    bfloat16 = is_bfloat16_fast(torch.device("cpu"))
    vectors = encode(model, tokenizer, list(texts.values()), 256, bfloat16)
    (query,) = encode(model, tokenizer, [queries[taught]], 256, bfloat16)
    cosines = dict(zip(texts, (vectors @ query).tolist()))
    expected = {doc_id: SCALE * cosines[doc_id] + BONUS * (doc_id == relevant) for doc_id in texts}
    nearest = sorted(texts, key=lambda doc_id: -cosines[doc_id])[:3]
    for name, doc_ids in (("mined", {*nearest, relevant}), ("retrieved", {other, relevant})):
        ((query_id, lines),) = read_lists(tmp_path / "out" / f"{name}.run")
        assert query_id == taught
        assert {line.doc_id for line in lines} == doc_ids
        for line in lines:
            assert line.score == pytest.approx(expected[line.doc_id], abs=1e-5)


def test_peers_see_the_lists_that_our_trainer_sees(samples, backbones, tmp_path):
    from benchmarks.peers import draw_lists
    from setenc_hf.train import load_data, load_model, parse

    recipe = tmp_path / "recipe.json"
    settings = {"model": backbones["bert"], "train_samples": [str(samples)], "output_dir": str(tmp_path / "out")}
    settings |= {"sampling": "single_relevant", "sample_size": 4, "loss": "infonce", "max_steps": 4, "warmup_steps": 2}
    settings |= {"per_device_train_batch_size": 2, "report_to": "none", "learning_rate": 1e-3}
    settings |= {"query_length": 8, "passage_length": 20}
    recipe.write_text(json.dumps(settings))
    job, lists = draw_lists([str(recipe)])
    assert (job["steps"], job["warmup_steps"], job["loss"]) == (4, 2, "infonce")
    drawn = list(lists)
    # three lists in steps of two: a step of two and one of one, in each of two epochs
    assert [item["step"] for item in drawn] == [0, 0, 1, 2, 2, 3]

    model_args, data_args, training = parse([str(recipe)])
    _, tokenizer = load_model(model_args)
    ours, _ = load_data(data_args, tokenizer, training)
    from setenc_hf.lists import EpochSampler

    expected = []
    for epoch in (0, 1):
        ours.set_epoch(epoch)
        expected += [ours[item] for item in EpochSampler(ours)]
    for item, sample in zip(drawn, expected, strict=True):
        assert item["labels"] == sample["labels"].tolist()
        assert sorted(item["labels"]) == [0.0, 0.0, 0.0, 1.0]
        for text, ids in zip(item["passages"], sample["passage_ids"], strict=True):
            assert tokenizer.encode_passages([text])[0] == ids.tolist()


def test_peers_refuse_a_loss_that_they_have_not(samples, backbones, tmp_path):
    from benchmarks.peers import draw_lists

    recipe = tmp_path / "recipe.json"
    settings = {"model": backbones["bert"], "train_samples": [str(samples)], "output_dir": str(tmp_path / "out")}
    recipe.write_text(json.dumps({**settings, "loss": "listnet", "report_to": "none"}))
    with pytest.raises(InputError, match="infonce or ranknet"):
        draw_lists([str(recipe)])


def test_peers_learn_the_same_distribution_as_the_kl_divergence():
    from benchmarks.peer_worker import Divide, label_scale
    from setenc_hf.losses import parse_loss

    job = {"loss": "kl_divergence", "temperature": 0.25}
    scores = torch.tensor([[0.3, -0.1, 0.7, 0.2]], requires_grad=True)
    labels = torch.tensor([[1.5, 0.2, 0.9, 0.4]])
    (ours,) = torch.autograd.grad(parse_loss("kl_divergence", 0.25)(scores, labels), scores)
    target = (labels * label_scale(job)).softmax(-1)  # as sentence-transformers' ListNet makes it
    cross_entropy = torch.nn.functional.cross_entropy(Divide(job["temperature"])(scores), target)
    (theirs,) = torch.autograd.grad(cross_entropy, scores)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert label_scale({"loss": "ranknet", "temperature": 0.25}) == 1


def test_a_list_goes_best_first_to_a_loss_of_one_passage_against_the_others():
    from benchmarks.peer_worker import best_first

    item = {"query": "q", "passages": ["a", "b", "c", "d"], "labels": [0.5, 3.0, -1.0, 0.5]}
    expected = {"query": "q", "passages": ["b", "a", "d", "c"], "labels": [3.0, 0.5, 0.5, -1.0]}
    assert best_first(item) == expected


@pytest.mark.parametrize("schedule", ["linear", "constant", "constant_with_warmup"])
def test_peers_learn_at_the_rates_of_transformers(schedule):
    from transformers import get_scheduler

    from benchmarks.peer_worker import learning_rate_factor

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=3, num_training_steps=10)
    for step in range(10):
        assert learning_rate_factor(step, 10, 3, schedule) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_what_is_prepared_stands_on_what_was_prepared_before():
    from benchmarks.effectiveness import PREPARED, TRAINED_ON

    made = set()
    for name, command in PREPARED.items():
        module, *words = command.split()
        assert find_spec(module)
        places = [word.removeprefix("{o}/") for word in words if word.startswith("{o}/")]
        outputs = {
            words[words.index(flag) + 1].removeprefix("{o}/")
            for flag in ("--output", "--output_dir", "--index-dir")
            if flag in words
        }
        assert any(name.startswith(output) for output in outputs), name
        assert {place for place in places if place not in outputs} <= made, name
        made |= {name, *outputs}
        if module == "benchmarks.bi_encoder_teacher":
            made.add("runs/mined.run")
    assert all(f"samples/{name}" in made for names in TRAINED_ON.values() for name in names)


def test_effectiveness_results_of_several_machines_come_into_one_table(tmp_path):
    from benchmarks.effectiveness_report import Results, comparisons, draw, render

    def values(*ndcg):
        return {name: {str(query): value for query, value in enumerate(ndcg)} for name in ("nDCG@10", "MRR@10")}

    path, first = tmp_path / "results.json", Results("a", tmp_path / "results.json")
    first.add_run("bm25", values(0.5, 0.3))
    first.add_run("bi-encoder/bm25-100", values(0.5, 0.5))
    for stage, ndcg in ((1, (0.6, 0.4)), (2, (0.75, 0.45))):
        first.add_run(f"set-encoder-1/stage{stage}/bm25-100", values(*ndcg))
        first.add_training(f"set-encoder-1/stage{stage}", 100.0 * stage)
    first.add_run("set-encoder-1/mean/bm25-100", values(0.9, 0.5))
    first.save()

    second = Results("a", path)
    second.add_training("set-encoder-1/stage1", 5.0)  # known: another machine's does not replace it
    second.add_run("set-encoder-2/stage1/bm25-100", values(0.7, 0.5))
    second.add_training("set-encoder-2/stage1", 300.0)
    second.add_run("pointwise-1/stage1/bm25-100", values(0.55, 0.65))
    second.add_training("pointwise-1/stage1", 50.0)
    second.save()

    results = Results("a", path)
    assert results.seeds("set-encoder", "stage1", "bm25-100") == [1, 2]
    assert results.averaged("set-encoder", "stage1", "bm25-100") == pytest.approx({"0": 0.65, "1": 0.45})
    text = render(results, ["bm25", "splade-pp"], 100, "judged-pool-bm25", [10])
    rows = text.splitlines()
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("| bm25")]
    assert rows[0][1:4] == ["as it is", "0.4000", "0.4000"]
    assert rows[1][1:3] == ["the backbone as bi-encoder", "0.5000"]
    named = {row[1]: row for row in rows[2:6]}
    assert named["set-encoder, stage 1"][2:5] == ["0.5500", "0.5500", "0.1000 of 2"]
    assert named["set-encoder, stage 1"][-1] == "200"
    assert named["set-encoder, stage 1"][5].startswith("+0.150 [")
    assert named["set-encoder, stage 2"][2:5] == ["0.6000", "0.6000", "one seed"]
    assert named["set-encoder, weights averaged"][2:5] == ["0.7000", "0.7000", "one seed"]
    assert named["set-encoder, weights averaged"][-1] == ""
    assert named["pointwise, stage 1"][2] == "0.6000"
    found = {(left, right): against for left, right, against in comparisons(results, "bm25-100")}
    assert found["set-encoder, stage 2", "stage 1"].difference == pytest.approx(0.05)
    assert found["set-encoder, weights averaged", "stage 2"].difference == pytest.approx(0.1)
    assert found["set-encoder, stage 1", "pointwise"].difference == pytest.approx(-0.05)
    assert found["set-encoder, stage 1", "bi-encoder"].difference == pytest.approx(0.05)
    assert ("set-encoder, stage 2", "pointwise") not in found

    with pytest.raises(InputError, match="other recipes or samples"):
        Results("b", path)
    pytest.importorskip("matplotlib")
    draw(results, tmp_path / "bars.png", "bm25", 100)
    assert (tmp_path / "bars.png").read_bytes()[:4] == b"\x89PNG"
