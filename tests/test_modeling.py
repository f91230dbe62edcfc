"""What makes a Set-Encoder: its scores follow a definition, and depend on nothing else."""

import copy
import json
import math
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForSequenceClassification,
    DebertaV2Config,
    MPNetConfig,
    RemBertConfig,
)

from conftest import WORDS
from setenc_hf import modeling
from setenc_hf.attention import ATTENTION, Run, SetLayout, pieces
from setenc_hf.chunking import ChunkedLayer
from setenc_hf.configuration import SetEncoderConfig
from setenc_hf.modeling import SetEncoderForReranking
from setenc_hf.tokenization import SetEncoderTokenizer

INTERACTIONS = ("int", "cls", "none")


def make_passages(count: int, seed: int = 0, longest: int = 24) -> list[str]:
    draw = random.Random(seed)
    words = WORDS.split()
    return [" ".join(draw.choices(words, k=draw.randint(1, longest))) for _ in range(count)]


def load(folder: str, interaction: str = "int", **kwargs):
    torch.manual_seed(1)
    model = SetEncoderForReranking.from_pretrained(folder, interaction=interaction, query_length=8, **kwargs)
    with torch.no_grad():
        model.linear.weight.normal_()
    return model, model.tokenizer


# ---- the definition, spelled out -----------------------------------------------------------------------------------


def defined_attention(
    module, query, key, value, _mask=None, scaling=None, sliding_window=None, *, lengths, position, normalize, **_
):
    """One passage at a time, every key and value named; padded rows [passages, heads, longest, dim]."""
    output = torch.zeros_like(query)
    for i, length in enumerate(lengths):
        others = [j for j in range(len(lengths)) if j != i and position is not None]
        keys = [key[i, :, t] for t in range(length)] + [key[j, :, position] for j in others]
        values = [value[i, :, t] for t in range(length)] + [value[j, :, position] for j in others]
        for t in range(length):
            seen = [n for n in range(len(keys)) if n >= length or sliding_window is None or abs(n - t) < sliding_window]
            weights = torch.stack([(query[i, :, t] * keys[n]).sum(-1) for n in seen]) * scaling
            if normalize and position is not None:  # all interaction tokens, the passage's own among them, count as one
                weights -= torch.tensor(
                    [[math.log(len(lengths)) if n == position or n >= length else 0.0] for n in seen]
                )
            weights = weights.softmax(0)[..., None]
            output[i, :, t] = (weights * torch.stack([values[n] for n in seen])).sum(0)
    return output.transpose(1, 2), None


AttentionInterface.register("defined_sdpa", defined_attention)
AttentionMaskInterface.register("defined_sdpa", lambda *_, **__: None)


def defined_scores(model, tokenizer, query: str, passages: list[str]) -> torch.Tensor:
    """Scores by the definition: padded rows, natural order of tokens, the attention above."""
    template = tokenizer.template
    head = [template.cls_id] + ([template.int_id] if template.int_id is not None else [])
    (query_ids,) = tokenizer.encode_queries([query])
    rows = [[*head, *query_ids, template.sep_id, *ids, template.sep_id] for ids in tokenizer.encode_passages(passages)]
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    first = len(head) + len(query_ids) + 1
    types = {"token_type_ids": (torch.arange(longest) >= first).long().expand(len(rows), -1)}
    position = {"int": 1, "cls": 0, "none": None}[model.config.interaction]
    model.encoder.config._attn_implementation = "defined_sdpa"
    layers = [module for module in model.encoder.modules() if isinstance(module, ChunkedLayer)]
    ours = type(layers[0])
    for layer in layers:
        layer.__class__ = ours.__bases__[1]  # the backbone's own
    hooked = [module for module in layers[-1].modules() if module._forward_pre_hooks]
    hooks = [module._forward_pre_hooks.copy() for module in hooked]
    for module in hooked:
        module._forward_pre_hooks.clear()
    try:
        states = model.encoder(
            input_ids=ids,
            position_ids=torch.arange(longest).expand(len(rows), -1) + model.position_offset,
            lengths=lengths,
            position=position,
            normalize=model.config.normalize_interaction,
            **(types if model.has_token_types else {}),
        ).last_hidden_state
    finally:
        model.encoder.config._attn_implementation = ATTENTION
        for layer in layers:
            layer.__class__ = ours
        for module, kept in zip(hooked, hooks):
            module._forward_pre_hooks.update(kept)
    return model.linear(states[:, 0])[:, 0]


@pytest.mark.parametrize("max_tokens", [None, 40])  # all in one chunk, or a few passages at a time
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_scores_and_gradients_equal_the_definition(backbones, family, interaction, normalize, max_tokens):
    model, tokenizer = load(backbones[family], interaction, normalize_interaction=normalize)
    model.max_tokens_per_chunk = max_tokens
    query, passages = "life cycle of the flea", make_passages(7)
    expected = defined_scores(model, tokenizer, query, passages)
    direction = torch.randn(7, generator=torch.Generator().manual_seed(0))
    (expected * direction).sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    scores = model(**tokenizer(query, passages)).logits[0]
    (scores * direction).sum().backward()
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    for name, weight in model.named_parameters():
        if name in gradients:
            error = (weight.grad - gradients[name]).abs().max() / gradients[name].abs().max().clamp(min=1)
            assert error < 1e-5, name
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == set(gradients)


@pytest.mark.parametrize("interaction", ["int", "cls"])
def test_passages_change_each_others_scores(backbones, family, interaction):
    model, tokenizer = load(backbones[family], interaction)
    alone = model(**tokenizer("cat", make_passages(1))).logits[0, 0]
    together = model(**tokenizer("cat", make_passages(5))).logits[0, 0]
    assert (alone - together).abs() > 1e-3


def test_without_interaction_a_passage_is_scored_as_if_alone(backbones, family):
    model, tokenizer = load(backbones[family], "none")
    alone = model(**tokenizer("cat", make_passages(1))).logits[0, 0]
    together = model(**tokenizer("cat", make_passages(5))).logits[0, 0]
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


# ---- invariance, to the bit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [None, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_bit_identical_under_permutation_and_in_any_batch(backbones, family, dtype, max_tokens):
    model, tokenizer = load(backbones[family], dtype=dtype)
    model.max_tokens_per_chunk = max_tokens
    assert model.dtype == dtype
    passages = make_passages(9)
    passages[4] = passages[1]  # equal passages must not trade scores either
    scores = model(**tokenizer("life cycle", passages)).logits[0]
    assert scores.dtype == torch.float32
    assert scores[4] == scores[1]
    assert len(scores.unique()) == 8
    draw = random.Random(3)
    for trial in range(20 if max_tokens is None else 5):
        order = draw.sample(range(9), 9)
        shuffled = [passages[index] for index in order]
        assert torch.equal(model(**tokenizer("life cycle", shuffled)).logits[0], scores[order])
        others = [make_passages(draw.randint(1, 12), seed=trial), shuffled, make_passages(3, seed=trial)]
        batched = model(**tokenizer(["blue river", "life cycle", "lamp"], others)).logits
        assert torch.equal(batched[1, :9], scores[order])
        assert torch.isinf(batched[2, 3:]).all()


def test_fsdp_wraps_the_layers_and_nothing_else(backbones, family):
    from accelerate.utils.dataclasses import get_module_class_from_name

    model = SetEncoderForReranking.from_pretrained(backbones[family])
    found = {get_module_class_from_name(model, name) for name in model._no_split_modules}
    assert found == {type(part) for part in model.modules() if isinstance(part, ChunkedLayer)}


@pytest.mark.parametrize("count", [1, 7, 100, 1000])
def test_any_number_of_passages(backbones, count):
    model, tokenizer = load(backbones["bert"])
    logits = model(**tokenizer("cat", make_passages(count, longest=4))).logits
    assert logits.shape == (1, count)
    assert logits.isfinite().all()


def test_a_set_is_packed_without_padding(backbones):
    _, tokenizer = load(backbones["bert"])
    passages = ["cat", "cat dog lamp"]
    batch = tokenizer("blue river", passages)
    assert batch["input_ids"].shape == (1, 2 * (len(["[CLS]", "[INT]", "blue", "river", "[SEP]", "[SEP]"])) + 1 + 3)
    assert batch["passage_lengths"].tolist() == [7, 9]
    assert batch["position_ids"][0].tolist() == [1, 0, 2, 3, 4, 5, 6, 1, 0, 2, 3, 4, 5, 6, 7, 8]


# ---- training mode -------------------------------------------------------------------------------------------------


def test_training_scores_equal_evaluation_scores_without_dropout(backbones, family):
    model, tokenizer = load(backbones[family])
    batch = tokenizer(["blue river", "cat"], [make_passages(5), make_passages(8, seed=1)])
    evaluated = model(**batch).logits
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(model.train()(**batch).logits, evaluated, atol=1e-5, rtol=1e-5)


def test_attention_dropout_is_used_in_training_only(backbones):
    model, tokenizer = load(backbones["bert"])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.encoder.encoder.layer[0].attention.self.dropout.p = 0.5
    batch = tokenizer("cat", make_passages(5))
    assert not torch.equal(model.train()(**batch).logits, model(**batch).logits)
    assert torch.equal(model.eval()(**batch).logits, model(**batch).logits)


def test_missing_passages_are_drawn_in_training_only(backbones):
    model, tokenizer = load(backbones["bert"], depth=50, sample_missing_passages=True)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = tokenizer("cat", make_passages(5))
    plain = model(**batch).logits
    assert torch.equal(model(**batch).logits, plain)
    drawn = [model.train()(**batch).logits for _ in range(2)]
    assert not torch.equal(*drawn)
    assert not torch.equal(model.eval()(**batch, sample_missing_passages=True).logits, plain)
    full = tokenizer("cat", make_passages(50, longest=3))
    torch.testing.assert_close(model.train()(**full).logits, model.eval()(**full).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("max_tokens", [None, 40])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(backbones, family, reentrant, max_tokens):
    model, tokenizer = load(backbones[family])
    model.max_tokens_per_chunk = max_tokens
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = tokenizer(["cat", "lamp"], [make_passages(5), make_passages(3, seed=2)])
    model.train()(**batch).logits[:, :3].sum().backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(**batch).logits[:, :3].sum().backward()
    for name, gradient in expected.items():
        assert torch.equal(dict(model.named_parameters())[name].grad, gradient), name


# ---- chunks --------------------------------------------------------------------------------------------------------


def test_chunks_cover_the_passages_within_the_limit_and_are_about_equal():
    lengths = [3, 9, 4, 4, 5, 5, 5, 30, 6, 7]
    for limit in range(1, 100):
        layout = SetLayout(lengths, [4, 6], "int", 0, False, torch.device("cpu"), limit)
        assert [length for chunk in layout.chunks for length in chunk.lengths] == lengths
        assert all(sum(chunk.lengths) <= limit or len(chunk.lengths) == 1 for chunk in layout.chunks)
        assert [chunk.tokens.stop for chunk in layout.chunks[:-1]] == [
            chunk.tokens.start for chunk in layout.chunks[1:]
        ]
    assert [
        sum(chunk.lengths) for chunk in SetLayout([5] * 9, [9], "int", 0, False, torch.device("cpu"), 40).chunks
    ] == [
        25,
        20,
    ]  # not 40 and 5


def test_a_layers_memory_is_bounded_by_its_chunk(backbones):
    """The largest intermediate tensor of a layer is a chunk's, however long the list."""
    model, tokenizer = load(backbones["bert"])
    model.max_tokens_per_chunk = 50
    rows = []
    layer = model.encoder.encoder.layer[0]
    layer.intermediate.register_forward_hook(lambda _module, _args, output: rows.append(output.shape[1]))
    batch = tokenizer("cat", make_passages(200))
    model(**batch)
    assert max(rows[1:]) <= 50
    assert rows[0] == 200  # the interaction tokens, for their keys and values
    assert sum(rows[1:]) == batch["input_ids"].shape[1]


def test_a_layer_works_by_chunks_where_that_spares_memory(backbones, monkeypatch):
    """A training step without checkpointing keeps the states of all chunks, so that it takes all tokens at once."""
    monkeypatch.setattr(modeling, "CPU_CHUNK", 50)
    model, tokenizer = load(backbones["bert"])
    rows = []
    model.encoder.encoder.layer[0].intermediate.register_forward_hook(lambda *call: rows.append(call[2].shape[1]))
    batch = tokenizer("cat", make_passages(60))
    tokens = batch["input_ids"].shape[1]

    def largest():
        rows.clear()
        model(**batch)
        return max(size for size in rows if size != 60)  # but for the interaction tokens of all 60 passages

    assert largest() <= 50
    model.train()
    assert largest() == tokens
    with torch.no_grad():
        assert largest() <= 50
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert largest() <= 50
    model.gradient_checkpointing_disable()
    model.max_tokens_per_chunk = 40
    assert largest() <= 40


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_checkpointing_a_chunk_is_recomputed_alone(backbones, reentrant):
    """What the backward pass makes again at a time is a chunk, not a layer: lists too long for a device can train."""
    model, tokenizer = load(backbones["bert"])
    model.max_tokens_per_chunk = 50
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    rows = []
    for layer in model.encoder.encoder.layer[:-1]:
        layer.intermediate.register_forward_hook(lambda _module, _args, output: rows.append(output.shape[1]))
    scores = model(**tokenizer("cat", make_passages(60))).logits
    forward = len(rows)
    scores.square().sum().backward()
    assert max(size for size in rows if size != 60) <= 50
    assert len(rows) == 2 * forward - 2  # all but the two layers' interaction tokens


# ---- loading and saving --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_a_saved_model_reloads_to_equal_scores(backbones, family, interaction, tmp_path):
    model, tokenizer = load(backbones[family], interaction, passage_length=11)
    passages = make_passages(6, longest=30)
    scores = model(**tokenizer("life cycle", passages)).logits
    model.save_pretrained(tmp_path)
    for opened in (SetEncoderForReranking, AutoModelForSequenceClassification):
        reloaded = opened.from_pretrained(tmp_path)
        again = SetEncoderTokenizer.from_pretrained(tmp_path)
        assert (again.interaction, again.query_length, again.passage_length) == (interaction, 8, 11)
        assert torch.equal(reloaded(**again("life cycle", passages)).logits, scores)
    reloaded.save_pretrained(tmp_path / "again")
    twice = SetEncoderForReranking.from_pretrained(tmp_path / "again")
    assert torch.equal(twice(**again("life cycle", passages)).logits, scores)


def test_the_int_token_starts_as_a_copy_of_cls(backbones, family):
    model, tokenizer = load(backbones[family])
    weight = model.get_input_embeddings().weight
    assert torch.equal(weight[tokenizer.template.int_id], weight[tokenizer.template.cls_id])


@pytest.mark.parametrize("name", ["lir-bert-int-exact", "lir-electra-cls-sample"])
def test_lightning_ir_checkpoints_give_their_recorded_scores(shared, name, tmp_path):
    folder = str(shared / "fixtures" / "lightning-ir" / name)
    model = SetEncoderForReranking.from_pretrained(folder)
    tokenizer = SetEncoderTokenizer.from_pretrained(folder)
    expected = json.loads((shared / "fixtures" / "lightning-ir" / name / "expected.json").read_text())
    model.tokenizer = tokenizer
    model.save_pretrained(tmp_path)
    for opened in (model, SetEncoderForReranking.from_pretrained(tmp_path)):
        for case in expected.values():
            scores = opened(**SetEncoderTokenizer.from_pretrained(tmp_path)(case["query"], case["docs"])).logits[0]
            torch.testing.assert_close(scores, torch.tensor(case["scores"]), atol=1e-4, rtol=0)
    assert len(expected) in (3, 6)


def test_an_unknown_kind_of_lightning_ir_model_is_refused():
    with pytest.raises(ValueError, match="pooling_strategy"):
        SetEncoderConfig.from_dict({"backbone_model_type": "bert", "pooling_strategy": "mean"})


# ---- set attention cannot be off unnoticed -------------------------------------------------------------------------


def test_replaced_attention_raises(backbones, family):
    model, tokenizer = load(backbones[family])
    batch = tokenizer("cat", make_passages(3))
    with pytest.raises(ValueError, match="cannot be 'sdpa'"):
        model.set_attn_implementation("sdpa")
    model.encoder.config._attn_implementation = "sdpa"
    with pytest.raises(RuntimeError, match="did not call the set attention"):
        model(**batch)


def test_a_missing_layout_raises(backbones, family):
    model, tokenizer = load(backbones[family])
    batch = tokenizer("cat", make_passages(3))
    with pytest.raises(RuntimeError, match="without a layout"):
        model.encoder(input_ids=batch["input_ids"], position_ids=batch["position_ids"])


@pytest.mark.parametrize("config", [DebertaV2Config, MPNetConfig, RemBertConfig])
def test_encoders_without_replaceable_attention_are_refused_by_name(config, tmp_path):
    from transformers import AutoModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16}
    small = config(vocab_size=40, **sizes)
    with pytest.raises(ValueError, match=f"{config.__name__.removesuffix('Config')}Model has no replaceable attention"):
        SetEncoderForReranking(SetEncoderConfig(encoder_config=small))
    AutoModel.from_config(small).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{config.__name__.removesuffix('Config')}Model has no replaceable attention"):
        SetEncoderForReranking.from_pretrained(tmp_path)


# ---- text ----------------------------------------------------------------------------------------------------------


def test_query_and_passage_are_cut_each_to_its_own_length_and_the_template_never(backbones):
    _, tokenizer = load(backbones["bert"], passage_length=5)
    batch = tokenizer("cat " * 100, ["dog " * 100])
    cat, dog = tokenizer.encode_queries(["cat"])[0], tokenizer.encode_passages(["dog"])[0]
    template = tokenizer.template
    expected = [template.int_id, template.cls_id, *cat * 8, template.sep_id, *dog * 5, template.sep_id]
    assert batch["input_ids"][0].tolist() == expected
    assert batch["token_type_ids"][0].tolist() == [0] * 11 + [1] * 6


def test_text_cannot_write_special_tokens(backbones):
    _, tokenizer = load(backbones["bert"])
    ids = tokenizer.encode_passages(["[SEP] [INT] [CLS] cat"])[0]
    template = tokenizer.template
    assert not {template.cls_id, template.sep_id, template.int_id} & set(ids)


def test_rank_gives_passages_best_first(backbones):
    model, tokenizer = load(backbones["bert"])
    passages = make_passages(5)
    ranked = model.rank("cat", passages)
    scores = model(**tokenizer("cat", passages)).logits[0]
    assert [row["index"] for row in ranked] == scores.argsort(descending=True).tolist()
    assert all(row["text"] == passages[row["index"]] and row["score"] == scores[row["index"]] for row in ranked)
    assert model.rank("cat", []) == []
    with pytest.raises(ValueError, match="non-empty list"):
        tokenizer("cat", "dog")


# ---- one model, many callers ---------------------------------------------------------------------------------------


def test_threads_that_share_a_model_get_their_own_scores(backbones):
    model, tokenizer = load(backbones["bert"])
    model.max_tokens_per_chunk = 60
    packed = [tokenizer("blue river", make_passages(count, count)) for count in (3, 9, 14, 22)]
    expected = [model(**item).logits for item in packed]

    def score(place: int) -> bool:
        with torch.no_grad():
            return torch.equal(model(**packed[place % 4]).logits, expected[place % 4])

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(score, range(80)))


def test_a_model_can_be_copied_after_a_training_step_of_several_chunks(backbones):
    model, tokenizer = load(backbones["bert"])
    model.max_tokens_per_chunk = 60
    packed = tokenizer("blue river", make_passages(14))
    model.train()(**packed).logits.sum().backward()
    assert torch.equal(copy.deepcopy(model).eval()(**packed).logits, model.eval()(**packed).logits)


@pytest.mark.parametrize("cls_only", [False, True])
def test_attention_written_out_in_pieces_is_the_same(backbones, monkeypatch, cls_only):
    model, tokenizer = load(backbones["modernbert"])  # its windows are shorter than these passages
    packed = tokenizer("blue river", ["lamp cat dog " * 7] * 5 + make_passages(6))
    expected = model(**packed).logits
    monkeypatch.setattr("setenc_hf.attention.MOST_WEIGHTS", 1)
    assert torch.allclose(model(**packed).logits, expected, atol=1e-6)
    runs = [Run(passage=2, token=10, size=5, length=4)]
    monkeypatch.setattr("setenc_hf.attention.MOST_WEIGHTS", (1 if cls_only else 4) * 2 * (2 * 4 + 6))
    assert list(pieces(runs, shared_weights=6, heads=2, cls_only=cls_only)) == [
        Run(2, 10, 2, 4), Run(4, 18, 2, 4), Run(6, 26, 1, 4)
    ]  # fmt: skip


def test_what_is_changed_on_opening_reaches_the_tokenizer(backbones, tmp_path):
    model, _ = load(backbones["bert"])
    model.save_pretrained(tmp_path)
    passages = make_passages(4)
    for changed in ({"interaction": "none"}, {"interaction": "cls"}, {"passage_length": 2}, {"query_length": 1}):
        opened = SetEncoderForReranking.from_pretrained(tmp_path, **changed)
        tokenizer = SetEncoderTokenizer.from_pretrained(str(tmp_path), **changed)
        assert opened.rank("blue river lamp", passages) == opened.rank("blue river lamp", passages, tokenizer)
        assert opened.rank("blue river lamp", passages) != model.rank("blue river lamp", passages)
    with pytest.raises(ValueError, match="packs for interaction 'none', the model has 'int'"):
        model.rank("blue", passages, SetEncoderTokenizer.from_pretrained(str(tmp_path), interaction="none"))
    SetEncoderForReranking.from_pretrained(tmp_path).save_pretrained(tmp_path / "copy")
    copied = SetEncoderForReranking.from_pretrained(tmp_path / "copy")
    assert copied.rank("blue river", passages) == model.rank("blue river", passages)


def test_an_auto_class_gives_a_new_interaction_token_too(backbones, tmp_path):
    load(backbones["bert"], "cls")[0].save_pretrained(tmp_path)
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path, interaction="int")
    template = opened.open_tokenizer().template
    rows = opened.get_input_embeddings().weight
    assert torch.equal(rows[template.int_id], rows[template.cls_id])
