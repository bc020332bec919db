"""Streamed datasets: read from any place, in a bounded shuffle, and gone on with exactly."""

from __future__ import annotations

import json
from array import array
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lmesh_trainer.data.errors import DatasetError
from lmesh_trainer.data.records import START, Place, Reading, Record, Source
from lmesh_trainer.data.row_table import row_table
from lmesh_trainer.data.rows import LengthPolicy, Row, RowSettings
from lmesh_trainer.data.shuffle_buffer import ShuffleBuffer
from lmesh_trainer.data.source import open_source
from lmesh_trainer.data.stream_head import TRIED
from lmesh_trainer.data.streamed_feed import SHUFFLE_BUFFER, StreamedFeed
from lmesh_trainer.spec import DatasetSpec, JobSpec

from tests.small_tokenizers import byte_level, wrap

TOKENIZER = wrap(byte_level())


def draws(buffer: ShuffleBuffer[int], count: int = 10_000) -> list[int]:
    return [buffer.draw() for _ in range(count) if not buffer.empty]


def shuffled(count: int, size: int, *, seed: int = 0, epoch: int = 0) -> ShuffleBuffer[int]:
    return ShuffleBuffer(iter(range(count)), size=size, seed=seed, epoch=epoch)


SIZES, SEEDS, COUNTS = st.integers(1, 20), st.integers(0, 5), st.integers(0, 60)


class TestBuffer:
    @given(COUNTS, SIZES, SEEDS, SEEDS)
    def test_every_item_once_and_always_so(self, count: int, size: int, seed: int, epoch: int) -> None:
        found = draws(shuffled(count, size, seed=seed, epoch=epoch))
        assert sorted(found) == list(range(count))
        assert found == draws(shuffled(count, size, seed=seed, epoch=epoch))
        # What is drawn was read: no item comes more than the buffer's size before its turn.
        assert all(item < at + size for at, item in enumerate(found))

    @given(COUNTS, SIZES, SEEDS, st.data())
    def test_saved_anywhere_it_goes_on(self, count: int, size: int, seed: int, data: st.DataObject) -> None:
        whole = draws(shuffled(count, size, seed=seed))
        source = iter(range(count))
        first = ShuffleBuffer(source, size=size, seed=seed, epoch=0)
        before = draws(first, data.draw(st.integers(0, count)))
        again = ShuffleBuffer(source, size=size, seed=seed, epoch=0, held=first.held, drawn=first.drawn)
        assert before + draws(again) == whole

    def test_one_keeps_the_order(self) -> None:
        assert draws(shuffled(20, 1)) == list(range(20))

    def test_epochs_and_seeds_differ(self) -> None:
        orders = {tuple(draws(shuffled(40, 10, seed=s, epoch=e))) for s in range(3) for e in range(3)}
        assert len(orders) == 9

    def test_it_mixes(self) -> None:
        """Rows stay near where they were, which is what a bound costs, and none of the order is left beside that."""
        found = draws(shuffled(2000, 100))
        assert sum(b == a + 1 for a, b in pairwise(found)) < 100

    def test_no_more_than_its_size_is_read_ahead(self) -> None:
        source = iter(range(10_000))
        buffer = ShuffleBuffer(source, size=7, seed=0, epoch=0)
        draws(buffer, 30)
        assert next(source) == 37 and len(buffer.held) == 7

    def test_nothing_left(self) -> None:
        with pytest.raises(IndexError, match="was taken"):
            shuffled(0, 3).draw()


@given(st.lists(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=9), max_size=9))
def test_rows_come_back_from_a_table(told: list[list[tuple[int, bool]]]) -> None:
    rows = [
        Row(number=2**40 + n, line=n, ids=array("i", [i for i, _ in row]), trained=bytes(t for _, t in row))
        for n, row in enumerate(told)
    ]
    assert row_table(rows).rows() == rows


RECORDS = [{"prompt": f"a,{i}", "completion": f'say "{i}"\n' + "\u00e9" * (i % 3)} for i in range(25)]


def save(folder: Path, kind: str) -> str:
    path = folder / f"rows.{kind}"
    match kind:
        case "jsonl":
            lines = (json.dumps(record, ensure_ascii=False) + "\n" * (1 + i % 3) for i, record in enumerate(RECORDS))
            path.write_text("".join(lines))
        case "csv":
            cells = [[cell.replace('"', '""') for cell in record.values()] for record in RECORDS]
            rows = "".join(f'"{a}","{b}"\r\n' for a, b in cells)
            path.write_bytes(b"\xef\xbb\xbf" + f"prompt,completion\r\n{rows}".encode())
        case "json":
            path.write_text(json.dumps(RECORDS))
        case "parquet":
            parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
            parquet.write_table(arrow.Table.from_pylist(RECORDS), path, row_group_size=7)
        case "hub":
            pytest.importorskip("datasets")
            for shard in range(3):
                lines = "".join(json.dumps(record) + "\n" for record in RECORDS[shard * 9 : shard * 9 + 9])
                (folder / f"train-{shard}.jsonl").write_text(lines)
            return f"hub:{folder}"
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json", "parquet", "hub"])
def test_a_source_goes_on_from_every_place(tmp_path: Path, kind: str) -> None:
    source = open_source(save(tmp_path, kind))
    with closing(source.read()) as reading:
        places, whole = [reading.place], []
        for found in reading:
            whole.append(found)
            places.append(reading.place)
        assert next(reading, None) is None
        places.append(reading.place)
    assert [record for _, record in whole] == RECORDS
    assert whole == sorted(whole, key=lambda found: found[0]) and source.streamable == (kind != "json")
    for at, place in enumerate(places):
        with closing(source.read(place)) as reading:
            assert list(reading) == whole[at:]


def test_a_place_in_a_file_skips_what_is_before_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    with closing(open_source(str(path)).read()) as reading:
        next(reading)
        place = reading.place
    path.write_text('{bad, but no}\n{"text": "b"}\n{"text": ')
    with closing(open_source(str(path)).read(place)) as reading:
        assert next(reading) == (2, {"text": "b"})
        with pytest.raises(DatasetError, match="line 3") as caught:
            next(reading)
    assert caught.value.reason == "NOT_JSON"


class Counting(Source):
    """Texts without end, or as many as are told; counts how far any reading came."""

    def __init__(self, count: int = 10**9, bad: int = 0, length: int = 6, even: int = 0) -> None:
        self.count, self.bad, self.lengths, self.furthest = count, bad, (even or length, length), 0

    streamable = True

    def identity(self) -> str:
        return "texts"

    def read(self, place: Place = START) -> Reading:
        return _Counted(self, place)


class _Counted(Reading):
    def __init__(self, texts: Counting, place: Place) -> None:
        self._texts, self._line = texts, place.line

    def __next__(self) -> tuple[int, Record]:
        if self._line >= self._texts.count:
            raise StopIteration
        self._line += 1
        self._texts.furthest = max(self._texts.furthest, self._line)
        text = " " if self._line == self._texts.bad else f"{self._line:0{self._texts.lengths[self._line % 2]}}"
        return self._line, {"text": text}

    @property
    def place(self) -> Place:
        return Place(line=self._line)

    def close(self) -> None:
        pass


def feed(source: Source, *, policy: str = "error", max_length: int = 64, **options: Any) -> StreamedFeed:
    told: dict[str, Any] = {"batch_size": 4, "max_steps": 100, "seed": 1}
    names = {"eval_rows", "shuffle_buffer_size"}
    rows = DatasetSpec(source="s", streaming=True, **{k: v for k, v in options.items() if k in names})
    told |= {k: v for k, v in options.items() if k not in names}
    made = RowSettings(max_length=max_length, policy=LengthPolicy(policy))
    return StreamedFeed(source, TOKENIZER, made, JobSpec(model="m", dataset=rows, **told))


def steps(found: StreamedFeed, begin: int, end: int) -> list[list[Row]]:
    return [found.step_rows(step) for step in range(begin, end)]


class TestFeed:
    def test_an_epoch_takes_every_row_once_and_no_held_out_one(self) -> None:
        found = feed(Counting(30), eval_rows=5, shuffle_buffer_size=8)
        assert [row.line for row in found.eval_rows] == [1, 2, 3, 4, 5]
        epochs = [steps(found, begin, begin + 7) for begin in (0, 7, 14)]
        for taken in epochs:
            assert [len(rows) for rows in taken] == [4, 4, 4, 4, 4, 4, 1]
            rows = [row for step in taken for row in step]
            assert sorted(row.line for row in rows) == list(range(6, 31))
            assert all(row.number == row.line - 1 for row in rows)  # dropout goes by it, in every epoch
        assert epochs[0] != epochs[1] != epochs[2]

    def test_where_epochs_end(self) -> None:
        found, ends = feed(Counting(10), shuffle_buffer_size=3), []
        for step in range(7):
            found.step_rows(step)
            ends.append((found.ends_epoch(step + 1), found.epochs(step + 1)))
        assert ends == [(False, 0), (False, 0), (True, 1), (False, 1), (False, 1), (True, 2), (False, 2)]

    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 17), st.integers(1, 30), st.integers(1, 6), st.integers(0, 3), st.sampled_from([9, 64]))
    def test_gone_on_anywhere_it_is_the_unbroken_one(
        self, stop: int, size: int, batch: int, held: int, longest: int
    ) -> None:
        options: dict[str, Any] = {"shuffle_buffer_size": size, "batch_size": batch, "eval_rows": held}
        options |= {"policy": "split", "max_length": longest}  # of 9: two rows a text, one of which may wait
        texts = Counting(11, length=12)
        unbroken = feed(texts, **options)
        whole = steps(unbroken, 0, 18)
        first = feed(texts, **options)
        before = steps(first, 0, stop)
        again = feed(texts, **options)
        again.go_to(stop, first.cursor())
        assert again.ends_epoch(stop) == first.ends_epoch(stop) and again.epochs(stop) == first.epochs(stop)
        assert before + steps(again, stop, 18) == whole
        assert again.summary() == unbroken.summary() and again.cursor() == unbroken.cursor()

    def test_a_stream_without_end_is_read_as_far_as_it_is_needed(self) -> None:
        texts = Counting()
        found = feed(texts, eval_rows=3, shuffle_buffer_size=500)
        assert texts.furthest == 3 + TRIED
        steps(found, 0, 50)
        assert texts.furthest == 3 + 500 + 50 * 4
        assert len(found.cursor()) < 500 * (3 * 8 + 5 * 10) + 1000

    def test_rows_are_held_as_the_page_says(self) -> None:
        texts = Counting()
        feed(texts).step_rows(0)
        assert texts.furthest == SHUFFLE_BUFFER + 4 == 1004

    def test_what_is_tried_is_told(self) -> None:
        told = feed(Counting(), eval_rows=2).report(TOKENIZER)
        assert told.streaming and (told.rows, told.eval_rows) == (TRIED, 2)
        assert told.tokens == (TRIED + 2) * told.longest and len(told.preview) == 3
        few = feed(Counting(5), eval_rows=2).report(TOKENIZER)
        assert (few.rows, few.eval_rows) == (3, 2)

    def test_a_bad_row_is_met_where_it_is(self) -> None:
        with pytest.raises(DatasetError) as caught:
            feed(Counting(bad=100))
        assert caught.value.line == 100  # among those that are tried
        found = feed(Counting(bad=400), shuffle_buffer_size=10)
        with pytest.raises(DatasetError, match="line 400") as caught:
            steps(found, 0, 100)
        assert caught.value.reason == "BAD_COLUMN"

    def test_the_length_policy_is_followed_as_rows_come(self) -> None:
        with pytest.raises(DatasetError) as caught:
            feed(Counting(), max_length=6)
        assert (caught.value.reason, caught.value.line) == ("TOO_LONG", 1)
        short = Counting(40, even=12)
        found = feed(short, policy="drop", max_length=9)
        taken = [row.line for rows in steps(found, 0, 5) for row in rows]
        assert sorted(taken) == list(range(1, 40, 2)) and found.ends_epoch(5)
        assert found.summary()["data_read"]["dropped"] == 20

    @pytest.mark.parametrize(("count", "held", "reason"), [(0, 0, "EMPTY_DATASET"), (4, 4, "TOO_FEW_ROWS")])
    def test_too_little(self, count: int, held: int, reason: str) -> None:
        with pytest.raises(DatasetError) as caught:
            feed(Counting(count), eval_rows=held)
        assert caught.value.reason == reason

    def test_an_array_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="jsonl") as caught:
            feed(open_source(save(tmp_path, "json")))
        assert caught.value.reason == "NOT_STREAMABLE"

    def test_a_cursor_of_something_else(self) -> None:
        with pytest.raises(DatasetError) as caught:
            feed(Counting()).go_to(3, b"")
        assert caught.value.reason == "CHECKPOINT_MISMATCH"

    @pytest.mark.parametrize(("micro", "lengths"), [(64, [64]), (200, [64, 64, 64, 8]), (1000, [64] * 4)])
    def test_the_worst_rows_fill_a_microbatch(self, micro: int, lengths: list[int]) -> None:
        texts = Counting()
        found = feed(texts)
        rows = found.worst_rows(micro)
        assert [len(row.ids) for row in rows] == lengths and all(row.trained_tokens for row in rows)
        untouched = feed(texts)
        assert steps(found, 0, 3) == steps(untouched, 0, 3)

    def test_another_source_is_another_job(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text('{"text": "abc"}\n' * 3)
        one = feed(open_source(str(path))).identity()
        (tmp_path / "moved.jsonl").write_bytes(path.read_bytes())
        assert feed(open_source(str(tmp_path / "moved.jsonl"))).identity() == one
        path.write_text('{"text": "abc"}\n' * 2 + '{"text": "abd"}\n')
        assert feed(open_source(str(path))).identity() != one
        path.write_text('{"text": "abc"}\n' * 400)
        longer = feed(open_source(str(path))).identity()
        path.write_text('{"text": "abc"}\n' * 401)
        assert feed(open_source(str(path))).identity() != longer
