"""The subcommands of `python -m sana_core`, one a file: `add_parser` declares it, the function it runs follows."""
