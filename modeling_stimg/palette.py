"""Colours and markers of all figures, told apart by colour-blind eyes.

Okabe and Ito's eight, then, for slides with more domains, Paul Tol's "muted" and "light" schemes.
"""

YELLOW, DARK_YELLOW = "#F0E442", "#8F8600"  # letters in plain yellow are not legible on white
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", YELLOW, "#000000")
LINE_COLOURS = (*(colour for colour in COLOURS if colour != YELLOW), "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_MUTED = ("#332288", "#882255", "#44AA99", "#999933", "#AA4499", "#117733", "#DDCC77", "#CC6677", "#88CCEE")
_LIGHT = ("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#44BB99", "#BBCC33", "#AAAA00")
CLASS_COLOURS = (*COLOURS, *_MUTED, *_LIGHT)
NO_CLASS = "#E0E0E0"


def class_colours(number: int) -> list[str]:
    """A colour, "#RRGGBB", for each of `number` classes; from the 26th on they repeat."""
    return [CLASS_COLOURS[i % len(CLASS_COLOURS)] for i in range(number)]
