"""One of two processes that train by recipes, beside whole targets and sharded ones; prints what it saw as JSON."""

import json
import sys

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from transformers_msd.trainer import run
from transformers_msd.trainer.parallel import shard_target


load_whole, types = run.load_target, set()


def load_sharded(arguments):
    target, processor = load_whole(arguments)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    target = shard_target(target.requires_grad_(False), mesh=mesh)
    text_model = [*target.get_decoder().parameters(), *target.get_output_embeddings().parameters()]
    types.update(type(parameter).__name__ for parameter in text_model)
    return target, processor


recipes, results = json.loads(sys.argv[1]), {}
for name, recipe in recipes.items():
    run.load_target = load_sharded if name.startswith("sharded") else load_whole
    types.clear()
    history = run.train(*run.make_parser().parse_dict(recipe)).state.log_history
    lengths = [entry["eval_acceptance_length"] for entry in history if "eval_acceptance_length" in entry]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    results[name] = {"losses": losses, "parameter_types": sorted(types), "acceptance_lengths": lengths}
if dist.get_rank() == 0:
    print("\n" + json.dumps(results), flush=True)
dist.destroy_process_group()
