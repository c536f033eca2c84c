"""Downloads: resumed, never incomplete, by one process at a time; errors in one sentence."""

import errno
import hashlib
import io
import json
import os
import random
import resource
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request

import pytest
import torch

from irpe_core import CheckpointError, load_checkpoint
from irpe_core.download import download
from irpe_core.web import _Redirects
from tests.web_server import serve

CONTENT = random.Random(1).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ROOT = Path(__file__).parents[2]


@pytest.fixture
def site():
    with serve(weights=CONTENT) as site:
        yield site


@pytest.fixture
def url(site) -> str:
    return site.url("weights.pth")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failure(url: str, folder: Path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        download(url, folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_file_is_downloaded_once_and_no_other_file_remains(site, url, tmp_path):
    for _ in range(2):
        path = download(url, tmp_path / "new" / "folder", sha256=SHA256.upper())
        assert path.read_bytes() == CONTENT
    assert path == tmp_path / "new" / "folder" / "weights.pth"
    assert names(path.parent) == ["weights.pth", "weights.pth.json"]
    assert len(site.requests) == 1


def test_the_default_folder_is_the_torch_hub_cache(url, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert download(url) == tmp_path / "hub" / "checkpoints" / "weights.pth"


def test_the_query_of_a_url_is_not_part_of_the_name(site, tmp_path):
    site.files["/weights.pth?token=1/2"] = CONTENT
    assert download(site.url("weights.pth?token=1/2"), tmp_path).name == "weights.pth"


@pytest.mark.parametrize(
    "version",
    [
        {"ETag": '"one"'},
        {"Last-Modified": "Sat, 01 Jan 2022 00:00:00 GMT"},
        {"ETag": 'W/"weak"', "Last-Modified": "Sat, 01 Jan 2022 00:00:00 GMT"},
    ],
    ids=["tag", "date", "weak-tag-and-date"],
)
def test_an_interrupted_download_continues_where_it_stopped(site, url, tmp_path, version):
    site.version, site.break_after = version, [100_000, 50_000]
    for kept in (100_000, 150_000):
        message = failure(url, tmp_path)
        assert f"broke off at {kept} of 300000 bytes, which are kept in " in message
        assert (tmp_path / "weights.pth.part").read_bytes() == CONTENT[:kept]
        assert not (tmp_path / "weights.pth").exists()
    assert download(url, tmp_path).read_bytes() == CONTENT
    assert [r.get("Range") for r in site.requests] == [None, "bytes=100000-", "bytes=150000-"]
    assert names(tmp_path) == ["weights.pth", "weights.pth.json"]


def test_a_server_that_ignores_ranges_sends_the_whole_file_again(site, url, tmp_path):
    site.ranges, site.break_after = False, [100_000]
    failure(url, tmp_path)
    assert download(url, tmp_path, sha256=SHA256).read_bytes() == CONTENT
    assert site.requests[1]["Range"] == "bytes=100000-"


def test_a_file_that_changed_meanwhile_is_not_mixed_with_the_old_one(site, url, tmp_path):
    site.break_after = [100_000]
    failure(url, tmp_path)
    site.files["/weights.pth"], site.version = CONTENT[::-1], {"ETag": '"two"'}
    assert download(url, tmp_path).read_bytes() == CONTENT[::-1]
    assert site.requests[1]["If-Range"] == '"one"'


def test_a_part_of_unknown_version_or_of_another_url_is_not_used(site, url, tmp_path):
    for spoil in ("no version", "another url", "damaged notes"):
        (tmp_path / spoil).mkdir()
        site.break_after = [100_000]
        site.version = {} if spoil == "no version" else {"ETag": '"one"'}
        message = failure(url, tmp_path / spoil)
        again = (
            "and the next call starts from the beginning, because the server does not name the "
            "version of the file: "
        )
        assert (again in message, "which are kept" in message) == (
            (True, False) if spoil == "no version" else (False, True)
        )
        notes = tmp_path / spoil / "weights.pth.part.json"
        if spoil == "another url":
            notes.write_text(notes.read_text().replace("http:", "https:"))
        elif spoil == "damaged notes":
            notes.write_text(notes.read_text()[:9])
        assert download(url, tmp_path / spoil, sha256=SHA256).read_bytes() == CONTENT
        assert "Range" not in site.requests[-1]


@pytest.mark.parametrize("answer", ["bytes 5-9/10", "bytes */300000", "nonsense"])
def test_an_answer_with_another_range_is_not_used(site, url, tmp_path, answer):
    site.break_after = [100_000]
    failure(url, tmp_path)
    site.headers = {"Content-Range": answer}
    assert download(url, tmp_path).read_bytes() == CONTENT


def test_a_part_that_is_already_complete_is_downloaded_again(site, url, tmp_path):
    """A process may be killed between the last byte and the renaming."""
    site.break_after = [300_000 - 1]
    failure(url, tmp_path)
    with (tmp_path / "weights.pth.part").open("ab") as file:
        file.write(CONTENT[-1:])
    assert download(url, tmp_path).read_bytes() == CONTENT


def test_an_answer_in_chunks_without_a_length_is_used_only_if_complete(site, url, tmp_path):
    site.chunked, site.break_after = True, [100_000]
    assert "broke off at 100000 of unknown bytes" in failure(url, tmp_path)
    assert names(tmp_path) == ["weights.pth.part", "weights.pth.part.json"]
    site.ranges = False
    assert download(url, tmp_path).read_bytes() == CONTENT


def test_the_error_of_a_missing_file_names_url_and_status(site, tmp_path):
    url = site.url("none.pth")
    assert failure(url, tmp_path) == f"cannot download {url}: the server answered 404 Not Found"
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"Content-Type": "text/html; charset=utf-8"}, "a web page instead of a file"),
        ({"Content-Length": "0"}, "empty"),
        ({"Content-Length": "many"}, "does not say how long"),
    ],
    ids=["page", "empty", "no-length"],
)
def test_an_answer_that_is_not_a_file_is_not_kept(site, url, tmp_path, headers, words):
    site.headers = headers
    assert words in failure(url, tmp_path)
    assert names(tmp_path) == []


def test_the_error_without_network_names_the_reason(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/weights.pth"
        assert failure(url, tmp_path) == f"cannot download {url}: Connection refused"
    assert failure("https://nowhere.invalid/weights.pth", tmp_path).startswith("cannot download")
    assert names(tmp_path) == []


def test_a_silent_server_times_out(site, url, tmp_path, monkeypatch):
    monkeypatch.setattr("irpe_core.web._TIMEOUT", 0.3)
    site.break_after, site.stall = [100_000], True
    message = failure(url, tmp_path)
    assert "broke off at 100000 of 300000" in message
    assert message.endswith("no answer within 0.3 s")
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/weights.pth"
        assert failure(url, tmp_path).endswith("no answer within 0.3 s")


@pytest.mark.parametrize(
    "url", ["ftp://host/a.pth", "file:///a.pth", "http://host/", "http:///a.pth", "http://[/a", "a"]
)
def test_a_url_that_does_not_name_a_file_is_refused(url, tmp_path):
    expected = f"url must be the http:// or https:// URL of a file, got {url!r}"
    assert failure(url, tmp_path) == expected


@pytest.mark.parametrize("url", ["https://host:port/a.pth", "http://127.0.0.1:1/a b.pth"])
def test_the_error_of_a_malformed_url_is_one_sentence(url, tmp_path):
    assert f"cannot download {url}: " in failure(url, tmp_path)


def test_the_error_of_a_wrong_checksum_names_both_and_nothing_is_kept(site, url, tmp_path):
    message = failure(url, tmp_path, sha256="0" * 64)
    assert SHA256 in message
    assert "0" * 64 in message
    assert names(tmp_path) == []
    download(url, tmp_path)
    assert "remove it to download it again" in failure(url, tmp_path, sha256="0" * 64)
    assert names(tmp_path) == ["weights.pth", "weights.pth.json"]


def test_a_damaged_part_fails_the_checksum(site, url, tmp_path):
    site.break_after = [100_000]
    failure(url, tmp_path)
    (tmp_path / "weights.pth.part").write_bytes(bytes(100_000))
    assert "instead of" in failure(url, tmp_path, sha256=SHA256)
    assert download(url, tmp_path, sha256=SHA256).read_bytes() == CONTENT


def test_a_download_to_a_full_disk_continues_later(site, url, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        message = failure(url, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    part = tmp_path / "weights.pth.part"
    assert message == f"cannot store {url} as {part}: File too large"
    assert part.read_bytes() == CONTENT[:100_000]
    assert not (tmp_path / "weights.pth").exists()
    assert download(url, tmp_path).read_bytes() == CONTENT
    assert site.requests[1]["Range"] == "bytes=100000-"


def test_nothing_is_kept_on_a_disk_without_any_space(url, tmp_path, monkeypatch):
    class FullDisk(io.FileIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("irpe_core.download._open_part", lambda path: FullDisk(path, "ab"))
    assert failure(url, tmp_path).endswith("weights.pth.part: No space left on device")
    assert names(tmp_path) == []


def test_the_error_names_a_folder_that_cannot_be_made(url, tmp_path):
    (tmp_path / "file").write_text("")
    message = failure(url, tmp_path / "file" / "folder")
    assert f"as {tmp_path / 'file' / 'folder'}: Not a directory" in message


def test_of_many_calls_at_the_same_time_one_downloads(site, url, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: download(url, tmp_path), range(8)))
    assert all(path.read_bytes() == CONTENT for path in paths)
    assert len(site.requests) == 1
    assert names(tmp_path) == ["weights.pth", "weights.pth.json"]


def test_a_killed_process_leaves_no_lock_and_its_part_is_used(site, url, tmp_path):
    site.break_after, site.stall = [100_000], True
    program = f"from irpe_core.download import download; download({url!r}, {str(tmp_path)!r})"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=os.environ)
    part, end = tmp_path / "weights.pth.part", time.monotonic() + 60
    while not part.exists() or part.stat().st_size < 100_000:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert download(url, tmp_path).read_bytes() == CONTENT
    assert site.requests[-1]["Range"] == "bytes=100000-"


def test_the_progress_bar_appears_only_on_terminals(url, tmp_path, capsys, monkeypatch):
    download(url, tmp_path / "plain")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    download(url, tmp_path / "silent", progress=False)
    assert capsys.readouterr().err == ""
    download(url, tmp_path / "shown")
    assert "100%" in capsys.readouterr().err


def test_the_progress_bar_works_without_tqdm(site, url, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "tqdm", torch.hub._Faketqdm)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    site.break_after = [150_000]
    failure(url, tmp_path)
    assert capsys.readouterr().err.rstrip().endswith("50.0%")
    download(url, tmp_path)
    shown = capsys.readouterr().err
    assert float(shown.split("\r")[1].rstrip("%\n")) > 50
    assert shown.rstrip().endswith("100.0%")


def test_a_checkpoint_loads_from_a_url(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.save({"model": {"a": torch.ones(3)}}, tmp_path / "a.pth")
    with serve(zoo=(tmp_path / "a.pth").read_bytes()) as site:
        for _ in range(2):
            assert torch.equal(load_checkpoint(site.url("zoo.pth"))["model"]["a"], torch.ones(3))
        assert len(site.requests) == 1
        with pytest.raises(CheckpointError, match="404 Not Found"):
            load_checkpoint(site.url("none.pth"))


def test_files_of_two_urls_with_the_same_name_are_not_mixed(site, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    site.files |= {"/run1/checkpoint.pth": b"one" * 99, "/run2/checkpoint.pth": b"two" * 99}
    for _ in range(2):
        for name, content in (("run1", b"one" * 99), ("run2", b"two" * 99)):
            path = download(site.url(f"{name}/checkpoint.pth"))
            assert path.read_bytes() == content
            assert path.name == "checkpoint.pth"
    assert len(site.requests) == 2


def test_many_urls_with_the_same_name_at_the_same_time_are_not_mixed(site, tmp_path):
    site.files |= {f"/{i}/a.pth": b"%d" % i * 999 for i in range(8)}
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda i: download(site.url(f"{i}/a.pth"), tmp_path), range(8)))
    assert [path.read_bytes() for path in paths] == [b"%d" % i * 999 for i in range(8)]


def test_url_version_size_and_checksum_of_a_file_are_recorded(url, tmp_path):
    path = download(url, tmp_path)
    facts = json.loads((tmp_path / "weights.pth.json").read_text())
    assert facts == {"url": url, "version": '"one"', "size": len(CONTENT), "sha256": SHA256}
    path.write_bytes(CONTENT[:-1])
    assert "has 299999 bytes instead of 300000: remove it to download it again" in failure(
        url, tmp_path
    )


def test_a_file_of_unknown_origin_is_used_with_a_warning(site, url, tmp_path, caplog):
    """Such as one that the user has copied into the cache of a machine without network."""
    (tmp_path / "weights.pth").write_bytes(b"mine")
    assert download(url, tmp_path).read_bytes() == b"mine"
    assert "where it came from is not recorded" in caplog.text
    assert site.requests == []


@pytest.mark.parametrize("name", ["weights.pth.part", "weights.pth.part.json", "weights.pth.json"])
def test_links_in_the_cache_are_not_followed(url, tmp_path, name):
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / name).symlink_to(precious)
    assert "symbolic links" in failure(url, tmp_path / "cache")
    assert precious.read_text() == "keep me"


def test_a_pipe_in_the_cache_is_an_error_and_no_hang(url, tmp_path):
    os.mkfifo(tmp_path / "weights.pth.part")
    assert "weights.pth.part: No such device or address" in failure(url, tmp_path)


def test_plain_http_gives_a_warning_unless_a_checksum_is_known(url, tmp_path, monkeypatch, caplog):
    warning = f"{url} is not encrypted: anyone on the way can replace the file"
    download(url, tmp_path / "local")
    assert warning not in caplog.messages
    monkeypatch.setattr("irpe_core.download._THIS_MACHINE", ())
    download(url, tmp_path / "known", sha256=SHA256)
    assert warning not in caplog.messages
    for _ in range(2):
        download(url, tmp_path / "unknown")
    assert caplog.messages.count(warning) == 1


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("http://127.0.0.1/a.pth", "ftp://h/a"),
        ("http://127.0.0.1/a.pth", "file:///etc/x"),
        ("https://host/a.pth", "http://127.0.0.1/a.pth"),
    ],
)
def test_a_redirection_to_another_scheme_is_refused(source, target):
    with pytest.raises((URLError, HTTPError), match=r"which must be an https?://"):
        _Redirects().redirect_request(Request(source), io.BytesIO(), 302, "Found", {}, target)


def test_the_hash_in_a_name_of_torchvision_is_checked(site, url, tmp_path, monkeypatch):
    monkeypatch.setattr("irpe_core.download._HASHING_HOST", "127.0.0.1")
    site.files |= {f"/a-{SHA256[:8]}.pth": CONTENT, "/b-00000000.pth": CONTENT}
    assert download(site.url(f"a-{SHA256[:8]}.pth"), tmp_path).read_bytes() == CONTENT
    assert f"SHA-256 {SHA256} instead of 00000000" in failure(site.url("b-00000000.pth"), tmp_path)


def test_a_damaged_download_says_which_file_to_delete(site, url, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"delete .*weights\.pth to download it again$"):
        load_checkpoint(url)


def test_a_file_url_is_a_path(tmp_path):
    torch.save({"model": {"a": torch.ones(3)}}, tmp_path / "a b.pth")
    assert set(load_checkpoint((tmp_path / "a b.pth").as_uri())) == {"model"}
