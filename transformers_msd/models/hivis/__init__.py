"""Drafts that see no picture: HiViS (arXiv 2509.23928)."""
