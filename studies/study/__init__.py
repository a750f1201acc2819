"""The comparison of the DRPO paper in miniature; docs/study/index.md has its results."""
