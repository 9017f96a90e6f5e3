"""The frozen target over several devices."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel


def shard_target(target: PreTrainedModel, **fsdp_kwargs: Any) -> PreTrainedModel:
    """
    Shard a frozen target in place with FSDP2.

    Its text layers are units of their own. So are its embeddings and its head, because drafting calls them on their
    own; they stay gathered from the first call to [`reshard`], since processes call them a different number of times.
    All else, such as a vision tower, stays whole on every device: a process whose rows have no pictures never calls
    it, and the others would wait. So does a weight that embeddings and head share, since units can't.

    Args:
        target (`PreTrainedModel`):
            Model to shard.
        fsdp_kwargs (`dict[str, Any]`, *optional*):
            Arguments of [`~torch.distributed.fsdp.fully_shard`], such as `mesh`.
    """
    embeddings, head, decoder = target.get_input_embeddings(), target.get_output_embeddings(), target.get_decoder()
    whole = set(target.parameters()) - set(decoder.parameters()) - set(head.parameters())
    units = [embeddings, head]
    if head.weight is embeddings.weight:
        whole.add(head.weight)
        units = []
    fsdp_kwargs["ignored_params"] = whole
    for unit in units:
        fully_shard(unit, **fsdp_kwargs | {"reshard_after_forward": False})
    for layer in decoder.layers:
        fully_shard(layer, **fsdp_kwargs)
    return fully_shard(target, **fsdp_kwargs)


def reshard(*modules: nn.Module) -> None:
    """Shard modules that stayed gathered; those that are not sharded are left alone."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()


def prepare_target(target: nn.Module, accelerator: Accelerator) -> nn.Module:
    """
    Move a frozen target to where it runs: sharded under FSDP2, else whole on every device.

    Raises:
        ValueError: Under FSDP 1 and DeepSpeed's ZeRO-3.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        if stage == 3:
            raise ValueError(
                "DeepSpeed's ZeRO-3 is not supported yet: it gathers a vision tower in processes that have pictures "
                "only, and the others would wait for ever. Use FSDP2 to shard the target, or ZeRO-2 to keep it whole."
            )
        return target.to(accelerator.device)
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(f"FSDP must be of version 2, got {plugin.fsdp_version}. Set `fsdp_version: 2`.")
        mesh = accelerator.torch_device_mesh
        return shard_target(
            target.to(accelerator.device),
            mesh=mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)] if mesh is not None else None,
            reshard_after_forward=plugin.reshard_after_forward,
            mp_policy=plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        )
    return accelerator.prepare_model(target, evaluation_mode=True)
