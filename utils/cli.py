"""Errors in one line, arguments, words and tables.

Look here to see why a message reads as it does.
"""
import argparse
import math
import os
import sys
import textwrap
import unicodedata


class UserError(Exception):
    """What the user can mend: shown as one line. Bugs keep their traceback."""

    def __init__(self, text, status=None):
        super().__init__(text)
        self.status = status or (2 if text.startswith("--") else 1)       # 2 as argparse has it


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors, defaults in --help, and no abbreviated flags."""

    class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            nothing = action.default is None or action.nargs == 0         # a flag without a value
            return action.help if nothing else super()._get_help_string(action)

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=self.Help, **kwargs)

    def error(self, message):
        if os.environ.get("RANK", "0") == "0":                # the other processes read the same
            print(f"{self.prog}: error: {one_line(message, 400)} (--help lists the flags)",
                  file=sys.stderr)
        raise SystemExit(2)


def number(kind, low=-math.inf, high=None):
    """An argparse type: an int or a float from low to high (by default 10^9, or 10^38)."""
    high = high or (10 ** 9 if kind is int else 1e38)

    def parse(text):
        value = kind(text)
        if not low <= value <= high:                          # nor is NaN
            bound = f"{high} or less" if value > high else f"{low} or more"
            raise argparse.ArgumentTypeError(f"must be {bound}, not {one_line(text, 30)}")
        return value
    parse.__name__ = kind.__name__                            # argparse says "invalid int value"
    return parse


def add_flags(parser, table):
    """A flag for each row of settings.py's table: (name, value, what may be given, same, help).

    A text starts a group, None ends those that have a flag.
    """
    for row in table:
        if isinstance(row, str):
            group = parser.add_argument_group(row)
        elif row is None:
            break
        else:
            name, value, given, _, what = row
            flag, more = f"--{name.replace('_', '-')}", {"dest": name, "help": what}
            if given is bool and value:
                flag, more["action"] = f"--no-{name}", "store_false"
            elif given is bool:
                more["action"] = argparse.BooleanOptionalAction if value is None else "store_true"
            elif isinstance(given, list):
                more |= {"type": given[0], "nargs": "+"}
            elif callable(given):
                more["type"] = given
            else:
                more["choices"] = given
            if name == "steps":                               # or epochs, the next row
                length = group.add_mutually_exclusive_group()
            (length if name in ("steps", "epochs") else group).add_argument(flag, **more)


def fits(value, given):
    """Is it something that could have been given? given: as in settings.py's table."""
    if given is bool:
        return isinstance(value, bool)
    if isinstance(given, list):
        return isinstance(value, (list, tuple)) and all(fits(v, given[0]) for v in value)
    if not callable(given):
        return value in given
    try:
        return given(str(value)) == value
    except (ValueError, argparse.ArgumentTypeError):
        return False


def printable(text):
    """Names come from files: nothing in them may steer a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def one_line(error, most=150):
    return printable(" ".join(str(error).split())[:most])


def size_text(n):
    """Bytes, in words."""
    power = min(3, max(1, (len(str(int(n))) - 1) // 3))
    return f"{n / 1000 ** power:,.1f} {' kMG'[power]}B"


def same_letters(name):
    """Composed, as keyboards write it; Macs write file names decomposed."""
    return unicodedata.normalize("NFC", name)


def same_names(a, b):
    return list(map(same_letters, a)) == list(map(same_letters, b))


def table_text(rows, formats=None):
    """Rows (dicts with the same keys) -> an aligned Markdown table. None is an empty cell.

    formats: key -> format of its numbers; by default up to three decimals, fewer for large ones.
    """
    columns = []
    for key in rows[0]:
        values = [row[key] for row in rows]
        largest = max((abs(v) for v in values if isinstance(v, float)), default=0)
        decimals = f".{(largest < 1e4) + (largest < 100) + (largest < 1)}f"
        float_format = (formats or {}).get(key, decimals)
        cells = ["" if v is None else v if isinstance(v, str) else
                 format(v, float_format if isinstance(v, float) else ",") for v in values]
        width, left = max(map(len, [key, *cells])), isinstance(values[0], str)
        cells = [key, "-" * width if left else "-" * (width - 1) + ":", *cells]
        columns.append([cell.ljust(width) if left else cell.rjust(width) for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns))


def class_numbers(wanted, classes):
    """Names or numbers of classes -> their labels. A name wins; what could be both is an error."""
    labels, classes = [], [same_letters(name) for name in classes]
    numbered = any(name.isdecimal() for name in classes)      # then a number is a name
    for name in map(same_letters, wanted):
        alike = [c for c in classes if name.isdecimal() and c.isdecimal() and int(c) == int(name)]
        if name in classes:
            labels.append(classes.index(name))
        elif alike:
            raise UserError(f"--classes {name}: is it the name {alike[0]}, or the number of "
                            f"{classes[int(name) % len(classes)]}? Write the name")
        elif name.isdecimal() and not numbered and len(name) < 10 and int(name) < len(classes):
            labels.append(int(name))
        else:
            shown = ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
            raise UserError(f"--classes {one_line(name, 30)}: there is no such class; there are "
                            f"{len(classes)}: {shown}")
    return labels


def words(recipe):
    """A recipe in a line, with the first digits of its sums."""
    def word(value):
        if isinstance(value, dict):
            return f"({words(value)})"
        return one_line(value, 16 if len(str(value)) == 64 else 200)
    return ", ".join(f"{one_line(key, 50).replace('_', ' ')} {word(value)}"
                     for key, value in recipe.items())


def recipe_text(texts):
    """{name: text} -> a paragraph each, names on the left; and an empty line."""
    return "\n".join(textwrap.fill(text, 100, initial_indent=f"{name:<10}", break_on_hyphens=False,
                                   subsequent_indent=" " * 10, break_long_words=False)
                     for name, text in texts.items()) + "\n"


def log_line(step, line):
    """The line of a logged step, in words. Its losses are those that the method has."""
    others = ("step", "epoch", "loss_by_angle", "grad_norm", "lr", "images_per_s", "waiting",
              "memory_gb")
    angles = " ".join("-" if value is None else f"{value:.1f}"
                      for value in line.get("loss_by_angle", ()))
    return (f"step {step} " +
            " ".join(f"{name} {value:.2f}" for name, value in line.items() if name not in others) +
            f" | by angle 0-22-45-68-90 deg: {angles}" * bool(angles) +
            f" | gradient {line['grad_norm']:.1f}, {line['images_per_s']:.0f} images/s, "
            f"waiting {100 * line['waiting']:.1f}%" +
            (f", {line['memory_gb']:.1f} GB" if line["memory_gb"] else ""))       # or unknown
