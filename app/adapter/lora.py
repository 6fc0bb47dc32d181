"""PEFT's description of the adapter."""

from __future__ import annotations

from peft import LoraConfig

from app.config import ModelSettings


def lora_config(settings: ModelSettings) -> LoraConfig:
    """PEFT's description of the adapter, as it stands in ``adapter_config.json``."""
    return LoraConfig(
        r=settings.lora.r,
        lora_alpha=settings.lora.alpha,
        lora_dropout=settings.lora.dropout,
        target_modules=list(settings.lora.modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=settings.name,
    )
