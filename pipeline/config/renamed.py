"""Keys and values of params.yaml that were renamed or replaced: an old name is refused with an error that
gives the new one.

Snapshots that were written before keep the old names, and still load (pipeline/models/config.py)."""

RENAMED_KEYS = {
    "sampling.lift": "sampling.handover",
    "sampling.finish": "sampling.early_exit",
    "pretrain.ema_moments": "pretrain.ema_snapshots",
    "finetune.ema_moments": "finetune.ema_snapshots",
}
# Keys that are gone, and what does their work now.
COUNTS = "promotion.precision and evaluate.max_calls"
REMOVED_KEYS = {
    "evaluate.heldout_captions": COUNTS,
    "evaluate.samples_per_caption": COUNTS,
    "evaluate.teacher_samples_per_caption": COUNTS,
    "evaluate.train_captions": COUNTS,
    "evaluate.teacher_train_captions": COUNTS,
    "refine.order": "refine.core_images (0 refines the whole at once)",
    "promotion.kid_margin": "promotion.margin_jpeg and promotion.margin_noise",
    "promotion.min_recall": "promotion.recall_margin",
    "promotion.min_coverage": "promotion.coverage_margin",
    "promotion.max_copies": "promotion.max_copy_excess",
    "threads": "threads_per_shard of the training stages in params.yaml",  # of compute profiles
}
RENAMED_GUIDES = {"no_text": "unconditional", "low": "low_band", "early": "early_weights"}
RENAMED_VALUES = {"sampling.guide": RENAMED_GUIDES}
