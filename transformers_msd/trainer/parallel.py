"""The frozen target over several devices."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
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
    Move a frozen target to where it runs: sharded by [`shard_target`] under FSDP2 and ZeRO-3, else whole on every
    device.

    Raises:
        ValueError: Under FSDP 1, or if DeepSpeed has sharded the target already.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if accelerator.state.deepspeed_plugin.zero_stage < 3:
            return target.to(accelerator.device)
        if not all(parameter.numel() for parameter in target.parameters()):
            raise ValueError(
                "The target must come whole, got weights that ZeRO-3 sharded as they were loaded. Load it before the "
                "training arguments are made, or call `transformers.integrations.unset_hf_deepspeed_config()` first."
            )
        # ZeRO-3 would gather a vision tower in processes that have pictures only, and the others would wait for ever.
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        return shard_target(target.to(accelerator.device), mesh=mesh)
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
    # Accelerate leaves alone what an earlier trainer prepared, wherever it was moved since.
    if target.device != accelerator.device and not getattr(target, "hf_device_map", None):
        target = target.to(accelerator.device)
    return accelerator.prepare_model(target, evaluation_mode=True)
