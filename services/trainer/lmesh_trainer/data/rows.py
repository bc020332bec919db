"""Examples as rows of token ids with a weight each, under a stated length and policy."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from lmesh_kernels.text.loss_mask import MaskedIds, mask_chat, mask_completion, mask_text, renderer
from lmesh_kernels.text.template import TemplateError
from lmesh_kernels.text.tokenizer import TextTokenizer

from lmesh_trainer.data.errors import DatasetError
from lmesh_trainer.data.formats import Chat, Completion, Example, Format, Text, convert, detect
from lmesh_trainer.data.records import Record


class LengthPolicy(StrEnum):
    """What becomes of a row with more tokens than the limit."""

    ERROR = "error"
    DROP = "drop"
    SPLIT = "split"  # plain text only: into rows of the limit
    TRUNCATE_LEFT = "truncate-left"  # the beginning goes
    TRUNCATE_RIGHT = "truncate-right"  # the end goes


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Token ids, and of each whether predicting it is learnt."""

    number: int  # in the dataset, from 0
    line: int  # of the file
    ids: array[int]
    trained: bytes  # 1 or 0 a token

    @property
    def trained_tokens(self) -> int:
        """Tokens with a part in the loss; the first has none."""
        return sum(self.trained[1:])


@dataclass(slots=True, kw_only=True)
class Counts:
    """What was made of a dataset."""

    records: int = 0
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    dropped: int = 0
    truncated: int = 0
    split: int = 0
    skipped_turns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSettings:
    """How rows are made."""

    max_length: int
    policy: LengthPolicy = LengthPolicy.ERROR
    form: Format | None = None  # None: that of the first row
    ignore_columns: Collection[str] = ()


class RowMaker:
    """Makes rows and counts them; the first record settles the format unless it is stated."""

    def __init__(self, tokenizer: TextTokenizer, settings: RowSettings) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self.form = settings.form
        self.counts = Counts()
        self.number = 0  # of the next row; whoever reads a dataset again says where it begins

    def rows(self, records: Iterable[tuple[int, Record]]) -> Iterator[Row]:
        """Rows in the order of the records.

        Raises DatasetError of the formats, and TOO_LONG, NOTHING_TO_LEARN, NO_CHAT_TEMPLATE or TEMPLATE_FAILED, each
        with the line.
        """
        for line, record in records:
            yield from self.make(line, record)

    def make(self, line: int, record: Record) -> list[Row]:
        """The rows of one record: one, or none or several where the length policy says so. Raises as `rows` does."""
        if self.form is None:
            self.form = detect(record, line)
        self.counts.records += 1
        example = convert(record, self.form, line, ignore=self._settings.ignore_columns)
        masked = self._mask(example, line)
        self.counts.skipped_turns += masked.skipped_turns
        return [self._row(line, ids, trained) for ids, trained in self._fitted(masked, example, line)]

    def _mask(self, example: Example, line: int) -> MaskedIds:
        try:
            match example:
                case Chat():
                    show = renderer(self._tokenizer, example.tools)
                    masked = mask_chat(self._tokenizer, example.messages, show)
                case Completion():
                    masked = mask_completion(self._tokenizer, example.prompt, example.completion)
                case Text():
                    masked = mask_text(self._tokenizer, example.text)
        except TemplateError as error:
            raise DatasetError("TEMPLATE_FAILED", error.message, line=line) from error
        except ValueError as error:
            raise DatasetError(
                "NO_CHAT_TEMPLATE", f"{error}; give prompt and completion as texts", line=line
            ) from error
        if not masked.trained_tokens:
            raise DatasetError("NOTHING_TO_LEARN", "the row has no token to learn", line=line)
        return masked

    def _fitted(self, masked: MaskedIds, example: Example, line: int) -> Iterator[tuple[list[int], list[bool]]]:
        limit, ids, trained = self._settings.max_length, masked.ids, masked.trained
        if len(ids) <= limit:
            yield ids, trained
            return
        match self._settings.policy:
            case LengthPolicy.ERROR:
                hint = "raise max_length or state a policy: drop, split, truncate-left or truncate-right"
                raise DatasetError("TOO_LONG", f"{len(ids)} tokens, and max_length is {limit}: {hint}", line=line)
            case LengthPolicy.DROP:
                self.counts.dropped += 1
            case LengthPolicy.SPLIT:
                if not isinstance(example, Text):
                    hint = "only plain text can be split: take drop, truncate-left or truncate-right"
                    raise DatasetError("TOO_LONG", f"{len(ids)} tokens, and max_length is {limit}: {hint}", line=line)
                self.counts.split += 1
                starts = range(0, len(ids), limit)
                # A last piece of one token would have nothing to learn.
                yield from ((ids[s : s + limit], trained[s : s + limit]) for s in starts if len(ids) - s > 1)
            case LengthPolicy.TRUNCATE_LEFT:
                yield from self._cut(ids[-limit:], trained[-limit:], line)
            case LengthPolicy.TRUNCATE_RIGHT:
                yield from self._cut(ids[:limit], trained[:limit], line)

    def _cut(self, ids: list[int], trained: list[bool], line: int) -> Iterator[tuple[list[int], list[bool]]]:
        if not any(trained[1:]):
            hint = "truncated it has no token to learn: raise max_length, or take drop"
            raise DatasetError("NOTHING_TO_LEARN", hint, line=line)
        self.counts.truncated += 1
        yield ids, trained

    def _row(self, line: int, ids: list[int], trained: list[bool]) -> Row:
        row = Row(number=self.number, line=line, ids=array("i", ids), trained=bytes(trained))
        self.number += 1
        self.counts.rows += 1
        self.counts.tokens += len(ids)
        self.counts.trained_tokens += row.trained_tokens
        self.counts.longest = max(self.counts.longest, len(ids))
        return row
