"""Several views of a prompt draft in one batch (IbED; TABED, arXiv 2601.20357)."""
