"""What others published, by benchmark and version: the rows that a user's own stand beside.

Sources: IRG, BAGEL and BAGEL self-CoT as IRG's paper and README print them (arXiv 2509.06945), their parts and
GPT-4o's from UniCorn's tables of the same models (arXiv 2601.03193), OneIG's rows of BAGEL from OneIG-Bench
(arXiv 2506.07977). WISE rows of BAGEL are plain means of six categories; IRG's printed 0.77 fits the weighted
mean (0.774) better than the plain one (0.778), so that the rows may not be of one formula.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Published(NamedTuple):
    """Rows {model: {column: score}}, in the units of the paper."""

    rows: Mapping[str, Mapping[str, float]]
    note: str = ""


def _rows(columns: str, **rows: str) -> dict[str, dict[str, float]]:
    names = [name.strip() for name in columns.split(",")]
    return {_NAMES[model]: dict(zip(names, map(float, values.split()), strict=True))
            for model, values in rows.items()}


_NAMES = {"irg": "IRG", "bagel": "BAGEL", "cot": "BAGEL self-CoT", "gpt": "GPT-4o", "janus": "Janus-Pro-7B",
          "show": "Show-o2", "flux": "FLUX.1-dev"}
_TIIF = ("overall, basic, attribute, relation, reasoning, advanced, attribute+relation, attribute+reasoning, "
         "relation+reasoning, style, text, real world")


def _tiif(length: str) -> dict[str, dict[str, float]]:
    columns = ", ".join(f"{name.strip()} {length}" for name in _TIIF.split(","))
    if length == "short":
        return _rows(columns,
                     bagel="70.97 78.16 78.00 80.24 76.25 68.23 73.37 64.36 68.92 80.00 40.72 76.87",
                     cot="68.06 77.63 75.00 78.55 79.33 71.24 77.65 69.77 72.93 69.93 26.24 69.78",
                     irg="76.00 83.17 81.00 82.96 85.54 75.25 75.82 78.16 73.84 90.00 43.89 72.76",
                     gpt="84.19 85.30 81.00 86.16 88.74 81.24 81.95 80.03 80.88 76.67 92.76 89.55")
    return _rows(columns,
                 bagel="71.79 78.12 79.50 79.08 75.77 68.19 77.49 66.15 61.48 80.00 52.40 74.63",
                 cot="68.78 79.40 77.00 82.37 78.81 68.20 75.37 65.87 67.91 63.33 26.70 71.64",
                 irg="73.77 81.28 76.00 81.86 85.98 74.66 77.25 77.76 72.93 70.00 47.51 74.63",
                 gpt="84.61 86.55 82.12 84.12 94.50 79.75 81.55 79.85 75.68 86.67 90.05 88.06")


PUBLISHED = {
    ("geneval", "original"): Published(_rows(
        "single_object, two_object, counting, colors, position, color_attr, overall",
        bagel="0.99 0.95 0.76 0.87 0.50 0.60 0.78", cot="0.99 0.92 0.75 0.89 0.54 0.63 0.79",
        irg="0.98 0.94 0.83 0.86 0.74 0.73 0.85", gpt="0.99 0.92 0.85 0.92 0.75 0.61 0.84",
        show="1.00 0.87 0.58 0.92 0.52 0.62 0.76", janus="0.99 0.89 0.59 0.90 0.79 0.66 0.80")),
    ("wise", "legacy"): Published(_rows(
        "cultural, time, space, biology, physics, chemistry, overall",
        bagel="0.44 0.55 0.68 0.44 0.60 0.39 0.52", cot="0.76 0.69 0.75 0.65 0.75 0.58 0.70",
        irg="0.78 0.72 0.76 0.81 0.82 0.78 0.77", gpt="0.81 0.71 0.89 0.83 0.79 0.74 0.80",
        show="0.64 0.58 0.61 0.58 0.63 0.49 0.61"),
        "BAGEL's overall scores are plain means of the six, IRG's fits the weighted mean better"),
    ("tiif", "testmini"): Published(
        {model: {**row, **_tiif("long")[model]} for model, row in _tiif("short").items()},
        "judged by Qwen2.5-VL-72B; the overall scores of BAGEL and GPT-4o, long, are 0.04 and 0.12 below the "
        "means of their leaves"),
    ("genai_bench", "1600"): Published(_rows(
        "overall", bagel="0.79", cot="0.81", irg="0.84", janus="0.75", show="0.75", flux="0.76")),
    ("oneig", "en"): Published(_rows(
        "alignment, text, reasoning, style, diversity, overall",
        bagel="0.769 0.244 0.173 0.367 0.251 0.361", cot="0.793 0.020 0.206 0.390 0.209 0.324",
        irg="0.839 0.377 0.239 0.427 0.192 0.415", gpt="0.851 0.857 0.345 0.462 0.151 0.533",
        flux="0.786 0.523 0.253 0.368 0.238 0.434")),
}
