"""A bounded cache: the least recently used give way, each file is fetched once, and no part passes for a file."""

import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from pipeline.data.cache import Cache


def write(size: int, path: Path) -> None:
    path.write_bytes(bytes(size))


def put(cache: Cache, name: str, size: int = 10) -> Path:
    return cache.path(name, size, lambda path: write(size, path))


def held(cache: Cache) -> list[str]:
    files = (path for path in cache.folder.rglob("*") if path.is_file() and path.name != "cache.lock")
    return sorted(path.relative_to(cache.folder).as_posix() for path in files)


def age(path: Path, seconds: int) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.mark.parametrize(("keep", "left"), [(0, ["b/2", "c"]), (3, ["a/1", "b/2", "c"])])
def test_what_was_not_used_for_longest_makes_room(tmp_path: Path, keep: int, left: list[str]) -> None:
    cache = Cache(tmp_path, 25, keep)
    age(put(cache, "a/1"), 5)
    age(put(cache, "b/2"), 9)
    assert held(cache) == ["a/1", "b/2"]
    put(cache, "b/2")  # is there, and the newest now
    put(cache, "c")
    assert held(cache) == left


def test_a_file_that_is_larger_than_the_bound_leaves_nothing_else(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 25)
    put(cache, "a")
    assert put(cache, "large", 100).stat().st_size == 100
    assert held(cache) == ["large"]


def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 25)

    def fail(path: Path) -> None:
        write(3, path)
        raise OSError("cut")

    with pytest.raises(OSError, match="cut"):
        cache.path("a", 10, fail)
    assert held(cache) == []


def hang(cache: Cache, started: Event) -> None:
    def fetch(path: Path) -> None:
        write(3, path)
        started.set()
        time.sleep(60)

    cache.path("a", 10, fetch)


def count(cache: Cache, fetched: Path) -> None:
    def fetch(path: Path) -> None:
        with open(fetched, "a") as file:
            file.write("x")
        time.sleep(0.05)
        write(10, path)

    assert cache.path("a", 10, fetch).stat().st_size == 10


def test_a_killed_process_leaves_a_part_that_is_no_file_and_of_several_one_fetches(tmp_path: Path) -> None:
    cache, context = Cache(tmp_path / "cache", 25), multiprocessing.get_context("fork")
    started = context.Event()
    victim = context.Process(target=hang, args=(cache, started))
    victim.start()
    assert started.wait(30)
    put(cache, "b"), put(cache, "c")
    assert held(cache) == ["a.10.part", "c"], "what is on its way counts, and stays"
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    crowd = [context.Process(target=count, args=(cache, tmp_path / "fetched")) for _ in range(4)]
    for each in crowd:
        each.start()
    for each in crowd:
        each.join()
    assert [each.exitcode for each in crowd] == [0] * 4
    assert (tmp_path / "fetched").read_text() == "x"
    assert "a" in held(cache) and "a.10.part" not in held(cache)


def test_the_part_of_a_dead_process_makes_room(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 25)
    write(3, tmp_path / "old.20.part")
    age(tmp_path / "old.20.part", 100)
    put(cache, "a")
    assert held(cache) == ["a"]
