"""The command line of `data_prep.rank_gpt`: its flags, what they must be, and which of them shape an answer."""

import argparse
import hashlib
import math
from pathlib import Path
from typing import Any

from setenc_hf.errors import InputError
from setenc_hf.files import sha256

from .llm_client import OPENAI
from .prompts import FORMS, SYSTEM, Prompt, read_template


def build_parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of `python -m data_prep.rank_gpt`."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.rank_gpt",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = parser.add_argument_group("what is ranked")
    data.add_argument("--run", required=True, help="First-stage run (TREC) to re-rank.")
    data.add_argument("--collection", required=True, help="Folder or ir_datasets id with queries and passages.")
    data.add_argument("--output", required=True, help="Run to write; OUTPUT.journal.jsonl beside it keeps the answers.")
    data.add_argument("--depth", type=_count, default=100, help="Passages per query, from the top of the run (100).")
    data.add_argument("--add-relevant", action="store_true", help="Append judged relevant passages that a list lacks.")
    data.add_argument("--qrels", help="Judgements for --add-relevant (default: the collection's).")
    data.add_argument("--tag", help="Tag of the run's lines (default: the model's name).")

    model = parser.add_argument_group("the teacher")
    model.add_argument("--model", required=True, help="Name of the model, as the server knows it.")
    model.add_argument("--base-url", help=f"Server (default: OPENAI_BASE_URL, else {OPENAI}).")
    model.add_argument("--window-size", type=_count, default=20, help="Passages the LLM sees at once (20).")
    model.add_argument("--stride", type=_count, default=10, help="Passages a window starts above the last one (10).")
    model.add_argument("--passes", type=_count, default=1, help="Times the windows go over each list (1).")
    model.add_argument("--prompt", default=FORMS[0], help=f"{', '.join(FORMS)} or a template file ({FORMS[0]}).")
    model.add_argument("--system", default=SYSTEM, help="System message; empty for none.")
    model.add_argument("--temperature", type=_temperature, default=0.0, help="0 by default; `server` sends none.")
    model.add_argument("--passage-words", type=_count, default=300, help="Words kept of each passage (300).")
    model.add_argument("--context-tokens", type=_count, help="The model's context: cut passages further to fit it.")
    model.add_argument(
        "--max-answer-tokens", type=_count, help="Longest answer (16 a passage and 64; reasoning: more)."
    )
    model.add_argument("--structured-output", action="store_true", help="Have the server enforce a JSON answer.")
    model.add_argument("--tokenizer", help="Hub id or folder to count tokens with (default: 4 bytes a token).")
    model.add_argument("--attempts", type=_count, default=5, help="Times a window without a ranking is asked (5).")

    job = parser.add_argument_group("the job")
    job.add_argument("--concurrency", type=_count, default=8, help="Requests in flight (8).")
    job.add_argument("--timeout", type=_amount, default=120.0, help="Seconds to wait for an answer (120).")
    job.add_argument("--max-retries", type=int, default=8, help="Times a request is sent again: 429, 5xx, cuts (8).")
    job.add_argument("--accept-changes", action="store_true", help="Go on with a journal of other settings.")
    job.add_argument(
        "--replay", nargs="?", const="", metavar="JOURNAL", help="Ask nobody: make the run from a journal (OUTPUT's)."
    )
    job.add_argument("--batch", choices=("submit", "status", "collect"), help="Use OpenAI's Batch API, in rounds.")

    cost = parser.add_argument_group("cost, in the currency of your prices")
    cost.add_argument("--dry-run", action="store_true", help="Print windows, tokens and cost; ask and write nothing.")
    cost.add_argument("--price-input", type=_amount, help="Price of a million prompt tokens.")
    cost.add_argument("--price-output", type=_amount, help="Price of a million answer tokens.")
    cost.add_argument("--max-cost", type=_amount, help="Stop before this is passed, what the journal holds included.")
    cost.add_argument("--max-tokens", type=_count, help="Stop before so many tokens (prompts and answers) are passed.")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raise `InputError` on flags that contradict one another or can't be kept."""
    if Path(args.output).is_dir():
        raise InputError(f"{args.output}: is a directory; --output names the run to write")
    if not (args.tag or args.model).split():
        raise InputError("--tag and --model are words, not blanks")
    if args.window_size < 2:
        raise InputError(f"--window-size must be at least 2 (one passage has no order), got {args.window_size}")
    if args.stride > args.window_size:
        raise InputError(
            f"--stride {args.stride} is larger than --window-size {args.window_size}: passages between two windows "
            "would never be seen"
        )
    if args.max_retries < 0:
        raise InputError(f"--max-retries must be 0 or more, got {args.max_retries}")
    if (args.price_input is None) != (args.price_output is None):
        raise InputError("--price-input and --price-output go together; give 0 for what is free")
    if args.max_cost is not None and args.price_input is None:
        raise InputError("--max-cost needs --price-input and --price-output, in currency per million tokens")
    if args.qrels and not args.add_relevant:
        raise InputError("--qrels is read for --add-relevant alone; give both or neither")
    if sum((args.dry_run, args.replay is not None, args.batch is not None)) > 1:
        raise InputError("--dry-run, --replay and --batch exclude one another")


def build_prompt(args: argparse.Namespace) -> Prompt:
    """Return the prompt that the flags describe; raises `InputError` where --prompt is neither a form nor a file."""
    own = args.prompt not in FORMS
    if own and not Path(args.prompt).is_file():
        raise InputError(f"--prompt {args.prompt}: neither {' nor '.join(FORMS)} nor a template file")
    return Prompt(
        form=FORMS[0] if own else args.prompt,
        template=read_template(args.prompt) if own else None,
        system=args.system,
        structured=args.structured_output,
        passage_words=args.passage_words,
        context_tokens=args.context_tokens,
    )


def journaled_settings(args: argparse.Namespace, prompt: Prompt) -> dict[str, Any]:
    """Return the settings that change what is asked: a journal begun with others is not gone on with unnoticed."""
    names = ["model", "window_size", "stride", "passes", "depth", "add_relevant", "system", "temperature"]
    names += ["passage_words", "context_tokens", "tokenizer", "structured_output"]
    settings = {name: getattr(args, name) for name in names}
    settings["prompt"] = prompt.form
    if prompt.template is not None:
        settings["prompt"] = f"template {hashlib.sha256(prompt.template.encode()).hexdigest()}"
    settings["max_answer_tokens"] = answer_tokens(args)
    settings["run"] = f"sha256 {sha256(args.run)}"
    if args.qrels:
        settings["qrels"] = f"sha256 {sha256(args.qrels)}"
    return settings


def answer_tokens(args: argparse.Namespace) -> int:
    """Return the limit on an answer: by default room for every identifier, a few words and the JSON around them."""
    return args.max_answer_tokens or 16 * args.window_size + 64


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _amount(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0, got {text}")
    return number


def _temperature(text: str) -> float | None:
    return None if text == "server" else _amount(text)


# argparse names the type in its message about a value that is none
_count.__name__, _amount.__name__, _temperature.__name__ = "whole number", "number", "temperature"
