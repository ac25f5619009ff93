"""Examines `ernie-tiny` on values that training never saw and prints a table; --card writes it into the model card.

The model runs in transformers, which never saw the training network: what is measured is what the files mean.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from tiny.examination import Question, questions
from tiny.network import TinyConfig, TinyErnie
from tokenizers import Tokenizer
from transformers import Ernie4_5_MoeForCausalLM, GenerationConfig

ROOT = Path(__file__).parent.parent
CARD = ROOT / "docs" / "ernie-tiny.md"


def main(
    folder: Path = ROOT / "ernie_serve" / "bundled" / "ernie-tiny",
    count: Annotated[int, typer.Option(help="Questions of each kind.")] = 50,
    seed: int = 1,
    batch: int = 20,
    show: Annotated[int, typer.Option(help="Wrong answers to print of each kind.")] = 0,
    card: Annotated[bool, typer.Option(help="Write the scores into the model card.")] = False,
    text: Annotated[bool, typer.Option(help="Print the answers to openings and completions.")] = False,
) -> None:
    """Print the scores of the model in `folder`."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = Ernie4_5_MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = questions(seed, count)
    scores: dict[str, list[bool]] = {question.task: [] for question in asked}
    shown: dict[str, int] = defaultdict(int)
    for question, answer, _ in answers(model, tokenizer, asked, batch):
        right = question.right(answer)
        scores[question.task].append(right)
        if (text and question.task in ("everyday openings", "completions")) or (
            not right and shown[question.task] < show
        ):
            shown[question.task] += 1
            print(
                f"--- {question.task}: {'right' if right else 'WRONG'}\n{question.prompt[-160:]!r}\n{answer!r}\n"
                f"wanted {question.wanted!r}"
            )
    rows = [(task, f"{sum(s)} of {len(s)}", f"{sum(s) / len(s):.0%}") for task, s in scores.items()]
    calls = [s for task, s in scores.items() if task.startswith("tool call")]
    rows.insert(
        4,
        (
            "tool call, all",
            f"{sum(map(sum, calls))} of {sum(map(len, calls))}",
            f"{sum(map(sum, calls)) / sum(map(len, calls)):.0%}",
        ),
    )
    accepted, drafts = acceptance(folder, model, tokenizer, asked[:: max(1, len(asked) // 60)])
    rows.append(("tokens that the MTP layer guesses", f"{accepted} of {drafts}", f"{accepted / drafts:.0%}"))
    table = Table("task", "right", "share")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if card:
        write_card(folder, rows)


def answers(
    model: Any, tokenizer: Tokenizer, asked: list[Question], batch: int
) -> Iterator[tuple[Question, str, list[int]]]:
    """Greedy answers with their ids, prompts of similar length together."""
    stops = [tokenizer.token_to_id(piece) for piece in ("</s>", "<|im_end|>")]
    settings = GenerationConfig(do_sample=False, max_new_tokens=160, eos_token_id=stops, pad_token_id=0)
    encoded = sorted(((q, tokenizer.encode(q.prompt).ids) for q in asked), key=lambda pair: len(pair[1]))
    for start in range(0, len(encoded), batch):
        group = encoded[start : start + batch]
        length = max(len(ids) for _, ids in group)
        ids = torch.tensor([[0] * (length - len(i)) + i for _, i in group])
        mask = torch.tensor([[0] * (length - len(i)) + [1] * len(i) for _, i in group])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, generation_config=settings)
        for (question, _), row in zip(group, out[:, length:].tolist(), strict=True):
            end = next((n + 1 for n, token in enumerate(row) if token in stops), len(row))
            yield question, tokenizer.decode(row[:end], skip_special_tokens=False), row[:end]


@torch.inference_mode()
def acceptance(folder: Path, model: Any, tokenizer: Tokenizer, asked: list[Question]) -> tuple[int, int]:
    """How many of the model's own greedy tokens its MTP layer says one step ahead; the training network runs it.

    Also holds that this network and transformers mean the same by the files.
    """
    network = TinyErnie(TinyConfig.from_published(folder / "config.json")).eval()
    network.load_published(load_file(folder / "model.safetensors"))
    accepted = drafts = 0
    for question, _, own in answers(model, tokenizer, asked, 8):
        prompt = tokenizer.encode(question.prompt).ids
        ids = torch.tensor([prompt + own])
        hidden = network(ids)
        difference = float((network.head(hidden) - model(ids).logits).abs().max())
        assert difference < 0.02, f"the training network and transformers differ by {difference}"
        ahead = network.head(network.mtp(hidden[:, :-1], ids[:, 1:])).argmax(dim=-1)[0, :-1]
        right = ahead[len(prompt) - 1 :] == ids[0, len(prompt) + 1 :]
        accepted, drafts = accepted + int(right.sum()), drafts + len(right)
    return accepted, drafts


def write_card(folder: Path, rows: list[tuple[str, str, str]]) -> None:
    """Put the scores and the files' checksums between the card's marks."""
    sums = [f"| `{p.name}` | `{hashlib.sha256(p.read_bytes()).hexdigest()}` |" for p in sorted(folder.iterdir())]
    scores = ["| task | right | share |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    text = CARD.read_text(encoding="utf-8")
    for mark, lines in (("scores", scores), ("files", ["| file | SHA-256 |", "|---|---|", *sums])):
        inside = "\n".join(["", *lines, ""])
        text, changed = re.subn(
            rf"(<!-- {mark} -->).*?(<!-- end {mark} -->)",
            lambda m, inside=inside: m[1] + "\n" + inside + "\n" + m[2],  # type: ignore[misc]  # a default binds it
            text,
            flags=re.DOTALL,
        )
        assert changed == 1, f"the card has no place for its {mark}"
    CARD.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
