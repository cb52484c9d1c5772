"""The smallest plans that exercise everything: two or three stages of phantoms, seconds on one core."""

from __future__ import annotations

from invcoss_common.config import Plan, parse_plan


def tiny_plan(modalities: tuple[str, ...] = ("xray", "ct"), **changes: object) -> Plan:
    """A plan with one site a modality, 12 phantoms each, 3 training and 3 inversion steps."""
    values: dict[str, object] = {
        "name": "tiny",
        "size": "nano",
        "seed": 3,
        "threads": 1,
        "train": {"steps": 3, "batch_size": 4},
        "inversion": {"pool_size": 4, "steps": 3, "batch_size": 2, "width": 16, "images_per_generator": 2},
        "relay": {"poll_s": 0.02, "stall_timeout_s": 120.0},
        "stages": [{"site": f"{name}-site", "modality": name} for name in modalities],
        "simulation": {f"{name}-site": {"phantoms": 12} for name in modalities},
    }
    return parse_plan({**values, **changes}, "tiny plan")
