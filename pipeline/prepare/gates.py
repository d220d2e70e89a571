"""What ends the prepare stage before it writes anything: too much that is unusable, too little that is left, or
data that a critical expectation refuses."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.config.params import Data
from pipeline.errors import BadData, InputMissing
from pipeline.prepare import photos
from pipeline.prepare.intake import DATA_DOCS, PREPARED, Inspection
from pipeline.prepare.sources.links import OUTSIDE, roots_in_words
from pipeline.prepare.splits import hardly_judged, shortage
from pipeline.prepare.validation import Report


def require_items(inspection: Inspection, data: Data, report: str) -> None:
    """Raise BadData if a link leads outside, no image is usable, or a larger part than `max_bad_fraction` is not;
    InputMissing if a plug-in is missing. `report` is the file that lists what is wrong."""
    items = inspection.items
    counts = items.counts()
    bad, total = counts["n_quarantined"], counts["n_in"]
    _links(inspection, data, report)
    _plugins(inspection, data)
    if items.ok and bad <= data.max_bad_fraction * total:
        return
    first, fix = "", f"see {report}"
    if items.quarantined and (problem := items.quarantined[0].problem):
        alike = sum(
            each.problem is not None and each.problem.code == problem.code for each in items.quarantined
        )
        first = f", {alike} by {problem.code}, such as {problem.where}, which {problem.problem}"
        fix = f"{problem.fix}; {report} lists all"
    if not items.ok:
        raise BadData("E-DAT-002", data.source, f"none of {total} images is usable{first}", fix)
    problem_text = (
        f"{bad} of {total} images are unusable, max_bad_fraction is {data.max_bad_fraction:g}{first}"
    )
    raise BadData("E-DAT-001", data.source, problem_text, fix)


def _links(inspection: Inspection, data: Data, report: str) -> None:
    """Raise BadData E-DAT-004 if links lead to where they may not: what they hold would be missing in silence."""
    links = [item for item in inspection.items.quarantined if item.problem and item.problem.code == OUTSIDE]
    problems = [item.problem for item in links if item.problem]
    problems += [note for note in inspection.notes if note.code == OUTSIDE]
    if problems:
        first, count = problems[0], len(problems) - 1
        more = f", and {count} more lead outside" if count else ""
        fix = f"{roots_in_words([item.item.version for item in links]) or first.fix}; {report} lists all"
        raise BadData("E-DAT-004", data.source, f"{first.where} {first.problem}{more}", fix)


def require_splits(inspection: Inspection, data: Data, log: Callable[[str], None]) -> None:
    """Raise BadData for too few images or families for the later stages; log where a verdict needs more."""
    missing = shortage(*inspection.split_sizes(captioned=False), data.split.model_dump())
    if missing:
        problem, fix = missing
        doubles = len(inspection.items.duplicates)
        also = f"; {doubles} more are exact duplicates" if doubles else ""
        raise BadData("E-DAT-005", data.source, problem + also, fix)
    if warning := hardly_judged(*inspection.split_sizes(captioned=True)):
        log(warning)


def _plugins(inspection: Inspection, data: Data) -> None:
    """Raise InputMissing E-INP-069 if images lack a plug-in: what is used must not depend on the machine."""
    problems = [item.problem for item in inspection.items.quarantined if item.problem]
    if names := [problem.where for problem in problems if problem.code == photos.NO_PLUGIN]:
        problem = f"{len(names)} images need the extra photos ({photos.counted(names)}), such as {names[0]}"
        raise InputMissing("E-INP-069", data.source, problem, f"{photos.INSTALL}, or export them as JPEG")


def require_valid(report: Report) -> None:
    """Raise BadData if a critical expectation failed."""
    failed = report.failed("critical")
    if failed:
        first = failed[0]
        others = f", and {len(failed) - 1} more expectations failed" if len(failed) > 1 else ""
        problem = f"{first.failure}{others}"
        raise BadData("E-DAT-003", PREPARED, problem, f"open {DATA_DOCS}/index.html and repair the data")
