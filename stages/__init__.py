"""The stages of dvc.yaml, each run by `python -m stages.<name>`."""
