"""Drafts that say all levels of a tree in one forward: DFlash (arXiv 2602.06036), JetSpec (arXiv 2606.18394)."""
