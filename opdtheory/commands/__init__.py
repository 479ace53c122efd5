"""The subcommands of `opdtheory`, one module each."""
