"""Does it hold up? The comparison of the DRPO paper in miniature: see docs/study/index.md."""
