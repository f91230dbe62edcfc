"""Encode queries and passages into one vector a token, with ColBERT checkpoints of three formats.

Khattab and Zaharia, "ColBERT", SIGIR 2020; Santhanam et al., "ColBERTv2", NAACL 2022. Read here, without the packages
that wrote them: ColBERTv2's own folders (`architectures: ["HF_ColBERT"]`, the projection beside the encoder's weights,
settings in `artifact.metadata`), and the folders of sentence-transformers' `MultiVectorEncoder` and of PyLate (module
by module in `modules.json`).
"""

import json
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from setenc_hf.errors import InputError
from setenc_hf.files import sha256
from setenc_hf.hub import find_model


@dataclass
class LateInteractionSettings:
    """How texts become tokens; lengths count every token, the special ones too."""

    query_marker: str = "[unused0] "
    doc_marker: str = "[unused1] "
    query_length: int = 32
    doc_length: int = 180
    expansion: str | None = "fixed"  # "fixed" and "min" pad with mask tokens to `query_length`, None does not
    query_limit: int | None = None  # where queries are cut; `query_length` unless "min" has a limit of its own
    attend: bool = False  # whether the encoder attends to the mask tokens; they score in any case
    skipped_words: tuple[str, ...] = tuple(string.punctuation)


class LateInteractionEncoder:
    """An encoder with its projections; `fingerprint` identifies weights and settings."""

    def __init__(self, model: str, device: str | torch.device = "cpu", doc_length: int | None = None) -> None:
        folder = download(model)
        self.settings, projections = read_checkpoint(folder)
        if doc_length is not None:
            self.settings.doc_length = doc_length
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.device = torch.device(device)
        self.encoder = AutoModel.from_pretrained(folder, use_safetensors=True).eval().to(device)
        self.projections = nn.ModuleList(projections).eval().to(device)
        if self.device.type == "cuda":  # half precision, as ColBERT encodes on a GPU
            self.encoder.half()
            self.projections.half()
        longest = getattr(self.encoder.config, "max_position_embeddings", None)
        lengths = self.settings.doc_length, self.settings.query_length, self.settings.query_limit or 0
        if longest and max(lengths) > longest:
            raise InputError(f"{model}: texts of {max(lengths)} tokens do not fit the encoder's {longest} positions")
        width = self.encoder.config.hidden_size
        self.dim = next((layer.out_features for layer in reversed(projections) if isinstance(layer, nn.Linear)), width)
        skipped = {self.tokenizer.convert_tokens_to_ids(word) for word in self.settings.skipped_words}
        self.skipped = torch.tensor(sorted(skipped - {self.tokenizer.unk_token_id, None}), dtype=torch.long)
        weights = {path.name: sha256(path) for path in sorted(folder.rglob("*.safetensors"))}
        self.fingerprint: dict[str, Any] = {"weights": weights, **asdict(self.settings)}
        del self.fingerprint["query_limit"]  # an index is of passages
        self.fingerprint["skipped_words"] = "".join(self.settings.skipped_words)

    @torch.inference_mode()
    def encode_queries(self, texts: Sequence[str]) -> list[Tensor]:
        """Return, per query, its vectors: float32 [tokens, dim], each of length 1."""
        settings, mask_id = self.settings, self.tokenizer.mask_token_id
        limit = settings.query_limit or settings.query_length
        vectors = []
        for ids in self._token_ids(texts, settings.query_marker, limit):
            fill = max(settings.query_length - len(ids), 0) if settings.expansion else 0
            attended = torch.tensor([[1] * len(ids) + [int(settings.attend)] * fill])
            vectors.append(self._encode(torch.tensor([ids + [mask_id] * fill]), attended)[0])
        return vectors

    @torch.inference_mode()
    def encode_passages(self, texts: Sequence[str], batch_size: int = 64) -> list[Tensor]:
        """Return, per passage, the vectors of its tokens without punctuation: float32 [kept tokens, dim].

        Passages of like length share a batch; the batches depend on `texts` alone, so that encoding them again
        gives the same bits.
        """
        rows = self._token_ids(texts, self.settings.doc_marker, self.settings.doc_length)
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        vectors: list[Tensor] = [torch.empty(0)] * len(rows)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            longest = len(rows[batch[0]])
            pad = self.tokenizer.pad_token_id or 0
            ids = torch.tensor([rows[row] + [pad] * (longest - len(rows[row])) for row in batch])  # [passages, tokens]
            lengths = torch.tensor([len(rows[row]) for row in batch])
            attended = (torch.arange(longest) < lengths[:, None]).long()
            kept = attended.bool() & ~torch.isin(ids, self.skipped)
            for row, found, keep in zip(batch, self._encode(ids, attended), kept, strict=True):
                vectors[row] = found[keep]
        return vectors

    def count_vectors(self, texts: Sequence[str]) -> list[int]:
        """Return how many vectors each passage will have."""
        rows = self._token_ids(texts, self.settings.doc_marker, self.settings.doc_length)
        return [int((~torch.isin(torch.tensor(row), self.skipped)).sum()) for row in rows]

    def _encode(self, ids: Tensor, attended: Tensor) -> Tensor:
        device = self.device
        states = self.encoder(input_ids=ids.to(device), attention_mask=attended.to(device)).last_hidden_state
        for layer in self.projections:
            states = layer(states)
        return normalize(states.float(), dim=-1).cpu()

    def _token_ids(self, texts: Sequence[str], marker: str, length: int | None) -> list[list[int]]:
        """Return [CLS] marker text [SEP] as ids; a marker that is one token of the vocabulary is never split."""
        tokenizer = self.tokenizer
        known = {token: tokenizer.get_vocab().get(token) for token in (marker, marker.strip())}
        marker_ids = [found for found in known.values() if found is not None][:1] if marker.strip() else []
        if not marker_ids:
            texts = [marker + text for text in texts]
        first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
        last = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        room = None if length is None else length - len(marker_ids) - 2
        found = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [[first, *marker_ids, *ids[:room], last] for ids in found]


def download(model: str) -> Path:
    """Return the folder of a model: a local folder, or the files of a hub id (weights in safetensors only)."""
    found = find_model(model)
    if Path(found).is_dir():
        return Path(found)
    from huggingface_hub import snapshot_download

    try:
        files = snapshot_download(found, allow_patterns=["*.json", "*.txt", "*.metadata", "*.safetensors", "*.model"])
    except Exception as error:
        raise InputError(f"{model}: the hub has this model, but it cannot be downloaded ({error})") from None
    return Path(files)


def read_checkpoint(folder: Path) -> tuple[LateInteractionSettings, list[nn.Module]]:
    """Return a checkpoint's settings and the layers between its encoder and the normalised vectors.

    Raises `InputError` naming what the folder lacks, or the module or setting that is not supported.
    """
    if (folder / "modules.json").exists():
        return _read_modules(folder)
    config = _json(folder / "config.json")
    if "HF_ColBERT" not in (config.get("architectures") or []):
        raise InputError(
            f"{folder}: no late-interaction checkpoint: neither HF_ColBERT in its config.json nor a modules.json"
        )
    if not (folder / "model.safetensors").exists():
        raise InputError(f"{folder}: holds no model.safetensors; other formats of weights can run code and are refused")
    weight = load_file(folder / "model.safetensors").get("linear.weight")
    if weight is None:
        raise InputError(f"{folder}/model.safetensors: holds no linear.weight, the projection of a ColBERT checkpoint")
    found = _json(folder / "artifact.metadata") if (folder / "artifact.metadata").exists() else {}
    settings = LateInteractionSettings(
        query_marker=found.get("query_token_id") or "[unused0]",
        doc_marker=found.get("doc_token_id") or "[unused1]",
        query_length=found.get("query_maxlen") or 32,
        doc_length=found.get("doc_maxlen") or 180,
        attend=bool(found.get("attend_to_mask_tokens")),
        skipped_words=tuple(string.punctuation) if found.get("mask_punctuation", True) else (),
    )
    return settings, [_linear(weight, None)]


def _read_modules(folder: Path) -> tuple[LateInteractionSettings, list[nn.Module]]:
    """Read a `MultiVectorEncoder` or PyLate folder; what either leaves out has the default of its library."""
    texts = _json(folder / "config_sentence_transformers.json")
    pylate = texts.get("model_type") == "ColBERT" or "query_prefix" in texts
    transformer: dict[str, Any] = {}
    if (folder / "sentence_bert_config.json").exists():
        transformer = _json(folder / "sentence_bert_config.json")
    layers: list[nn.Module] = []
    skipped: Sequence[str] = (texts.get("skiplist_words") or string.punctuation) if pylate else ()
    for module in _json(folder / "modules.json"):
        kind, path = module["type"].rsplit(".", 1)[-1], folder / module["path"]
        if kind == "Dense":
            layers += _read_dense(path)
        elif kind == "MultiVectorMask":
            found = _json(path / "config.json")
            skipped = found.get("skiplist_words") or ()
            if found.get("skiplist_tasks", ["document"]) != ["document"] or found.get("keep_only_token_ids"):
                raise InputError(f"{path}/config.json: only masks that skip words of passages are supported")
        elif kind not in ("Transformer", "Normalize"):
            raise InputError(f"{folder}/modules.json: the module {kind} is not supported in a late-interaction model")
    prompts = texts.get("prompts") or {}
    if pylate:
        settings = LateInteractionSettings(
            query_marker=texts.get("query_prefix", "[Q] "),
            doc_marker=texts.get("document_prefix", "[D] "),
            query_length=texts.get("query_length") or 32,
            doc_length=texts.get("document_length") or 180,
            expansion="fixed" if texts.get("do_query_expansion", True) else None,
            attend=bool(texts.get("attend_to_expansion_tokens")),
        )
    else:
        expansion = transformer.get("query_expansion") or {}
        longest = transformer.get("max_seq_length") or 512
        settings = LateInteractionSettings(
            query_marker=prompts.get("query") or "",
            doc_marker=prompts.get("document") or "",
            query_length=expansion.get("length") or transformer.get("query_length") or longest,
            query_limit=transformer.get("query_length") or longest if expansion.get("strategy") == "min" else None,
            doc_length=transformer.get("document_length") or longest,
            expansion=expansion.get("strategy"),
            attend=bool(expansion.get("attend")),
        )
        if expansion.get("token"):
            raise InputError(f"{folder}: queries are expanded with {expansion['token']!r}; only the mask is supported")
    settings.skipped_words = tuple(skipped)
    return settings, layers


def _read_dense(folder: Path) -> list[nn.Module]:
    config = _json(folder / "config.json")
    if config.get("use_residual"):
        raise InputError(f"{folder}/config.json: a projection with `use_residual` is not supported")
    activation = str(config.get("activation_function", "torch.nn.modules.linear.Identity")).rsplit(".", 1)[-1]
    known = {"Identity": nn.Identity, "Tanh": nn.Tanh, "ReLU": nn.ReLU, "GELU": nn.GELU}
    if activation not in known:
        raise InputError(f"{folder}/config.json: the activation {activation} is not supported")
    if not (folder / "model.safetensors").exists():
        raise InputError(f"{folder}: holds no model.safetensors; other formats of weights can run code and are refused")
    weights = load_file(folder / "model.safetensors")
    return [_linear(weights["linear.weight"], weights.get("linear.bias")), known[activation]()]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.float())
    if bias is not None:
        layer.bias = nn.Parameter(bias.float())
    return layer


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a late-interaction checkpoint has it") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not json ({error.msg})") from None
