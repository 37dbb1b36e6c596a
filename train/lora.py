"""Adds low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) with the package peft, and merges them."""

from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

if TYPE_CHECKING:
    from train.config import LoraConfig

M = TypeVar("M", bound=nn.Module)


def add_adapters(model: M, config: "LoraConfig") -> M:
    """Adds adapters to the linear layers that `config.targets` names, and freezes all other weights; returns `model`.

    Raises ValueError if peft is not installed, or a target names no linear layer of the model.
    """
    peft = _peft()
    maps = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for target in config.targets:
        if target not in maps:
            raise ValueError(
                f"lora.targets: {target!r} is no linear map of this model; known: {', '.join(sorted(maps))}"
            )
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(config.targets)
    )
    peft.inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    return model


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora_" in name


def merge_adapters(model: M) -> M:
    """Adds each adapter's product to the weight that it adapts, and removes the adapters; returns `model`."""
    from peft.tuners.lora import LoraLayer

    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for name, module in adapted:
        layer: Any = module
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    return model


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError:
        raise ValueError("lora.rank: adapters need the package peft: pip install 'attnzoo[hf]'") from None
    return peft
