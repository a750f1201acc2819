"""Seeded batches as arrays, for losses of frameworks; they need NumPy alone."""

import numpy as np

ROWS, WIDTH = 16, 9


def batch(seed=0, *, drift=0.2, mismatch=0.05):
    """Arrays by the names of our arguments: |log π − log π_old| is about `drift`, |log π_old − log μ| about `mismatch`."""
    random = np.random.default_rng(seed)
    behavior = -np.exp(random.normal(size=(ROWS, WIDTH)))

    def near(log_prob, scale):
        return np.minimum(log_prob + scale * random.normal(size=log_prob.shape), -1e-3)

    proximal = near(behavior, mismatch)
    log_prob = near(proximal, drift)
    advantages = np.repeat(random.normal(size=(ROWS, 1)), WIDTH, axis=1)
    advantages[2] = 0.0
    lengths = np.concatenate(([1, WIDTH], random.integers(1, WIDTH + 1, size=ROWS - 2)))
    return {
        "log_prob": log_prob,
        "behavior_log_prob": behavior,
        "proximal_log_prob": proximal,
        "reference_log_prob": near(log_prob, 0.3),
        "advantages": advantages,
        "mask": np.arange(WIDTH) < lengths[:, None],
    }
