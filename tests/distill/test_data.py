"""Documents from files, folders and datasets; packing; and a position that resumes exactly."""

from __future__ import annotations

import json
import sys
from itertools import islice

import pytest
import torch
import zstandard

from seerattention.distillation.batches import BatchWalk
from seerattention.distillation.data import PackedText, Position, tokenize_with
from seerattention.distillation.documents import open_documents

from .tiny import tiny_tokenizer

TEXTS = ["one two", "", "drei vier fünf", "six"]


def _jsonl(texts, key="text"):
    return "".join(json.dumps({key: text}) + "\n" for text in texts)


def _read(source, skip=0, **options):
    return list(open_documents(source, **options)(skip))


@pytest.mark.parametrize("compressed", [False, True])
def test_json_lines(tmp_path, compressed):
    data = (_jsonl(TEXTS, "body") + "\n").encode()
    path = tmp_path / ("a.jsonl.zst" if compressed else "a.jsonl")
    path.write_bytes(zstandard.compress(data) if compressed else data)
    assert _read(path, text_field="body") == TEXTS
    assert _read(str(path), skip=2, text_field="body") == TEXTS[2:]
    with pytest.raises(ValueError, match=r"a\.jsonl.*:1 .*'text'.*body.*--text-field"):
        _read(path)


def test_text_files_and_folders(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt").write_text("last\nline")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"first"))
    (tmp_path / "b" / "m.jsonl").write_text(_jsonl(TEXTS))
    (tmp_path / "notes.md").write_text("not text for us")
    everything = ["first", *TEXTS, "last\nline"]
    for skip in range(len(everything) + 1):
        assert _read(tmp_path, skip=skip) == everything[skip:]
    assert _read(tmp_path / "b" / "z.txt") == ["last\nline"]
    with pytest.raises(ValueError, match=r"notes\.md"):
        _read(tmp_path / "notes.md")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        _read(tmp_path / "empty")


def test_broken_line_is_located(tmp_path):
    (tmp_path / "a.jsonl").write_text(_jsonl(TEXTS[:1]) + "{broken\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:2 is not JSON"):
        _read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["./nothing", "/nothing", "nothing.txt", "books/train.jsonl.zst", "a/b/c"])
def test_missing_paths_never_ask_a_hub(name):
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_documents(name)


def test_dataset_ids(monkeypatch):
    calls = []

    class Stream(list):
        def skip(self, count):
            return Stream(self[count:])

    class FakeDatasets:
        @staticmethod
        def load_dataset(*args, **kwargs):
            calls.append((args, kwargs))
            return Stream({"text": text} for text in TEXTS)

    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets)
    assert _read("owner/name:config@validation", skip=1) == TEXTS[1:]
    assert calls == [(("owner/name", "config"), {"split": "validation", "streaming": True})]
    assert _read("owner/name") == TEXTS
    assert calls[1] == (("owner/name", None), {"split": "train", "streaming": True})
    with pytest.raises(ValueError, match="fields are"):
        _read("owner/name", text_field="body")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        open_documents("owner/name")


def _documents(texts):
    return lambda skip: iter(texts[skip:])


def _numbers(text):
    return [int(word) for word in text.split()]


def _packed(texts, **options):
    options = {"length": 4, "batch_size": 1, **options}
    return PackedText(_documents(texts), _numbers, **options)


def _rows(batches):
    return [row for batch in batches for row in batch["input_ids"].tolist()]


def test_packing_leaves_no_gaps():
    texts = ["0 1 2 3 4 5", "6", "", "7 8 9 10 11 12 13 14 15 16", "17 18"]
    assert _rows(_packed(texts)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert _rows(_packed(texts, batch_size=3)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert _rows(_packed(texts, document_tokens=3)) == [[0, 1, 2, 6], [7, 8, 9, 17]]
    batch = next(iter(_packed(texts)))["input_ids"]
    assert batch.dtype == torch.int64


def test_tokens_between_bos_and_eos():
    tokenizer = tiny_tokenizer()
    tokenize = tokenize_with(tokenizer)
    ids = tokenize("w0 w1 nothing")
    assert ids == [tokenizer.bos_token_id, 3, 4, tokenizer.unk_token_id, tokenizer.eos_token_id]
    tokenizer.bos_token = tokenizer.eos_token = None
    assert tokenize_with(tokenizer)("w0 w1") == [3, 4]


def _random_texts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 23, (9,), generator=generator).tolist()
    numbers = iter(range(1000))
    return [" ".join(str(next(numbers)) for _ in range(length)) for length in lengths]


@pytest.mark.parametrize("repeat", [False, True])
def test_position_resumes_exactly(repeat):
    texts = _random_texts()
    options = {"length": 5, "batch_size": 2, "repeat": repeat, "start": Position(0, 1, 3)}
    whole = list(islice(_packed(texts, **options), 25))
    assert (len(whole) == 25) == repeat
    for stop in range(len(whole)):
        first = _packed(texts, **options)
        part = list(islice(first, stop))
        state = json.loads(json.dumps(first.state_dict()))
        second = _packed(texts, **options)
        second.load_state_dict(state)
        rest = list(islice(second, len(whole) - stop))
        assert _rows(part) + _rows(rest) == _rows(whole), stop
    if not repeat:
        second = _packed(texts, **options)
        list(second)
        assert list(second) == []  # at the end


def test_each_pass_begins_at_the_start_position():
    texts = ["0 1 2 3 4 5 6 7", "8 9 10 11"]
    rows = _rows(islice(_packed(texts, start=Position(0, 0, 4), repeat=True), 4))
    assert rows == [[4, 5, 6, 7], [8, 9, 10, 11]] * 2


def test_processes_share_the_global_batch():
    texts = _random_texts(3)
    single = _rows(_packed(texts, batch_size=4))
    shares = [_rows(_packed(texts, batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    merged = []
    for i in range(0, len(shares[0]), 2):
        merged += shares[0][i : i + 2] + shares[1][i : i + 2]
    assert merged == single
    assert len(single) > 4


@pytest.mark.parametrize("repeat", [False, True])
def test_too_little_text_is_an_error(repeat):
    with pytest.raises(ValueError, match="1 sequences of 4 tokens"):
        list(_packed(["0 1 2 3 4"], batch_size=2, repeat=repeat))


def test_errors_of_the_background_thread_surface():
    def documents(skip):
        yield "0 1 2 3 4 5"
        raise OSError("the disk is gone")

    batches = PackedText(documents, _numbers, length=4, batch_size=1)
    with pytest.raises(OSError, match="the disk is gone"):
        list(batches)


def test_walk_repeats_and_resumes_plain_lists():
    batches = [{"input_ids": torch.full((1, 2), i)} for i in range(3)]
    walk = BatchWalk(batches)
    taken = [int(batch["input_ids"][0, 0]) for _ in range(4) for batch in walk.take(2)]
    assert taken == [0, 1, 2, 0, 1, 2, 0, 1]
    resumed = BatchWalk(batches)
    resumed.load_state_dict(walk.state_dict())
    assert [int(batch["input_ids"][0, 0]) for batch in resumed.take(3)] == [2, 0, 1]
    once = BatchWalk(batches, passes=1)
    assert len(once.take(5)) == 3
    assert once.take(1) == []
    with pytest.raises(ValueError, match="cannot resume after 8 batches"):
        BatchWalk(batches, passes=1).load_state_dict(walk.state_dict())
    assert BatchWalk([]).take(1) == []


def test_walk_checks_batches():
    with pytest.raises(TypeError, match="input_ids"):
        BatchWalk([torch.zeros(1, 2)]).take(1)
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        BatchWalk([{"input_ids": torch.zeros(3)}]).take(1)
    with pytest.raises(ValueError, match="attention_mask"):
        BatchWalk([{"input_ids": torch.zeros(2, 3), "attention_mask": torch.ones(2, 4)}]).take(1)
