"""What a `Trainer` leaves on disk and on the hub: our model card, and no pickle of its arguments."""

from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress, hf_api

from .card import write_card

# what a checkpoint holds to go on with training: pickles, of no use to who only loads the model
TRAINING_STATE = ["optimizer*", "scheduler*", "scaler*", "rng_state*", "global_step*", "*.bin", "*.pt", "*.pth"]


class HubTrainer(Trainer):
    """A `Trainer` whose saved folders anyone may open.

    `--push_to_hub true` pushes at every save (`hub_strategy`) and at the end.
    """

    recipe: dict[str, Any]  # for the card; what the model was trained by, where that is more than `args`
    push_in_progress: PushInProgress | None
    _pushed: frozenset[Path] = frozenset()

    @property
    def uploading(self) -> set[Path]:
        """The checkpoints that are being read by an upload."""
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        return set(self._pushed) if is_busy else set()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # a pickle; the recipe says the same to anyone
            (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def create_model_card(self, **metadata: Any) -> None:  # type: ignore[override]
        """Write our card into the output folder; the stock one knows nothing of lists, measures or data."""
        if self.is_world_process_zero():
            metadata["base_model"] = metadata.pop("finetuned_from", None)
            metadata["datasets"] = metadata.pop("dataset_tags", None) or metadata.pop("dataset", None)
            known = ("license", "language", "tags", "model_name", "base_model", "datasets")
            given = {name: metadata[name] for name in known if metadata.get(name) is not None}
            write_card(self, Path(self.args.output_dir) / "README.md", **given)  # type: ignore[arg-type]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # the stock method copies the model into the output folder and pickles the arguments beside it
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        shared: dict[str, Any] = {
            "repo_id": self.hub_model_id,
            "folder_path": checkpoint_folder,
            "token": self.args.hub_token,
            "revision": self.args.hub_revision,
            "run_as_future": True,
        }
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [hf_api().upload_folder(commit_message=message, ignore_patterns=TRAINING_STATE, **shared)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last_only = self.args.hub_strategy == HubStrategy.CHECKPOINT
            place = "last-checkpoint" if is_last_only else Path(checkpoint_folder).name
            message += ", checkpoint"
            jobs.append(hf_api().upload_folder(commit_message=message, path_in_repo=place, **shared))
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress, self._pushed = PushInProgress(jobs), frozenset()
        else:
            self.push_in_progress.jobs.extend(jobs)
        self._pushed |= {Path(checkpoint_folder)}
