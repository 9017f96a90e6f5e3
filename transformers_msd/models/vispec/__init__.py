"""Drafts that read a picture as a few learned rows: ViSpec (arXiv 2509.15235)."""
