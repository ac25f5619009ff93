"""A verb that takes settings: its help, and what is said of words that it has no place for.

Knows how a line of flags is read. Knows no setting and no verb.
"""

import copy
import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from typer.core import TyperCommand

from ernie_serve.errors import CheckpointError
from ernie_serve.vllm_flags import elsewhere


class Words(NamedTuple):
    """A command line: flags that are none, words that belong to no flag, and flags of one value that some follow."""

    unknown: list[str]
    loose: list[str]
    followed: list[str]


class SettingsCommand(TyperCommand):
    """Tells all unknown flags at once, and lists that are spelled as vLLM spells them, `--served-model-name a b`.

    Its help has no column for `--no-…`, which would cut the names of flags off in a narrow terminal.
    """

    def format_help(self, *args: Any) -> None:
        """Show each flag without its opposite, of which its text speaks."""
        shown = copy.copy(self)
        shown.params = [copy.copy(parameter) for parameter in self.params]
        for parameter in shown.params:
            parameter.secondary_opts = []
        TyperCommand.format_help(shown, *args)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words, unless some have no place."""
        flags = {
            name: each
            for each in self.get_params(ctx)
            if each.param_type_name == "option"
            for name in (*each.opts, *each.secondary_opts)
        }
        words = read(args, flags)
        if words.unknown and not ctx.resilient_parsing:
            told = [f"  {name}: {_told(name, list(flags))}" for name in dict.fromkeys(words.unknown)]
            ctx.fail("\n".join([f"No such option{'s' if len(told) > 1 else ''}:", *told]))
        num_places = len(self.get_params(ctx)) - len(set(flags.values()))
        if len(words.loose) > num_places and words.followed and not ctx.resilient_parsing:
            ctx.fail(f"There are {len(words.loose)} words without a flag, and a place for one. {_as_one(words)}")
        ctx.meta["words"] = words
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; of a model that is not there say that it may have been meant for the flag before it."""
        try:
            return super().invoke(ctx)
        except CheckpointError as error:
            words: Words = ctx.meta["words"]
            if words.followed and "/" not in words.loose[0] and not os.path.exists(words.loose[0]):
                raise CheckpointError(f"{error} {_as_one(words)}") from error
            raise


def read(args: Sequence[str], flags: Mapping[str, Any]) -> Words:
    """Sort the words of a command line, of which these are the flags."""
    words = Words([], [], [])
    values, before = iter(args), ""
    for word in values:
        if word == "--":
            words.loose.extend(values)
        elif not word.startswith("-") or word == "-":
            words.loose.append(word)
            words.followed.extend([before] if before and before not in words.followed else [])
        else:
            name, equals, _ = word.replace("_", "-").partition("=")
            flag, before = flags.get(name), ""
            if flag is None:
                words.unknown.append(name)
            elif not flag.is_flag and not equals:
                next(values, None)
            if flag is not None and flag.multiple:
                before = name
    return words


def _told(name: str, flags: list[str]) -> str:
    """What there is instead of a flag."""
    if told := elsewhere(name):
        return told
    nearest = difflib.get_close_matches(name.lstrip("-"), [flag[2:] for flag in flags], n=1, cutoff=0.7)
    return f"did you mean --{nearest[0]}?" if nearest else "--help lists those that there are"


def _as_one(words: Words) -> str:
    """No word is repeated: it may be a key."""
    return f"Several values of {' or '.join(words.followed)} are one, with commas and no spaces between."
