"""Recipes: flat JSON files whose values the command line overrides."""

import json
from collections.abc import Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from .errors import InputError, nearest
from .files import check_readable


class RecipeParser(HfArgumentParser):
    """An argument parser over dataclasses that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists every argument)")


def parse_recipe(
    dataclass_types: Sequence[Any], argv: Sequence[str], prog: str, defaults: dict[str, Any] | None = None
) -> tuple[Any, ...]:
    """Parse `[recipe.json] [--argument value ...]` into one object of each dataclass; `defaults` give way to both.

    The recipe's values go through the same parser as words of a command line, before the command line's own: types
    are checked alike, and what comes later wins. Raises `InputError` for a recipe that is no flat JSON object and for
    an unknown name, in the recipe or on the command line, with the nearest one that exists.
    """
    parser = RecipeParser(list(dataclass_types), prog=prog, usage=f"{prog} RECIPE.json [--argument value ...]")
    parser.allow_abbrev = False
    names = [field.name for kind in dataclass_types for field in fields(kind) if field.init]
    argv = list(argv)
    words: list[str] = []
    if argv and not argv[0].startswith("-"):
        path = Path(argv.pop(0))
        recipe = read_recipe(path, names)
        words = recipe_words(recipe)
        required = [action.dest for action in parser._actions if action.required]
        if set(required) <= recipe.keys():  # what the recipe alone gets wrong is said of the recipe
            try:
                parser.parse_known_args(words)
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
    *parsed, unknown = parser.parse_args_into_dataclasses(
        recipe_words(defaults or {}) + words + argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise InputError(f"{unknown[0]}: no such argument{nearest(unknown[0].lstrip('-').replace('-', '_'), names)}")
    return tuple(parsed)


def given_fields(dataclass_types: Sequence[Any], argv: Sequence[str]) -> dict[str, Any]:
    """Return what a recipe and a command line set, by name, in the types of JSON: a recipe that says the same.

    Args:
        argv: words that [`parse_recipe`] has taken.
    """
    parser = RecipeParser(list(dataclass_types))
    parser.allow_abbrev = False
    words = list(argv)
    if words and not words[0].startswith("-"):
        words = recipe_words(json.loads(Path(words[0]).read_text("utf-8"))) + words[1:]
    options = {word.split("=")[0] for word in words if word.startswith("--")}
    set_here = {action.dest for action in parser._actions if options & set(action.option_strings)}
    parsed, _ = parser.parse_known_args(words)
    values = {name: value for name, value in vars(parsed).items() if name in set_here}
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


def read_recipe(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return a recipe's fields, all of which are in `names`."""
    check_readable(path)
    try:
        recipe = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON ({error})") from None
    if not isinstance(recipe, dict):
        raise InputError(f"{path}: a recipe is one flat JSON object of fields and values")
    for name in recipe:
        if name not in names:
            raise InputError(f"{path}: no field {name!r}{nearest(name, names)}")
    return recipe


def recipe_words(recipe: dict[str, Any]) -> list[str]:
    """Return a recipe as the words of a command line."""
    words = []
    for name, value in recipe.items():
        if value is None or value == []:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(part if isinstance(part, str) else json.dumps(part) for part in values)]
    return words
