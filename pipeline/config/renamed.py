"""Keys and values of params.yaml that were renamed: an old name is refused with an error that gives the new one.

Snapshots that were written before keep the old names, and still load (pipeline/models/config.py)."""

RENAMED_KEYS = {
    "sampling.lift": "sampling.handover",
    "sampling.finish": "sampling.early_exit",
    "pretrain.ema_moments": "pretrain.ema_snapshots",
    "finetune.ema_moments": "finetune.ema_snapshots",
}
RENAMED_GUIDES = {"no_text": "unconditional", "low": "low_band", "early": "early_weights"}
RENAMED_VALUES = {"sampling.guide": RENAMED_GUIDES}
