"""What rounds cost, the trees that pay most by it, and where measured costs are kept: numbers only."""
