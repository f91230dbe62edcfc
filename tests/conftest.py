"""Tiny local models and tokenizers of every backbone family, and the shared data where it is present."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

WORDS = "a the of in is flea cat dog life cycle days weeks water green blue river stone paper lamp"
SIZES = {
    "vocab_size": 136,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
FAMILIES = {
    "bert": lambda: BertConfig(**SIZES),
    "electra": lambda: ElectraConfig(**SIZES, embedding_size=16),
    "roberta": lambda: RobertaConfig(**SIZES, type_vocab_size=1),
    "xlm-roberta": lambda: XLMRobertaConfig(**SIZES, type_vocab_size=1),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=136, dim=32, n_layers=3, n_heads=4, hidden_dim=48, max_position_embeddings=64, initializer_range=0.3
    ),
    "modernbert": lambda: ModernBertConfig(
        **SIZES, local_attention=16, global_attn_every_n_layers=2, cls_token_id=2, sep_token_id=3
    ),
}


def make_backend() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of some words and all letters; ids 0 to 4 are the special tokens'."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789.,-[]")
    words = dict.fromkeys([*special, *WORDS.split(), *letters, *[f"##{letter}" for letter in letters]])
    tokenizer = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """Give the next module the threads that this one found: the last bits of a score depend on their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder with a tiny random backbone and its tokenizer, for every family."""
    from transformers import AutoModel

    folders = {}
    for number, (family, config) in enumerate(FAMILIES.items()):
        torch.manual_seed(number)
        folder = tmp_path_factory.mktemp(family)
        AutoModel.from_config(config()).save_pretrained(folder)
        make_backend().save_pretrained(folder)
        folders[family] = str(folder)
    return folders


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data, which is no part of the project; tests that need it are skipped without it."""
    folder = Path(os.environ.get("SETENC_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("the shared data is not here")
    return folder
