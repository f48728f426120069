"""Colours and markers of all figures: those of Okabe and Ito, told apart by colour-blind eyes."""

YELLOW, DARK_YELLOW = "#F0E442", "#8F8600"  # letters in plain yellow are not legible on white
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", YELLOW, "#000000")
LINE_COLOURS = (*(colour for colour in COLOURS if colour != YELLOW), "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
