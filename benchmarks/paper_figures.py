"""The MACs columns that the paper prints (headed "TFLOPs"; they are tera-MACs of one guided sample), row by row."""

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
