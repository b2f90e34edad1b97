"""Texts from files: read to their proven end in the format that the name says, or refused in one sentence."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import struct

import pytest
import zstandard

from seerattention.distillation import documents as room
from seerattention.distillation.documents import open_documents
from seerattention.distillation.text_files import read_text, text_format

COMPRESS = {
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
TEXT = "".join(random.Random(0).choices("abcdefgh \n", k=200_000))


def read(source, **options):
    return list(open_documents(source, **options)(0))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path):
    """The sentence with which reading ends; it names the file."""
    with pytest.raises(ValueError) as caught:
        read(path)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_are_read_whole(tmp_path, suffix):
    compress = COMPRESS[suffix]
    one = write(tmp_path / f"one.txt{suffix}", compress(TEXT.encode()))
    assert read(one) == [TEXT]
    parts = [TEXT[:70_001], "", "é" + TEXT[70_001:]]  # a frame each, one of them without content
    many = write(tmp_path / f"many.txt{suffix}", b"".join(compress(part.encode()) for part in parts))
    assert read(many) == ["".join(parts)]
    lines = [json.dumps({"text": part}) + "\n" for part in ("a", "b", "c")]
    jsonl = write(tmp_path / f"lines.jsonl{suffix}", b"".join(compress(line.encode()) for line in lines))
    assert read(jsonl) == ["a", "b", "c"]
    assert list(open_documents(jsonl)(2)) == ["c"]


def test_frames_without_text_are_passed_over(tmp_path):
    skipped = struct.pack("<II", 0x184D2A53, 3) + b"abc"
    frame = zstandard.compress(b"words")
    assert read(write(tmp_path / "a.txt.zst", skipped + frame + skipped)) == ["words"]
    assert read(write(tmp_path / "a.txt.gz", gzip.compress(b"words", mtime=0) + bytes(512))) == ["words"]  # as tar pads
    assert read(write(tmp_path / "a.txt.xz", lzma.compress(b"wo") + bytes(4) + lzma.compress(b"rds"))) == ["words"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_cut_and_damaged_files_are_refused(tmp_path, suffix):
    packed = COMPRESS[suffix](TEXT.encode())
    file = tmp_path / f"cut.txt{suffix}"
    for left in (len(packed) - 1, len(packed) - 3, len(packed) // 2, 30, 9):
        write(file, packed[:left])
        assert f"ends in the middle of its {suffix} data" in refusal(file)
    for left in (len(packed) - 1, len(packed) // 2, 7):  # the second frame is cut
        write(file, packed + packed[:left])
        assert f"ends in the middle of its {suffix} data" in refusal(file)
    at = len(packed) // 2
    write(file, packed[:at] + bytes([packed[at] ^ 16]) + packed[at + 1 :])
    assert f"damaged {suffix} data" in refusal(file)
    write(file, packed + b"something else entirely")
    assert f"{suffix} data" in refusal(file)


def test_a_cut_line_is_refused_after_the_whole_lines_before_it(tmp_path):
    texts = ["".join(random.Random(i).choices("abcdefgh ", k=100)) for i in range(5_000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    packed = zstandard.compress(lines.encode())
    file = write(tmp_path / "cut.jsonl.zst", packed[: len(packed) // 2])
    found = open_documents(file)(0)
    assert next(found) == texts[0]
    with pytest.raises(ValueError, match="was cut off"):
        list(found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wiki.txt.jsonl", (".jsonl", "")),
        ("wiki.txt.jsonl.zst", (".jsonl", ".zst")),
        ("wiki.jsonl.txt", (".txt", "")),
        ("wiki.jsonl.v2.txt.gz", (".txt", ".gz")),
        ("WIKI.JSONL.ZST", (".jsonl", ".zst")),
        ("Wiki.Txt", (".txt", "")),
        ("wiki.gz.txt", (".txt", "")),
        ("wiki.txt.zip", None),
        ("wiki.txt.bak", None),
        ("wiki.txt.gz.zst", None),
        ("wiki.zst", None),
        ("jsonl", None),
    ],
)
def test_the_last_suffix_decides(name, expected, tmp_path):
    assert text_format(name) == expected
    content = json.dumps({"text": "words"}) + "\n"
    file = write(tmp_path / name, COMPRESS.get(expected[1], bytes)(content.encode()) if expected else content)
    if expected is None:
        with pytest.raises(ValueError, match="supported are"):
            open_documents(file)
        with pytest.raises(FileNotFoundError, match="no text in folder"):
            open_documents(tmp_path)
    else:
        assert read(file) == read(tmp_path) == (["words"] if expected[0] == ".jsonl" else [content])


LINE = json.dumps({"text": "words"}) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        # The content is not what the name says.
        ("a.jsonl.zst", LINE, "named .zst but holds something else (uncompressed text?)"),
        ("a.jsonl.zst", gzip.compress(LINE.encode(), mtime=0), "named .zst but holds gzip data"),
        ("a.txt.gz", LINE, "named .gz but holds something else"),
        ("a.txt.bz2", lzma.compress(b"words"), "named .bz2 but holds xz data"),
        ("a.txt.xz", bz2.compress(b"words"), "named .xz but holds bzip2 data"),
        ("a.jsonl", gzip.compress(LINE.encode(), mtime=0), "holds gzip data, not plain text; end its name in .gz"),
        ("a.txt", zstandard.compress(b"words"), "holds zstandard data"),
        ("a.txt.gz", gzip.compress(gzip.compress(b"words", mtime=0), mtime=0), "holds decompressed, gzip data"),
        ("a.txt", b"PK\x03\x04....", "a zip archive"),
        ("a.jsonl", b"PAR1....PAR1", "a Parquet table"),
        # Not UTF-8.
        ("a.txt", "words".encode("utf-16"), "holds UTF-16 text, not plain text; convert it to UTF-8"),
        ("a.jsonl", LINE.encode("utf-16-be"), ":1 holds a NUL byte"),
        ("a.jsonl.zst", zstandard.compress(LINE.encode("utf-16")), "UTF-16 text"),
        ("a.txt", "one\ntwo caf\xe9".encode("latin-1"), ":2 is not UTF-8: byte 0xe9 at character 8"),
        ("a.jsonl", LINE.encode() + b'{"text": "caf\xe9"}\n', ":2 is not UTF-8"),
        ("a.txt.gz", gzip.compress(b"one\ntwo\nthr\xffee", mtime=0), ":3 is not UTF-8: byte 0xff"),
        ("a.txt", b"\xed\xa0\xbd", ":1 is not UTF-8"),
        ("a.txt", b"one\n\ntwo \0", ":3 holds a NUL byte"),
        ("a.jsonl", LINE.encode() * 2 + b'{"text": "a\0b"}', ":3 holds a NUL byte"),
        # Nothing in it.
        ("a.txt", b"", "is empty"),
        ("a.jsonl.zst", b"", "is empty"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("a.txt", b"\xef\xbb\xbf", "is empty"),
        ("a.jsonl", b"\n \n", "holds no text"),
        ("a.jsonl.zst", zstandard.compress(b""), "holds no text"),
        # No JSON lines of texts.
        ("a.jsonl", LINE + json.dumps({"text": "high \ud83d"}) + "\n", ":2 has a text with half of a surrogate pair"),
        ("a.jsonl", LINE + "words\n", ":2 is not JSON"),
        ("a.jsonl", "[" * 100_000, ":1 is not JSON"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}", ":1 "),
        ("a.jsonl", json.dumps([{"text": "a"}], indent=1), "one JSON array is not JSON lines"),
        ("a.jsonl", '[{"text": "a"}]', ":1 has no text under 'text' (found an array, not an object)"),
        ("a.jsonl", LINE + '"words"', ":2 has no text under 'text' (found a string, not an object)"),
        ("a.jsonl", '{"body": "words", "id": 1}', "(its fields are ['body', 'id']); name the right key"),
        ("a.jsonl", json.dumps({f"k{i}": 0 for i in range(99)}), "and 89 more)"),
        ("a.jsonl", LINE + "\n" + '{"text": 5}', ":3 has no text under 'text' (found a number there)"),
        ("a.jsonl", '{"text": null}', ":1 has no text under 'text' (found null there)"),
        ("a.jsonl", '{"text": ["a"]}', ":1 has no text under 'text' (found an array there)"),
    ],
)
def test_what_cannot_be_read_is_one_sentence_with_file_and_line(tmp_path, name, content, sentence):
    assert sentence in refusal(write(tmp_path / name, content))


def test_a_wrong_start_is_said_when_files_are_opened(tmp_path):
    write(tmp_path / "a.jsonl", LINE)
    write(tmp_path / "z.jsonl.zst", LINE)
    with pytest.raises(ValueError, match=r"z\.jsonl\.zst is named \.zst"):
        open_documents(tmp_path)  # no text asked for yet


def test_harmless_differences_are_no_errors(tmp_path):
    assert read(write(tmp_path / "a.txt", "\ufeffone\r\ntwo\rthree")) == ["one\ntwo\nthree"]
    assert (
        read(write(tmp_path / "b.jsonl", "\ufeff" + LINE.replace("\n", "\r\n") + "\n" + LINE.strip())) == ["words"] * 2
    )
    assert read(write(tmp_path / "c.jsonl", json.dumps({"text": "\ud83d\ude00 \u2028"}) + "\n")) == ["😀 \u2028"]
    assert read(write(tmp_path / "d.jsonl", '{"text": ""}\n')) == [""]


def test_a_prompt_may_have_any_name(tmp_path):
    assert read_text(write(tmp_path / "README", "words")) == "words"
    with pytest.raises(ValueError, match=r"README:1 is not UTF-8"):
        read_text(write(tmp_path / "README", b"\xe9"))


def test_odd_sources(tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        open_documents("")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        open_documents(tmp_path / "pipe.txt")


def _samples(monkeypatch):
    monkeypatch.setattr(room, "_HASHED_WHOLE", 40_000)
    monkeypatch.setattr(room, "_SAMPLE", 1_000)


@pytest.mark.parametrize("sampled", [False, True])
def test_fingerprint_follows_content(tmp_path, monkeypatch, sampled):
    if sampled:
        _samples(monkeypatch)
    file = write(tmp_path / "a.txt", TEXT)

    def fingerprint(source=file, **options):
        return open_documents(source, **options).fingerprint()

    first = fingerprint()
    stamp = os.stat(file)
    for changed in (TEXT[:-1] + "?", "?" + TEXT[1:], TEXT + "?", TEXT[:-1], TEXT[::-1]):
        write(file, changed)
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        assert fingerprint() != first
    os.utime(write(file, TEXT), (0, 0))
    assert fingerprint() == first
    (tmp_path / "elsewhere").mkdir()
    assert fingerprint(write(tmp_path / "elsewhere" / "b.txt", TEXT)) == first
    one = fingerprint(tmp_path / "elsewhere")
    assert one == first
    write(tmp_path / "elsewhere" / "c.jsonl", LINE)
    two = fingerprint(tmp_path / "elsewhere")
    assert two != one
    assert fingerprint(tmp_path / "elsewhere", text_field="body") != two


def test_fingerprint_of_a_change_in_the_middle(tmp_path, monkeypatch):
    file = write(tmp_path / "a.txt", TEXT)
    first = open_documents(file).fingerprint()
    write(file, TEXT[:77_777] + "?" + TEXT[77_778:])
    assert open_documents(file).fingerprint() != first
    # Samples of a long file are cheap: they read no more than the limit, and both ends.
    _samples(monkeypatch)
    read_bytes = []
    real = open

    class Counting:
        def __init__(self, opened):
            self.opened = opened

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.opened.close()

        def seek(self, place):
            self.opened.seek(place)

        def read(self, size):
            read_bytes.append((self.opened.tell(), size))
            return self.opened.read(size)

    source = open_documents(file)
    monkeypatch.setattr(room, "open", lambda *args: Counting(real(*args)), raising=False)
    source.fingerprint()
    assert sum(size for _, size in read_bytes) == 40_000
    assert read_bytes[0] == (0, 1_000)
    assert read_bytes[-1] == (199_000, 1_000)
