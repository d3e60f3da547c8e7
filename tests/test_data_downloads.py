"""Downloads from a server in this process: a whole, checked file or none."""

import contextlib
import errno
import hashlib
import http.server
import re
import resource
import socket
import threading
import time
import types

import pytest

from latephase_kernels.data import DOWNLOADS, ArchiveError, Download, download, downloads

CONTENT = b"0123456789" * 250_000  # more than two pieces


class Handler(http.server.BaseHTTPRequestHandler):
    requests = 0

    def do_GET(self):
        type(self).requests += 1
        if self.path == "/missing":
            self.send_error(404)
        elif self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/whole")
            self.end_headers()
        elif self.path == "/silent":
            time.sleep(1)
        else:
            self.send_response(200)
            if self.path in ("/whole", "/cut"):
                self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            body = {"/cut": CONTENT[:-1], "/page": b"<html>quota exceeded</html>", "/other": CONTENT[::-1]}
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body.get(self.path, CONTENT))
                while self.path == "/endless":
                    self.wfile.write(CONTENT)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def entry(monkeypatch, address):
    """A function that makes "sample" point to a path of the server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def add(path, url=None):
        sample = Download(url or address + path, "sample.bin", len(CONTENT), "md5", hashlib.md5(CONTENT).hexdigest())
        monkeypatch.setitem(DOWNLOADS, "sample", sample)

    return add


@pytest.mark.parametrize("path", ["/whole", "/moved"])
def test_a_whole_file_arrives_once(path, entry, tmp_path):
    entry(path)
    folder = tmp_path / "new" / "folder"
    target = download("sample", folder)
    assert target == folder / "sample.bin" and target.read_bytes() == CONTENT
    assert [file.name for file in folder.iterdir()] == ["sample.bin"]
    assert target.stat().st_mode & 0o044, "others may read it, as far as the umask allows"
    requests = Handler.requests
    assert download("sample", str(folder)) == target and Handler.requests == requests
    target.write_bytes(CONTENT[::-1])
    with pytest.raises(ArchiveError, match=r"sample.bin is damaged or another file.*delete it and get it again"):
        download("sample", folder)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("/page", ArchiveError, "gave 27 bytes with md5 .*, expected 2500000 with .*; try again, or get sample.bin"),
        ("/other", ArchiveError, "gave 2500000 bytes with md5"),
        ("/endless", ArchiveError, "gave more than 2500000 bytes"),
        ("/cut", (ArchiveError, ConnectionError), "gave 2499999 bytes|IncompleteRead|cannot be read"),
        ("/missing", ConnectionError, "/missing cannot be read .*404.*check the network"),
        ("/silent", ConnectionError, "/silent cannot be read .*timed out"),
    ],
)
def test_nothing_stays_of_what_went_wrong(path, error, message, entry, tmp_path):
    entry(path)
    with pytest.raises(error, match=message):
        download("sample", tmp_path, timeout=0.3)
    assert not [*tmp_path.iterdir()]


def test_nobody_listens(entry, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        entry("", f"http://127.0.0.1:{closed.getsockname()[1]}/whole")
        with pytest.raises(ConnectionError, match="cannot be read .*refused.*check the network"):
            download("sample", tmp_path)


def set_free_space(monkeypatch, free):
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))


def test_a_disk_that_is_or_becomes_full(entry, tmp_path, monkeypatch):
    entry("/whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, limits[1]))  # stops in the middle, as a full disk does
    try:
        with pytest.raises(OSError, match="sample.bin cannot be written") as caught:
            download("sample", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path)
    assert not [*tmp_path.iterdir()]

    set_free_space(monkeypatch, 2_499_999)
    with pytest.raises(OSError, match="needs 2500000 bytes, 2499999 are free") as caught:
        download("sample", tmp_path)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path)


def test_a_folder_that_cannot_be_made_or_written(entry, tmp_path, monkeypatch):
    entry("/whole")
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught:
        download("sample", tmp_path / "file" / "folder")
    assert caught.value.errno == errno.ENOTDIR and "file" in caught.value.filename
    set_free_space(monkeypatch, 10**9)
    with pytest.raises(OSError, match="sample.bin cannot be written") as caught:
        download("sample", "/proc/self")  # a folder where nobody may make a file, not even root
    assert caught.value.filename == "/proc/self"


def test_an_interrupted_download_leaves_nothing(entry, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def interrupted(*arguments):
        def update(size):
            assert [file.suffix for file in tmp_path.iterdir()] == [".part"]
            raise KeyboardInterrupt

        yield update

    entry("/whole")
    monkeypatch.setattr(downloads, "_progress_bar", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download("sample", tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_bar_is_shown_on_terminals_only(monkeypatch, capsys):
    sample = Download("", "sample.bin", 2000, "md5", "")
    for terminal, wanted in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        with downloads._progress_bar(sample, wanted) as update:
            update(2000)
        assert ("sample.bin: 100%" in capsys.readouterr().err) == (terminal and wanted)


def test_unknown_names_are_told_what_there_is_and_where_the_rest_comes_from(tmp_path):
    with pytest.raises(ValueError, match=r"name must be one of cifar-10-python.*got 'lsun'; LSUN_resize.tar.gz and"):
        download("lsun", tmp_path)


def test_every_address_comes_with_a_size_and_a_digest():
    for entry in DOWNLOADS.values():
        assert re.fullmatch(r"https?://[\w./~-]+(\?download=1)?", entry.url) and entry.file_name in entry.url
        digits = {"md5": 32, "sha256": 64}[entry.algorithm]
        assert re.fullmatch(rf"[0-9a-f]{{{digits}}}", entry.digest) and entry.size > 10**7
    assert len({entry.digest for entry in DOWNLOADS.values()}) == len(DOWNLOADS) == 8
