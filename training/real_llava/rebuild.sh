#!/usr/bin/env bash
# Make the real LLaVA and all its drafts again, in a night of two CPU cores. What is there already is kept, and a
# training that was broken off goes on.
#
#   PROMPTS=folder training/real_llava/rebuild.sh conversations.jsonl [language model]
set -euo pipefail
texts=${1:?must be a JSONL file of conversations, as training/real_llava/README.md says}
prompts=${PROMPTS:?must be a folder of mt_bench.jsonl, gsm8k.jsonl and the other prompts to measure on}
language_model=${2:-HuggingFaceTB/SmolLM2-135M-Instruct}
cd "$(dirname "$0")/../.."
ls "$prompts" > /dev/null # or is told here, and not after a night
work=/tmp/real_llava # as the recipes have it
here=training/real_llava

if [ ! -e $work/target/config.json ]; then
    python -m training.real_llava.build --language_model "$language_model" --texts "$texts" --output $work/target
fi
[ -e $work/rows ] || python -m training.real_llava.rows unpack --texts "$texts" --target $work/target --output $work/rows
[ -e $work/first_layers ] ||
    python -m training.real_llava.first_layers --target $work/target --output $work/first_layers
for draft in msd_8k draft_vlm msd eagle3_8k eagle3 block_8k; do
    resume=$(compgen -G "$work/$draft/checkpoint-*" > /dev/null && echo --resume_from_checkpoint true || true)
    # shellcheck disable=SC2086
    [ -e $work/$draft/config.json ] || transformers-msd train --config $here/$draft.yaml $resume
done
# Text that others wrote, too: what English takes.
[ -e $work/rows_long ] || python -m training.real_llava.rows unpack --texts "$texts" --target $work/target \
    --num_conversations 5600 --output $work/rows_long
[ -e $work/msd_8k_long/config.json ] || transformers-msd train --config $here/msd_8k.yaml --datasets $work/rows_long \
    --output_dir $work/msd_8k_long --max_steps 1000
python -m training.real_llava.measure --target $work/target \
    --drafts $work/msd $work/msd_8k $work/draft_vlm $work/eagle3 $work/eagle3_8k $work/block_8k --prompts "$prompts"
