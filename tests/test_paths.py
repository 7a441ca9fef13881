"""Names of files that programs take for something else, and files that are not regular, through `bsq_ray.storage`."""

import errno
import os
import shutil
import stat
import subprocess
import sys
import threading

import pytest

from bsq_ray import storage

# Local names: only `scheme://` makes a URL.
NAMES = [
    "a::b.bin", "zip::x", "::", "x::s3:", "file:x", "s3:x.jpg", "memory:", "~x", "~root", "x#y?z%20",
    "with space", " leading", "trailing ", "new\nline", "tab\t", "küche 猫", "-p", "--", ".hidden", "a:b", "[1]*?{a,b}",
    "'quoted\"", "back\\slash", "$HOME", "%2e%2e", "lr=1e-4", "x" * 255, "é" * 127, "caf\udce9.bin",
]  # fmt: skip
# Keys of an object store; "" and "." are no components there, and all keys are UTF-8.
KEYS = [
    "a::b.bin", "x::s3:", "file:x", "~x", "x#y?z%20", "with space", "küche 猫", "a:b", "[1]*?{a,b}", "lr=1e-4",
    "back\\slash", "a+b&c=d", "x" * 200,
]  # fmt: skip


def check_every_function(folder, name):
    """Write, read, list, copy, open and remove one file and one folder of this name."""
    url = storage.join(folder, name)
    storage.write_bytes(url, b"first")
    storage.write_text(url, "text")
    assert storage.read_bytes(url) == b"text"
    assert storage.read_text(url) == "text"
    assert storage.list_folder(folder) == [name]
    assert storage.file_sizes(folder) == {name: 4}
    assert storage.exists(url)
    with storage.open_url(url) as file:
        file.seek(1)
        assert file.read() == b"ext"
    storage.remove(url)
    assert not storage.exists(url)
    inner = storage.join(url, "inner")
    storage.write_bytes(inner, b"inner")
    assert storage.list_folder(folder) == [name]
    storage.copy_folder(url, storage.join(folder, "copy"))
    assert storage.read_bytes(storage.join(folder, "copy", "inner")) == b"inner"
    storage.remove_folder(url)
    assert storage.list_folder(folder) == ["copy"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_local_name_is_a_file_name_in_every_function(tmp_path, monkeypatch, name):
    """Absolute and relative paths mean the same file, and nothing else is written."""
    check_every_function(str(tmp_path / "absolute"), name)
    (tmp_path / "relative").mkdir()
    monkeypatch.chdir(tmp_path / "relative")
    storage.write_bytes(name, b"data")
    assert os.listdir() == [name]
    assert storage.absolute(name) == str(tmp_path / "relative" / name)
    (tmp_path / "source").write_bytes(b"uploaded")
    storage.upload(str(tmp_path / "source"), name)
    storage.download(name, str(tmp_path / "downloaded"))
    assert (tmp_path / "downloaded").read_bytes() == b"uploaded"
    assert os.listdir() == [name]


@pytest.mark.parametrize("name", KEYS, ids=ascii)
def test_object_key_is_a_name_in_every_function(bucket, name):
    check_every_function(f"{bucket}/folder", name)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_listed_name_leads_back_to_the_file(tmp_path, name):
    """Images of any name are found by a listing and read at the URLs of the list."""
    from bsq_ray.data.file_list import list_files

    if len(os.fsencode(name)) > 200 or name.startswith("."):
        pytest.skip("too long with a suffix, or hidden")
    (tmp_path / f"{name}.png").write_bytes(b"content")
    [url] = list_files(str(tmp_path), "images", (".png",)).urls
    assert storage.read_bytes(url) == b"content"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/x", True),
        ("S3://bucket", True),
        ("gs://b", True),
        ("file:///tmp/x", True),
        ("memory://", True),
        ("hdfs+x://h", True),
        ("a::b", False),
        ("s3:/x", False),
        ("./s3://x", False),
        ("folder/s3://x", False),
        ("://x", False),
        ("1://x", False),
        ("", False),
        ("zip::s3://b", False),
    ],
)
def test_is_url_requires_scheme(text, expected):
    assert storage.is_url(text) is expected


def test_local_url_is_a_path(tmp_path):
    """`file://` names a local file, whose name is taken literally."""
    url = f"file://{tmp_path}/a::b%20"
    storage.write_bytes(url, b"data")
    assert os.listdir(tmp_path) == ["a::b%20"]
    assert storage.is_local(url)
    assert storage.absolute(url) == f"{tmp_path}/a::b%20"


@pytest.mark.parametrize("function", [storage.exists, storage.read_bytes, storage.absolute, storage.list_folder])
def test_empty_path_raises(function):
    """An unset variable does not name the working folder."""
    with pytest.raises(ValueError, match="a path is empty"):
        function("")


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.write_bytes("~/file", b"data")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("link", ["file", "folder/file", "dangling", "chain"])
def test_write_through_link_changes_its_target(tmp_path, link):
    """A link stays a link, and the file it leads to has the new content."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "target"
    if link != "dangling":
        target.write_bytes(b"previous")
    if link == "chain":
        (tmp_path / "second").symlink_to("elsewhere/target")
        (tmp_path / link).symlink_to("second")
    else:
        (tmp_path / link).symlink_to(target)
    storage.write_bytes(str(tmp_path / link), b"new")
    assert (tmp_path / link).is_symlink()
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path / "elsewhere") == ["target"]


def test_write_to_circular_link_raises(tmp_path):
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(ValueError, match="cannot write .*/link: Too many levels of symbolic links"):
        storage.write_bytes(str(tmp_path / "link"), b"data")


@pytest.mark.parametrize("path", ["/dev/null", "link"])
def test_write_to_device_leaves_the_device(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("/dev/null")
    storage.write_bytes(path, b"data")
    storage.upload(__file__, path)
    assert stat.S_ISCHR(os.stat(path).st_mode)
    assert os.listdir(tmp_path) == ["link"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make device nodes")
def test_write_to_device_node_leaves_the_node(tmp_path):
    """A node for the null device, as in a container where commands run as root."""
    try:
        os.mknod(tmp_path / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (tmp_path / "null").write_bytes(b"")
    except OSError as error:
        pytest.skip(f"device nodes are not allowed here: {error}")
    storage.write_bytes(str(tmp_path / "null"), b"data")
    assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)


def test_write_to_full_device_raises():
    with pytest.raises(ValueError, match="cannot write /dev/full: No space left on device"):
        storage.write_bytes("/dev/full", b"data")


def test_pipe_is_written_and_read(tmp_path):
    """A named pipe passes the whole content, in both directions."""
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    content = bytes(range(256)) * 1000
    for read in (storage.read_bytes, lambda url: read_opened(url, 1000)):
        writer = threading.Thread(target=storage.write_bytes, args=(pipe, content))
        writer.start()
        assert read(pipe) == content
        writer.join()
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)


def read_opened(url, offset):
    """Read a file from an offset, then its start: the order of a decoder that seeks."""
    with storage.open_url(url) as file:
        file.seek(offset)
        end = file.read()
        file.seek(0)
        return file.read(offset) + end


OUTPUT_PROGRAM = "import sys; from bsq_ray import storage; storage.write_bytes(sys.argv[1], b'data\\n')"


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/proc/thread-self/fd/1", "link"])
@pytest.mark.parametrize("redirection", ["| cat", "> out; cat out", ">> out; cat out"])
def test_standard_output_by_name_is_written_in_place(tmp_path, path, redirection):
    """Output continues where the shell's redirection is, whether that is a pipe or a file."""
    (tmp_path / "link").symlink_to("/dev/stdout")
    command = f'(echo before; {sys.executable} -c "$PROGRAM" {path}) {redirection}'
    environment = os.environ | {"PROGRAM": OUTPUT_PROGRAM}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("before\ndata\n", "")


@pytest.mark.parametrize("folder", ["/proc/{}/fd", "/proc/{0}/task/{0}/fd"])
@pytest.mark.parametrize("kind", ["pipe", "file", "link"])
def test_open_file_of_a_process_is_written_in_place(tmp_path, folder, kind):
    """The output of another process, such as /proc/1/fd/1 of a container, is neither replaced nor truncated."""
    (tmp_path / "file").write_bytes(b"before ")
    read_fd, write_fd = os.pipe() if kind != "file" else (os.open(tmp_path / "file", os.O_RDWR),) * 2
    os.write(write_fd, b"before " if kind != "file" else b"")
    path = f"{folder.format(os.getpid())}/{write_fd}"
    if kind == "link":
        (tmp_path / "link").symlink_to(path)
        path = str(tmp_path / "link")
    storage.write_bytes(path, b"data")
    assert os.read(read_fd, 100) == b"before data"
    assert sorted(os.listdir(tmp_path)) == ["file", *(["link"] if kind == "link" else [])]
    for fd in {read_fd, write_fd}:
        os.close(fd)


def test_process_substitution_is_read(tmp_path):
    program = "import sys; from bsq_ray import storage; print(storage.read_bytes(sys.argv[1]).decode())"
    for source in ("<(echo data)", "/dev/stdin < <(echo data)", "/dev/stdin <<< data"):
        command = ["bash", "-c", f'{sys.executable} -c "{program}" {source}']
        assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == "data"


def test_write_keeps_permissions(tmp_path):
    """A replaced file keeps its mode; a new one has that of the umask."""
    (tmp_path / "private").touch(0o600)
    storage.write_bytes(str(tmp_path / "private"), b"data")
    storage.write_bytes(str(tmp_path / "new"), b"data")
    (tmp_path / "plain").touch()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"private": 0o600, "new": modes["plain"], "plain": modes["plain"]}


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EROFS, errno.EACCES])
def test_file_that_cannot_be_replaced_is_written_in_place(tmp_path, monkeypatch, number):
    """A file that is a mount point, or in a folder without write permission."""

    def fail(*_):
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").write_bytes(b"previous content")
    monkeypatch.setattr(os, "replace", fail)
    storage.write_bytes(str(tmp_path / "file"), b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(ValueError, match=f"cannot write {tmp_path}/other: "):
        storage.write_bytes(str(tmp_path / "other"), b"new")
    assert os.listdir(tmp_path) == ["file"]


def test_failed_write_leaves_the_previous_file(tmp_path, monkeypatch):
    """The temporary file is removed, and the error names the file that was to be written."""
    storage.write_bytes(str(tmp_path / "file"), b"previous")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", fail)
    with pytest.raises(
        storage.StorageUnavailableError, match=f"^cannot write {tmp_path}/file: No space left on device$"
    ):
        storage.upload(__file__, str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == b"previous"
    assert os.listdir(tmp_path) == ["file"]


def test_partial_file_of_a_killed_process_is_not_listed(tmp_path):
    (tmp_path / ".0123456789abcdef.partial").touch()
    (tmp_path / "file").touch()
    assert storage.list_folder(str(tmp_path)) == ["file"]
