"""The same pairs from every format of file, and errors that name the file and the line."""

from __future__ import annotations

import gzip
import json

import pytest

from dpofast.data import load_preferences
from dpofast.errors import DataError
from tests.data.builders import assistant, plain_rows, user, write_rows

ROWS = [
    {"prompt": "2+2=", "chosen": "4", "rejected": "five, or\nsix"},
    {"prompt": "The sky", "chosen": "42", "rejected": "true"},
]
EXPECTED = [{"row": index, **row} for index, row in enumerate(ROWS)]
MESSAGE_ROWS = [
    {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
    {"prompt": [user("d")], "chosen": [assistant("e")], "rejected": [assistant("f")]},
]


def write(path, rows=ROWS):
    return write_rows(path, rows)


ENDINGS = ("json", "jsonl", "ndjson", "lines.json", "jsonl.gz", "parquet", "arrow", "stream.arrow")


@pytest.mark.parametrize("ending", [*ENDINGS, "csv"])
def test_files_of_text(tmp_path, ending):
    path = write(tmp_path / f"pairs.{ending}")
    assert load_preferences(path).to_list() == EXPECTED
    assert load_preferences(str(path)).to_list() == EXPECTED
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "no cache beside the data"


@pytest.mark.parametrize("ending", ENDINGS)
def test_files_of_messages(tmp_path, ending):
    path = write(tmp_path / f"pairs.{ending}", MESSAGE_ROWS)
    assert plain_rows(load_preferences(path).remove_columns("row")) == MESSAGE_ROWS


@pytest.mark.parametrize("key", ["train", "data"])
def test_an_object_that_holds_the_rows(tmp_path, key):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps({key: ROWS, "test": ROWS[:1]}))
    assert len(load_preferences(path)) == 2
    assert len(load_preferences(path, split="test")) == 1


def test_a_single_file_has_no_test_split_but_by_its_name(tmp_path):
    for ending in ("json", "jsonl", "parquet"):
        path = write(tmp_path / f"pairs.{ending}")
        with pytest.raises(DataError, match=r"pairs\.\w+ is one file without a split 'test'"):
            load_preferences(path, split="test")
        named = write(tmp_path / f"eval-v2.{ending}")
        assert len(load_preferences(named, split="test")) == 2
        assert len(load_preferences(named)) == 2
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"train": ROWS}))
    with pytest.raises(DataError, match=r"without a list 'test' \(found: train\)"):
        load_preferences(path, split="test")


def test_one_pretty_printed_object_is_one_row(tmp_path):
    path = tmp_path / "pair.json"
    path.write_text(json.dumps(ROWS[0], indent=2))
    assert load_preferences(path).to_list() == EXPECTED[:1]


def test_a_large_file_keeps_its_order(tmp_path):
    rows = [{"prompt": f"{i}", "chosen": f"{i} a", "rejected": f"{i} b"} for i in range(2_500)]
    loaded = load_preferences(write(tmp_path / "pairs.jsonl", rows))
    assert loaded["row"][:] == list(range(2_500))
    assert loaded[2_499]["chosen"] == "2499 a"


BROKEN = {
    "line of json lines": (
        "a.jsonl",
        json.dumps(ROWS[0]) + "\n\n{oops}\n",
        "a.jsonl, line 3: broken JSON",
    ),
    "line of an array": ("a.json", '[\n{"prompt": "a"},\n{"chosen" "b"}]', "a.json, line 3 is "),
    "end of an array": ("a.json", "[\n{}", "a.json, line 2 is broken JSON"),
    "first line": ("a.json", '{"a": }\n' + json.dumps(ROWS[0]), "a.json, line 1: broken JSON"),
    "empty file": ("a.json", "", "a.json, line 1 is broken JSON"),
    "no objects": ("a.json", "[1]", "a.json, row 0 (counted from 0): the row is int"),
    "line without object": ("a.jsonl", "[]\n", "a.jsonl, line 1: the row is list"),
    "number": ("a.json", "7", "a.json holds int"),
    "too deep": ("a.json", "[" * 100_000, "a.json is JSON that can't be read"),
    "huge number": ("a.json", f'[{{"a": {"9" * 5_000}}}]', "a.json is JSON that can't be read"),
    "object of lists": ("a.json", '{"valid": []}', "without a list 'train' (found: valid)"),
    "no rows": ("a.json", "[]", "a.json holds no rows"),
    "no lines": ("a.jsonl", "\n", "a.jsonl holds no rows"),
    "not parquet": ("a.parquet", "oops", "a.parquet can't be read as parquet"),
    "not arrow": ("a.arrow", "oops", "a.arrow can't be read as arrow"),
    "not gzip": ("a.jsonl.gz", "oops", "a.jsonl.gz can't be read"),
    "torn csv": (
        "a.csv",
        "prompt,chosen,rejected\na,b\n",
        "row 0 (counted from 0): the row has 2 ",
    ),
    "empty csv": ("a.csv", "", "a.csv can't be read as csv"),
    "csv without column": ("a.csv", "prompt,chosen\na,b\n", "no column 'rejected'"),
    "other ending": ("a.txt", "oops", "a.txt has an ending that can't be read"),
}


@pytest.mark.parametrize(("name", "content", "text"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_named(tmp_path, name, content, text):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        load_preferences(path)
    assert str(path) in str(caught.value)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8 text"):
        load_preferences(path)


GOOD = {"prompt": "ä", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize("ending", ["jsonl", "json", "jsonl.gz"])
def test_a_line_that_is_no_text_is_one_bad_row(tmp_path, ending):
    line = json.dumps(GOOD, ensure_ascii=False).encode()
    content = b"\r\n".join([b"\xef\xbb\xbf" + line, line.replace(b"b", b"\xff"), b"", line])
    path = tmp_path / f"a.{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    with pytest.raises(DataError, match=r"line 2: not UTF-8 text \(byte 28 of the line\)"):
        load_preferences(path)
    pairs = load_preferences(path, skip_bad_rows=True)
    assert pairs["prompt"] == ["ä", None, "ä"]
    assert pairs["left_out"] == [None, "bad row", None]


def test_a_row_of_csv_that_cannot_be_shown_is_an_error_without_a_traceback(tmp_path, capfd):
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,chosen,rejected\na,b,c\nx\xee,y\n")
    with pytest.raises(
        DataError, match=r"a\.csv can't be read .*Row #3: Expected 3 columns, got 2"
    ):
        load_preferences(path)
    assert capfd.readouterr().err == ""


def test_a_byte_that_is_no_text_in_an_array_is_named_by_its_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[\n{"prompt": "\xff"}]')
    with pytest.raises(DataError, match=r"a\.json, line 2 is not UTF-8 text \(byte 14 of"):
        load_preferences(path)


def test_rows_of_csv_that_cannot_be_read_are_bad_rows(tmp_path):
    lines = [b"prompt,chosen,rejected", b"a,b,c", b"too,few", b"", b"d,e,f", "ü,ü".encode()]
    lines += [b'g,"h\nh",i', b"a,b\xff,c", b'"now\ntoo",m,a,n,y', b"j,k,l", b"last"]
    path = tmp_path / "a.csv"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(DataError) as caught:
        load_preferences(path)
    first, *places, _ = str(caught.value).splitlines()
    assert first == f"{path}: 5 of 9 rows can't be used:"
    assert [place.partition(", ")[2].split(";")[0] for place in places] == [
        "row 1 (counted from 0): the row has 2 cells, expected 3: 'too,few'",
        "row 3 (counted from 0): the row has 2 cells, expected 3: 'ü,ü'",
        "row 5 (counted from 0): chosen is not UTF-8 text",
        "row 6 (counted from 0): the row has 5 cells, expected 3: '\"now\\ntoo\",m,a,n,y'",
        "row 8 (counted from 0): the row has 1 cells, expected 3: 'last'",
    ]
    pairs = load_preferences(path, skip_bad_rows=True)
    assert pairs["prompt"] == ["a", None, "d", None, "g", None, None, "j", None]
    assert pairs["row"] == list(range(9))


def test_bad_rows_of_a_long_csv_file_keep_their_places(tmp_path):
    rows = [f"{i},b" if i % 997 == 5 else f"{i},b,c" for i in range(5_000)]
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected\n" + "\n".join(rows))
    pairs = load_preferences(path, skip_bad_rows=True)
    assert pairs["prompt"] == [None if i % 997 == 5 else str(i) for i in range(5_000)]


def test_a_byte_order_mark_is_read_over(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())
    assert load_preferences(path).to_list() == EXPECTED


def test_rows_of_json_lines_are_named_by_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(ROWS[0]) + "\n" + json.dumps({**ROWS[1], "chosen": 4}))
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: chosen is not text"):
        load_preferences(path)
