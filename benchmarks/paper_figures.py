"""What the paper prints, row by row: MACs (headed "TFLOPs"; they are tera-MACs of one guided sample), quality and latency."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Printed:
    """One row of a table.

    Attributes:
        model: whose MACs; a key of ``paper_models.MODELS``.
        steps: NFE of the row.
        tmacs: the figure with the digits it is printed with.
        full_steps: TokenCache's #Full: Table I; the text for Open-Sora-Plan; PixArt-α "used the same hyperparameters as DiT at
            256×256". 0 for other methods.
        last_k, ratio: K and r of the row.
    """

    table: str
    model: str
    method: str
    steps: int
    tmacs: str
    full_steps: int = 0
    last_k: int = 4
    ratio: float = 0.9


def _table(table: str, model: str, *rows: tuple[str, int, str], full: dict[int, int] | None = None) -> tuple[Printed, ...]:
    """Rows (method, NFE, figure) of one model; ``full``: #Full of TokenCache by NFE. K is 2 for 250 steps."""
    known = full or {}
    return tuple(Printed(table, model, m, n, t, known.get(n, 0) if m == "Ours" else 0, 2 if n == 250 else 4) for m, n, t in rows)


TABLES: tuple[Printed, ...] = (
    *_table(
        "II",
        "DiT-XL/2 256²",
        ("DiT-XL/2", 250, "59.34"),
        ("DiT-XL/2", 125, "29.67"),
        ("DiT-XL/2", 84, "19.94"),
        ("FORA", 250, "20.02"),
        ("ToCa", 250, "19.11"),
        ("Ours", 250, "19.70"),
        ("DiT-XL/2", 50, "11.86"),
        ("DiT-XL/2", 26, "6.17"),
        ("DiT-XL/2", 21, "4.98"),
        ("FORA", 50, "4.99"),
        ("Learning-to-Cache", 50, "5.94"),
        ("ToCa", 50, "5.27"),
        ("Ours", 50, "4.94"),
        ("DiT-XL/2", 20, "4.74"),
        ("DiT-XL/2", 14, "3.32"),
        ("DiT-XL/2", 12, "2.84"),
        ("Learning-to-Cache", 20, "2.78"),
        ("ToCa", 20, "2.76"),
        ("Ours", 20, "2.74"),
        ("DiT-XL/2", 10, "2.37"),
        ("DiT-XL/2", 8, "1.89"),
        ("DiT-XL/2", 7, "1.66"),
        ("ToCa", 10, "1.71"),
        ("Ours", 10, "1.64"),
        full={250: 50, 50: 12, 20: 9, 10: 6},
    ),
    *_table(
        "II",
        "DiT-XL/2 512²",
        ("DiT-XL/2", 50, "52.48"),
        ("DiT-XL/2", 28, "29.38"),
        ("Learning-to-Cache", 50, "31.17"),
        ("ToCa", 50, "28.86"),
        ("Ours", 50, "28.89"),
        ("DiT-XL/2", 20, "20.99"),
        ("DiT-XL/2", 12, "12.59"),
        ("Learning-to-Cache", 20, "14.25"),
        ("ToCa", 20, "13.57"),
        ("Ours", 20, "12.86"),
        full={50: 21, 20: 10},
    ),
    *_table(
        "III",
        "PixArt-α 256²",
        ("PixArt-α", 20, "5.74"),
        ("PixArt-α", 12, "3.44"),
        ("FORA", 20, "3.15"),
        ("ToCa", 20, "2.96"),
        ("Ours", 20, "2.95"),
        full={20: 9},
    ),
    *_table(
        "IV",
        "PixArt-α 1024²",
        ("PixArt-α", 50, "324.86"),
        ("PixArt-α", 25, "162.43"),
        ("FORA", 50, "168.93"),
        ("ToCa", 50, "165.37"),
        ("Ours", 50, "164.86"),
        full={50: 12},
    ),
    *_table(
        "V",
        "Open-Sora-Plan",
        ("Open-Sora-Plan", 50, "1717.49"),
        ("Open-Sora-Plan", 25, "858.74"),
        ("FORA", 50, "790.10"),
        ("ToCa", 50, "764.60"),
        ("Ours", 50, "743.51"),
        full={50: 18},
    ),
    *(
        Printed("VII", "DiT-XL/2 256²", "Ours", 50, tmacs, 12, ratio=ratio)
        for ratio, tmacs in ((0.9, "4.94"), (0.8, "5.88"), (0.7, "6.35"), (0.6, "7.30"), (0.5, "8.26"))
    ),
    *(
        Printed("IX", "DiT-XL/2 256²", "Ours", 50, tmacs, 12, last_k=last_k)
        for last_k, tmacs in ((1, "3.835"), (2, "4.137"), (3, "4.439"), (4, "4.748"))
    ),
)

# Tables II to V: the columns, and their figures in the order of the rows above. "seconds" is the latency.
COLUMNS = {
    "II": ("fid", "sfid", "inception_score", "precision", "recall", "seconds"),
    "III": ("fid", "clip", "parti_clip", "seconds"),
    "IV": ("image_reward", "clip", "seconds"),
    "V": ("vbench", "seconds"),
}
_FIGURES = {
    "II": """
        2.09 4.58 243.24 0.81 0.61 21.57
        2.13 4.44 244.99 0.80 0.60 10.77
        2.18 4.36 243.90 0.81 0.60 7.25
        2.82 6.04 253.96 0.80 0.58 8.60
        2.58 5.74 244.00 0.81 0.59 11.13
        2.07 4.44 244.29 0.80 0.62 10.51
        2.25 4.32 240.24 0.80 0.59 4.32
        2.81 4.47 231.64 0.79 0.59 2.24
        3.34 4.79 224.73 0.78 0.58 1.79
        40.82 30.25 71.17 0.44 0.54 2.04
        2.61 4.73 238.63 0.80 0.58 2.36
        3.31 4.90 218.00 0.78 0.59 2.38
        2.33 4.72 265.30 0.79 0.59 2.27
        3.51 4.93 222.80 0.78 0.59 1.72
        5.68 6.55 201.23 0.75 0.56 1.20
        7.80 8.04 184.68 0.72 0.54 1.01
        5.82 6.05 195.04 0.75 0.55 1.07
        8.02 7.75 179.33 0.72 0.54 1.17
        3.41 4.91 232.47 0.78 0.58 1.15
        12.30 11.23 158.08 0.67 0.52 0.85
        22.94 19.19 120.29 0.57 0.48 0.68
        33.77 27.60 92.68 0.48 0.46 0.62
        57.20 32.12 58.46 0.36 0.50 0.67
        13.99 10.68 148.79 0.60 0.54 0.65
        3.43 5.31 204.93 0.81 0.55 23.01
        4.02 5.78 196.14 0.80 0.54 12.96
        3.75 5.73 198.01 0.83 0.54 14.32
        4.72 5.90 194.44 0.83 0.53 13.77
        3.44 5.57 207.31 0.82 0.54 12.92
        5.17 5.74 183.97 0.82 0.56 9.20
        10.44 8.80 149.79 0.78 0.52 5.56
        7.38 7.17 168.99 0.81 0.52 6.41
        13.50 11.18 134.28 0.74 0.53 6.27
        5.43 6.21 185.64 0.83 0.50 5.76""",
    "III": """
        40.00 31.11 31.69 2.394
        43.67 30.79 31.22 1.511
        39.92 31.10 31.48 1.590
        40.81 31.01 31.45 2.202
        39.60 31.15 31.62 1.502""",
    "IV": """
        1.0127 32.13 42.15
        1.0113 32.00 21.07
        1.0109 31.98 22.46
        1.0117 32.04 44.19
        1.0121 32.09 23.50""",
    "V": """
        73.15 29.23
        71.38 14.73
        70.96 15.54
        71.92 14.54
        72.36 14.48""",
}


def figures(row: Printed) -> dict[str, str]:
    """The row's figures of quality and its latency, by column, with the digits they are printed with; none in Tables VII and IX."""
    if row.table not in COLUMNS:
        return {}
    lines = _FIGURES[row.table].strip().splitlines()
    number = [other for other in TABLES if other.table == row.table].index(row)
    return dict(zip(COLUMNS[row.table], lines[number].split(), strict=True))
