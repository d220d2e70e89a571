"""Decoders: what their items may do to them, and that nothing of them is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from deeds import act, count_together

from pipeline.errors import BadData, ConfigError
from pipeline.prepare import decoder
from pipeline.prepare.decoder import Decoder
from pipeline.prepare.limits import USUAL, Limits

ROOT = Path(__file__).resolve().parents[2]


def tasks(*contents):
    return [(content.encode(), f"raw/{number}.png") for number, content in enumerate(contents)]


def alive(pid):
    """Whether a process runs; one that ended but is not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.fixture(scope="module")
def acting():
    with Decoder(act, processes=2, seconds=0.3, megabytes=256) as opened:
        yield opened


def test_results_come_in_order(acting) -> None:
    words = [f"word {number}" for number in range(100)]
    assert list(acting.map(tasks(*words))) == [word.upper() for word in words]
    assert list(acting.map([])) == []


def test_what_work_refuses_is_the_result_of_its_item(acting) -> None:
    good, bad, after = list(acting.map(tasks("a", "refuse", "b")))
    assert (good, after) == ("A", "B")
    assert isinstance(bad, BadData) and (bad.code, bad.where) == ("E-IMG-005", "raw/1.png")


@pytest.mark.parametrize(
    ("deed", "code", "says"),
    [
        ("segfault", "E-IMG-008", "SIGSEGV"),
        ("exit", "E-IMG-008", "status 3"),
        ("spin", "E-IMG-009", "0.3 s"),
        ("sleep", "E-IMG-009", "0.3 s"),
        ("hog", "E-IMG-010", "256 MB"),
    ],
)
def test_an_item_that_kills_hangs_or_gorges_is_lost_alone(acting, monkeypatch, deed, code, says) -> None:
    monkeypatch.setattr(decoder, "CHUNK", 2)
    *before, lost, after = list(acting.map(tasks("a", "b", "c", deed, "d")))
    assert (before, after) == (["A", "B", "C"], "D")
    assert isinstance(lost, BadData) and lost.code == code and lost.where == "raw/3.png"
    assert says in str(lost) and " Fix: " in str(lost) and len(str(lost).splitlines()) == 1


def test_several_deaths_cost_no_more_than_their_items(acting) -> None:
    results = list(acting.map(tasks(*(["a", "exit", "b", "c"] * 4))))
    assert [result.code if isinstance(result, BadData) else result for result in results] == [
        "A", "E-IMG-008", "B", "C",
    ] * 4  # fmt: skip


def test_what_was_sent_together_is_finished_together_but_for_what_was_refused(monkeypatch) -> None:
    monkeypatch.setattr(decoder, "CHUNK", 3)
    with Decoder(act, processes=1, finish=count_together) as opened:
        results = list(opened.map(tasks("a", "refuse", "b", "c", "fatal", "d")))
    assert [result.code if isinstance(result, BadData) else result for result in results] == [
        ("A", 2), "E-IMG-005", ("B", 2), ("C", 1), "E-IMG-008", ("D", 1),
    ]  # fmt: skip


def test_a_bug_in_the_work_comes_through_and_leaves_the_decoder_usable(acting) -> None:
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(acting.map(tasks("a", "bug")))
    with pytest.raises(ConfigError):
        list(acting.map(tasks("other")))
    assert list(acting.map(tasks("a"))) == ["A"]


def test_empty_and_oversized_files_are_not_even_sent(acting, monkeypatch) -> None:
    monkeypatch.setattr(acting, "_limits", Limits(max_bytes=4))
    results = list(acting.map(tasks("good", "", "oversized", "fine")))
    assert [getattr(result, "code", result) for result in results] == [
        "GOOD", "E-IMG-001", "E-IMG-002", "FINE",
    ]  # fmt: skip


def test_decoders_are_confined(acting) -> None:
    assert list(acting.map(tasks("limits"))) == [(0, decoder.OPEN_FILES, True, 1)]


def test_chunks_are_bounded_in_number_and_bytes(monkeypatch) -> None:
    monkeypatch.setattr(decoder, "CHUNK", 3)
    monkeypatch.setattr(decoder, "CHUNK_BYTES", 10)
    sizes = [1, 1, 1, 1, 9, 2, 20, 1]
    chunks = list(decoder._chunks([(bytes(size), "") for size in sizes], USUAL))
    assert [[len(content) for content, _ in chunk] for chunk in chunks] == [[1, 1, 1], [1, 9], [2], [20], [1]]
    assert list(decoder._chunks([], USUAL)) == []


def test_a_decoder_killed_while_idle_is_replaced() -> None:
    with Decoder(act, processes=1) as opened:
        (pid,) = opened.map(tasks("pid"))
        os.kill(pid, signal.SIGKILL)
        assert wait_for(lambda: not alive(pid))
        time.sleep(0.5)  # pebble looks every 0.1 s
        assert list(opened.map(tasks("a"))) == ["A"]


def test_no_process_is_left_after_the_end_or_an_exception() -> None:
    with Decoder(act, processes=2) as opened:
        pids = set(opened.map(tasks(*["pid"] * 64)))
    assert wait_for(lambda: not any(map(alive, pids)), 5)
    with pytest.raises(KeyboardInterrupt):
        with Decoder(act, processes=1) as opened:
            (pid,) = opened.map(tasks("pid"))
            raise KeyboardInterrupt
    assert wait_for(lambda: not alive(pid), 5)


def test_decoders_die_with_a_parent_that_is_killed() -> None:
    code = (
        "from pipeline.prepare.decoder import Decoder\n"
        "from deeds import act\n"
        "decoder = Decoder(act, processes=1)\n"
        "print(*decoder.map([(b'pid', 'a')]), flush=True)\n"
        "list(decoder.map([(b'spin', 'a')] * 100))\n"
    )
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=os.environ | paths, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    assert wait_for(lambda: not alive(pid))
