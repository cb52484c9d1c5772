"""Texts from JSON lines, CSV and plain files: every bad line is named and costs that line only."""

import json

import pytest

from invcoss_common.errors import UnreadableFile
from invcoss_site.ingest.text import MAX_CHARS, MAX_LINE, Record, read_texts

BAD_LINES = [
    b'{"id": "ok-1", "text": "A normal sentence about a chest radiograph.", "label": "RESULTS"}',
    b'{"id": "broken", "text": "missing brace"',
    b"",
    b'{"id": "empty", "text": "", "label": "RESULTS"}',
    b'{"id": "no-text", "label": "METHODS"}',
    b'{"id": "latin1", "text": "caf\xe9"}',
    b'{"id": "ok-1", "text": "Duplicate id."}',
    b'{"id": "long", "text": "' + b"word " * 20_000 + b'"}',
    b'{"id": "label-type", "text": "Label is a number.", "label": 3}',
    b'["a", "list"]',
    b'{"id": "nul", "text": "has a \\u0000 character"}',
    b'{"id": "deep", "text": ' + b"[" * 100_000 + b"}",
    b'{"id": "odd", "text": "Label is a list.", "label": ["RESULTS"]}',
]


def test_bad_lines_are_named_by_number_and_the_good_ones_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(BAD_LINES) + b"\n")
    texts = read_texts(path)
    assert [record.id for record in texts.records] == ["ok-1", "long", "label-type"]
    assert [len(record.text) for record in texts.records] == [43, MAX_CHARS, 18]
    assert [record.label for record in texts.records] == ["RESULTS", "", 3]
    words = {
        2: "not JSON",
        3: "blank",
        4: "text is empty",
        5: "no text",
        6: "not UTF-8",
        7: "id was used before",
        10: "not an object",
        11: "control character",
        12: "not JSON",
        13: "neither a word nor a number",
    }
    assert len(texts.rejected) == len(words)
    for finding, (number, word) in zip(texts.rejected, words.items(), strict=True):
        assert finding.kind == "line"
        assert f"{path}, line {number}: " in finding.reason
        assert word in finding.reason
    assert [f"line {n}:" in one.reason for one, n in zip(texts.warnings, (8, 9), strict=True)] == [True, True]
    assert "100,000 characters" in texts.warnings[0].reason


def test_sections_are_joined_and_records_without_an_id_get_one(tmp_path):
    lines = [{"sections": [{"role": "AIM", "text": "One."}, {"role": "END", "text": "Two."}]}, {"text": "x", "id": 7}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_texts(tmp_path / "a.jsonl").records == (Record("a-1", "One.\nTwo."), Record("7", "x"))


def test_csv_rows_and_plain_files(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        'id,text\r\n1,"Größe, normal"\r\n2,"two\r\nlines"\r\n3,caf\xe9\r\n'.encode("latin-1")
    )
    texts = read_texts(tmp_path / "a.csv")
    assert texts.records == (Record("2", "two\r\nlines"),)
    assert ["line 2:" in texts.rejected[0].reason, "line 5:" in texts.rejected[1].reason] == [True, True]
    (tmp_path / "b.csv").write_text('id,text\n1,"Größe, normal"\n', encoding="utf-8-sig")
    assert read_texts(tmp_path / "b.csv").records == (Record("1", "Größe, normal"),)
    (tmp_path / "report 7.txt").write_text("Befund: unauffällig.\n", encoding="utf-8")
    assert read_texts(tmp_path / "report 7.txt").records == (Record("report 7", "Befund: unauffällig.\n"),)


def test_a_line_without_an_end_takes_no_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * (2 * MAX_LINE + 5) + b'"}\n{"id": "b", "text": "fine"}\n')
    texts = read_texts(path)
    assert [record.id for record in texts.records] == ["b"]
    assert "line 1: longer than" in texts.rejected[0].reason


@pytest.mark.parametrize(
    ("name", "content", "kind", "reason"),
    [
        ("a.jsonl", b"", "empty", "file is empty"),
        ("a.jsonl", "\ufeff{}".encode("utf-16-le"), "not-this-format", "UTF-16"),
        ("a.jsonl", b"nothing\nof use\n", "empty", "no usable text.*line 1: not JSON"),
        ("a.csv", b"id,report\n1,x\n", "not-this-format", "no column 'text'"),
        ("a.txt", b"caf\xe9", "empty", "not UTF-8"),
        ("a.docx", b"PK\x03\x04", "not-this-format", "read from .jsonl, .csv, .txt"),
    ],
)
def test_files_without_texts_are_refused(tmp_path, name, content, kind, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableFile, match=reason) as caught:
        read_texts(tmp_path / name)
    assert caught.value.kind == kind
