"""`python -m stages.prepare`: from the source of images to data/prepared, with reports and quarantine."""

import sys
import time
from pathlib import Path

from pipeline.config.params import load_params
from pipeline.errors import run_main
from pipeline.launch import execution
from pipeline.launch.stage import open_stage
from pipeline.prepare import intake, prepare

LINE_SECONDS = 15.0  # Between lines where there is no terminal.


class ProgressLine:
    """What is done, images a second and time left: one rewritten line on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self.what = ""
        self.started = self.printed = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Hear that `done` of `total` are done."""
        now, live, last = time.monotonic(), sys.stderr.isatty(), done == total
        if what != self.what:
            self.what, self.started, self.printed = what, now, now
        if not last and now - self.printed < (0.2 if live else LINE_SECONDS):
            return
        self.printed = now
        rate = done / max(now - self.started, 1e-3)
        left = "" if last or not done else f", {(total - done) / rate:.0f} s left"
        speed = f", {rate:.0f}/s" if total > 1 and done else ""
        line = f"prepare: {what} {done}/{total}{speed}{left}"
        print(
            f"\r\033[K{line}" if live else line,
            end="\n" if last or not live else "",
            file=sys.stderr,
            flush=True,
        )


def main() -> None:
    """Prepare the data, or say in one line why not."""
    params = load_params()
    with open_stage("prepare", params) as stage:
        processes = execution.cpu_count() if stage.profile.workers == 0 else 1
        work = stage.run_dir.parent / "cache"
        metrics = prepare.prepare(params, stage.root, work, stage.spread, processes, ProgressLine())
        counts = metrics["counts"]
        stage.log_metrics({name: float(value) for name, value in counts.items()})
        stage.tracker.set_tags({"crescendo.validation": prepare.validation_digest(stage.root)})
        stage.log_artifact(Path(intake.REPORTS))
    left_out = f"{counts['n_quarantined']} quarantined, {counts['n_duplicate']} duplicates"
    parts = ", ".join(f"{counts[name]} {name}" for name in ("train", "val", "test"))
    print(f"prepare: {counts['n_ok']} of {counts['n_in']} images ({parts}; {left_out})", file=sys.stderr)
    print(f"prepare: look at {intake.DATA_DOCS}/index.html", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
