"""The frozen target over several devices."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel


def shard_target(target: PreTrainedModel, **fsdp_kwargs) -> PreTrainedModel:
    """
    Shard a frozen target in place with FSDP2.

    Its embeddings and its head are units of their own, because drafting calls them on their own. A weight they share
    stays whole on every device: units can't share.

    Args:
        target (`PreTrainedModel`):
            Model to shard.
        fsdp_kwargs (`dict[str, Any]`, *optional*):
            Arguments of [`~torch.distributed.fsdp.fully_shard`], such as `mesh`.
    """
    embeddings, head = target.get_input_embeddings(), target.get_output_embeddings()
    names = set(target._no_split_modules or ())
    layers = [module for module in target.modules() if type(module).__name__ in names]
    if head.weight is embeddings.weight:
        fsdp_kwargs["ignored_params"] = {*fsdp_kwargs.get("ignored_params", ()), head.weight}
        units = layers
    else:
        units = [embeddings, head, *layers]
    for unit in units:
        fully_shard(unit, **fsdp_kwargs)
    return fully_shard(target, **fsdp_kwargs)


def prepare_target(target: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Move a frozen target to where it runs, sharded as the draft is under FSDP2 and DeepSpeed's ZeRO-3."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from trl.models import prepare_deepspeed

        return prepare_deepspeed(target, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(f"FSDP {plugin.fsdp_version} is not supported. Set `fsdp_version: 2`.")
        mesh = accelerator.torch_device_mesh
        return shard_target(
            target,
            mesh=mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)] if mesh is not None else None,
            reshard_after_forward=plugin.reshard_after_forward,
            mp_policy=plugin.mixed_precision_policy or torch.distributed.fsdp.MixedPrecisionPolicy(),
        )
    return accelerator.prepare_model(target, evaluation_mode=True)
