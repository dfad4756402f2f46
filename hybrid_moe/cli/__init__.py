"""The `hybrid-moe` command. One file per subcommand; heavy imports happen inside them."""

from hybrid_moe.cli.app import app, main

__all__ = ["app", "main"]
