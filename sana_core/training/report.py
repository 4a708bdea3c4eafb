"""What `train --check` and the data set's node say about a data set, as plain text."""

from collections.abc import Iterable, Iterator

from ..text import MAX_TOKENS, Tokenizer, instruction_text
from .dataset import Dataset
from .entries import Problem

SHOWN = 10  # of the files with the same problem


def report(dataset: Dataset, tokenizer: Tokenizer | None, chi: bool | str = True) -> str:
    """Bucket table, problems by reason, and token counts of the captions, as lines of text.

    Without a tokenizer the captions' tokens are not counted.
    """
    tokens = [] if tokenizer is None else ["", *_token_lines(dataset, tokenizer, chi)]
    return "\n".join([*_bucket_lines(dataset), *tokens, *problem_lines(dataset)])


def problem_lines(dataset: Dataset) -> Iterator[str]:
    """Each reason with its count and the first files that have it: what is left out first."""
    for left_out, title in ((True, "Left out"), (False, "Used, but note")):
        grouped: dict[str, list[Problem]] = {}
        for problem in dataset.problems:
            if problem.left_out is left_out:
                grouped.setdefault(problem.reason, []).append(problem)
        for reason, problems in sorted(grouped.items(), key=lambda item: -len(item[1])):
            yield from ("", f"{title}: {len(problems)} x {reason}")
            yield from _first(
                f"{problem.name}{f': {problem.detail}' if problem.detail else ''}" for problem in problems
            )


def _bucket_lines(dataset: Dataset) -> Iterator[str]:
    pictures = len({sample.name for sample in dataset.samples})
    repeated = f", {len(dataset.samples)} with repetitions" if len(dataset.samples) != pictures else ""
    yield f"{dataset.folder}: {pictures} pictures{repeated}, in buckets of {dataset.base} px:"
    yield f"{'width x height':>16} {'ratio h/w':>10} {'samples':>8}"
    for bucket, count in dataset.buckets().items():
        yield f"{str(bucket):>16} {bucket.height / bucket.width:>10.2f} {count:>8}"


def _token_lines(dataset: Dataset, tokenizer: Tokenizer, chi: bool | str) -> Iterator[str]:
    names = {caption.text: sample.name for sample in dataset.samples for caption in sample.captions}
    tokens = {text: tokenizer.tokenize(text, instruction_text(chi)) for text in names}
    counts = sorted(row.prompt_tokens for row in tokens.values())
    yield (
        f"{len(counts)} different captions of {counts[0]} to {counts[-1]} tokens, "
        f"half of them up to {counts[(len(counts) - 1) // 2]}; {MAX_TOKENS - 1} are used at most"
    )
    cut = [(text, row) for text, row in tokens.items() if row.kept_text is not None]
    if cut:
        yield from ("", f"Used, but note: {len(cut)} x caption too long, its end is not read")
        yield from _first(
            f'{names[text]}: {row.prompt_tokens} tokens, cut after "...{row.kept_text[-40:]}"' for text, row in cut
        )


def _first(lines: Iterable[str]) -> Iterator[str]:
    lines = [f"  {line.replace(chr(10), ' ')}" for line in lines]
    yield from lines[:SHOWN]
    if len(lines) > SHOWN:
        yield f"  ... and {len(lines) - SHOWN} more"
