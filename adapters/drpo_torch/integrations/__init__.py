"""One thin module a framework: import the module of yours; none is imported here."""

from drpo_core import BehaviorPolicyWarning

__all__ = ["BehaviorPolicyWarning"]
