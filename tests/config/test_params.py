"""params.yaml: everything unknown or contradictory is refused in one line, with a fix."""

import copy
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.params import Params, load_params, parse_params
from pipeline.config.renamed import RENAMED_KEYS, RENAMED_VALUES
from pipeline.errors import ConfigError, PipelineError
from tests.conftest import ROOT

TEXT = (ROOT / "params.yaml").read_text()
TREE = load_params(ROOT / "params.yaml").model_dump(mode="json")
CORE, PASSES = TREE["core"]["resolution"], len(TREE["refine"]["passes"])


def changed(key, value):
    """The tree of params.yaml with one dotted key set (or, with ..., removed)."""
    tree = copy.deepcopy(TREE)
    *parents, last = key.split(".")
    section = tree
    for name in parents:
        section = section[name]
    if value is ...:
        del section[last]
    else:
        section[last] = value
    return tree


def refusal(tree):
    with pytest.raises(ConfigError) as caught:
        parse_params(tree)
    line = str(caught.value)
    assert len(line.splitlines()) == 1 and ". Fix: " in line
    return line


def test_the_shipped_params_are_valid_and_every_line_of_them_is_short() -> None:
    assert isinstance(load_params(ROOT / "params.yaml"), Params)
    assert max(map(len, TEXT.splitlines())) <= 110


def test_params_survive_json_and_pickle() -> None:
    params = parse_params(TREE)
    assert parse_params(params.model_dump(mode="json")) == params == pickle.loads(pickle.dumps(params))


def test_params_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_params(TREE).finetune.lr = 1.0


def test_a_misspelt_key_gets_a_suggestion() -> None:
    tree = changed("finetune.lrr", 0.1)
    assert refusal(tree) == "E-CFG-001 params.yaml: finetune.lrr: unknown key. Fix: did you mean 'lr'?"
    assert "did you mean 'finetune'?" in refusal(changed("finetun", {}))


def test_a_misspelt_key_is_reported_before_the_missing_one() -> None:
    tree = changed("finetune.lr", ...)
    tree["finetune"]["lrr"] = 0.1
    assert "did you mean 'lr'?" in refusal(tree)
    del tree["finetune"]["lrr"]
    assert refusal(tree).startswith("E-CFG-003 params.yaml: finetune.lr: missing key")


def test_an_integer_may_stand_for_a_float_but_no_text_or_boolean_for_a_number() -> None:
    assert parse_params(changed("pretrain.lr", 1)).pretrain.lr == 1.0
    assert "E-CFG-002 params.yaml: pretrain.lr" in refusal(changed("pretrain.lr", "0.1"))
    assert "E-CFG-002 params.yaml: seed" in refusal(changed("seed", True))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seed", -1, "-1 is not valid"),
        ("pretrain.lr", 0.0, "greater than 0"),
        ("pretrain.lr", float("nan"), "finite"),
        ("pretrain.lr", float("inf"), "finite"),
        ("pretrain.batch_size", 0, "greater than or equal to 1"),
        ("pretrain.shards", 7, "params.yaml: pretrain.shards: batch_size"),
        ("pretrain.log_images", 33, "pretrain.log_images: 33 is not a multiple of batch_size"),
        ("refine.check_images", 9, "refine.check_images: 9 is not a multiple of batch_size"),
        ("core.resolution", 24, "core.resolution: 24 is not a power of two"),
        ("data.resolution", CORE, f"data.resolution: {CORE} is not core.resolution ({CORE}) doubled once"),
        ("core.attention", [5], "core.attention: 5 is not a feature map size of this network"),
        ("core.channel_mult", [1] * 9, "core.channel_mult: 9 levels are too many"),
        ("core.kernels", "all", "core.kernels: 'all' is not valid"),
        ("core.kernels", True, "core.kernels: True is not valid"),
        ("regions.probability", 1.5, "regions.probability: 1.5 is not valid"),
        ("regions.maps", "oracle", "regions.maps: 'oracle' is not valid"),
        ("regions.maps", "bridge", "regions.maps: 'bridge' has no effect without probability above 0"),
        ("data.background", [255, 255], "data.background: needs 3 numbers"),
        ("data.background", [255, 255, 256], "data.background[2]"),
        (
            "data.source",
            "openmoji",
            "data.source: 'openmoji' is unknown. Fix: write folder, archive, parquet,",
        ),
        ("shell.channels", 32, "shell.channels: 32 is not valid"),
        (
            "shell.channels",
            [32, 16, 8],
            "shell.channels: needs 2 numbers, one for each octave from core.resolution",
        ),
        ("shell.patch", [1, 2, 4], "shell.patch: needs 2 numbers, one for each octave"),
        ("shell.patch", [3], "shell.patch[0]: 3 is not valid"),
        ("refine.noise_starts", 1.5, "refine.noise_starts: 1.5 is not valid"),
        ("refine.discriminators", ["pixel"], "refine.discriminators[0]"),
        ("sampling.handover", [8.0, 4.0, 2.0], "sampling.handover: needs 2 numbers, one for each octave"),
        ("sampling.handover", 0.0, "sampling.handover[0]: 0.0 is not valid"),
        ("finetune.order", "sideways", "finetune.order: 'sideways' is not valid"),
        ("finetune.core", "thawed", "finetune.core: 'thawed' is not valid"),
        (
            "finetune.init_from",
            "models:/a@b",
            "init_from: 'models:/a@b' does not name a fixed version of a model. Fix: run `cr",
        ),
        ("finetune.init_from", "models:/a/2", "finetune.init_sha256: is empty, models:/a/2 needs the digest"),
        ("finetune.init_sha256", "0" * 64, "finetune.init_sha256: models/core takes none. Fix: write ''"),
        ("finetune.init_sha256", "0", "finetune.init_sha256: '0' is not valid"),
        (
            "evaluate.baseline",
            "models:/a@b",
            "evaluate.baseline: 'models:/a@b' does not name a fixed version of a model. Fix: run `crescendo pin -",
        ),
        ("evaluate.baseline", "models/refined", "evaluate.baseline: 'models/refined' does not name a fixed"),
        (
            "evaluate.baseline",
            "models:/a/2",
            "evaluate.baseline_sha256: is empty, models:/a/2 needs the digest",
        ),
        ("evaluate.baseline_passes", 2, "evaluate.baseline_passes: has no effect without baseline"),
        ("evaluate.baseline_sha256", "0" * 64, "evaluate.baseline_sha256: has no effect without baseline"),
        ("evaluate.baseline_sha256", "0", "evaluate.baseline_sha256: '0' is not valid"),
        (
            "evaluate.training_spread",
            [{"rule": "recall", "half_widths": [0.1]}],
            "evaluate.training_spread: recall needs a number for each of num_passes",
        ),
        ("finetune.degrade.jpeg", [90, 30], "finetune.degrade.jpeg: needs two qualities"),
        ("finetune.degrade.jpeg", [30, 101], "finetune.degrade.jpeg[1]"),
        ("finetune.degrade.blur", 1.0, "finetune.degrade: has no effect without"),
        ("refine.passes", [1, 1], "refine.passes: an entry is given twice"),
        ("refine.passes", [3], "refine.passes[0]"),
        ("refine.pass_probs", [0.0] * PASSES, "refine.pass_probs: the sum is 0, must be 1"),
        ("data.split", {"train": 0.7, "val": 0.1, "test": 0.1}, "data.split: the sum is 0.9, must be 1"),
        ("data.split.val", 0.0, "data.split.val: 0.0 is not valid"),
        ("refine.pass_probs", [], f"refine.pass_probs: needs {PASSES} numbers"),
        ("refine.discriminators", [], "refine.discriminators"),
        ("sampling.guidance_interval", [5.0, 0.3], "sampling.guidance_interval: needs two numbers"),
        ("pretrain.ema_snapshots", -1, "pretrain.ema_snapshots: -1 is not valid"),
        ("sampling.guide", "early_weights", "sampling.guide: 'early_weights' needs pretrain.early_images"),
        ("sampling.sampler", "adaptive", "sampling.sampler: 'adaptive' needs regions.probability above 0"),
        (
            "pretrain.early_images",
            10**9,
            "pretrain.early_images: 1000000000 is more than pretrain.num_images",
        ),
        ("promotion.name", "a/b", "promotion.name"),
        ("core", [], "core"),
        ("data", None, "data"),
    ],
)
def test_values_out_of_range_or_in_conflict_are_refused(key, value, words) -> None:
    assert words in refusal(changed(key, value))


def test_a_handover_is_one_number_or_one_an_octave() -> None:
    tree = changed("data.resolution", 4 * CORE)
    tree["shell"]["channels"] = [32, 16]
    for handover, kept in ((8, (8,)), ([8.0], (8.0,)), ([8.0, 4.0], (8.0, 4.0))):
        tree["sampling"]["handover"] = handover
        assert parse_params(tree).sampling.handover == kept


def test_bridges_and_the_training_of_upscaling_exclude_each_other() -> None:
    tree = changed("regions", {"probability": 0.5, "maps": "bridge"})
    assert parse_params(tree).regions.maps == "bridge"
    tree["finetune"]["upscale_probability"] = 0.2
    assert "regions.maps: 'bridge' cannot be combined with finetune.upscale_probability" in refusal(tree)


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_a_renamed_key_is_refused_with_its_new_name(old, new) -> None:
    section, key = new.split(".")
    tree = changed(old, TREE[section][key])
    assert refusal(tree) == f"E-CFG-001 params.yaml: {old}: was renamed. Fix: write {new}"
    del tree[section][key]  # as in a file that was written before
    assert refusal(tree) == f"E-CFG-001 params.yaml: {old}: was renamed. Fix: write {new}"


@pytest.mark.parametrize(("old", "new"), RENAMED_VALUES["sampling.guide"].items())
def test_a_renamed_guide_is_refused_with_its_new_name(old, new) -> None:
    assert refusal(changed("sampling.guide", old)).endswith(
        f"sampling.guide: {old!r} was renamed. Fix: write {new}"
    )


def test_the_adaptive_sampler_is_guided_by_captions_only() -> None:
    tree = changed("sampling.sampler", "adaptive")
    tree["sampling"]["guide"] = "low_band"
    assert (
        "sampling.guide: 'low_band' cannot guide the adaptive sampler. Fix: write unconditional"
        in refusal(tree)
    )


def test_the_adaptive_sampler_has_no_early_exit() -> None:
    tree = changed("sampling.sampler", "adaptive")
    tree["sampling"]["early_exit"] = True
    assert "sampling.early_exit: has no effect on the adaptive sampler. Fix: write false" in refusal(tree)


def test_snapshots_are_judged_at_most_once_an_update() -> None:
    assert parse_params(changed("evaluate.watch_images.refine", 0)).evaluate.watch_images.refine == 0
    problem = "evaluate.watch_images.refine: 4 is less than refine.batch_size (8). Fix: raise it, or write 0"
    assert problem in refusal(changed("evaluate.watch_images.refine", 4))


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers())
)
KEYS = [f"{section}.{key}" for section, keys in TREE.items() if isinstance(keys, dict) for key in keys]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([*KEYS, *TREE]), VALUES)
def test_any_value_of_any_key_is_accepted_or_refused_in_one_line(key, value) -> None:
    try:
        parse_params(changed(key, value))
    except PipelineError as exc:
        assert exc.exit_status == 78 and len(str(exc).splitlines()) == 1
