"""The Set-Encoder: a backbone whose attention reaches across the passages of a query, and a linear layer on `[CLS]`."""

import inspect
import logging
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import SequenceClassifierOutput

from .attention import ATTENTION, SetLayout
from .chunking import chunk_layers, cut_last_layer
from .configuration import SetEncoderConfig
from .packing import unpack
from .tokenization import SetEncoderTokenizer

logger = logging.getLogger(__name__)
FAMILIES = "BERT, ELECTRA, RoBERTa, XLM-RoBERTa, DistilBERT, ModernBERT"
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")
WEIGHT_ALIGNMENT = 64  # bytes
CPU_CHUNK = 2_048  # tokens: the intermediate states of so many stay in the cache
ADAPTER_FILE = "adapter_config.json"
OWN_FIELDS = (
    "interaction",
    "depth",
    "sample_missing_passages",
    "normalize_interaction",
    "query_length",
    "passage_length",
    "linear_bias",
)
# what the backbones call their dropouts
DROPOUTS = {
    "attention_dropout": ("attention_probs_dropout_prob", "attention_dropout"),
    "hidden_dropout": ("hidden_dropout_prob", "dropout", "mlp_dropout", "embedding_dropout"),
}


class TextTooLong(ValueError):
    """A passage with its query has more tokens than the backbone has positions."""


class ScoreHead(nn.Linear):
    """A linear layer that computes in float32: bfloat16 has too few digits to tell a hundred passages apart.

    It is called as a module, since ZeRO-3 and FSDP gather the weights of a module when it is called.
    """

    def forward(self, states: Tensor) -> Tensor:
        """Return float32 [..., out_features] of `states` [..., in_features] of any type."""
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(states.device.type, enabled=False):
            return nn.functional.linear(states.float(), self.weight.float(), bias)


class SetEncoderForReranking(PreTrainedModel):
    """Scores the passages of a query together (Schlatt et al., ECIR 2025, arXiv 2404.06912).

    `from_pretrained` opens a folder or hub id of our own (an adapter too), of lightning-ir's `set-encoder` models, or
    of a plain backbone, which gets a new linear layer and, where its vocabulary lacks it, an embedding for `[INT]`.
    """

    config_class = SetEncoderConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over lists: Trainer divides it by the accumulation steps
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: SetEncoderConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        options = encoder_options(config.encoder_config)
        if encoder is None:
            encoder = AutoModel.from_config(config.encoder_config, **options)
        self.encoder = encoder
        # building the outer configuration resets this to None, and attention would silently be the stock one
        self.encoder.config._attn_implementation = ATTENTION
        self.linear = ScoreHead(encoder.config.hidden_size, 1, bias=config.linear_bias)
        self.has_token_types = getattr(encoder.config, "type_vocab_size", 0) > 1
        embeddings = getattr(encoder, "embeddings", None)
        is_offset = hasattr(embeddings, "create_position_ids_from_input_ids")  # RoBERTa counts from padding_idx + 1
        self.position_offset = encoder.config.pad_token_id + 1 if is_offset else 0
        layers = chunk_layers(encoder)
        cut_last_layer(layers[-1])
        self.max_tokens_per_chunk: int | None = None
        self.tokenizer: SetEncoderTokenizer | None = None
        self.hub: dict[str, Any] = {}  # what it was opened from the hub with
        self.is_head_new = False  # of a plain backbone, not trained yet
        self.post_init()
        # what FSDP wraps; backbones name their embeddings too, which accelerate wraps on its own, or nothing at all
        self._no_split_modules = {type(layers[-1]).__name__}

    @classmethod
    def from_pretrained(cls, name_or_path: str, *args: Any, **kwargs: Any) -> "SetEncoderForReranking":  # type: ignore[override]
        """Open a trained Set-Encoder, ours or lightning-ir's, or make a new one from a plain backbone.

        Args:
            name_or_path: a folder or a hub id.
            kwargs: as in transformers; fields of [`SetEncoderConfig`], which override the stored ones; and
                `attention_dropout` and `hidden_dropout`, which override the backbone's under whatever name it has them.

        Raises `ValueError` for a backbone whose attention cannot be replaced, by name.
        """
        hub: dict[str, Any] = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        found = kwargs.get("adapter_kwargs") or {}  # an Auto class hands an adapter over in this way
        if "_adapter_model_path" in found:
            return open_adapter(cls, found["_adapter_model_path"], {**kwargs, "revision": found.get("revision")})
        if os.path.isfile(os.path.join(name_or_path, ADAPTER_FILE)):
            return open_adapter(cls, name_or_path, kwargs)
        is_told = kwargs.get("config") is not None
        if not is_told:
            stored, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub)
            if stored.get("is_adapter"):
                return open_adapter(cls, name_or_path, kwargs)
            if stored.get("model_type") != SetEncoderConfig.model_type:
                return cls._from_backbone(name_or_path, hub, *args, **kwargs)
            own = {name: kwargs.pop(name) for name in OWN_FIELDS if name in kwargs}
            is_told = "interaction" in own
            config = SetEncoderConfig.from_pretrained(name_or_path, **hub, **own)
            set_dropout(config.encoder_config, kwargs)
            kwargs["config"] = config
        kwargs.pop("attn_implementation", None)
        loaded = super().from_pretrained(name_or_path, *args, **kwargs)
        opened: SetEncoderForReranking = loaded[0] if isinstance(loaded, tuple) else loaded
        opened.hub = hub
        # transformers remembers how keys were renamed on loading, and would rename them back on saving
        for part in opened.modules():
            if isinstance(part, PreTrainedModel):
                part._weight_conversions = None
                align_weights(part)
        is_int = is_told and opened.config.interaction == "int"
        if is_int and stored_interaction(name_or_path, hub) in ("cls", "none"):
            opened.add_interaction_token(opened.open_tokenizer())
        return loaded

    @classmethod
    def _from_backbone(
        cls, name_or_path: str, hub: dict[str, Any], *args: Any, **kwargs: Any
    ) -> "SetEncoderForReranking":
        own = {name: kwargs.pop(name) for name in OWN_FIELDS if name in kwargs}
        kwargs.pop("attn_implementation", None)
        backbone_config = AutoConfig.from_pretrained(name_or_path, **hub)
        set_dropout(backbone_config, kwargs)
        options = encoder_options(backbone_config)
        encoder = AutoModel.from_pretrained(name_or_path, *args, config=backbone_config, **options, **kwargs)
        encoder._weight_conversions = None
        align_weights(encoder)
        config = SetEncoderConfig(encoder_config=encoder.config, **own)
        config.dtype = encoder.dtype
        tokenizer = SetEncoderTokenizer.from_pretrained(
            name_or_path,
            **hub,
            interaction=config.interaction,
            query_length=config.query_length,
            passage_length=config.passage_length,
        )
        model = cls(config, encoder=encoder).to(device=encoder.device, dtype=encoder.dtype)
        model.add_interaction_token(tokenizer)
        model.name_or_path = name_or_path
        model.tokenizer, model.hub, model.is_head_new = tokenizer, hub, True
        return model.eval()

    def add_interaction_token(self, tokenizer: SetEncoderTokenizer) -> None:
        """Start the embedding of a new `[INT]` as a copy of `[CLS]`'s, in a new row where none is left."""
        template = tokenizer.template
        if template.int_id is None or not tokenizer.is_int_new:
            return
        if template.int_id >= self.encoder.get_input_embeddings().num_embeddings:
            self.encoder.resize_token_embeddings(template.int_id + 1, pad_to_multiple_of=8, mean_resizing=False)
        weight = self.encoder.get_input_embeddings().weight
        with torch.no_grad(), gathered(weight):
            weight[template.int_id] = weight[template.cls_id]

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse any other attention than the set attention that makes this model what it is."""
        if attn_implementation != ATTENTION:
            raise ValueError(f"a Set-Encoder's attention is {ATTENTION!r} and cannot be {attn_implementation!r}")

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        passage_lengths: Tensor,
        num_passages: Tensor,
        restore: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        sample_missing_passages: bool | None = None,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput:
        """Score packed lists, as `SetEncoderTokenizer` and `ListwiseCollator` make them.

        Args:
            input_ids, position_ids, token_type_ids: [1, tokens].
            passage_lengths: [passages], tokens of each passage.
            num_passages: [queries].
            restore: [passages], for each passage in the caller's order its place in packed order.
            labels: ignored here; the loss is the trainer's.
            sample_missing_passages: fill each list up to the configured `depth` with drawn interaction tokens; the
                default is the configuration's in training, and off otherwise.

        Returns:
            `logits` [queries, longest list] in float32, -inf behind a shorter list. In evaluation each list is
            computed on its own, so that its scores do not depend on what else is in the batch.
        """
        if sample_missing_passages is None:
            sample_missing_passages = self.training and self.config.sample_missing_passages
        fill_to = self.config.depth if sample_missing_passages else 0
        sizes = num_passages.tolist()
        lengths = passage_lengths.tolist()
        if (positions := self.num_positions) is not None and max(lengths) > positions:
            raise TextTooLong(
                f"a passage has {max(lengths)} tokens with its query, but the {self.config.encoder_config.model_type} "
                f"backbone has {positions} positions: open the model with a lower `passage_length` or `query_length`"
            )
        max_tokens = self.max_tokens_per_chunk or self._default_chunk(input_ids.device)
        groups = [slice(0, len(sizes))] if self.training else [slice(i, i + 1) for i in range(len(sizes))]
        scores = []
        passage = token = 0
        for group in groups:
            layout = SetLayout(
                lengths=lengths[passage : passage + sum(sizes[group])],
                list_sizes=sizes[group],
                interaction=self.config.interaction,
                fill_to=fill_to,
                normalize=self.config.normalize_interaction,
                device=input_ids.device,
                max_tokens=max_tokens,
            )
            tokens = slice(token, token + sum(layout.lengths))
            token_types = None if token_type_ids is None else token_type_ids[:, tokens]
            scores.append(self._score(input_ids[:, tokens], position_ids[:, tokens], token_types, layout))
            passage, token = passage + len(layout.lengths), tokens.stop
        return SequenceClassifierOutput(logits=unpack(torch.cat(scores), num_passages, restore, -torch.inf))

    @property
    def num_positions(self) -> int | None:
        """The most tokens that a passage with its query may have; None where the backbone's configuration says none."""
        positions = getattr(self.config.encoder_config, "max_position_embeddings", None)
        return None if positions is None else positions - self.position_offset

    def _default_chunk(self, device: torch.device) -> int | None:
        # a training step without checkpointing keeps what every chunk computes, so that chunks would spare nothing
        if not (self.training and torch.is_grad_enabled()):
            return default_chunk(device)
        # transformers' own property has another name in 5.20 than in 5.23, which warns of the old one
        is_checkpointed = any(getattr(part, "gradient_checkpointing", False) for part in self.encoder.modules())
        return default_chunk(device) if is_checkpointed else None

    def _score(
        self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None, layout: SetLayout
    ) -> Tensor:
        """Return the scores [passages] of packed tokens [1, tokens] in packed order."""
        inputs: dict[str, Any] = {"token_type_ids": token_type_ids} if self.has_token_types else {}
        output = self.encoder(
            input_ids=input_ids, position_ids=position_ids + self.position_offset, set_layout=layout, **inputs
        )
        states = output.last_hidden_state[0]  # [passages, hidden]: the last layer gives `[CLS]` alone
        return self.linear(states)[:, 0]

    @torch.no_grad()
    def rank(
        self, query: str, passages: Sequence[str], tokenizer: SetEncoderTokenizer | None = None
    ) -> list[dict[str, Any]]:
        """Return the passages of a query best first, as `{"index": 3, "score": 7.1, "text": "..."}`.

        `index` is the passage's place in the argument; ties keep that order. Without a `tokenizer` the model's own is
        used, read once from the folder or hub id that the model came from. Raises `ValueError` where a score is not
        finite.
        """
        if not passages:
            return []
        tokenizer = tokenizer or self.open_tokenizer()
        if tokenizer.interaction != self.config.interaction:
            raise ValueError(
                f"the tokenizer packs for interaction {tokenizer.interaction!r}, the model has "
                f"{self.config.interaction!r}"
            )
        if self.is_head_new:
            logger.warning(
                f"{self.name_or_path or 'this model'} has a new score head: until it is trained, it ranks at random"
            )
        was_training = self.training
        self.eval()
        try:
            scores = self(**tokenizer(query, passages).to(self.device)).logits[0].tolist()
        finally:
            self.train(was_training)
        return [{"index": index, "score": scores[index], "text": passages[index]} for index in best_first(scores)]

    @property
    def tokenizer_fields(self) -> dict[str, Any]:
        """What the configuration says of the tokenizer."""
        return {name: getattr(self.config, name) for name in ("interaction", "query_length", "passage_length")}

    def open_tokenizer(self) -> SetEncoderTokenizer:
        """Return the model's tokenizer, opened where it is not yet: from where the model came from, as configured."""
        if self.tokenizer is None:
            if not self.name_or_path:
                raise ValueError("this model was not opened from a folder or hub id: pass `tokenizer=`")
            self.tokenizer = SetEncoderTokenizer.from_pretrained(self.name_or_path, **self.hub, **self.tokenizer_fields)
        return self.tokenizer

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Save the model, and the tokenizer with it where one can be had; of an opened adapter, the adapter."""
        if "adapter" in self.__dict__:
            self.adapter.save_pretrained(save_directory)
            return
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.tokenizer is None and self.name_or_path:
            with suppress(OSError, ValueError):  # weights may lie without one
                self.open_tokenizer()
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)


def best_first(scores: Sequence[float]) -> list[int]:
    """Return the places of scores, the highest first; ties keep their order.

    Raises `ValueError` where one is not finite: what a diverged model gives would keep the input's order and look fine.
    """
    for place, score in enumerate(scores):
        if not math.isfinite(score):
            raise ValueError(f"the score of passage {place + 1} of {len(scores)} is {score}: has the model diverged?")
    return sorted(range(len(scores)), key=lambda place: -scores[place])


def stored_interaction(name_or_path: str, hub: dict[str, Any]) -> str | None:
    """Return the interaction that a saved Set-Encoder was trained with; None where that is none."""
    stored, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub)
    if stored.get("model_type") != SetEncoderConfig.model_type:
        return None
    return SetEncoderConfig.from_pretrained(name_or_path, **hub).interaction


def open_adapter(cls: type[SetEncoderForReranking], name_or_path: str, kwargs: dict[str, Any]) -> Any:
    """Open an adapter with what only the package has; these modules also travel on their own, beside saved weights."""
    try:
        adapters = import_module("setenc_hf.adapters")
    except ModuleNotFoundError as error:
        raise ImportError(f"{name_or_path} is an adapter, which needs the package setenc_hf to be opened") from error
    return adapters.open_adapter(cls, name_or_path, kwargs)


def align_weights(model: nn.Module) -> None:
    """Copy weights that lie at an odd address, as those of a memory-mapped file do, to where torch would put them.

    A matrix product may round otherwise where a row is not aligned: the same weights would give other last bits after
    saving and opening.
    """
    for weight in model.parameters():
        if weight.device.type == "cpu" and weight.data_ptr() % WEIGHT_ALIGNMENT:
            weight.data = weight.data.clone()


def default_chunk(device: torch.device) -> int | None:
    """Return how many tokens a layer works on at a time where nobody said so: what measured best, or `None` for all.

    In training this is how many are recomputed at a time by gradient checkpointing.
    """
    return CPU_CHUNK if device.type == "cpu" else None


def gathered(weight: nn.Parameter) -> AbstractContextManager:
    """Make a weight that ZeRO-3 has split between the processes whole, and spread what the first one changes of it."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    # not by `import`: whoever loads this file as remote code would be asked to install it
    return import_module("deepspeed").zero.GatheredParameters([weight], modifier_rank=0)


def set_dropout(config: PreTrainedConfig, kwargs: dict[str, Any]) -> None:
    """Move `attention_dropout` and `hidden_dropout` from `kwargs` into a backbone's configuration."""
    for ours, theirs in DROPOUTS.items():
        value = kwargs.pop(ours, None)
        for name in theirs:
            if value is not None and hasattr(config, name):
                setattr(config, name, value)


def encoder_options(config: PreTrainedConfig) -> dict[str, Any]:
    """Return how a backbone of this configuration is built: with our attention, and without a pooler it may have.

    A pooler would get no gradient. Raises `ValueError`, by name, for a backbone in which set attention cannot work.
    """
    model_class = AutoModel._model_mapping[type(config)]
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    name = model_class.__name__
    accepts = inspect.signature(model_class.forward).parameters
    takes_layout = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepts.values())
    if not model_class._supports_attention_backend or not takes_layout or "position_ids" not in accepts:
        raise ValueError(f"{name} has no replaceable attention, which a Set-Encoder needs; use one of {FAMILIES}")
    if getattr(config, "is_decoder", False) or config.is_encoder_decoder:
        raise ValueError(f"{name} is a decoder here; a Set-Encoder needs an encoder: {FAMILIES}")
    options: dict[str, Any] = {"attn_implementation": ATTENTION}
    if "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        options["add_pooling_layer"] = False
    return options


AutoModelForSequenceClassification.register(SetEncoderConfig, SetEncoderForReranking, exist_ok=True)
# a saved model carries these modules, so that it opens with trust_remote_code where this package is not installed
SetEncoderConfig.register_for_auto_class()
SetEncoderForReranking.register_for_auto_class("AutoModelForSequenceClassification")
