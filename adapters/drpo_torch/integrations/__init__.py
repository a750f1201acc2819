"""One thin module a framework: import the module of yours; none is imported here."""

__all__ = ["BehaviorPolicyWarning"]


class BehaviorPolicyWarning(UserWarning):
    """The log-probs that anchor the trust region are not known to be those of the policy that sampled the tokens."""
