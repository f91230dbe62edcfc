"""Adapters: the backbone stays as it is, and PEFT's small modules in it, the score head and `[INT]` are trained.

An adapter's folder holds `adapter_model.safetensors` (the modules, the head, the row of `[INT]`), `adapter_config.json`
(PEFT's, which names the base), `config.json` and the tokenizer, but not the base's weights.
`SetEncoderForReranking.from_pretrained` opens it.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import cached_file

from .configuration import SetEncoderConfig
from .errors import InputError
from .modeling import HUB_ARGUMENTS, OWN_FIELDS, SetEncoderForReranking
from .recipe import nearest

try:
    from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils.other import TrainableTokensWrapper
except ImportError as error:
    raise InputError("adapters need PEFT: pip install 'setenc_hf[peft]'") from error

ADAPTER = "default"  # PEFT's name for the one adapter of a model
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
HEAD = "linear"
UNKNOWN_STEPS = 10**9  # of AdaLoRA, until training begins and the trainer says
# methods that need more than modules to put themselves into: tasks of a batch, other adapters, a model of their own
REFUSED = {"POLY", "XLORA", "SHADOW", "TRAINABLE_TOKENS"}
# (IA)^3 scales keys, values and the inside of the feed-forward part: the modules of each, in the families' names
IA3_ATTENTION = ("key", "value", "k_lin", "v_lin", "Wqkv")
IA3_FEED_FORWARD = (r"layer\.\d+\.output\.dense", r"ffn\.lin2", r"mlp\.Wo")


def methods() -> list[str]:
    """Return the names of PEFT's methods that work inside a model's modules, and so in a Set-Encoder."""
    names = []
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
        settings = {field.name for field in fields(config)}
        if (
            isinstance(tuner, type)
            and issubclass(tuner, BaseTuner)
            and {"target_modules", "modules_to_save"} <= settings
            and kind.value not in REFUSED
        ):
            names.append(kind.value.lower())
    return sorted(names)


def check_method(name: str, settings: Mapping[str, Any]) -> None:
    """Raise `InputError` where PEFT has no such method for us, or the method no such settings."""
    if name.lower() not in methods():
        raise InputError(
            f"`peft` {name!r} is no method of PEFT that works inside a Set-Encoder{nearest(name.lower(), methods())} "
            f"(it is one of {', '.join(methods())})"
        )
    known = [field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name.upper())])]
    for setting in settings:
        if setting not in known:
            raise InputError(f"`peft_config`: {name} has no setting {setting!r}{nearest(setting, known)}")


def add_adapter(
    model: SetEncoderForReranking, name: str, settings: Mapping[str, Any] | None = None, revision: str | None = None
) -> "SetEncoderAdapter":
    """Freeze a model and put a method's new modules into it, to be trained with the head and the row of `[INT]`.

    Args:
        model: opened from the folder or hub id that the adapter will name as its base.
        name: one of [`methods`], such as `lora`.
        settings: the method's own, in PEFT's names; the default `target_modules` are all linear layers of the encoder
            (for `ia3` and `ln_tuning` those of their papers).
        revision: the base's, on the hub.
    """
    settings = dict(settings or {})
    check_method(name, settings)
    kind = PeftType(name.upper())
    if settings.get("target_modules") in (None, "all-linear"):
        settings |= default_targets(model, kind)
    settings["modules_to_save"] = sorted({*(settings.get("modules_to_save") or ()), HEAD})
    if kind is PeftType.ADALORA and "total_step" not in settings:
        settings["total_step"] = UNKNOWN_STEPS
    base = model.name_or_path
    try:
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](**settings)
        config.base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
        config.revision = None if os.path.isdir(base) else revision
        add_interaction_row(config, model)
        return SetEncoderAdapter(model, config)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise InputError(f"`peft` {name!r} cannot be put into this model: {' '.join(str(error).split())}") from None


def default_targets(model: SetEncoderForReranking, kind: PeftType) -> dict[str, Any]:
    """Return which modules a method goes into, by their whole names; never the head."""
    if kind is PeftType.IA3:
        feed_forward = rf"encoder\..*({'|'.join(IA3_FEED_FORWARD)})"
        attention = rf"encoder\..*\.({'|'.join(IA3_ATTENTION)})"
        return {"target_modules": f"{attention}|{feed_forward}", "feedforward_modules": feed_forward}
    wanted = nn.LayerNorm if kind is PeftType.LN_TUNING else nn.Linear
    names = [name for name, module in model.encoder.named_modules() if isinstance(module, wanted)]
    return {"target_modules": [f"encoder.{name}" for name in names]}


def add_interaction_row(config: PeftConfig, model: SetEncoderForReranking) -> None:
    """Let the row of `[INT]`, and no other of the embeddings, be trained and saved.

    PEFT honours the attribute in every method, but stores it for LoRA's kin alone: it is set again on opening.
    """
    row = model.open_tokenizer().template.int_id
    if row is None or getattr(config, "trainable_token_indices", None):
        return
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    config.trainable_token_indices = {name: [row]}


class SetEncoderAdapter(PeftModel):
    """A Set-Encoder with an adapter in it; saves what the adapter's folder needs to be opened on its own."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the adapter, head and `[INT]` included, with the configuration and the tokenizer; no base weights."""
        super().save_pretrained(str(save_directory), save_embedding_layers=False, **kwargs)
        model = self.get_base_model()
        if kwargs.get("is_main_process", True):
            # without the code that travels with whole models: an adapter is opened by this package
            settings = {**json.loads(model.config.to_json_string()), "is_adapter": True}
            settings.pop("auto_map", None)
            text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
            (Path(save_directory) / "config.json").write_text(text, "utf-8")
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(save_directory)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """PEFT would write a card full of blanks on every save; ours is written after training."""

    def penalty(self) -> Tensor | float:
        """Return what the method adds to the loss: AdaLoRA's pull towards orthogonal factors (arXiv 2303.10512)."""
        config = self.peft_config[ADAPTER]
        if config.peft_type is not PeftType.ADALORA or not config.orth_reg_weight:
            return 0.0
        distances = [
            torch.linalg.matrix_norm(product - torch.eye(len(product), dtype=product.dtype, device=product.device))
            for product in self._gram_matrices()
        ]
        return config.orth_reg_weight * torch.stack(distances).mean()

    def _gram_matrices(self) -> Iterator[Tensor]:
        for name, weight in self.named_parameters():
            if ".lora_A." in name:
                yield weight @ weight.T
            elif ".lora_B." in name:
                yield weight.T @ weight


def open_adapter(
    model_class: type[SetEncoderForReranking], name_or_path: str, kwargs: dict[str, Any]
) -> SetEncoderForReranking:
    """Open the base that an adapter's folder or hub id names, and put the adapter into it, unmerged.

    Its scores are those of training to the bit. Raises `ValueError` for weights that are no safetensors file, and for
    any that are missing or left over: a head must never be random.
    """
    hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
    found = {
        name: cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False, **hub)
        for name in (CONFIG_FILE, WEIGHTS_FILE, "config.json")
    }
    if found[WEIGHTS_FILE] is None or found[CONFIG_FILE] is None:
        missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if found[name] is None]
        raise ValueError(f"{name_or_path}: an adapter needs {' and '.join(missing)}; pickled weights are not opened")
    folder = Path(found[WEIGHTS_FILE]).parent
    config = PeftConfig.from_pretrained(str(folder))
    own: dict[str, Any] = {}
    if found["config.json"] is not None:
        stored = SetEncoderConfig.from_pretrained(str(folder))
        own = {name: getattr(stored, name) for name in OWN_FIELDS}
    base_name = config.base_model_name_or_path
    hub["revision"] = config.revision or "main"
    kwargs = {**own, **kwargs}
    for name in ("config", "adapter_kwargs", "output_loading_info"):
        kwargs.pop(name, None)
    try:
        base = model_class.from_pretrained(base_name, **hub, **kwargs)
    except OSError as error:
        raise OSError(
            f"{name_or_path}: its base model {base_name!r} cannot be opened ({str(error).splitlines()[0]}); bring it "
            f"there, or name its place as `base_model_name_or_path` in {CONFIG_FILE}"
        ) from None
    base = merge(base)
    base.open_tokenizer()
    with safe_open(found[WEIGHTS_FILE], framework="pt") as file:
        stored_names = set(file.keys())
    if any("trainable_tokens_delta" in name for name in stored_names):
        add_interaction_row(config, base)
    config.inference_mode = True
    adapter = SetEncoderAdapter(base, config)
    expected = set(get_peft_model_state_dict(adapter, save_embedding_layers=False))
    if expected != stored_names:
        raise ValueError(
            f"{name_or_path}: is no adapter of {base_name!r}: of its weights {sorted(expected - stored_names)[:3]} are "
            f"missing and {sorted(stored_names - expected)[:3]} have no place"
        )
    if not any(HEAD in name.split(".") for name in stored_names) and is_plain_backbone(base_name, hub):
        raise ValueError(f"{name_or_path}: has no score head, nor has its base {base_name!r}; it would be random")
    adapter.load_adapter(str(folder), ADAPTER)
    model = adapter.get_base_model()
    model.is_head_new = False
    model.__dict__["adapter"] = adapter  # past nn.Module's own bookkeeping: the adapter contains the model
    model.name_or_path = name_or_path
    return model.eval()


def is_plain_backbone(name_or_path: str, hub: Mapping[str, Any]) -> bool:
    """Tell whether a model is no Set-Encoder yet, nor an adapter of one."""
    stored, _ = SetEncoderConfig.get_config_dict(name_or_path, **hub)
    return stored.get("model_type") != SetEncoderConfig.model_type


def merge(model: SetEncoderForReranking) -> SetEncoderForReranking:
    """Return a model whose adapter, if it has one, has become part of its weights: an ordinary Set-Encoder."""
    adapter = model.__dict__.pop("adapter", None)
    if adapter is None:
        return model
    # PEFT's own unwrapping of single rows works in LoRA's kin alone
    for name, module in list(model.named_modules()):
        if isinstance(module, TrainableTokensWrapper):
            whole = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            model.set_submodule(name, whole)
    try:
        merged = adapter.merge_and_unload()
    except (NotImplementedError, AttributeError) as error:
        kind = adapter.peft_config[ADAPTER].peft_type.value.lower()
        raise InputError(f"an adapter of PEFT's {kind!r} cannot be merged ({error})") from None
    merged.requires_grad_(True)
    return merged


class AdapterCallback(TrainerCallback):
    """What AdaLoRA has to be told during training: how long it is, and when a step is done.

    Args:
        adapter: what is trained.
        args: the training arguments.
        steps: that training will take.
        checkpoint: the folder that training resumes from, if any.
    """

    def __init__(
        self, adapter: SetEncoderAdapter, args: TrainingArguments, steps: int, checkpoint: str | None = None
    ) -> None:
        config = adapter.peft_config[ADAPTER]
        self.is_adalora = config.peft_type is PeftType.ADALORA
        if self.is_adalora and (checkpoint is not None or args.load_best_model_at_end):
            wish = "resume_from_checkpoint" if checkpoint is not None else "load_best_model_at_end"
            raise InputError(
                f"`{wish}` cannot be had with adalora: how it shares out its ranks is in no checkpoint, and the "
                "weights would not be those of an uninterrupted training; use lora"
            )
        if self.is_adalora and config.total_step == UNKNOWN_STEPS:
            if config.tinit + config.tfinal >= steps:
                raise InputError(
                    f"`peft_config`: tinit {config.tinit} and tfinal {config.tfinal} leave none of the {steps} steps "
                    "to choose ranks in"
                )
            config.total_step = steps

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.is_adalora:
            model.base_model.update_and_allocate(state.global_step + 1)  # counted from 1, so that the last one is met
