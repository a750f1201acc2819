"""``python -m drpo_core.cli`` is the command `drpo`."""

from drpo_core.cli import main

main()
