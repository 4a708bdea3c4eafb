"""How the command line shows its options: help without empty defaults, errors of one line."""

import argparse


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that names the defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str:
        is_switch = action.nargs == 0
        says_nothing = is_switch or action.default in (None, "", [])
        return action.help if says_nothing else super()._get_help_string(action)


class CommandParser(argparse.ArgumentParser):
    """A parser with that help. Subparsers are of its class, and so alike."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"formatter_class": DefaultsFormatter, **kwargs})

    def error(self, message: str):
        """One line as for every other error, and not the usage of 30 lines before it; the exit status stays 2."""
        self.exit(2, f"error: {message}. See {self.prog} --help\n")
