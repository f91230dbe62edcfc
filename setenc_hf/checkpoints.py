"""Checkpoints that are there whole or not at all, whenever the training that writes them is killed.

A checkpoint is written within `output_dir/.partial`, where nothing looks for one, and moved to its name when every
process has written its part. Beside its files lies `files.json` with their sizes, so that a copy that was cut short
is told from a whole one as well.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from .distributed import wait_for_all
from .files import PARTIAL

FILES = "files.json"


class CheckpointedTrainer(Trainer):
    """A `Trainer` whose checkpoints appear under their names only when they are complete."""

    _is_saving = False

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # resumed from its last checkpoint, a stock training goes one step beyond its end
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL) if self._is_saving else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_saving:  # uploads run beside the training and would find the folder moved away
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        written, checkpoint = output / PARTIAL / name, output / name
        if self.args.should_save:
            shutil.rmtree(output / PARTIAL, ignore_errors=True)
        wait_for_all()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving = False
        best = output / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_global_step and (best == checkpoint or best.is_dir()):
            self.state.best_model_checkpoint = str(best)  # and not where it was written
        wait_for_all()
        if self.args.should_save:
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            seal(written)
            move_away(checkpoint, output)  # where a training that was resumed from an earlier step comes by again
            os.replace(written, checkpoint)
            sync(output)
            if self.args.save_total_limit:
                kept = {checkpoint, Path(self.state.best_model_checkpoint or checkpoint)}
                kept |= getattr(self, "uploading", set())  # a HubTrainer's
                rotate(output, self.args.save_total_limit, kept)
            shutil.rmtree(output / PARTIAL, ignore_errors=True)
        wait_for_all()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))


def seal(folder: Path) -> None:
    """Write the sizes in bytes of all files of a checkpoint beside them, and everything through to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILES)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    (folder / FILES).write_text(json.dumps(sizes, indent=1) + "\n", "utf-8")
    for path in [*files, folder / FILES, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Write a file or folder through to the disk: what a power cut leaves must not carry a checkpoint's name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rotate(output: Path, limit: int, kept: set[Path]) -> None:
    """Delete the earliest checkpoints until `limit` are left, but none of `kept`."""
    checkpoints = [Path(path) for path in sort_checkpoints(str(output))]
    loose = [checkpoint for checkpoint in checkpoints if checkpoint not in kept]
    for checkpoint in loose[: max(len(checkpoints) - max(limit, len(kept)), 0)]:
        move_away(checkpoint, output)


def move_away(checkpoint: Path, output: Path) -> None:
    """Delete a checkpoint such that it keeps its name until it goes as a whole."""
    if checkpoint.exists():
        doomed = output / PARTIAL / f"old-{checkpoint.name}"
        doomed.parent.mkdir(exist_ok=True)
        os.replace(checkpoint, doomed)
        shutil.rmtree(doomed)


def missing_files(checkpoint: Path) -> list[str]:
    """Return the files that a checkpoint lacks or holds cut short; `files.json` itself where it was never sealed."""
    try:
        sizes = json.loads((checkpoint / FILES).read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return [FILES]
    paths = {name: checkpoint / name for name in sizes}
    return [name for name, path in paths.items() if not path.is_file() or path.stat().st_size != sizes[name]]


def lies_in(checkpoint: Path, output: Path) -> bool:
    """Tell whether a checkpoint is one of `output`'s, be it a link to another disk."""
    return checkpoint.parent.resolve() == output.resolve()


def later_checkpoints(output: Path, checkpoint: Path) -> list[Path]:
    """Return the checkpoints of `output` behind `checkpoint`, where that is one of them."""
    if not lies_in(checkpoint, output):
        return []
    paths = [Path(path) for path in sort_checkpoints(str(output))]
    names = [path.name for path in paths]
    return paths[names.index(checkpoint.name) + 1 :] if checkpoint.name in names else []


def last_checkpoint(output: Path) -> tuple[Path | None, list[Path]]:
    """Return the latest complete checkpoint in `output`, if any, and later ones that are not complete."""
    incomplete: list[Path] = []
    for path in reversed(sort_checkpoints(str(output))):
        if not missing_files(Path(path)):
            return Path(path), incomplete
        incomplete.append(Path(path))
    return None, incomplete
