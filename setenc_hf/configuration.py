"""The Set-Encoder's configuration: a backbone's own configuration and what makes a set of it."""

from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

# what lightning-ir writes into its flat config, and our name for it; everything else there belongs to the backbone
LIGHTNING_IR_FIELDS = {
    "depth": "depth",
    "sample_missing_docs": "sample_missing_passages",
    "query_length": "query_length",
    "doc_length": "passage_length",
    "linear_bias": "linear_bias",
}
# fields of lightning-ir that change the scores, with the one value that this implementation (and the paper) has
LIGHTNING_IR_FIXED = {"pooling_strategy": "first", "scoring_strategy": "rank", "tokenizer_pattern": None}
LIGHTNING_IR_DROPPED = {
    "add_extra_token",
    "adapter_config",
    "architectures",
    "backbone_model_type",
    "model_type",
    "pretrained_adapter_name_or_path",
    "use_adapter",
}


class SetEncoderConfig(PreTrainedConfig):
    r"""
    Configuration of a [`SetEncoderForReranking`] (Schlatt et al., ECIR 2025, arXiv 2404.06912).

    Args:
        encoder_config (`PreTrainedConfig` or `dict`):
            The backbone's configuration, `model_type` included.
        interaction (`"int"`, `"cls"` or `"none"`, defaults to `"int"`):
            Which token of a passage the other passages of its query attend to: a token `[INT]` of its own at
            position 1; the `[CLS]` token, as in the paper's first version; or none, which leaves a pointwise
            cross-encoder.
        depth (`int`, defaults to 100):
            Passages per query that the model is meant for: the size to which a list is filled up where
            `sample_missing_passages` is on.
        sample_missing_passages (`bool`, defaults to `False`):
            In training, let every passage also attend to interaction tokens drawn from the distribution of the
            list's own, as many as the list lacks to `depth`. Never at inference unless asked for there.
        normalize_interaction (`bool`, defaults to `False`):
            Take the logarithm of their number off the attention logits of a list's interaction tokens, so that they
            weigh as much as one token together, however many there are: meant for models that are trained on short
            lists and used on long ones. The paper's model does not. A list of one passage is the same either way.
        query_length, passage_length (`int`, default to 32 and 256):
            Tokens of a query and of a passage that are kept; special tokens are not counted.
        linear_bias (`bool`, defaults to `False`):
            Whether the linear layer that gives the score has a bias.
    """

    model_type = "set-encoder"
    sub_configs_defaults = {"encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="bert")}  # noqa: RUF012

    encoder_config: dict | PreTrainedConfig | None = None
    interaction: Literal["int", "cls", "none"] = "int"
    depth: int = 100
    sample_missing_passages: bool = False
    normalize_interaction: bool = False
    query_length: int = 32
    passage_length: int = 256
    linear_bias: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.interaction not in ("int", "cls", "none"):
            raise ValueError(f"`interaction` is one of 'int', 'cls' and 'none', got {self.interaction!r}")
        for name in ("depth", "query_length", "passage_length"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {getattr(self, name)!r}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from its own dictionary or from the flat one that lightning-ir writes."""
        if "backbone_model_type" in config_dict:
            config_dict = from_lightning_ir(config_dict)
        return super().from_dict(config_dict, **kwargs)


def from_lightning_ir(flat: dict[str, Any]) -> dict[str, Any]:
    """Return our configuration's fields for a `config.json` of lightning-ir's `set-encoder` models.

    Raises `ValueError` where the model was made with an option that gives other scores than the paper's model.
    """
    for name, value in LIGHTNING_IR_FIXED.items():
        if flat.get(name, value) != value:
            raise ValueError(f"a lightning-ir model with `{name}` {flat[name]!r} is not supported; only {value!r} is")
    if flat.get("use_adapter"):
        raise ValueError("a lightning-ir model saved as an adapter is not supported; merge the adapter and save it")
    config = {ours: flat[theirs] for theirs, ours in LIGHTNING_IR_FIELDS.items() if theirs in flat}
    config["interaction"] = "int" if flat.get("add_extra_token") else "cls"
    known = {*LIGHTNING_IR_FIELDS, *LIGHTNING_IR_FIXED, *LIGHTNING_IR_DROPPED}
    encoder = {name: value for name, value in flat.items() if name not in known}
    config["encoder_config"] = {**encoder, "model_type": flat["backbone_model_type"]}
    config["dtype"] = flat.get("dtype", flat.get("torch_dtype"))
    config["architectures"] = ["SetEncoderForReranking"]
    return config


AutoConfig.register(SetEncoderConfig.model_type, SetEncoderConfig, exist_ok=True)
