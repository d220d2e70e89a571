"""No file ends the program: the hostile corpus, and mutants of the valid part of it.

CRESCENDO_MUTANTS=10000 asks for more mutants than the usual 200.
"""

import os
import re
from collections import Counter
from functools import partial

import numpy as np
import pytest
from deeds import weigh
from hostile import BACKGROUND, RESOLUTION, cases
from mutate import mutant

from pipeline.errors import BadData
from pipeline.prepare.decoder import Decoder
from pipeline.prepare.framing import DecodedImage, Framing

MUTANTS = int(os.environ.get("CRESCENDO_MUTANTS", "200"))
MEGABYTES = 512
BATCH = 500
SEED = 0
WORK = partial(weigh, framing=Framing(RESOLUTION, "crop", BACKGROUND))


def is_one_line(error, where):
    """Whether an error reads as errors must."""
    line = str(error)
    shape = rf"E-IMG-0(0[1-9]|10|1[5-8]) {re.escape(where)}: .+\. Fix: .+"
    return bool(re.fullmatch(shape, line)) and line.isprintable() and len(line) < 400


@pytest.fixture(scope="module")
def corpus():
    return cases(SEED)


@pytest.fixture(scope="module")
def decoder():
    with Decoder(WORK, processes=2, megabytes=MEGABYTES) as opened:
        yield opened


@pytest.fixture(scope="module")
def outcomes(decoder, corpus):
    return list(decoder.map([(case.content, f"raw/{case.name}") for case in corpus]))


def test_the_corpus_is_large_distinct_and_the_same_every_time(corpus) -> None:
    assert len(corpus) >= 400
    assert len({case.name for case in corpus}) == len(corpus)
    assert [case.content for case in cases(SEED)] == [case.content for case in corpus]


def test_every_case_ends_as_it_must(corpus, outcomes) -> None:
    wrong = []
    for case, outcome in zip(corpus, outcomes, strict=True):
        if isinstance(outcome, BadData):
            right = case.expect != "ok" and is_one_line(outcome, f"raw/{case.name}")
            right = right and outcome.code in (case.codes or (outcome.code,))
        else:
            right = case.expect != "bad" and case.check(outcome[0])
        if not right:
            wrong.append((case.name, case.expect, str(outcome)[:300]))
    assert not wrong


def test_no_case_takes_more_memory_than_it_may(corpus, outcomes) -> None:
    """Beyond a decoder that has framed only small pictures."""
    with Decoder(WORK, processes=1, megabytes=MEGABYTES) as fresh:
        ((_, least),) = fresh.map([(case.content, case.name) for case in corpus if case.name == "8x8.jpeg"])
    most = max(outcome[1] for outcome in outcomes if not isinstance(outcome, BadData))
    assert most - least <= MEGABYTES


def test_files_that_are_no_pixel_images_are_refused_by_their_format_alone(corpus, monkeypatch) -> None:
    """Neither they nor what they name are opened."""
    opened = []
    monkeypatch.setattr("builtins.open", lambda *names, **how: opened.append(names))
    monkeypatch.setattr("subprocess.Popen", lambda *names, **how: opened.append(names))
    for case in corpus:
        if case.codes == ("E-IMG-003",):
            with pytest.raises(BadData):
                WORK(case.content, case.name)
    assert not opened


def test_mutants_become_pictures_or_one_line(corpus, decoder, capsys) -> None:
    valid = [case.content for case in corpus if case.expect == "ok" and len(case.content) < 20_000]
    counts = Counter()
    for first in range(0, MUTANTS, BATCH):
        names = [f"raw/{number}.png" for number in range(first, min(first + BATCH, MUTANTS))]
        tasks = [(mutant(valid, SEED, first + row), name) for row, name in enumerate(names)]
        for (content, name), outcome in zip(tasks, decoder.map(tasks), strict=True):
            if isinstance(outcome, BadData):
                assert is_one_line(outcome, name), (outcome, content[:64])
                counts[outcome.code] += 1
            else:
                pixels = outcome[0].pixels
                assert isinstance(outcome[0], DecodedImage) and pixels.dtype == np.uint8
                assert pixels.shape == (RESOLUTION, RESOLUTION, 3)
                counts["picture"] += 1
    with capsys.disabled():
        print(f"\n{MUTANTS} mutants: {dict(sorted(counts.items()))}")
    assert counts.total() == MUTANTS
    assert counts["picture"] and counts["E-IMG-005"]


def test_the_same_number_is_the_same_mutant() -> None:
    files = [b"one" * 20, b"two" * 30]
    assert [mutant(files, 3, number) for number in range(50)] == [mutant(files, 3, n) for n in range(50)]
    assert len({mutant(files, 3, number) for number in range(50)}) > 40
    assert mutant(files, 4, 0) != mutant(files, 3, 0)
    assert isinstance(mutant([b""], 0, 1), bytes)
