"""The draft model of MSD (arXiv 2505.14260)."""
