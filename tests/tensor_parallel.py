"""One of two processes that share the weights of a target; prints whether drafted tokens are plain's, as JSON."""

import json
import os
import sys

import torch
import torch.distributed as dist
from oracle import Oracle
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from zoo import VOCAB_SIZE, make_inputs

from transformers_msd import MSDConfig, MSDDraftModel, TreeConfig


torch.set_num_threads(1)
dist.init_process_group("gloo")
target = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto").eval()
inputs = make_inputs("llama", (0, 0), lengths=(12, 9))
torch.manual_seed(1)
draft = MSDDraftModel(MSDConfig.from_target(target.config)).eval()
draft.tree_config = TreeConfig(num_nodes=12, depth=3, top_k=3, gate=False)
result = {"is_shared": any(isinstance(weight, DTensor) for weight in target.parameters()), "equal": [], "tau": []}
for do_sample in (False, True):
    settings = {"do_sample": do_sample, "max_new_tokens": 16, "return_dict_in_generate": True}
    torch.manual_seed(2)
    plain = target.generate(**inputs, **settings).sequences
    for assistant in (draft, Oracle(plain[:, inputs["input_ids"].shape[1] :], VOCAB_SIZE)):
        torch.manual_seed(2)
        drafted = target.generate(**inputs, **settings, assistant_model=assistant)
        result["equal"].append(torch.equal(drafted.sequences, plain))
        result["tau"].append(drafted.speculative_stats.mean_acceptance_length)
everywhere = [None, None]
dist.all_gather_object(everywhere, result)
if dist.get_rank() == 0:
    print("\n" + json.dumps(everywhere), flush=True)
# At once: while an interpreter winds down, gloo's threads now and then abort it, with the group destroyed or not.
os._exit(0)
