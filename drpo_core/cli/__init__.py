"""The command `drpo`. Without the extra `cli` it says how to install it; this package then still imports."""

import sys
from typing import TYPE_CHECKING

from drpo_core.cli.usage import stop

if TYPE_CHECKING:
    import typer

__all__ = ["main"]

EXTRA = ("matplotlib", "pyarrow", "rich", "safetensors", "typer")


def main() -> None:
    """Run `drpo`: exit code 0, or 2 and one line on stderr if the input is bad."""
    for stream in (sys.stdout, sys.stderr):
        # a terminal that has no π gets a question mark, not a traceback
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        app()()
    except ModuleNotFoundError as missing:
        library = (missing.name or "").partition(".")[0]
        if library not in EXTRA:
            raise
        stop(f"drpo: {library} is not installed: pip install 'drpo-core[cli]'")


def app() -> "typer.Typer":
    """Make the application with its commands."""
    import typer  # noqa: PLC0415 - of the extra `cli`

    from drpo_core.cli import audit, check  # noqa: PLC0415 - they need typer and rich, of the extra `cli`

    commands = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    @commands.callback()
    def drpo() -> None:
        """Policy-loss math for off-policy RL of language models."""

    commands.command("audit")(audit.audit_command)
    commands.command("check")(check.check_command)
    return commands
