"""Finds log π, log μ, A and the mask among the arrays of a file, by the names that frameworks give them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from drpo_core.audit.readers.base import RolloutError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from drpo_core.audit.readers.base import Stored

__all__ = ["ADVANTAGES", "BEHAVIOR", "MASK", "OLD", "Names", "choose", "normal"]

# names used by drpo_core, verl, TRL, SkyRL, prime-rl, NeMo-RL, AReaL, slime, ROLL, tinker and tunix
POLICY = (
    "log_prob", "log_probs", "logprob", "logprobs", "logps", "policy_log_prob", "policy_log_probs", "policy_logprobs",
    "current_log_probs", "current_logprobs", "new_log_probs", "new_logprobs", "per_token_logps", "per_token_logprobs",
    "trainer_log_probs", "trainer_logprobs", "training_logprobs", "train_log_probs", "target_logprobs",
)  # fmt: skip
BEHAVIOR = (
    "behavior_log_prob", "behavior_log_probs", "behavior_logprobs", "behaviour_log_prob", "behaviour_log_probs",
    "behaviour_logprobs", "behave_logprobs", "rollout_log_prob", "rollout_log_probs", "rollout_logprobs",
    "inference_log_probs", "inference_logprobs", "infer_log_probs", "infer_logprobs", "sampling_log_probs",
    "sampling_logprobs", "sampling_per_token_logps", "sampler_log_probs", "sampler_logprobs", "sample_log_prob",
    "generation_logprobs", "vllm_logprobs", "mu_log_prob",
)  # fmt: skip
# the trainer's own log-probs at the start of the step: μ if the file has nothing better, else π before any update
OLD = ("old_log_prob", "old_log_probs", "old_logprobs", "old_per_token_logps", "prev_logprobs", "proximal_logprobs")
ADVANTAGES = ("advantages", "advantage", "adv", "advs", "token_advantages")
MASK = (
    "mask", "masks", "response_mask", "completion_mask", "loss_mask", "loss_masks", "action_mask", "token_mask", "valid_mask",
)  # fmt: skip


class Names:
    """Finds the arrays of a file by names that are given or guessed."""

    def __init__(self, arrays: Mapping[str, Stored]) -> None:
        self.arrays = arrays

    def find(self, what: str, flag: str, given: str | None, *guesses: tuple[str, ...]) -> str:
        """Return the array of the given name, else the only one with a name of the first group of guesses that has any."""
        name = self.find_optional(what, flag, given, *guesses)
        if name is None:
            self.fail(f"no array found for the {what}; name it with {flag}")
        return name

    def find_optional(self, what: str, flag: str, given: str | None, *guesses: tuple[str, ...]) -> str | None:
        """Return what `find` returns, or None if nothing fits."""
        if given is not None:
            if given not in self.arrays:
                self.fail(f"no array {given!r} ({flag})")
            return given
        for group in guesses:
            hits = [name for name in self.arrays if normal(name) in group]
            if len(hits) > 1:
                self.fail(f"{' and '.join(map(repr, hits))} could each be the {what}; name one with {flag}")
            if hits:
                return hits[0]
        return None

    def find_snapshots(self, given: str | None, *, taken: str) -> dict[str, str]:
        """Return the array of log π of each snapshot; a single array is its own snapshot."""
        what, flag = "training policy's log-probs", "--log-prob"
        free = {name: stored for name, stored in self.arrays.items() if name != taken}
        if given is not None and given in self.arrays:
            return {given: given}
        stems = POLICY if given is None else (given,)
        exact = Names(free).find_optional(what, flag, None, stems)
        several = {
            name[len(stem) + 1 :]: name
            for name in free
            for stem in stems
            if name != exact and (name if given else normal(name)).startswith(f"{stem}_") and len(name) > len(stem) + 1
        }
        if several:
            return ({exact: exact} if exact else {}) | several
        if given is not None:
            self.fail(f"no array {given!r} and none named {given}_<snapshot> ({flag})")
        if exact:
            return {exact: exact}
        old = self.find(what, flag, None, tuple(name for name in OLD if name != normal(taken)))
        return {old: old}

    def fail(self, problem: str) -> NoReturn:
        """Raise the problem and list what the file has."""
        listing = "; ".join(f"{name} {stored}" for name, stored in self.arrays.items()) or "nothing"
        msg = f"{problem}. The file has: {listing}"
        raise RolloutError(msg)


def normal(name: str) -> str:
    """Lower-case the name and replace hyphens."""
    return name.lower().replace("-", "_")


def choose(found: dict[str, str], wanted: Sequence[str]) -> dict[str, str]:
    """Keep the wanted snapshots, given by their own name or by their array's."""
    by_array = {array: name for name, array in found.items()}
    chosen = {}
    for given in wanted:
        name = by_array.get(given, given)
        if name not in found:
            msg = f"no snapshot {given!r} (--snapshot); the file has: {', '.join(found)}"
            raise RolloutError(msg)
        chosen[name] = found[name]
    return chosen or found
