"""Batches side by side: in order, on a core each, and with the threads of before at the end."""

import threading
from collections.abc import Iterator

import pytest
import torch

from pipeline.evaluation.cores import side_by_side


@pytest.fixture
def four_threads() -> Iterator[None]:
    """A process that may use four threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("tasks", "threads"), [(4, 1), (2, 2), (1, 4)])
def test_tasks_meet_and_share_the_threads(four_threads: None, tasks: int, threads: int) -> None:
    barrier = threading.Barrier(tasks, timeout=60)

    def work(number: int) -> tuple[int, int]:
        barrier.wait()  # all at once, or never
        return number, torch.get_num_threads()

    assert list(side_by_side(work, range(tasks))) == [(number, threads) for number in range(tasks)]
    assert torch.get_num_threads() == 4


def test_an_error_ends_the_rest_and_leaves_the_threads_of_before(four_threads: None) -> None:
    begun = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 1:
            raise ValueError("no")
        return number

    with pytest.raises(ValueError, match="no"):
        list(side_by_side(work, range(1000)))
    assert len(begun) < 1000 and torch.get_num_threads() == 4


def test_with_a_gpu_they_come_one_after_the_other(
    four_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    here = threading.get_ident()
    assert (
        list(side_by_side(lambda _: (threading.get_ident(), torch.get_num_threads()), [1, 2]))
        == [(here, 4)] * 2
    )
