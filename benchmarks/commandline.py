"""Command-line options of the benchmarks: numbers that are checked, and errors of one line."""

from __future__ import annotations

import argparse


class Parser(argparse.ArgumentParser):
    """Without abbreviations; a wrong option gives one line instead of argparse's usage."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message.rstrip('.')}; see --help\n")


def positive(kind: type):
    """A converter to a number of this type, int or float, above 0 and finite."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive {name}")
        return value

    return convert
