"""`python -m transformers_msd.cli`: the command under `accelerate launch -m`."""

from transformers_msd.cli import main


main()
