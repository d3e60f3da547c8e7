"""Text: the split, the vocabulary, enwik8 in its forms, and the streams that are made of a text."""

import argparse
import hashlib
import typing
import zipfile
from pathlib import Path

import pytest
import torch

from latephase_kernels.data import (
    ArchiveError,
    TextBatches,
    load_enwik8,
    load_python_text,
    load_text,
    split_text,
    split_texts,
    text,
)
from latephase_kernels.data.downloads import DOWNLOADS


def whole(data):
    return torch.cat([data.train, data.validation, data.test])


@pytest.mark.parametrize(
    "content", [b"abcdefghijklmnopqrst", bytes(range(255, -1, -1)) * 3, b"x" * 1001, "äöü€".encode() * 9]
)
def test_split_and_vocabulary(content):
    data = split_text(content)
    assert whole(data).dtype == torch.uint8
    assert (len(data.train), len(data.validation)) == (len(content) * 9 // 10, len(content) // 20)
    assert data.vocabulary == bytes(sorted(set(content)))
    assert data.decode(whole(data)) == content  # every symbol, in order, none lost between the parts
    assert sorted(whole(data).unique().tolist()) == list(range(len(data.vocabulary)))
    with pytest.raises(ValueError, match="at least 20 bytes, got 19"):
        split_text(content[:19])


def test_enwik8_has_the_usual_split():
    # 10⁸ bytes, as enwik8 has; the sizes do not depend on what they are.
    data = split_text(bytes(text.ENWIK8_BYTES))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [90_000_000, 5_000_000, 5_000_000]


@pytest.fixture
def small_enwik8(monkeypatch):
    content = b"<mediawiki> [[Anarchism]] " * 40
    monkeypatch.setattr(text, "ENWIK8_BYTES", len(content))
    monkeypatch.setattr(text, "_ENWIK8_MD5", hashlib.md5(content).hexdigest())
    return content


def write_zip(path, content, name="enwik8"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return path


@pytest.mark.parametrize("form", ["zip", "raw", "unpacked into a folder"])
def test_enwik8_is_read_in_every_form(form, small_enwik8, tmp_path):
    if form == "zip":
        path = write_zip(tmp_path / "enwik8.zip", small_enwik8)
    elif form == "raw":
        path = tmp_path / "enwik8"
        path.write_bytes(small_enwik8)
    else:
        path = tmp_path / "enwik8"
        path.mkdir()
        (path / "enwik8").write_bytes(small_enwik8)
    for place in (path, str(tmp_path)):
        data = load_enwik8(place, verify=form != "zip")
        assert data.decode(whole(data)) == small_enwik8 and len(data.train) == 936


def test_what_is_not_enwik8_is_refused(small_enwik8, tmp_path):
    with pytest.raises(FileNotFoundError, match='get it with .*download."enwik8", folder'):
        load_enwik8(tmp_path)
    (tmp_path / "enwik8").mkdir()
    with pytest.raises(FileNotFoundError, match="enwik8 holds none of enwik8, enwik8.zip; get it"):
        load_enwik8(tmp_path)
    (tmp_path / "enwik8").rmdir()
    path = write_zip(tmp_path / "enwik8.zip", small_enwik8)
    with pytest.raises(ArchiveError, match=f"enwik8.zip has .* bytes, expected {DOWNLOADS['enwik8'].size}"):
        load_enwik8(path)
    for content, message in (
        (small_enwik8 + b"x", "declares 1041 bytes, more than the 1040"),
        (small_enwik8[:-1], "holds no text of 1040 bytes"),
        (bytes(1 << 28), "declares 268435456 bytes"),  # a bomb: 260 kB of zip
    ):
        write_zip(path, content)
        with pytest.raises(ArchiveError, match=message):
            load_enwik8(path, verify=False)
    write_zip(path, small_enwik8, "other")
    with pytest.raises(ArchiveError, match="holds no file enwik8"):
        load_enwik8(path, verify=False)
    path.unlink()
    raw = tmp_path / "enwik8"
    raw.write_bytes(small_enwik8.swapcase())
    with pytest.raises(ArchiveError, match="its md5 is .*delete it and get it again"):
        load_enwik8(raw)
    raw.write_bytes(small_enwik8 + b"more")
    with pytest.raises(ArchiveError, match="holds no text of 1040 bytes"):
        load_enwik8(raw, verify=False)


def test_any_file_and_pythons_own_text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"It was a dark and stormy night. " * 5)
    assert load_text(path).decode(load_text(path).train[:6]) == b"It was"
    python = load_python_text()
    assert len(whole(python)) > 1_000_000 and 60 < len(python.vocabulary) < 256
    assert python.decode(python.train[:4]) == b"The " and b'The "assert" statement' in python.decode(python.train)
    first, last = (Path(module.__file__).read_bytes() for module in (argparse, typing))
    assert first[: len(first) * 9 // 10] in python.decode(python.train)  # each text is split, not the whole
    assert python.decode(python.test).endswith(last[len(last) * 9 // 10 + len(last) // 20 :])
    assert torch.equal(python.train, load_python_text().train)


def test_several_texts_are_split_one_by_one():
    first, second = b"a" * 18 + b"bc", b"d" * 36 + b"eeff"
    data = split_texts([first, second])
    assert [data.decode(part) for part in (data.train, data.validation, data.test)] == [
        b"a" * 18 + b"d" * 36,
        b"bee",
        b"cff",
    ]
    assert data.vocabulary == b"abcdef"
    for texts in ([], [first, b"short"]):
        with pytest.raises(ValueError, match="at least 20 bytes"):
            split_texts(texts)


def windows(batches, epoch):
    return [batches.window(epoch, step) for step in range(len(batches))]


@pytest.mark.parametrize(
    ("num_symbols", "batch_size", "length", "num_members"), [(100, 3, 5, 1), (101, 2, 7, 3), (25, 2, 1, 4)]
)
def test_streams_are_contiguous_disjoint_and_miss_little(num_symbols, batch_size, length, num_members):
    symbols = torch.arange(num_symbols)
    batches = TextBatches(symbols, batch_size, length, num_members=num_members)
    rows = batch_size * num_members
    for epoch in range(6):
        seen = windows(batches, epoch)
        for inputs, targets in seen:
            assert inputs.shape == targets.shape == (rows, length) and inputs.dtype == torch.int64
            assert inputs.is_contiguous() and targets.is_contiguous()
            assert torch.equal(targets, inputs + 1)  # the text counts up: the next symbol is one more
        streams = torch.cat([inputs for inputs, _ in seen], dim=1)
        assert torch.equal(streams, streams[:, :1] + torch.arange(len(seen) * length))  # step after step, row by row
        assert len(streams.unique()) == streams.numel()  # no symbol twice
        # Not seen: the shift's reserve, and less than one window and one symbol in each stream.
        assert num_symbols - streams.numel() <= length + rows * length
        # Member k reads the part of member k + epoch: parts lie one behind the other in the text.
        part_order = streams.view(num_members, -1).min(dim=1).values.argsort().argsort()
        assert part_order.tolist() == [(member + epoch) % num_members for member in range(num_members)]


def test_shifts_depend_on_seed_and_epoch_and_reach_every_place():
    def starts(seed):
        batches = TextBatches(torch.arange(50), 2, 4, seed=seed)
        return [int(batches.window(epoch, 0)[0][0, 0]) for epoch in range(60)]

    assert starts(0) == starts(0) != starts(1)
    assert set(starts(0)) == set(range(4))


def test_ranks_share_the_streams_of_every_member():
    text_symbols = torch.arange(200)
    whole_batches = TextBatches(text_symbols, 4, 5, num_members=3)
    shares = [TextBatches(text_symbols, 4, 5, num_members=3, rank=rank, num_ranks=2) for rank in range(2)]
    assert shares[1].batch_size == 2
    for epoch in range(2):
        for (inputs, targets), *parts in zip(*(windows(b, epoch) for b in (whole_batches, *shares)), strict=True):
            for position, expected in ((0, inputs), (1, targets)):
                joined = torch.cat([part[position].view(3, 2, 5) for part in parts], dim=1).flatten(0, 1)
                assert torch.equal(joined, expected)
    for rank, num_ranks in ((0, 3), (2, 2)):
        with pytest.raises(ValueError, match=f"divisible by num_ranks={num_ranks}, and rank={rank}"):
            TextBatches(text_symbols, 4, 5, rank=rank, num_ranks=num_ranks)


def test_stream_arguments_that_do_not_fit_are_refused():
    symbols = torch.arange(30, dtype=torch.uint8)
    for wrong in (symbols.float(), symbols.view(5, 6), symbols.bool()):
        with pytest.raises(TypeError, match="text must be integers"):
            TextBatches(wrong, 2, 3)
    for arguments, message in (
        ((0, 3), "must be positive, got 0, 3 and 1"),
        ((2, 0), "must be positive, got 2, 0 and 1"),
        ((4, 6), "at least 30 symbols for 4 streams of one window of 6"),
    ):
        if message.startswith("at least"):
            TextBatches(symbols, *arguments)  # 30 are just enough
            symbols_short = symbols[:29]
        else:
            symbols_short = symbols
        with pytest.raises(ValueError, match=message):
            TextBatches(symbols_short, *arguments)
    with pytest.raises(ValueError, match="for 20 streams"):
        TextBatches(symbols, 2, 3, num_members=10)
