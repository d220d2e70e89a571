"""Where a stage runs: in this process, on local Ray, or as a job of a Ray cluster."""
