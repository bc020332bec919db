"""Datasets of every format to rows; what is wrong with one is said with its line."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lmesh_trainer.data.errors import DatasetError
from lmesh_trainer.data.formats import Chat, Completion, Format, Text, convert, detect
from lmesh_trainer.data.order import epoch_order, held_out
from lmesh_trainer.data.packing import pack
from lmesh_trainer.data.rows import LengthPolicy, Row, RowMaker, RowSettings
from lmesh_trainer.data.source import read_records

from tests.small_tokenizers import byte_level, wrap
from tests.unit.test_loss_mask import CHATML

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "abc"}
CHAT = {"messages": [USER, ANSWER]}


def one(record: dict[str, Any], **options: Any) -> Any:
    return convert(record, detect(record, 1), 1, **options)


class TestFormats:
    def test_messages(self) -> None:
        tools = [{"type": "function", "function": {"name": "f"}}]
        assert one({**CHAT, "tools": tools}) == Chat(messages=[USER, ANSWER], tools=tools)
        assert one({**CHAT, "tools": None}).tools is None

    def test_sharegpt(self) -> None:
        turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "abc"}]
        found = one({"conversations": turns, "system": "be brief"})
        assert found.messages == [{"role": "system", "content": "be brief"}, USER, ANSWER]

    def test_sharegpt_calls(self) -> None:
        call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
        turns = [{"from": "human", "value": "hi"}, call, {"from": "observation", "value": "2"}]
        found = one({"conversations": turns}).messages
        assert found[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
        assert found[2] == {"role": "tool", "content": "2"}

    def test_alpaca(self) -> None:
        record = {"instruction": "add", "input": "1 2", "output": "3", "history": [["hi", "abc"]]}
        assert [m["content"] for m in one(record).messages] == ["hi", "abc", "add\n\n1 2", "3"]
        assert one({"instruction": "add", "output": "3"}).messages[0]["content"] == "add"

    def test_prompt_completion(self) -> None:
        assert one({"prompt": "a", "completion": "b"}) == Completion(prompt="a", completion="b")
        chat = one({"prompt": [USER], "completion": [ANSWER]})
        assert chat.messages == [{**USER, "train": False}, ANSWER]

    def test_text(self) -> None:
        assert one({"text": "abc"}) == Text(text="abc")

    @pytest.mark.parametrize(
        ("record", "reason", "said"),
        [
            ({"question": "x"}, "UNKNOWN_FORMAT", "question"),
            ({**CHAT, "id": 3}, "UNKNOWN_COLUMN", "ignore_columns"),
            ({"messages": []}, "BAD_COLUMN", "at least one"),
            ({"messages": "x"}, "BAD_COLUMN", "no JSON"),
            ({"messages": [USER]}, "BAD_MESSAGE", "nothing to learn"),
            ({"messages": [{"role": "bot", "content": "x"}]}, "BAD_MESSAGE", "'bot'"),
            ({"messages": [USER, {"role": "assistant", "content": None}]}, "BAD_MESSAGE", "message 2"),
            ({"messages": [USER, {**ANSWER, "mood": 1}]}, "BAD_MESSAGE", "mood"),
            ({"conversations": [{"from": "me", "value": "x"}]}, "BAD_MESSAGE", "turn 1"),
            ({"conversations": [{"from": "function_call", "value": "x"}]}, "BAD_MESSAGE", "function_call"),
            ({"instruction": "x", "output": 3}, "BAD_COLUMN", "output must be a text"),
            ({"instruction": "x", "output": "y", "history": ["z"]}, "BAD_COLUMN", "history"),
            ({"text": " "}, "BAD_COLUMN", "empty"),
        ],
    )
    def test_refusals(self, record: dict[str, Any], reason: str, said: str) -> None:
        with pytest.raises(DatasetError, match=said) as caught:
            convert(record, detect(record, 7), 7)
        assert (caught.value.reason, caught.value.line) == (reason, 7)

    def test_ignored_columns(self) -> None:
        assert one({**CHAT, "id": 3}, ignore=("id",)).messages == [USER, ANSWER]

    def test_mixed(self) -> None:
        with pytest.raises(DatasetError, match="needs messages") as caught:
            convert({"text": "x"}, Format.MESSAGES, 4)
        assert caught.value.reason == "MIXED_FORMATS"


class TestSources:
    def test_each_file_type_gives_the_same(self, tmp_path: Path) -> None:
        rows = [{"prompt": "a,b", "completion": 'say "x"'}, {"prompt": "c\nd", "completion": "\u00e9"}]
        (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
        (tmp_path / "d.json").write_text(json.dumps(rows))
        (tmp_path / "d.csv").write_text('prompt,completion\n"a,b","say ""x"""\n"c\nd",\u00e9\n', encoding="utf-8")
        for name in ("d.jsonl", "d.json", "d.csv"):
            assert [record for _, record in read_records(str(tmp_path / name))] == rows
        assert [line for line, _ in read_records(str(tmp_path / "d.jsonl"))] == [1, 2]

    @pytest.mark.parametrize(
        ("name", "text", "reason"),
        [
            ("d.jsonl", '{"text": "x"}\n{oops\n', "NOT_JSON"),
            ("d.jsonl", '{"text": "x"}\n[1]\n', "NOT_A_ROW"),
            ("d.json", '{"text": "x"}', "NOT_A_ROW"),
            ("d.json", '{"text": "x"}\n{"text": "y"}', "NOT_JSON"),
            ("d.csv", "text,more\nx\n", "NOT_A_ROW"),
            ("d.txt", "x", "UNKNOWN_FILE_TYPE"),
        ],
    )
    def test_refusals(self, tmp_path: Path, name: str, text: str, reason: str) -> None:
        (tmp_path / name).write_text(text)
        with pytest.raises(DatasetError) as caught:
            list(read_records(str(tmp_path / name)))
        assert caught.value.reason == reason
        assert name != "d.jsonl" or caught.value.line == 2

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="no file") as caught:
            list(read_records(str(tmp_path / "d.jsonl")))
        assert caught.value.reason == "NO_DATASET"


def maker(max_length: int = 64, policy: LengthPolicy = LengthPolicy.ERROR) -> RowMaker:
    by = wrap(byte_level(), chat_template=CHATML)
    return RowMaker(by, RowSettings(max_length=max_length, policy=policy))


class TestRows:
    def test_counts(self) -> None:
        rows = maker()
        found = list(rows.rows([(1, CHAT), (2, CHAT)]))
        assert [row.number for row in found] == [0, 1] and found[0].trained_tokens == 3
        assert rows.counts.trained_tokens == 6 and rows.counts.tokens == sum(len(r.ids) for r in found)
        assert rows.counts.longest == len(found[0].ids)

    def test_too_long(self) -> None:
        with pytest.raises(DatasetError, match="state a policy") as caught:
            list(maker(8).rows([(1, CHAT)]))
        assert (caught.value.reason, caught.value.line) == ("TOO_LONG", 1)

    def test_drop(self) -> None:
        rows = maker(40, LengthPolicy.DROP)
        long = {"messages": [USER, {"role": "assistant", "content": "x" * 50}]}
        assert [row.line for row in rows.rows([(1, long), (2, CHAT)])] == [2]
        assert rows.counts.dropped == 1

    def test_truncate(self) -> None:
        left, right = maker(10, LengthPolicy.TRUNCATE_LEFT), maker(16, LengthPolicy.TRUNCATE_RIGHT)
        whole = next(maker().rows([(1, CHAT)]))
        assert next(left.rows([(1, CHAT)])).ids == whole.ids[-10:]
        with pytest.raises(DatasetError, match="truncated it has no token") as caught:
            list(right.rows([(3, CHAT)]))
        assert (caught.value.reason, caught.value.line) == ("NOTHING_TO_LEARN", 3)

    def test_split(self) -> None:
        rows = maker(5, LengthPolicy.SPLIT)
        found = list(rows.rows([(1, {"text": "abcdefghijkl"})]))
        whole = next(maker().rows([(1, {"text": "abcdefghijkl"})]))
        assert [i for row in found for i in row.ids] == list(whole.ids)[: sum(len(r.ids) for r in found)]
        assert all(len(row.ids) <= 5 for row in found) and rows.counts.split == 1
        with pytest.raises(DatasetError, match="only plain text"):
            list(maker(5, LengthPolicy.SPLIT).rows([(1, CHAT)]))

    def test_nothing_to_learn(self) -> None:
        silent = {"messages": [USER, {**ANSWER, "train": False}]}
        with pytest.raises(DatasetError) as caught:
            list(maker().rows([(9, silent)]))
        assert (caught.value.reason, caught.value.line) == ("NOTHING_TO_LEARN", 9)

    def test_no_template(self) -> None:
        rows = RowMaker(wrap(byte_level()), RowSettings(max_length=64))
        with pytest.raises(DatasetError) as caught:
            list(rows.rows([(1, CHAT)]))
        assert caught.value.reason == "NO_CHAT_TEMPLATE"

    def test_a_template_that_refuses(self) -> None:
        by = wrap(byte_level(), chat_template="{{ raise_exception('no system, please') }}")
        with pytest.raises(DatasetError, match="no system, please") as caught:
            list(RowMaker(by, RowSettings(max_length=64)).rows([(5, CHAT)]))
        assert (caught.value.reason, caught.value.line) == ("TEMPLATE_FAILED", 5)


@given(st.integers(), st.integers(0, 5), st.integers(0, 60))
def test_an_epoch_takes_every_row_once(seed: int, epoch: int, count: int) -> None:
    order = epoch_order(seed, epoch, count)
    assert sorted(order) == list(range(count)) and order == epoch_order(seed, epoch, count)


@given(st.integers(), st.integers(1, 40), st.data())
def test_held_out_rows_are_apart(seed: int, total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total - 1))
    kept, out = held_out(seed, range(total), count)
    assert len(out) == count and sorted([*kept, *out]) == list(range(total))
    with pytest.raises(ValueError, match="at most"):
        held_out(seed, range(total), total)


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(10, 60))
def test_packs_hold_every_row_once(lengths: list[int], limit: int) -> None:
    rows = [Row(number=i, line=i, ids=array("i", [0] * n), trained=bytes(n)) for i, n in enumerate(lengths)]
    packs = pack(rows, limit)
    assert sorted(row.number for members in packs for row in members) == list(range(len(rows)))
    for members in packs:
        assert len(members) == 1 or sum(len(row.ids) for row in members) <= limit
    assert packs == pack(rows, limit)
    # Any two packs would not fit into one, or best fit would have joined the later one's rows to the earlier.
    sizes = sorted(sum(len(row.ids) for row in members) for members in packs)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > limit
