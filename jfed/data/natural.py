"""Sets that come with jfed and have clients of their own: the roles of Shakespeare, four hospitals.

Both are split within each client by rule, not at random, so that every run of every machine trains and
tests on the same rows.

Letters: E examples, N clients.
"""

import csv
import json
import lzma
import math
from pathlib import Path

import numpy as np

from jfed import _validate
from jfed.core import Population
from jfed.data.population import population

_EMBEDDED = Path(__file__).parent / "embedded"


def shakespeare(
    *, window: int = 80, min_speeches: int = 2, test_fraction: float = 0.2
) -> tuple[Population, Population, str]:
    """Next-character prediction over Shakespeare's plays; a client is a role in a play.

    A role's speeches, in the order spoken, are cut in two: the first part is to train on, the last to
    test on, so no speech is in both. Each part is one text, every speech ended by a newline, cut into
    windows that do not overlap; the last is filled up. Train and test have the same clients in the
    same order. This is the task of McMahan et al. 2017, arXiv:1602.05629, from another edition than
    LEAF's, so client counts differ from there.

    Args:
      window: characters in a window.
      min_speeches: roles with fewer are left out; at least 2, so that both parts have one.
      test_fraction: share of a role's speeches to test on, in (0, 1), rounded up.

    Returns:
      `(train, test, vocabulary)`. Leaves `x` int32 [E, window], the characters, and `y` int32
      [E, window], the one after each. Character `vocabulary[i]` has the number i + 1; 0 is the pad
      symbol, so a model needs `len(vocabulary) + 1` = 76 symbols. Padding is 0 in `x`, -1 in `y`.

    Raises:
      ValueError: if an argument is out of range, or no role is left.

    >>> train, test, vocabulary = shakespeare(min_speeches=200)
    >>> text = "".join(vocabulary[i - 1] for i in train.examples["x"][0].tolist())
    >>> len(train.size), len(vocabulary), text[:21]
    (7, 75, 'Dear Celia, I show mo')
    """
    _validate.at_least_one("shakespeare", "window", window, "80 is usual")
    if isinstance(min_speeches, bool) or not isinstance(min_speeches, int) or min_speeches < 2:
        raise ValueError(
            f"shakespeare(min_speeches={min_speeches!r}): min_speeches must be a whole number of at least 2; "
            "a role needs a speech to train on and one to test on."
        )
    if not 0 < test_fraction < 1:
        raise ValueError(f"shakespeare(test_fraction={test_fraction}): must lie in (0, 1); 0.2 is usual.")
    roles = json.loads(lzma.decompress((_EMBEDDED / "roles.json.xz").read_bytes()))
    # From all roles, so that symbols do not depend on which are kept.
    vocabulary = "".join(sorted(set().union("\n", *(speech for *_, speeches in roles for speech in speeches))))
    number = np.zeros(128, np.int32)
    number[np.frombuffer(vocabulary.encode("ascii"), np.uint8)] = 1 + np.arange(len(vocabulary))
    parts: tuple[list, list] = ([], [])
    for _, _, speeches in roles:
        if len(speeches) < min_speeches:
            continue
        # The small term keeps 0.2 * 15 = 3.0000000000000004 at 3.
        held = min(len(speeches) - 1, max(1, math.ceil(test_fraction * len(speeches) - 1e-9)))
        for part, chosen in zip(parts, (speeches[:-held], speeches[-held:]), strict=True):
            text = "".join(speech + "\n" for speech in chosen).encode("ascii")
            part.append(_windows(number[np.frombuffer(text, np.uint8)], window))
    if not parts[0]:
        raise ValueError(f"shakespeare(min_speeches={min_speeches}): no role has so many; 2 keeps 1,125 roles.")
    built = []
    for part in parts:
        examples = {key: np.concatenate([client[key] for client in part]) for key in ("x", "y")}
        built.append(population(examples, [len(client["x"]) for client in part]))
    return built[0], built[1], vocabulary


def _windows(text: np.ndarray, window: int) -> dict[str, np.ndarray]:
    """Windows [E, window] of a text and of the text one on; the last character is only ever predicted."""
    count = -(-(len(text) - 1) // window)
    x, y = np.zeros(count * window, np.int32), np.full(count * window, -1, np.int32)
    x[: len(text) - 1], y[: len(text) - 1] = text[:-1], text[1:]
    return {"x": x.reshape(count, window), "y": y.reshape(count, window)}


_NUMBERS = ("age", "trestbps", "chol", "thalch", "oldpeak", "ca")
_TWO = {"sex": ("Female", "Male"), "fbs": ("FALSE", "TRUE"), "exang": ("FALSE", "TRUE")}
_MANY = {
    "cp": ("typical angina", "atypical angina", "non-anginal", "asymptomatic"),
    "restecg": ("normal", "st-t abnormality", "lv hypertrophy"),
    "slope": ("upsloping", "flat", "downsloping"),
    "thal": ("normal", "fixed defect", "reversable defect"),
}
_MAY_BE_MISSING = ("trestbps", "chol", "fbs", "restecg", "thalch", "exang", "oldpeak", "slope", "ca", "thal")
HOSPITALS = ("Cleveland", "Hungary", "Switzerland", "VA Long Beach")
HEART_FEATURES = (
    *_NUMBERS,
    *_TWO,
    *(f"{name}={value}" for name, values in _MANY.items() for value in values),
    *(f"{name} missing" for name in _MAY_BE_MISSING),
)
"""Names of the 32 columns of `heart`'s `x`."""


def heart() -> tuple[Population, Population, list[str]]:
    """Heart disease at four hospitals: 920 patients, a client a hospital, a real shift between them.

    The 13 features become 32 columns, named in `HEART_FEATURES`:

      * 6 numbers (age, resting blood pressure, cholesterol, greatest heart rate, ST depression, vessels
        coloured), standardized with the mean and deviation of all hospitals' training rows where known;
        a missing value is 0, the mean. A pressure or a cholesterol of 0 stands for a missing value: no
        living patient has one, and Switzerland wrote all its cholesterol so.
      * 3 yes/no features (sex is male, fasting sugar, exercise angina) as 1 and -1; missing is 0.
      * 4 categories one-hot, 13 columns; missing is all 0.
      * 10 columns that are 1 where a feature is missing. Which are differs by hospital.

    The label is 1 if there is any disease (`num` > 0). The table files row 304 under Cleveland; it is
    Hungary's and is moved there, which gives 303, 294, 123 and 200 rows. Of each hospital's healthy,
    and of its ill, every fifth row is to test on. The standardization shares statistics among hospitals;
    a strict study would refit it on what one hospital sees.

    Source: Janosi, Steinbrunn, Pfisterer and Detrano 1989, UCI Heart Disease, doi:10.24432/C52P4X,
    CC BY 4.0.

    Returns:
      `(train, test, hospitals)`: leaves `x` float32 [E, 32] and `y` int32 [E], and the four names.

    >>> train, test, hospitals = heart()
    >>> print(hospitals, train.size, test.size, train.examples["x"].shape)
    ['Cleveland', 'Hungary', 'Switzerland', 'VA Long Beach'] [244 236  99 161] [59 58 24 39] (740, 32)
    """
    with open(_EMBEDDED / "heart_disease_uci.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if row["id"] == "304":
            row["dataset"] = "Hungary"
        for name in ("trestbps", "chol"):
            if row[name] == "0":
                row[name] = ""
    rows.sort(key=lambda row: (HOSPITALS.index(row["dataset"]), int(row["id"])))
    hospital = np.array([HOSPITALS.index(row["dataset"]) for row in rows])
    y = np.array([int(row["num"]) > 0 for row in rows], np.int32)
    test = np.zeros(len(rows), bool)
    for group in range(2 * len(HOSPITALS)):
        test[np.flatnonzero(2 * hospital + y == group)[4::5]] = True

    columns = []
    for name in _NUMBERS:
        known = np.array([row[name] != "" for row in rows])
        value = np.array([float(row[name] or 0) for row in rows])
        fit = value[known & ~test]
        columns.append(np.where(known, (value - fit.mean()) / fit.std(), 0))
    for name, values in _TWO.items():
        columns.append([0 if row[name] == "" else 2 * values.index(row[name]) - 1 for row in rows])
    for name, values in _MANY.items():
        columns += [[row[name] == value for row in rows] for value in values]
    columns += [[row[name] == "" for row in rows] for name in _MAY_BE_MISSING]
    x = np.array(columns, np.float32).T

    def part(chosen: np.ndarray) -> Population:
        return population({"x": x[chosen], "y": y[chosen]}, np.bincount(hospital[chosen]))

    return part(~test), part(test), list(HOSPITALS)
