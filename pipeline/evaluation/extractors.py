"""The extractors that `evaluate.extractors` names, in the order of the report.

randconv    a random convolutional network; no training, no file
group-cls   a small classifier of the data's own groups, trained on the train split
lite2       EfficientNet-Lite2, from an installed package; a relative of the discriminator Lite0
dinov2, inception, clip    from the user's files (see pretrained.py)
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.params import ExtractorSetting
from pipeline.data.dataset import PreparedDataset
from pipeline.errors import ConfigError
from pipeline.evaluation import pretrained
from pipeline.evaluation.features import Extractor, lite2, randconv
from pipeline.evaluation.group_classifier import Unavailable, group_cls


def load_extractors(
    settings: Sequence[ExtractorSetting], dataset: PreparedDataset, device: str = "cpu"
) -> tuple[list[Extractor], list[Unavailable]]:
    """Extractors for images of the data set's resolution, in the order of `settings`, and those it cannot have.

    Raises:
        ConfigError: it can have none of them.
        InputMissing, StorageError: weights are missing, or not those of `sha256`.
    """
    loaded = [load_extractor(setting, dataset, device) for setting in settings]
    extractors = [each for each in loaded if isinstance(each, Extractor)]
    unavailable = [each for each in loaded if isinstance(each, Unavailable)]
    if not extractors:
        reasons = "; ".join(f"{each.name} {each.reason}" for each in unavailable)
        raise ConfigError("E-CFG-054", "evaluate.extractors", reasons, "add randconv")
    return extractors, unavailable


def load_extractor(
    setting: ExtractorSetting, dataset: PreparedDataset, device: str = "cpu"
) -> Extractor | Unavailable:
    """One of them; see `load_extractors`."""
    match setting.name:
        case "randconv":
            return randconv(dataset.resolution, device=device)
        case "group-cls":
            return group_cls(dataset, device)
        case "lite2":
            return lite2(dataset.resolution, device)
        case "dinov2":
            return pretrained.dinov2(setting.weights, setting.sha256, device)
        case "inception":
            return pretrained.inception(setting.weights, setting.sha256, device)
        case "clip":
            return pretrained.clip(setting.weights, setting.sha256, device)
