"""One of two processes that train a draft beside a sharded target; prints what it saw as JSON."""

import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from transformers_msd.trainer import AcceptanceLengthCallback, MSDTrainer
from transformers_msd.trainer.parallel import shard_target
from transformers_msd.trainer.recipe import hold_out, load_rows, load_target, make_draft
from transformers_msd.trainer.run import make_parser


arguments, args = make_parser().parse_dict(json.loads(sys.argv[1]))
target, processor = load_target(arguments)
rows, prompts = hold_out(load_rows(arguments, is_multimodal=True), arguments.num_eval_prompts, args.seed)
torch.manual_seed(args.seed)
draft = make_draft(arguments, target.config)
device = args.device  # joins the process group
target = shard_target(target.requires_grad_(False), mesh=init_device_mesh(device.type, (dist.get_world_size(),)))
text_model = [*target.get_decoder().parameters(), *target.get_output_embeddings().parameters()]
types = sorted({type(parameter).__name__ for parameter in text_model})
trainer = MSDTrainer(
    model=draft, target=target, args=args, train_dataset=rows, processing_class=processor, eval_dataset=prompts
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
measured = AcceptanceLengthCallback(trainer, prompts, max_new_tokens=8).measure()
if dist.get_rank() == 0:
    result = {"losses": losses, "parameter_types": types, "acceptance_length": measured["eval_acceptance_length"]}
    print("\n" + json.dumps(result), flush=True)
dist.destroy_process_group()
