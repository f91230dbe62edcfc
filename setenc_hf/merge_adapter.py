"""Make an ordinary Set-Encoder of an adapter and its base.

    python -m setenc_hf.merge_adapter ADAPTER OUTPUT

The scores are the adapter's within rounding, at the speed of a model without one; the folder needs neither PEFT nor
the base.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .command import run_command
from .errors import InputError
from .files import atomic_folder
from .hub import opening


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m setenc_hf.merge_adapter", description=__doc__.split("\n\n")[0])
    parser.add_argument("adapter", help="folder or hub id of an adapter")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder where it exists")
    args = parser.parse_args(argv)

    from transformers.utils import logging

    from .adapters import merge
    from .modeling import SetEncoderForReranking
    from .tokenization import SetEncoderTokenizer

    logging.disable_progress_bar()
    with atomic_folder(args.output, args.overwrite) as folder:
        with opening(args.adapter):
            model = SetEncoderForReranking.from_pretrained(args.adapter)
        if "adapter" not in model.__dict__:
            raise InputError(f"{args.adapter}: is no adapter, but a whole model already")
        model.tokenizer = model.tokenizer or SetEncoderTokenizer.from_pretrained(args.adapter)
        merge(model).save_pretrained(folder)
    weights = sum(file.stat().st_size for file in Path(args.output).glob("*.safetensors"))
    print(f"Merged {args.adapter} into its base; wrote {args.output} ({weights / 1e6:,.1f} MB of weights)")


if __name__ == "__main__":
    run_command(main)
