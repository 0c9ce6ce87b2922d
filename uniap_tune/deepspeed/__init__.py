"""Planning behind DeepSpeed's own command: ``deepspeed --autotune uniap train.py …``.

``import uniap_tune.deepspeed`` loads neither DeepSpeed nor torch; only what runs inside a training process or in the
check's own process does.

>>> from uniap_tune.deepspeed import pipeline_module
>>> module = pipeline_module(layers, plan="autotuning_results/plan.json", loss_fn=loss)   # doctest: +SKIP
"""

from __future__ import annotations

from uniap_tune.deepspeed.pipeline import patch_pipeline_module, pipeline_module

__all__ = ["patch_pipeline_module", "pipeline_module"]
