"""`python -m stages.job RUN_DIR`: the part of a stage that runs on a cluster."""

import sys
from pathlib import Path

from pipeline.errors import run_main
from pipeline.launch import jobs


def main() -> None:
    """Train as RUN_DIR/job.json describes."""
    jobs.run_job(Path(sys.argv[1]))


if __name__ == "__main__":
    run_main(main)
