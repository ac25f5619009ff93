"""A verb that takes settings: its help, and what is said of flags that are none.

Knows how a line of flags is read. Knows no setting and no verb.
"""

import copy
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from typer.core import TyperCommand

from ernie_serve.vllm_flags import elsewhere


class SettingsCommand(TyperCommand):
    """Tells all unknown flags at once.

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
        told = [f"  {name}: {_told(name, list(flags))}" for name in dict.fromkeys(unknown(args, flags))]
        if told and not ctx.resilient_parsing:
            ctx.fail("\n".join([f"No such option{'s' if len(told) > 1 else ''}:", *told]))
        return super().parse_args(ctx, args)


def unknown(args: Sequence[str], flags: Mapping[str, Any]) -> list[str]:
    """The flags on a command line that are none of these."""
    found: list[str] = []
    values = iter(args)
    for word in values:
        if word == "--":
            break
        if word.startswith("-") and word != "-":
            name, equals, _ = word.replace("_", "-").partition("=")
            flag = flags.get(name)
            if flag is None:
                found.append(name)
            elif not flag.is_flag and not equals:
                next(values, None)
    return found


def _told(name: str, flags: list[str]) -> str:
    """What there is instead of a flag."""
    if told := elsewhere(name):
        return told
    nearest = difflib.get_close_matches(name.lstrip("-"), [flag[2:] for flag in flags], n=1, cutoff=0.7)
    return f"did you mean --{nearest[0]}?" if nearest else "--help lists those that there are"
