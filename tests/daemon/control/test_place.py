"""Where the control socket is, who may come, and what is left of it."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from troupe.daemon.control import place as place_room
from troupe.daemon.control.place import (
    MAX_PATH_BYTES,
    Peer,
    Place,
    connect,
    find_socket,
    peer_of,
    refuse_where_served,
)
from troupe.errors import OutputError
from troupe.records.layout import CONTROL_LOCK, CONTROL_POINTER, CONTROL_SOCKET, PAGE

pytestmark = pytest.mark.alone


@contextmanager
def held(folder: Path) -> Iterator[Place]:
    """The place of a folder, as long as the body lasts."""
    place = Place(folder)
    place.take()
    try:
        yield place
    finally:
        place.leave()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def long_folder(tmp_path: Path) -> Path:
    """A folder whose socket would have a longer path than any system allows."""
    folder = tmp_path / ("long" * 20) / ("name" * 20)
    folder.mkdir(parents=True)
    return folder


def point(folder: Path, path: Path | str) -> None:
    """Have a folder say where its socket is."""
    found = folder.stat()
    (folder / CONTROL_POINTER).write_text(f"{path}\n{found.st_dev}:{found.st_ino}\n")


def test_the_socket_is_there_while_the_place_is_held(tmp_path: Path) -> None:
    with held(tmp_path) as place, place.listen() as listener:
        assert find_socket(tmp_path) == tmp_path / CONTROL_SOCKET
        assert names(tmp_path) == {CONTROL_SOCKET, CONTROL_LOCK}
        mode = (tmp_path / CONTROL_SOCKET).stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
        with connect(tmp_path / CONTROL_SOCKET, 5.0) as client:
            accepted, _ = listener.accept()
            with accepted:
                assert peer_of(accepted) == Peer(uid=os.geteuid(), pid=os.getpid())
            assert client.recv(1) == b""
    place.leave()
    assert names(tmp_path) == set()
    assert find_socket(tmp_path) is None


def test_nobody_else_could_ever_have_connected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the moment of binding the socket lies in a folder that only we can enter; it moves when its mode is set."""
    seen: list[tuple[int, int]] = []
    chmod, replace = Path.chmod, Path.replace

    def watched_chmod(path: Path, mode: int) -> None:
        seen.append((stat.S_IMODE(path.parent.stat().st_mode), mode))
        assert not (tmp_path / CONTROL_SOCKET).exists()
        chmod(path, mode)

    def watched_replace(path: Path, target: Path) -> Path:
        if target.name == CONTROL_SOCKET:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            seen.append((0, 0))
        return replace(path, target)

    monkeypatch.setattr(Path, "chmod", watched_chmod)
    monkeypatch.setattr(Path, "replace", watched_replace)
    before = os.umask(0)
    try:
        place = Place(tmp_path)
        place.take()
        place.listen().close()
    finally:
        os.umask(before)
    place.leave()
    assert seen == [(0o700, 0o600), (0, 0)]


def test_what_a_dead_owner_left_gives_way(tmp_path: Path) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(os.fspath(tmp_path / CONTROL_SOCKET))
    stale.close()
    (tmp_path / ".cabcdefgh").mkdir()
    (tmp_path / ".cabcdefgh" / "s").write_text("")
    (tmp_path / PAGE).write_text("http://127.0.0.1:1/?token=of-a-page-that-is-gone")
    with held(tmp_path) as place, place.listen():
        connect(tmp_path / CONTROL_SOCKET, 5.0).close()
        assert names(tmp_path) == {CONTROL_SOCKET, CONTROL_LOCK}


def test_a_socket_that_is_another_ones_stays(tmp_path: Path) -> None:
    with held(tmp_path) as place:
        place.listen().close()
        other = socket.socket(socket.AF_UNIX)
        other.bind(os.fspath(tmp_path / "other"))
        (tmp_path / "other").replace(tmp_path / CONTROL_SOCKET)
    assert names(tmp_path) == {CONTROL_SOCKET}
    other.close()


def test_one_place_one_owner(tmp_path: Path) -> None:
    first, second = Place(tmp_path), Place(tmp_path)
    first.take()
    with pytest.raises(OutputError, match=f"process {os.getpid()}"):
        second.take()
    second.leave()
    first.leave()
    second.take()
    second.leave()


def test_the_command_that_is_named_can_be_given_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "two words"
    folder.mkdir()
    with held(folder), pytest.raises(OutputError, match=f"troupe status '{folder}'$"):
        Place(folder).take()


@pytest.mark.slow
def test_who_comes_later_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    refuse_where_served(tmp_path / "nowhere")
    refuse_where_served(tmp_path)
    with held(tmp_path):
        with pytest.raises(OutputError, match=f"is there already .process {os.getpid()}."):
            refuse_where_served(tmp_path)
        assert names(tmp_path) == {CONTROL_LOCK}
    (tmp_path / CONTROL_LOCK).write_text("{}")  # of somebody who was killed
    refuse_where_served(tmp_path)
    assert names(tmp_path) == set()


def test_a_killed_owner_holds_nothing(tmp_path: Path) -> None:
    hold = (
        "import pathlib, sys, time; from troupe.daemon.control.place import Place; "
        "p = Place(pathlib.Path(sys.argv[1])); "
        "p.take(); s = p.listen(); print('there', flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "there\n"
    with pytest.raises(OutputError, match=f"process {owner.pid}"):
        Place(tmp_path).take()
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert names(tmp_path) == {CONTROL_SOCKET, CONTROL_LOCK}
    with pytest.raises(ConnectionRefusedError):
        connect(tmp_path / CONTROL_SOCKET, 5.0)
    with held(tmp_path) as place, place.listen():
        connect(tmp_path / CONTROL_SOCKET, 5.0).close()


def test_a_long_path_has_its_socket_among_the_temporary_files(tmp_path: Path) -> None:
    folder = long_folder(tmp_path)
    with held(folder) as place, place.listen():
        path = find_socket(folder)
        assert path is not None
        assert names(folder) == {CONTROL_POINTER, CONTROL_LOCK}
        assert path.parent.parent == Path(tempfile.gettempdir())
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        connect(path, 5.0).close()
    assert not path.parent.exists()
    assert names(folder) == set()


def test_the_longest_path_that_fits_is_used(tmp_path: Path) -> None:
    room = MAX_PATH_BYTES - len(os.fsencode(tmp_path)) - len(f"//{CONTROL_SOCKET}")
    if room < 1:
        pytest.skip("the folder for temporary files has too long a path")
    folder = tmp_path / ("x" * room)
    folder.mkdir()
    with held(folder) as place, place.listen():
        assert len(os.fsencode(folder / CONTROL_SOCKET)) == MAX_PATH_BYTES
        connect(folder / CONTROL_SOCKET, 5.0).close()


def test_the_private_folder_of_a_dead_owner_goes(tmp_path: Path) -> None:
    private = Path(tempfile.mkdtemp(prefix="troupe-control-"))
    (private / CONTROL_SOCKET).write_text("")
    point(tmp_path, private / CONTROL_SOCKET)
    Place(tmp_path).take()
    assert not private.exists()
    assert names(tmp_path) == {CONTROL_LOCK}


def test_a_pointer_to_somewhere_else_removes_nothing(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    point(tmp_path, precious / CONTROL_SOCKET)
    Place(tmp_path).take()
    assert precious.is_dir()


@pytest.mark.parametrize("text", ["relative/control.sock", "/nowhere/control.sock", "\0", ""])
def test_a_pointer_that_leads_nowhere(tmp_path: Path, text: str) -> None:
    point(tmp_path, text)
    assert find_socket(tmp_path) is None
    (tmp_path / CONTROL_POINTER).write_text(text)
    assert find_socket(tmp_path) is None


def test_a_file_system_without_sockets_has_them_among_the_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen_at = Place._listen_at

    def refuse_here(place: Place, path: Path) -> socket.socket:
        if path.parent == tmp_path:
            raise PermissionError(1, "Operation not permitted")
        return listen_at(place, path)

    monkeypatch.setattr(Place, "_listen_at", refuse_here)
    with held(tmp_path) as place:
        place.listen().close()
        assert names(tmp_path) == {CONTROL_POINTER, CONTROL_LOCK}


def test_no_short_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = long_folder(tmp_path)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: os.fspath(_made(long / "t")))
    with pytest.raises(OSError, match="short enough"):
        place_room._private_folder()


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def test_a_pointer_that_cannot_be_written_leaves_no_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = long_folder(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    place = Place(folder)
    place.take()
    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(OSError, match="No space left"):
        place.listen()
    private = place._private
    place.leave()
    assert private is not None
    assert not private.exists()


def test_a_copy_of_a_folder_is_not_the_run_in_it(tmp_path: Path) -> None:
    """Whoever asks the copy must not reach the run, and whoever resumes the copy must not take its socket away."""
    folder = long_folder(tmp_path)
    with held(folder) as place, place.listen():
        copy = folder.with_name("copy" * 20)
        shutil.copytree(folder, copy)
        assert find_socket(copy) is None
        other = Place(copy)
        other.take()
        path = find_socket(folder)
        assert path is not None
        connect(path, 5.0).close()
        other.leave()
    assert not path.parent.exists()


@pytest.mark.parametrize(
    ("uid", "may"), [(None, True), (os.geteuid(), True), (0, True), (os.geteuid() + 1, os.geteuid() + 1 == 0)]
)
def test_who_may_enter(uid: int | None, may: bool) -> None:
    assert Peer(uid=uid).may_enter is may


def test_a_peer_in_words() -> None:
    assert str(Peer(uid=501, pid=7)) == "user 501 (pid 7)"
    assert str(Peer()) == "user ? (pid ?)"


class FakeSocket:
    """What a system tells of a peer."""

    def __init__(self, options: dict[tuple[int, int], bytes]) -> None:
        self._options = options

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        try:
            return self._options[level, option][:size]
        except KeyError:
            raise OSError(42, "Protocol not available") from None


@pytest.mark.parametrize(
    ("system", "options", "peer"),
    [
        ({"SO_PEERCRED": 17}, {(1, 17): struct.pack("iII", 7, 501, 20)}, Peer(uid=501, pid=7)),
        ({"SO_PEERCRED": 17}, {}, Peer()),
        ({}, {(0, 1): struct.pack("IIh16I", 0, 501, 1, *[20] * 16), (0, 2): struct.pack("i", 7)}, Peer(uid=501, pid=7)),
        ({}, {(0, 1): b"short"}, Peer()),
        ({}, {}, Peer()),
    ],
    ids=["linux", "linux, refused", "macos", "macos, odd", "none"],
)
def test_who_it_is_as_systems_tell(
    monkeypatch: pytest.MonkeyPatch, system: dict[str, int], options: dict[tuple[int, int], bytes], peer: Peer
) -> None:
    monkeypatch.setattr(place_room, "socket", SimpleNamespace(SOL_SOCKET=1, **system))
    told: Any = FakeSocket(options)
    assert peer_of(told) == peer
