"""The stages of a version's dvc.yaml: which of them make its model, what they read, and what of theirs is
compared."""

from __future__ import annotations

from graphlib import TopologicalSorter
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.launch.fingerprint import entry_paths, is_code, read_stages
from pipeline.registry.provenance import VERDICT


class Graph:
    """Of the project in `root`, which makes `model`."""

    def __init__(self, root: Path, model: str) -> None:
        stages = read_stages(root)
        deps = {name: entry_paths(section.get("deps", [])) for name, section in stages.items()}
        self.model = model
        self.inputs = {name: [path for path in paths if not is_code(path)] for name, paths in deps.items()}
        self.outputs = {name: entry_paths(section.get("outs", [])) for name, section in stages.items()}

    def maker(self, path: str) -> str | None:
        """The stage that makes a path; None for what a user brings."""
        for stage, outputs in self.outputs.items():
            if any(Path(path).is_relative_to(output) for output in outputs):
                return stage
        return None

    def chosen(self, only: str | None) -> list[str]:
        """The stages to run, in order: those that lead to the model, or one of all.

        Raises ConfigError for an unknown one, or where none makes the model."""
        if only is not None:
            if only not in self.outputs:
                fix = f"choose from {', '.join(self.outputs)}"
                raise ConfigError("E-CFG-160", "--only", f"{only!r} is no stage of this version", fix)
            return [only]
        last = self.maker(self.model)
        if last is None:
            fix = "reproduce a version that a stage of dvc.yaml made"
            raise ConfigError("E-CFG-161", "dvc.yaml", f"no stage makes {self.model}", fix)
        before: dict[str, set[str]] = {}
        waiting = [last]
        while waiting:
            stage = waiting.pop()
            makers = {maker for path in self.inputs[stage] if (maker := self.maker(path))}
            waiting += makers - before.keys()
            before[stage] = makers
        return list(TopologicalSorter(before).static_order())

    def brought(self, stages: list[str]) -> list[str]:
        """What these stages read and none of them makes."""
        paths = [path for stage in stages for path in self.inputs[stage]]
        return [path for path in dict.fromkeys(paths) if self.maker(path) not in stages]

    def compared(self, stage: str) -> list[str]:
        """Outputs whose bits matter: what other stages read, the model, and the verdict. The others are
        reports."""
        read = {path for inputs in self.inputs.values() for path in inputs} | {self.model, VERDICT}
        return [path for path in self.outputs[stage] if path in read]
