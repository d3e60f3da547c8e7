"""Archives are read in memory, within limits, and whatever they hold nothing is written or followed."""

import gzip
import hashlib
import io
import os
import stat
import tarfile
import time
import tracemalloc
import zipfile

import pytest

from latephase_kernels.data import ArchiveError
from latephase_kernels.data.archives import Limits, iterate_members
from latephase_kernels.data.files import check_digest, find_data

LIMITS = Limits(member_bytes=100_000, total_bytes=1_000_000, members=20)
FILES = {"set/a.bin": b"alpha" * 999, "set/b.bin": b"", "set/deep/c.bin": bytes(range(256)) * 5}


def entry(name, size=0, **fields):
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def write_tar(path, entries, mode="w:gz", **options):
    with tarfile.open(path, mode, **options) as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content))
    return path


def write_kind(kind, folder, files=FILES):
    path = folder / f"data.{kind}"
    if kind == "folder":
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.mkdir("set") if hasattr(archive, "mkdir") else None
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        directory = entry("set", type=tarfile.DIRTYPE)
        entries = [(directory, b""), *((entry(f"./{name}", len(content)), content) for name, content in files.items())]
        write_tar(path, entries, "w:gz" if kind == "tar.gz" else "w")
    return path


def read(path, wanted=lambda name: True, limits=LIMITS):
    return {member.name: member.read() for member in iterate_members(path, wanted, limits)}


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip", "folder"])
def test_every_kind_gives_the_same_files(kind, tmp_path):
    path = write_kind(kind, tmp_path)
    assert read(path) == FILES
    assert read(path, lambda name: name.endswith("c.bin")) == {"set/deep/c.bin": FILES["set/deep/c.bin"]}
    for member in iterate_members(path, lambda name: "c.bin" in name, LIMITS):
        assert member.size == 1280 and member.read(300) == FILES["set/deep/c.bin"][:300]  # piece by piece
        assert member.read(0) == b"" and member.read() == FILES["set/deep/c.bin"][300:] and member.read() == b""
        with pytest.raises(ArchiveError, match="ends 1 bytes early"):
            member.read(1)


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip", "folder"])
@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(4994, 10**6), r"a.bin.*declares 4995 bytes, more than the 4994"),
        (Limits(10**6, 5500), r"data\.(zip|folder).*c.bin.*5500 in all|holds more than 5500 bytes"),
        (Limits(10**6, 10**6, 2), "holds more than 2 members"),
    ],
)
def test_limits_hold_for_every_kind(kind, limits, message, tmp_path):
    with pytest.raises(ArchiveError, match=message):
        read(write_kind(kind, tmp_path), limits=limits)


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../up", "C:/x", "..\\up", "\\\\host\\share"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_names_that_lead_outside_are_refused_even_if_nobody_wants_them(name, kind, tmp_path):
    path = write_kind(kind, tmp_path, {"fine": b"x", name: b"boo"})
    if kind == "tar":
        write_tar(path, [(entry("fine", 1), b"x"), (entry(name, 3), b"boo")])
    with pytest.raises(ArchiveError, match="points outside of the archive; do not use"):
        read(path, lambda member: member == "fine")


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE]
)
def test_links_and_devices_are_passed_over_or_refused_and_never_followed(kind, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    special = entry("data", type=kind, linkname=str(secret), devmajor=1, devminor=3)
    path = write_tar(tmp_path / "x.tar.gz", [(special, b""), (entry("other", 2), b"ok")])
    assert read(path, lambda name: name == "other") == {"other": b"ok"}
    with pytest.raises(ArchiveError, match="'data', is a link or a device"):
        read(path)


def test_links_in_a_zip_and_devices_in_a_folder_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        info = zipfile.ZipInfo("data")
        info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ArchiveError, match="is a link or a device"):
        read(tmp_path / "x.zip")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "data")  # opening it would wait forever
    (tmp_path / "folder" / "dangling").symlink_to("nowhere")
    (tmp_path / "folder" / "mine").symlink_to(tmp_path / "x.zip")
    content = (tmp_path / "x.zip").read_bytes()
    assert read(tmp_path / "folder", lambda name: name == "mine") == {"mine": content}
    with pytest.raises(ArchiveError, match="is a link or a device"):
        read(tmp_path / "folder")


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_small_archives_of_gigabytes_are_refused(kind, tmp_path):
    path, zeros = tmp_path / "bomb", bytes(1 << 20)
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            with archive.open("data", "w", force_zip64=True) as file:
                for _ in range(256):
                    file.write(zeros)
    else:
        # The gigabytes stand in a member nobody asked for, and are all there: one compressed block again and again.
        block = gzip.compress(zeros)
        path.write_bytes(gzip.compress(entry("ignored", 8 << 30).tobuf()) + block * 8192)
    assert path.stat().st_size < 10 << 20
    start = time.process_time()
    with pytest.raises(ArchiveError, match="more than"):
        read(path, lambda name: name == "data")
    assert time.process_time() - start < 2


def test_a_zip_that_declares_less_than_it_holds_gives_no_more(tmp_path):
    path = write_kind("zip", tmp_path, {"data": b"x" * 50_000})
    content = bytearray(path.read_bytes())
    for position in (22, content.rindex(b"PK\x01\x02") + 24):  # the uncompressed size, in both headers
        content[position : position + 4] = (10).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match="data.zip.*'data', is damaged.*CRC"):
        read(path)


def pax_bomb():
    """Extended headers: one claims to be large, in a single piece that tarfile would read into memory."""
    return entry("header", 40 << 20, type=tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT) + bytes(40 << 20)


def sparse_bomb():
    """A sparse map of millions of entries (GNU format 1.0), which tarfile would build as a list."""
    map_records = b"".join(
        b"%d %s=%s\n" % (len(key) + len(value) + 5, key, value)
        for key, value in ((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", b"data"))
    )
    header = entry("header", len(map_records), type=tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT)
    body = b"9999999\n" + b"0\n" * (10 << 20)
    return header + map_records.ljust(512, b"\0") + entry("data", len(body)).tobuf() + body


def chained_headers():
    """Global headers one behind the other: each one is a level deeper in tarfile's recursion."""
    return entry("header", 0, type=tarfile.XGLTYPE).tobuf(tarfile.USTAR_FORMAT) * 20_000


def backward_header():
    """A negative size, which would send the reader to the first header again."""
    header = bytearray(entry("data", 0).tobuf())
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"  # −1024 in base 256
    checksum = sum(header[:148]) + sum(header[156:512]) + 8 * 32
    header[148:156] = b"%06o\0 " % checksum
    return entry("first", 0).tobuf() + bytes(header)


@pytest.mark.parametrize("make", [pax_bomb, sparse_bomb, chained_headers, backward_header])
def test_forged_tar_headers_end_in_an_error_at_once(make, tmp_path):
    path = tmp_path / "forged.tar.gz"
    path.write_bytes(gzip.compress(make(), compresslevel=1))
    tracemalloc.start()
    start = time.process_time()
    try:
        for wanted in (True, False):
            with pytest.raises(ArchiveError, match="forged.tar.gz"):
                read(path, lambda name, wanted=wanted: wanted, Limits(10**9, 10**9))
        assert time.process_time() - start < 2
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_damage_is_named(kind, tmp_path):
    path = write_kind(kind, tmp_path, {"data": os.urandom(5000), "more": b"m"})
    content = path.read_bytes()
    path.write_bytes(content[:3000])
    with pytest.raises(ArchiveError, match=rf"data\.{kind}.*(damaged|cut off).*again"):
        read(path)
    if kind != "tar":  # which has no checksum of its content
        path.write_bytes(content[:2500] + bytes([content[2500] ^ 1]) + content[2501:])
        with pytest.raises(ArchiveError, match=rf"data\.{kind}.*damaged.*again"):
            read(path)
    for rubbish in (b"", b"PK\x03\x04rubbish", b"\x1f\x8brubbish", b"<html>not found</html>" * 99):
        path.write_bytes(rubbish)
        with pytest.raises(ArchiveError, match=rf"data\.{kind}.*damaged or cannot be read"):
            read(path)


@pytest.mark.parametrize(
    "damage", [lambda data, at: data[:at] + b"?" + data[at + 1 :], lambda data, at: data[: at + 300]]
)
def test_a_damaged_header_is_not_the_end(damage, tmp_path):
    path = write_kind("tar", tmp_path)
    content = path.read_bytes()
    path.write_bytes(damage(content, content.index(b"./set/deep/c.bin")))
    with pytest.raises(ArchiveError, match="data.tar has a damaged header behind its member 3; get the file again"):
        read(path)


def test_a_member_that_is_there_twice_is_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", [(entry("data", 1), b"1"), (entry("./data", 1), b"2")], "w")
    with pytest.raises(ArchiveError, match="is there twice"):
        read(path)


def test_encrypted_or_oddly_compressed_zip_and_missing_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "odd.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("data", b"x" * 1000)
    with pytest.raises(ArchiveError, match="'data', is not stored or deflated"):
        read(tmp_path / "odd.zip")
    path = write_kind("zip", tmp_path, {"data": b"x"})
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match="password"):
        read(path)
    with pytest.raises(FileNotFoundError) as caught:
        read(tmp_path / "missing.tar")
    assert caught.value.filename == str(tmp_path / "missing.tar")


def test_digest_and_size(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    digest = hashlib.md5(b"content").hexdigest()
    check_digest(path, "md5", digest)
    check_digest(path, "sha256", hashlib.sha256(b"content").hexdigest(), 7)
    with pytest.raises(ArchiveError, match="file has 7 bytes, expected 8; delete it"):
        check_digest(path, "md5", digest, 8)
    with pytest.raises(ArchiveError, match=f"its md5 is {digest}, expected 00; delete it"):
        check_digest(path, "md5", "00")


def test_data_is_found_as_itself_or_in_a_folder_the_first_candidate_first(tmp_path):
    for name in ("b.tar", "a"):
        (tmp_path / name).touch()
    candidates = ["a", "b.tar", "c"]
    assert find_data(tmp_path, candidates, "") == tmp_path / "a"
    assert find_data(str(tmp_path / "b.tar"), candidates, "") == tmp_path / "b.tar"
    with pytest.raises(FileNotFoundError, match="holds none of them; buy it"):
        find_data(tmp_path / "a", ["z"], "buy it")
