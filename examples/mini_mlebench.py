#!/usr/bin/env python
"""Mini MLE-bench: small Kaggle-style competitions in MLE-bench's prepared layout.

Where in the paper: AceGRPO (arXiv 2602.07906) is evaluated on MLE-bench-Lite, whose data sets take
days to prepare and hours to fit. These competitions have the same files, the same grading and
the same medals, and a typical script solves one in a fraction of a second on one core, so that the
whole training loop can be watched on a laptop.

1. [paper] MLE-bench's competitions: a private leaderboard, its rules for medals, a private grader.
2. [ours] The data: the real sets that scikit-learn ships, and generated tables where those run out
   (`origin` in config.yaml says which). Every one of the six metrics occurs in both splits.
3. [ours] Scripts can read scikit-learn's bundled files, so real rows are disguised: a feature is
   a random mixture of several original columns plus noise, a row is a blend of two, and targets
   are perturbed or derived. tests/test_mini_mlebench.py tries to match them back.
4. [ours] The leaderboard: 1,000 teams or more, interpolated between the private scores of the
   reference pipelines of `pipelines()`. Three of them are pinned: the constant model at human rank
   0.05, the default random forest at 0.50, the best pipeline at 0.99; the rest lie evenly between.
   So "median" means "a forest with default settings", and a medal needs a better choice than that.
   Reference scores are constants, kept in mini_mlebench_references.json beside this file. They
   depend on the data alone, never on any policy. `--recompute-references` fits all pipelines again
   and writes OUT/references.json; to change the constants, copy that file over the stored one.

A directory <id> holds config.yaml, description.md, grade.py, leaderboard.csv, and
prepared/public/{train,test,sample_submission}.csv and prepared/private/test.csv (the answers).
A script that knows no name can start from
    target = [c for c in train.columns if c not in test.columns][0]; id_col = sample.columns[0]

Run alone:
    python examples/mini_mlebench.py --out data/mini                 # a few seconds
    python examples/mini_mlebench.py --out data/mini1 --seed 1 --recompute-references   # minutes
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: tiny fits lose time to threads

import argparse
import json
import sys
import warnings
import zlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Callable

import numpy as np
import pandas as pd
import yaml
from tqdm import tqdm

REFERENCES = Path(__file__).with_name("mini_mlebench_references.json")
SPLITS = ("train", "heldout")
# Few training rows, so that scripts are quick. As many test rows as it takes to rank good pipelines
# by what they are worth: with 170 to 500 of them, medals on the real sets went by luck.
ROWS = (400, 2000)
PINS = {"dummy": 0.05, "forest": 0.50, "best": 0.99}  # human rank of the three pinned pipelines


@dataclass(frozen=True)
class Metric:
    """`plain` is the name in description.md; `form` says what a submission holds."""

    plain: str
    lower_is_better: bool
    form: str  # "label" | "probability" | "number"


METRICS = {
    "accuracy": Metric("accuracy", False, "label"),
    "f1": Metric("F1", False, "label"),
    "roc_auc": Metric("ROC AUC", False, "probability"),
    "log_loss": Metric("log loss", True, "probability"),
    "rmse": Metric("RMSE", True, "number"),
    "mae": Metric("MAE", True, "number"),
}


class BuildError(ValueError):
    """One line for the terminal; main() turns it into exit status 2."""


@dataclass
class Table:
    """The rows of one competition before they are split.

    columns: one array (n,) a feature, numbers or strings, NaN or None where missing.
    y: (n,) floats for regression, class numbers 0..K-1 otherwise.
    source: (n,) row of the bundled data set behind each row, or None. Never written; for tests.
    """

    columns: list[np.ndarray]
    y: np.ndarray
    source: np.ndarray | None = None


@dataclass(frozen=True)
class Spec:
    """Everything that defines one competition. `labels` are the classes as written in train.csv."""

    id: str
    split: str
    title: str
    story: str
    origin: str  # "generated" or the bundled data set's name
    metric: str
    id_column: str
    id_format: str
    target: str
    features: tuple[str, ...]
    rows: tuple[int, int]  # train, test
    labels: tuple = ()
    make: Callable = field(repr=False, default=None)  # (rng, n) -> Table

    @property
    def kind(self) -> str:
        if not self.labels:
            return "regression"
        return "binary classification" if len(self.labels) == 2 else "multi-class classification"

    @property
    def submission_columns(self) -> list[str]:
        if self.metric == "log_loss" and len(self.labels) > 2:
            return [self.id_column, *(str(label) for label in sorted(self.labels))]
        return [self.id_column, self.target]


SPECS: list[Spec] = []


def competition(id, split, title, story, *, origin="generated", metric, key, target, features,
                labels=()):
    """Decorator: registers the function `(rng, n) -> Table` below it as one competition.

    `key` is "column format", e.g. "crane_ref QC-{:04d}"; `features` are names parted by spaces.
    """
    id_column, id_format = key.split()
    if metric in ("f1", "roc_auc") or (metric == "log_loss" and not labels):
        labels = (0, 1)

    def register(make):
        SPECS.append(Spec(id, split, title, story, origin, metric, id_column, id_format, target,
                          tuple(features.split()), ROWS, tuple(labels), make))
        return make

    return register


# ---------------------------------------------------------------------------------------------
# What the generators are made of
# ---------------------------------------------------------------------------------------------

def standard(x):
    """Zero mean, unit variance along the rows. Works on (n,) and (n, p)."""
    return (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-12)


@lru_cache(maxsize=None)
def bundled(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(X (n, p), y (n,)) of a data set that scikit-learn ships."""
    from sklearn import datasets

    data = getattr(datasets, f"load_{name}")()
    return np.asarray(data.data, float), np.asarray(data.target, float)


def disguise(x, rng, count, group=4, noise=0.3):
    """`count` columns, each a random mixture of `group` standardised columns of x, plus noise.

    Mixing keeps linear and distance structure (so that the learning problem stays real) while no
    column equals an original one; the noise makes exact inversion impossible.
    """
    z, mixed = standard(x), []
    for _ in range(count):
        members = rng.choice(z.shape[1], group, replace=False)
        weights = rng.uniform(0.5, 1.0, group) * rng.choice([-1.0, 1.0], group)
        mixed.append(standard((z[:, members] * weights).sum(axis=1)))
    mixed = np.column_stack(mixed)  # (n, count)
    return mixed + noise * rng.normal(size=mixed.shape)


def latent(rng, n, p, shared=0.3):
    """(n, p) Gaussian columns, unit variance, pairwise correlation `shared`."""
    common = rng.normal(size=(n, 1))
    return np.sqrt(shared) * common + np.sqrt(1 - shared) * rng.normal(size=(n, p))


WARPS = (lambda z: z, lambda z: np.expm1(0.7 * z), lambda z: np.sinh(z), lambda z: np.tanh(0.7 * z))


def measured(z, rng, warp=True):
    """(n, p) -> list of p columns with their own unit, offset and (with `warp`) monotone scale."""
    columns = []
    for j in range(z.shape[1]):
        shape = WARPS[rng.integers(len(WARPS))] if warp else WARPS[0]
        scale = 10.0 ** rng.uniform(-1, 2.5)
        columns.append(scale * (shape(z[:, j]) + rng.uniform(-2, 5)))
    return columns


def words(z, names, rng):
    """(n,) numbers -> strings: cuts z at its quantiles, names the bands in random order."""
    names = [names[i] for i in rng.permutation(len(names))]
    edges = np.quantile(z, np.linspace(0, 1, len(names) + 1)[1:-1])
    return np.array([names[i] for i in np.searchsorted(edges, z)], dtype=object)


def holes(columns, rng, which, share=0.12):
    """Blanks a random `share` of the columns numbered `which`, in place; returns the list."""
    for j in which:
        missing = rng.random(len(columns[j])) < share
        columns[j][missing] = None if columns[j].dtype == object else np.nan
    return columns


def binary(signal, rng, share=0.5, noise=0.5):
    """(n,) -> 0/1: the top `share` of the standardised signal + noise * N(0, 1) is 1."""
    noisy = standard(signal) + noise * rng.normal(size=len(signal))
    return (noisy > np.quantile(noisy, 1 - share)).astype(int)


def bands(signal, rng, count, noise=0.5):
    """(n,) -> classes 0..count-1 of equal size, by the quantiles of the noisy signal."""
    noisy = standard(signal) + noise * rng.normal(size=len(signal))
    return np.searchsorted(np.quantile(noisy, np.linspace(0, 1, count + 1)[1:-1]), noisy)


def noisy(signal, rng, noise=0.3, center=10.0, scale=3.0):
    """(n,) -> regression target: standardised signal + noise, moved to a natural-looking range
    that stays above 0, since a pipeline takes logarithms."""
    return center + scale * (standard(signal) + noise * rng.normal(size=len(signal)))


def poured(x, rng, n, share=0.4, classes=None):
    """(n, p) rows, each a blend of two random rows of x, and (n,) the numbers of the larger parts.

    With `classes`, one for each row of x, both are of one class. So bundled rows do not occur as
    they are (but for the few that meet themselves), and n may be larger than their number.
    """
    rows = rng.integers(len(x), size=n)
    if classes is None:
        others = rng.integers(len(x), size=n)
    else:
        others = np.array([rng.choice(np.flatnonzero(classes == classes[row])) for row in rows])
    return (1 - share) * x[rows] + share * x[others], rows


def digit_blocks(rows):
    """(n, 16): mean ink of the 4 x 4 blocks of the 8 x 8 digit images `rows`."""
    images = bundled("digits")[0][rows].reshape(-1, 4, 2, 4, 2)
    return images.mean(axis=(2, 4)).reshape(len(images), 16)


# The digits' 1,797 images are dealt once: held-out competitions never see a training image.
_DIGITS = np.random.default_rng(7).permutation(1797)
DIGITS = {"train": _DIGITS[:950], "heldout": _DIGITS[950:]}


def scribbles(split, rng, n, kept=range(10)):
    """Of the split's images that show one of the digits `kept`: (n, 16) blocks of two images of the
    same digit, laid over each other, (n,) digits and (n,) rows of the larger parts."""
    digits = bundled("digits")[1].astype(int)
    images = DIGITS[split][np.isin(digits[DIGITS[split]], list(kept))]
    blocks, chosen = poured(digit_blocks(images), rng, n, classes=digits[images])
    return blocks, digits[images][chosen], images[chosen]


# ---------------------------------------------------------------------------------------------
# Training competitions
# ---------------------------------------------------------------------------------------------

@competition(
    "biopsy-nuclei", "train", "Biopsy nuclei",
    "A pathology lab outlines cell nuclei on biopsy slides and blends the outlines into shape "
    "indices. Tell which slides are malignant.",
    origin="breast_cancer", metric="roc_auc", key="slide_key SL{:05d}", target="malignant_call",
    features="outline_idx chroma_idx lobing_idx mottling_idx elongation_idx pitting_idx halo_idx")
def biopsy_nuclei(rng, n):
    x, y = bundled("breast_cancer")
    z, rows = poured(standard(x), rng, n, classes=y)
    flipped = rng.random(n) < 0.04
    return Table(measured(disguise(z, rng, 7, group=4, noise=0.9), rng, warp=False),
                 (1 - y[rows].astype(int)) ^ flipped, rows)


@competition(
    "nucleus-grain", "train", "Nucleus grain",
    "A microscope reports ten optical indices for each nucleus, but the grain of its contour "
    "needs a slow scan. Estimate that grain from the indices.",
    origin="breast_cancer", metric="rmse", key="scan_no {:d}", target="contour_grain",
    features="optic_ka optic_mu optic_nu optic_xi optic_pi optic_ro optic_si optic_fi optic_da "
             "optic_ze")
def nucleus_grain(rng, n):
    x, _ = bundled("breast_cancer")
    z, rows = poured(standard(x), rng, n)
    target = z[:, 29] + 0.7 * z[:, 24] - 0.5 * z[:, 21] + 0.5 * z[:, 11]
    z = disguise(np.delete(z, [24, 29], axis=1), rng, 10, 3, 0.2)
    return Table(measured(z, rng, False), noisy(target, rng, 0.15, 42.0, 6.0), rows)


@competition(
    "clinic-progression", "train", "Clinic progression",
    "A clinic follows diabetes patients for a year and summarises blood tests in panels. Predict "
    "how far the disease progresses.",
    origin="diabetes", metric="mae", key="chart_id {:d}", target="progress_units",
    features="panel_lipid panel_sugar panel_mass panel_press panel_renal panel_bile panel_iron")
def clinic_progression(rng, n):
    x, y = bundled("diabetes")
    z, rows = poured(standard(np.column_stack([x, y])), rng, n)
    return Table(measured(disguise(z[:, :-1], rng, 7, 3, 0.2), rng, False),
                 noisy(z[:, -1], rng, 0.15, 250.0, 60.0), rows)


@competition(
    "glucose-alert", "train", "Glucose alert",
    "Nurses want an early warning for patients whose sugar load will be high at the next visit. "
    "Give the chance of an alert.",
    origin="diabetes", metric="log_loss", key="visit_code V-{:04d}", target="sugar_alert",
    features="waist_mix serum_mix pulse_mix enzyme_mix salt_mix years_mix clot_mix fibre_mix")
def glucose_alert(rng, n):
    x, y = bundled("diabetes")
    z, rows = poured(standard(np.column_stack([x, y])), rng, n)
    return Table(measured(disguise(z[:, :-1], rng, 8, 3, 0.25), rng, False),
                 binary(z[:, -1] + 0.6 * z[:, 9], rng, 0.45, 0.2), rows)


@competition(
    "postal-scribbles", "train", "Postal scribbles",
    "A sorting machine sees each handwritten digit through twelve smeared light sensors. Only the "
    "digits 0 to 5 are in use. Read the digit.",
    origin="digits", metric="accuracy", key="envelope_no {:d}", target="written_digit",
    features="lamp_a lamp_b lamp_c lamp_d lamp_e lamp_f lamp_g lamp_h lamp_i lamp_j lamp_k lamp_l",
    labels=tuple(range(6)))
def postal_scribbles(rng, n):
    z, digits, rows = scribbles("train", rng, n, range(6))
    return Table(measured(disguise(z, rng, 12, 3, 0.35), rng, False), digits, rows)


@competition(
    "meter-parity", "train", "Meter parity",
    "An old electricity meter shows one digit behind foggy glass, watched by ten photo cells. "
    "Decide whether the digit is odd.",
    origin="digits", metric="roc_auc", key="reading_id RD{:06d}", target="digit_is_odd",
    features="cell_ne cell_nw cell_se cell_sw cell_mid cell_rim cell_top cell_low cell_lft "
             "cell_rgt")
def meter_parity(rng, n):
    z, digits, rows = scribbles("train", rng, n)
    return Table(measured(disguise(z, rng, 10, 3, 0.8), rng, False), digits % 2, rows)


@competition(
    "ticket-glyphs", "train", "Ticket glyphs",
    "Parking tickets carry one of five hand-drawn glyphs, scanned by a worn strip reader. Give a "
    "probability for every glyph.",
    origin="digits", metric="log_loss", key="ticket_no {:d}", target="glyph_name",
    features="strip_01 strip_02 strip_03 strip_04 strip_05 strip_06 strip_07 strip_08 "
             "strip_09 strip_10", labels=("arch", "crook", "hook", "loop", "twist"))
def ticket_glyphs(rng, n):
    kept = (2, 3, 5, 8, 9)
    z, digits, rows = scribbles("train", rng, n, kept)
    z = disguise(z, rng, 10, 3, 0.3)
    return Table(measured(z, rng, False), np.searchsorted(kept, digits), rows)


@competition(
    "cellar-blends", "train", "Cellar blends",
    "Three growers press wine in one valley; samples of the same grower are poured together before "
    "the chemistry is measured. Name the grower.",
    origin="wine", metric="accuracy", key="cask_ref CK-{:03d}", target="grower",
    features="tannin_sum acid_sum phenol_sum hue_sum alkali_sum ash_sum sugar_sum "
             "resin_sum cork_sum", labels=("aldine", "brunel", "corvo"))
def cellar_blends(rng, n):
    x, y = bundled("wine")
    z, rows = poured(standard(x), rng, n, classes=y)
    return Table(measured(disguise(z, rng, 9, 6, 1.4), rng, False), y[rows].astype(int), rows)


@competition(
    "kiln-cracks", "train", "Kiln cracks",
    "A pottery fires tiles in three kilns with several clays. Some cracks appear only when heat "
    "and damp meet; gauges fail at times. Predict cracking.",
    metric="roc_auc", key="tile_no {:d}", target="cracked",
    features="kiln_name clay_body peak_heat damp_gauge soak_time draft_pull shelf_slot glaze_mm")
def kiln_cracks(rng, n):
    z = latent(rng, n, 8, 0.1)
    signal = (2.0 * (z[:, 2] > 0.4) * (z[:, 3] > -0.2) + 1.5 * (z[:, 0] > 0.43) * (z[:, 4] < 0)
              + 1.2 * (np.abs(z[:, 5]) < 0.6) - 0.8 * (z[:, 1] > 0.6) * (z[:, 6] > 0))
    columns = measured(z, rng)
    columns[0] = words(z[:, 0], ["anagama", "noborigama", "raku"], rng)
    columns[1] = words(z[:, 1], ["stoneware", "terracotta", "porcelain", "gault"], rng)
    return Table(holes(columns, rng, (3, 5, 7), 0.1), binary(signal, rng, 0.4, 0.35))


@competition(
    "brine-density", "train", "Brine density",
    "A salt works mixes brines at several temperatures. Density rises with salt, bends with heat "
    "and jumps when crystals form. Predict the density.",
    metric="rmse", key="batch_tag BT{:04d}", target="brine_density",
    features="salt_feed pan_heat stir_rate sun_hours wind_draw pool_depth lime_dose")
def brine_density(rng, n):
    z = latent(rng, n, 7, 0.0)
    signal = (1.2 * np.sin(1.6 * z[:, 0]) * (z[:, 1] > -0.3) + 1.5 * (z[:, 2] > 0.5)
              + 0.4 * z[:, 1] ** 2 + 1.0 * (z[:, 3] > 0) * (z[:, 2] < 0) + 0.4 * z[:, 4])
    return Table(measured(z, rng), noisy(signal, rng, 0.25, 1150.0, 40.0))


@competition(
    "tide-mills", "train", "Tide mills",
    "Mills on an estuary turn with the tide, whose phase wraps around, and with the river's flow. "
    "Predict the power that a mill gives in an hour.",
    metric="mae", key="mill_hour {:d}", target="mill_power",
    features="moon_phase river_flow sluice_gap wheel_load weed_mass")
def tide_mills(rng, n):
    z = latent(rng, n, 5, 0.0)
    z[:, 0] = rng.uniform(-2, 2, n)
    signal = 1.5 * np.sin(3.0 * z[:, 0]) + 0.8 * z[:, 1] * np.cos(1.5 * z[:, 0]) + 0.4 * z[:, 2]
    return Table(measured(z, rng, False), noisy(signal, rng, 0.2, 85.0, 14.0))


@competition(
    "rail-wear", "train", "Rail wear",
    "Inspectors grind only the worst tenth of the rails. Wear adds up from axle load, curves and "
    "sand, each in proportion. Flag the rails to grind.",
    metric="f1", key="rail_code R/{:05d}", target="needs_grinding",
    features="axle_tonnes curve_deg sand_index rail_years steel_grade track_gauge_mm brake_zone")
def rail_wear(rng, n):
    z = latent(rng, n, 7, 0.1)
    signal = z[:, :4] @ np.array([1.0, 0.8, 0.7, 0.6]) - 0.5 * z[:, 4]
    columns = measured(z, rng, False)
    columns[6] = words(z[:, 6] + 0.5 * z[:, 0], ["apron", "grade", "yard"], rng)
    return Table(holes(columns, rng, (2,), 0.05), binary(signal, rng, 0.16, 0.4))


@competition(
    "bat-colonies", "train", "Bat colonies",
    "Microphones near caves record bat calls, summarised as six spectral figures. Each species "
    "fills its own cloud of calls. Name the species.",
    metric="accuracy", key="call_id {:d}", target="bat_species",
    features="chirp_peak chirp_span echo_lag trill_rate hum_floor wing_beat",
    labels=("barbastelle", "noctule", "pipistrelle", "serotine"))
def bat_colonies(rng, n):
    y = rng.integers(4, size=n)
    centers, shapes = rng.normal(size=(4, 6)) * 0.55, rng.normal(size=(4, 6, 6)) * 0.45
    z = np.stack([centers[k] + shapes[k] @ rng.normal(size=6) for k in y])
    return Table(measured(z + 0.25 * rng.normal(size=(n, 6)), rng, False), y)


@competition(
    "auction-clocks", "train", "Auction clocks",
    "An auction house sells antique clocks. Age, makers and condition multiply the price rather "
    "than add to it. Predict the hammer price.",
    metric="rmse", key="lot_no {:d}", target="hammer_price",
    features="clock_years maker_rank case_wear dial_mm strike_train parts_swapped bidder_count")
def auction_clocks(rng, n):
    z = latent(rng, n, 7, 0.1)
    log_price = 0.45 * z[:, 0] + 0.4 * z[:, 1] - 0.3 * z[:, 2] + 0.25 * z[:, 6] + 0.1 * z[:, 3]
    columns = measured(z, rng, False)
    columns[4] = words(z[:, 4] + z[:, 1], ["bim_bam", "carillon", "single_bell"], rng)
    return Table(columns, 300.0 * np.exp(0.9 * log_price + 0.15 * rng.normal(size=n)))


@competition(
    "orbit-locks", "train", "Orbit locks",
    "A ground station locks onto a satellite when two phase errors together stay inside a ring. "
    "Give the chance that the lock holds.",
    metric="log_loss", key="pass_key P{:05d}", target="lock_held",
    features="phase_err_x phase_err_y doppler_ofs dish_tilt ion_noise clock_drift")
def orbit_locks(rng, n):
    z = latent(rng, n, 6, 0.0)
    radius = np.sqrt(z[:, 0] ** 2 + z[:, 1] ** 2)
    signal = -np.abs(radius - 1.0) * 2.0 + 0.7 * z[:, 2] * z[:, 3]
    return Table(measured(z, rng, False), binary(signal, rng, 0.5, 0.35))


@competition(
    "hive-swarms", "train", "Hive swarms",
    "Beekeepers weigh hives and log brood, queen age and weather. Weight and warmth matter "
    "together, an old queen and a rich or failing flow of nectar add to it. Predict swarming.",
    metric="accuracy", key="hive_tag HV{:04d}", target="swarm_outcome",
    features="hive_kg brood_frames queen_months warm_weeks nectar_flow frame_style apiary_slope "
             "mite_load", labels=("stays", "swarms"))
def hive_swarms(rng, n):
    z = latent(rng, n, 8, 0.15)
    signal = 1.2 * z[:, 0] * z[:, 3] + 0.8 * z[:, 2] + 0.6 * z[:, 4] ** 2 + 0.5 * z[:, 1]
    columns = measured(z, rng, False)
    columns[5] = words(z[:, 5], ["langstroth", "topbar", "warre"], rng)
    return Table(holes(columns, rng, (6, 7), 0.1), binary(signal, rng, 0.5, 0.35))


# ---------------------------------------------------------------------------------------------
# Held-out competitions
# ---------------------------------------------------------------------------------------------

@competition(
    "tumour-margins", "heldout", "Tumour margins",
    "A second laboratory grades how ragged a tumour's margin is, from ten scanner channels that "
    "it does not explain. Name the grade.",
    origin="breast_cancer", metric="accuracy", key="specimen_no {:d}", target="margin_grade",
    features="chan_red chan_blue chan_teal chan_rose chan_gold chan_jade chan_onyx "
             "chan_puce chan_lime chan_mauve", labels=("clean", "frayed", "notched", "ragged"))
def tumour_margins(rng, n):
    x, _ = bundled("breast_cancer")
    z, rows = poured(standard(np.log1p(x)), rng, n)
    signal = z[:, 26] + 0.6 * z[:, 17] - 0.5 * z[:, 14]
    z = disguise(np.delete(z, [17, 26], axis=1), rng, 10, 3, 0.15)
    return Table(measured(z, rng, False), bands(signal, rng, 4, 0.1), rows)


@competition(
    "lipid-followup", "heldout", "Lipid follow-up",
    "At a follow-up visit only cheap tests are taken. Estimate the costly lipid figure that a "
    "specialist would have measured.",
    origin="diabetes", metric="rmse", key="followup_ref FU{:04d}", target="lipid_figure",
    features="assay_uno assay_due assay_tre assay_qua assay_cin assay_sei assay_set")
def lipid_followup(rng, n):
    x, y = bundled("diabetes")
    z, rows = poured(standard(np.column_stack([x, y])), rng, n)
    signal = z[:, 8] + 0.5 * z[:, 9] + 0.4 * z[:, 10]
    return Table(measured(disguise(np.delete(z, [8, 10], axis=1), rng, 7, 3, 0.2), rng, False),
                 noisy(signal, rng, 0.2, 4.6, 0.5), rows)


@competition(
    "bank-cheques", "heldout", "Bank cheques",
    "A bank reads the cents digit of cheques with nine magnetic pickups. Only five digits occur. "
    "Give a probability for every digit.",
    origin="digits", metric="log_loss", key="cheque_no {:d}", target="cents_digit",
    features="pickup_q1 pickup_q2 pickup_q3 pickup_q4 pickup_q5 pickup_q6 pickup_q7 pickup_q8 "
             "pickup_q9", labels=("d1", "d2", "d4", "d7", "d8"))
def bank_cheques(rng, n):
    kept = (1, 2, 4, 7, 8)
    z, digits, rows = scribbles("heldout", rng, n, kept)
    z = disguise(z, rng, 9, 3, 0.45)
    return Table(measured(z, rng, False), np.searchsorted(kept, digits), rows)


@competition(
    "frost-orchards", "heldout", "Frost orchards",
    "Orchards in a valley lose blossom when cold air pools below a slope on still nights. Stations "
    "drop out. Predict which orchards lose their blossom.",
    metric="roc_auc", key="orchard_id {:d}", target="blossom_lost",
    features="slope_aspect fruit_kind night_low wind_lull basin_depth dew_gap canopy_m sprinkler")
def frost_orchards(rng, n):
    z = latent(rng, n, 8, 0.1)
    signal = (1.2 * (z[:, 2] < 0) + 1.0 * (z[:, 3] < 0.3) + 1.0 * (np.abs(z[:, 4]) < 0.7)
              + 1.0 * (z[:, 1] > 0.5) - 0.8 * (z[:, 7] > 0) * (z[:, 5] > 0) + 0.8 * (z[:, 6] > 0.8))
    columns = measured(z, rng)
    columns[0] = words(z[:, 0], ["north", "east", "south", "west"], rng)
    columns[1] = words(z[:, 1], ["apricot", "damson", "medlar", "quince"], rng)
    return Table(holes(columns, rng, (2, 4, 6), 0.08), binary(signal, rng, 0.45, 0.4))


@competition(
    "sonar-wrecks", "heldout", "Sonar wrecks",
    "A survey ship pings the sea bed. Wrecks are rare and show as echoes of the right length at "
    "the right depth. Flag the wrecks.",
    metric="f1", key="ping_ref PG-{:05d}", target="is_wreck",
    features="echo_ms bed_depth return_db silt_cm tow_speed swell_cm magnet_nt")
def sonar_wrecks(rng, n):
    z = latent(rng, n, 7, 0.0)
    echo = np.exp(-((z[:, 0] - 0.5) ** 2 + (z[:, 1] + 0.3) ** 2) / 1.2)
    signal = 3.0 * echo + 0.6 * z[:, 2] + 0.5 * z[:, 6]
    return Table(measured(z, rng, False), binary(signal, rng, 0.2, 0.3))


@competition(
    "loom-breaks", "heldout", "Loom breaks",
    "A weaving mill counts the length woven before a thread breaks. Tension, humidity and speed "
    "act in proportion; a few looms are oddly bad. Predict the length.",
    metric="mae", key="loom_run {:d}", target="metres_woven",
    features="warp_tension hall_humidity pick_speed yarn_batch reed_count lint_level shuttle_age")
def loom_breaks(rng, n):
    z = latent(rng, n, 7, 0.2)
    signal = z[:, :3] @ np.array([-1.0, 0.8, -0.6]) + 0.5 * z[:, 5] + 0.4 * z[:, 6]
    columns = measured(z, rng, False)
    columns[3] = words(z[:, 3] + 0.6 * z[:, 1], ["bouclee", "chenille", "worsted"], rng)
    y = noisy(signal, rng, 0.25, 1200.0, 120.0) - 500.0 * (rng.random(n) < 0.05)
    return Table(holes(columns, rng, (4,), 0.08), y)


@competition(
    "glacier-melt", "heldout", "Glacier melt",
    "Stakes on a glacier show how much ice melts in a week. Melt starts above a threshold of "
    "warmth, grows with sun and dust, and stalls under fresh snow. Predict the melt.",
    metric="rmse", key="stake_week {:d}", target="melt_cm",
    features="air_warmth sun_angle dust_cover fresh_snow stake_height crevasse_m fog_hours")
def glacier_melt(rng, n):
    z = latent(rng, n, 7, 0.1)
    signal = (1.6 * np.maximum(z[:, 0], 0) * (1 + 0.6 * z[:, 1]) + 0.8 * (z[:, 2] > 0.3)
              - 1.2 * (z[:, 3] > 0.6) + 0.5 * np.cos(1.5 * z[:, 4]))
    return Table(measured(z, rng), noisy(signal, rng, 0.25, 65.0, 11.0))


@competition(
    "ferry-delays", "heldout", "Ferry delays",
    "A ferry line wants the chance that a crossing is late. Wind from either side hurts, fog hurts "
    "alone, and large crews make up for load.",
    metric="log_loss", key="sailing_no {:d}", target="sailed_late",
    features="cross_wind fog_banks deck_load crew_size berth_queue tide_gap hull_age")
def ferry_delays(rng, n):
    z = latent(rng, n, 7, 0.0)
    signal = (1.1 * z[:, 0] ** 2 + 0.8 * z[:, 1] + 0.9 * z[:, 2] * z[:, 3]
              + 0.5 * np.sin(2 * z[:, 4]))
    return Table(measured(z, rng, False), binary(signal, rng, 0.45, 0.4))


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------

@dataclass
class Files:
    """The tables of one competition as they are written; `source` as in Table, train then test."""

    train: pd.DataFrame
    test: pd.DataFrame
    sample: pd.DataFrame
    answers: pd.DataFrame
    source: np.ndarray | None


def generator(spec: Spec, seed: int, purpose: str) -> np.random.Generator:
    """An own random stream for each competition and purpose, whatever else is built."""
    return np.random.default_rng([seed, zlib.crc32(f"{spec.id}/{purpose}".encode())])


def short(column):
    """Four significant digits, as instruments write them; strings pass."""
    if column.dtype == object:
        return column
    return np.array([float(f"{v:.4g}") for v in column])


def build_files(spec: Spec, seed: int = 0) -> Files:
    """Draws, splits and names the rows of one competition. Pure: same arguments, same tables."""
    rng = generator(spec, seed, "rows")
    n_train, n_test = spec.rows
    n = n_train + n_test
    table = spec.make(rng, n)
    if len(table.columns) != len(spec.features) or len(table.y) != n:
        raise BuildError(f"{spec.id}: the generator gave {len(table.columns)} columns and "
                         f"{len(table.y)} rows; expected {len(spec.features)} and {n}")
    order = rng.permutation(n)
    numbers = rng.choice(np.arange(100, 100 + 9 * n), n, replace=False)
    ids = [spec.id_format.format(i) for i in numbers]
    frame = pd.DataFrame({spec.id_column: ids if "{:d}" not in spec.id_format else numbers})
    for name, column in zip(spec.features, table.columns):
        frame[name] = short(column)[order]
    y = table.y[order]
    y = [spec.labels[int(k)] for k in y] if spec.labels else short(np.asarray(y, float))
    frame[spec.target] = y
    train, rest = frame.iloc[:n_train], frame.iloc[n_train:].reset_index(drop=True)
    return Files(train=train, test=rest.drop(columns=spec.target),
                 sample=constant_submission(spec, train[spec.target], rest[spec.id_column]),
                 answers=rest[[spec.id_column, spec.target]],
                 source=None if table.source is None else table.source[order])


def constant_submission(spec: Spec, y: pd.Series, ids: pd.Series) -> pd.DataFrame:
    """The best constant for the metric: prior, mean, median, most frequent label (F1: all ones)."""
    sample = pd.DataFrame({ids.name: ids})
    if spec.metric == "log_loss" and len(spec.labels) > 2:
        for label in sorted(spec.labels):
            sample[str(label)] = round(float((y == label).mean()), 4)
        sample[spec.submission_columns[-1]] = (
            1 - sample[spec.submission_columns[1:-1]].sum(axis=1)).round(4)
        return sample
    sample[spec.target] = {
        "accuracy": lambda: y.mode()[0], "f1": lambda: 1,
        "roc_auc": lambda: round(float(y.mean()), 4), "log_loss": lambda: round(float(y.mean()), 4),
        "rmse": lambda: float(f"{y.mean():.4g}"), "mae": lambda: float(f"{y.median():.4g}"),
    }[spec.metric]()
    return sample


# ---------------------------------------------------------------------------------------------
# The grader, written into every competition
# ---------------------------------------------------------------------------------------------

GRADER = '''"""Grader of {id}: {plain}, {direction} is better.

`grade(submission, answers)` returns the score of a submission or raises InvalidSubmission with a
one-line reason.
"""

import sys

import numpy as np
import pandas as pd

ID = {id_column!r}
TARGET = {target!r}
COLUMNS = {columns!r}
CLASSES = {classes!r}

# mlebench catches its own exception; its helpers are loaded already whenever it calls this file.
_BASE = getattr(sys.modules.get("mlebench.grade_helpers"), "InvalidSubmissionError", Exception)


class InvalidSubmission(ValueError, _BASE):
    """The submission cannot be graded; the message is one line that a script's author can use."""


def refuse(reason: str):
    raise InvalidSubmission(reason)


def grade(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """{plain} of a submission that holds COLUMNS; its ids may come in any order."""
    found = [str(column) for column in submission.columns]
    if found != COLUMNS:
        listed = ",".join(found[:12])[:120]
        refuse(f"submission must have the columns {{','.join(COLUMNS)}}; found {{listed}}")
    if len(submission) != len(answers):
        refuse(f"submission must have {{len(answers)}} rows; found {{len(submission)}}")
    given, wanted = submission[ID].astype(str), answers[ID].astype(str)
    twice = given[given.duplicated()]
    if len(twice):
        refuse(f"column {{ID}} holds the id {{twice.iloc[0]!s:.40}} twice")
    unknown = given[~given.isin(wanted)]
    if len(unknown):
        refuse(f"column {{ID}} holds the unknown id {{unknown.iloc[0]!s:.40}}")
    rows = submission.set_axis(given, axis=0).loc[wanted]
    return float(score(values(rows), answers[TARGET].to_numpy()))


def numbers(column: pd.Series) -> np.ndarray:
    """Finite floats, or a refusal."""
    array = pd.to_numeric(column, errors="coerce").to_numpy(dtype=float, na_value=np.nan)
    bad = ~np.isfinite(array)
    if bad.any():
        refuse(f"column {{column.name}} holds {{bad.sum()}} values that are not finite numbers")
    return array

{metric_code}'''

LABELS = '''
def values(rows: pd.DataFrame) -> np.ndarray:
    """Labels out of CLASSES, or a refusal."""
    column = rows[TARGET]
    labels = numbers(column) if isinstance(CLASSES[0], int) else column.astype(str).to_numpy()
    bad = ~np.isin(labels, CLASSES)
    if bad.any():
        known = ",".join(map(str, CLASSES))
        refuse(f"column {TARGET} holds {labels[bad][0]!s:.40}, which is not one of {known}")
    return labels
'''

PROBABILITY = '''
def values(rows: pd.DataFrame) -> np.ndarray:
    """Probabilities of class 1 in [0, 1], or a refusal."""
    p = numbers(rows[TARGET])
    if (p < 0).any() or (p > 1).any():
        refuse(f"column {TARGET} must hold probabilities in [0, 1]; "
               f"found {p.min():.4g} to {p.max():.4g}")
    return p
'''

PROBABILITIES = '''
def values(rows: pd.DataFrame) -> np.ndarray:
    """(n, classes) probabilities in [0, 1] whose rows sum to 1, or a refusal."""
    p = np.column_stack([numbers(rows[column]) for column in COLUMNS[1:]])
    if (p < 0).any() or (p > 1).any():
        refuse("class columns must hold probabilities in [0, 1]; "
               f"found {p.min():.4g} to {p.max():.4g}")
    off = np.abs(p.sum(axis=1) - 1).max()
    if off > 1e-3:
        refuse(f"class probabilities must sum to 1 in every row; one row is off by {off:.4g}")
    return p / p.sum(axis=1, keepdims=True)
'''

NUMBERS = '''
def values(rows: pd.DataFrame) -> np.ndarray:
    """Finite numbers, or a refusal."""
    return numbers(rows[TARGET])
'''

SCORES = {
    "accuracy": LABELS + '''

def score(given, truth):
    return np.mean(given == truth)
''',
    "f1": LABELS + '''

def score(given, truth):
    hits = np.sum((given == 1) & (truth == 1))
    return 2 * hits / max(np.sum(given == 1) + np.sum(truth == 1), 1)
''',
    "roc_auc": PROBABILITY + '''

def score(given, truth):
    ranks = pd.Series(given).rank().to_numpy()  # ties share their mean rank
    ones, zeros = np.sum(truth == 1), np.sum(truth == 0)
    return (ranks[truth == 1].sum() - ones * (ones + 1) / 2) / (ones * zeros)
''',
    "log_loss": PROBABILITY + '''

def score(given, truth):
    p = np.where(truth == 1, given, 1 - given)
    return -np.mean(np.log(np.clip(p, 1e-3, 1)))  # a certain mistake costs 6.9
''',
    "log_loss multi": PROBABILITIES + '''

def score(given, truth):
    p = given[np.arange(len(truth)), [CLASSES.index(label) for label in truth]]
    return -np.mean(np.log(np.clip(p, 1e-3, 1)))  # a certain mistake costs 6.9
''',
    "rmse": NUMBERS + '''

def score(given, truth):
    return np.sqrt(np.mean((given - truth) ** 2))
''',
    "mae": NUMBERS + '''

def score(given, truth):
    return np.mean(np.abs(given - truth))
''',
}


def grader_source(spec: Spec) -> str:
    """The text of grade.py."""
    metric, columns = METRICS[spec.metric], spec.submission_columns
    return GRADER.format(
        id=spec.id, plain=metric.plain, direction="lower" if metric.lower_is_better else "higher",
        id_column=spec.id_column, target=spec.target, columns=columns, classes=sorted(spec.labels),
        metric_code=SCORES[spec.metric + (" multi" if len(columns) > 2 else "")])


def load_grade(spec: Spec) -> Callable:
    """`grade` of the competition, from its source text."""
    namespace = {"__name__": "grade"}
    exec(compile(grader_source(spec), f"{spec.id}/grade.py", "exec"), namespace)
    return namespace["grade"]


# ---------------------------------------------------------------------------------------------
# Reference pipelines
# ---------------------------------------------------------------------------------------------

def pipelines(spec: Spec, seed: int = 0) -> dict:
    """name -> unfitted scikit-learn estimator; each is within the reach of a short script."""
    from sklearn import discriminant_analysis, dummy, ensemble, linear_model, naive_bayes, neighbors
    from sklearn import neural_network, svm, tree
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, QuantileTransformer, StandardScaler

    def scaled(model):
        return make_pipeline(StandardScaler(), model)

    def squared(model):
        return make_pipeline(StandardScaler(), PolynomialFeatures(2), StandardScaler(), model)

    def ranked(model):
        return make_pipeline(QuantileTransformer(100, output_distribution="normal"), model)

    r = dict(random_state=seed)
    if not spec.labels:
        absolute = spec.metric == "mae"
        out = {
            "dummy": dummy.DummyRegressor(strategy="median" if absolute else "mean"),
            "tree": tree.DecisionTreeRegressor(**r),
            "tree depth 3": tree.DecisionTreeRegressor(max_depth=3, **r),
            "tree leaf 10": tree.DecisionTreeRegressor(min_samples_leaf=10, **r),
            "knn unscaled": neighbors.KNeighborsRegressor(),
            "knn 5": scaled(neighbors.KNeighborsRegressor()),
            "knn 12 distance": scaled(neighbors.KNeighborsRegressor(12, weights="distance")),
            "linear": linear_model.LinearRegression(),
            "ridge 30": scaled(linear_model.Ridge(30.0)),
            "lasso": linear_model.Lasso(),
            "huber": scaled(linear_model.HuberRegressor(max_iter=500)),
            "ridge squares": squared(linear_model.Ridge(3.0)),
            "ridge squares 50": squared(linear_model.Ridge(50.0)),
            "log ridge": TransformedTargetRegressor(
                scaled(linear_model.Ridge(1.0)), func=np.log1p, inverse_func=np.expm1),
            "svr unscaled": svm.SVR(),
            "svr": scaled(svm.SVR()),
            "svr 10": scaled(svm.SVR(C=10)),
            "svr 100": scaled(svm.SVR(C=100)),
            "svr 1000 gamma .03": scaled(svm.SVR(C=1000, gamma=0.03)),
            "forest": ensemble.RandomForestRegressor(**r),
            "forest leaf 5": ensemble.RandomForestRegressor(min_samples_leaf=5, **r),
            "forest features .4": ensemble.RandomForestRegressor(max_features=0.4, **r),
            "extra": ensemble.ExtraTreesRegressor(**r),
            "extra leaf 3": ensemble.ExtraTreesRegressor(200, min_samples_leaf=3, **r),
            "boosting": ensemble.GradientBoostingRegressor(**r),
            "boosting depth 2": ensemble.GradientBoostingRegressor(
                n_estimators=300, max_depth=2, learning_rate=0.05, **r),
            "boosting slow": ensemble.GradientBoostingRegressor(
                n_estimators=300, learning_rate=0.04, max_depth=4, subsample=0.5, **r),
            "hist": ensemble.HistGradientBoostingRegressor(**r),
            "hist slow": ensemble.HistGradientBoostingRegressor(
                learning_rate=0.05, max_iter=150, l2_regularization=5, max_leaf_nodes=8, **r),
            "ada": ensemble.AdaBoostRegressor(**r),
            "mlp": scaled(neural_network.MLPRegressor(hidden_layer_sizes=64, max_iter=400, **r)),
        }
        if absolute:
            out["boosting absolute"] = ensemble.GradientBoostingRegressor(
                loss="absolute_error", **r)
        blends = {"blend ridge forest": ("ridge 30", "forest"),
                  "blend svr extra": ("svr 10", "extra"),
                  "blend boosting svr": ("boosting slow", "svr 10")}
        out |= {name: ensemble.VotingRegressor([(m, out[m]) for m in members])
                for name, members in blends.items()}
        return out
    probability = METRICS[spec.metric].form == "probability"

    def svc(**options):
        model = svm.SVC(**options)
        return CalibratedClassifierCV(model, ensemble=False) if probability else model

    out = {
        "dummy": dummy.DummyClassifier(),
        "bayes": naive_bayes.GaussianNB(),
        "tree": tree.DecisionTreeClassifier(**r),
        "tree depth 3": tree.DecisionTreeClassifier(max_depth=3, **r),
        "tree leaf 10": tree.DecisionTreeClassifier(min_samples_leaf=10, **r),
        "knn unscaled": neighbors.KNeighborsClassifier(),
        "knn 5": scaled(neighbors.KNeighborsClassifier()),
        "knn 15 distance": scaled(neighbors.KNeighborsClassifier(15, weights="distance")),
        "logistic unscaled": linear_model.LogisticRegression(max_iter=200),
        "logistic": scaled(linear_model.LogisticRegression(max_iter=500)),
        "logistic .05": scaled(linear_model.LogisticRegression(C=0.05, max_iter=500)),
        "logistic squares": squared(linear_model.LogisticRegression(C=0.1, max_iter=500)),
        "lda": discriminant_analysis.LinearDiscriminantAnalysis(),
        "qda": scaled(discriminant_analysis.QuadraticDiscriminantAnalysis(reg_param=0.05)),
        "svc unscaled": svc(),
        "svc": scaled(svc()),
        "svc 10": scaled(svc(C=10)),
        "svc 3 gamma .05": scaled(svc(C=3, gamma=0.05)),
        "forest": ensemble.RandomForestClassifier(**r),
        "forest leaf 5": ensemble.RandomForestClassifier(min_samples_leaf=5, **r),
        "forest features .6": ensemble.RandomForestClassifier(200, max_features=0.6, **r),
        "extra": ensemble.ExtraTreesClassifier(**r),
        "extra leaf 3": ensemble.ExtraTreesClassifier(200, min_samples_leaf=3, **r),
        "boosting": ensemble.GradientBoostingClassifier(**r),
        "boosting depth 2": ensemble.GradientBoostingClassifier(
            n_estimators=150, max_depth=2, learning_rate=0.05, **r),
        "boosting slow": ensemble.GradientBoostingClassifier(
            n_estimators=150, learning_rate=0.04, max_depth=4, subsample=0.5, **r),
        "hist": ensemble.HistGradientBoostingClassifier(**r),
        "hist slow": ensemble.HistGradientBoostingClassifier(
            learning_rate=0.05, max_iter=100, l2_regularization=5, max_leaf_nodes=8, **r),
        "ada": ensemble.AdaBoostClassifier(**r),
        "mlp": scaled(neural_network.MLPClassifier(hidden_layer_sizes=64, max_iter=300, **r)),
    }
    if spec.metric == "f1":
        balanced = dict(class_weight="balanced")
        out |= {
            "logistic balanced": scaled(linear_model.LogisticRegression(max_iter=500, **balanced)),
            "svc balanced": scaled(svc(**balanced)),
            "svc 3 gamma .05 balanced": scaled(svc(C=3, gamma=0.05, **balanced)),
            "forest leaf 5 balanced": ensemble.RandomForestClassifier(
                min_samples_leaf=5, **balanced, **r),
            "extra leaf 3 balanced": ensemble.ExtraTreesClassifier(
                200, min_samples_leaf=3, **balanced, **r),
            "hist slow balanced": ensemble.HistGradientBoostingClassifier(
                learning_rate=0.05, max_iter=100, max_leaf_nodes=8, **balanced, **r),
        }
    blends = {"blend logistic forest": ("logistic", "forest"),
              "blend svc extra": ("svc 10", "extra"),
              "blend boosting logistic": ("boosting slow", "logistic")}
    out |= {name: ensemble.VotingClassifier([(m, out[m]) for m in members],
                                            voting="soft" if probability else "hard")
            for name, members in blends.items()}
    return out


def features_of(files: Files, spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """(train, test) float matrices as a short script makes them: get_dummies, median for blanks."""
    both = pd.concat([files.train[list(spec.features)], files.test[list(spec.features)]])
    both = pd.get_dummies(both).astype(float)
    both = both.fillna(both[:len(files.train)].median())
    return both[:len(files.train)].to_numpy(), both[len(files.train):].to_numpy()


def submission_of(spec: Spec, files: Files, model, x_train, x_test) -> pd.DataFrame:
    """Fits the model and writes its predictions in the competition's submission form."""
    out = pd.DataFrame({spec.id_column: files.test[spec.id_column]})
    model.fit(x_train, files.train[spec.target].to_numpy())
    if METRICS[spec.metric].form != "probability":
        out[spec.target] = model.predict(x_test)
    elif len(spec.labels) == 2:
        out[spec.target] = model.predict_proba(x_test)[:, 1]
    else:
        out[spec.submission_columns[1:]] = model.predict_proba(x_test)
    return out


def is_seeded(model) -> bool:
    return any(name.endswith("random_state") and value is not None
               for name, value in model.get_params().items())


def reference_scores(spec: Spec, seed: int) -> dict[str, float]:
    """Private score of every reference pipeline; seeded ones as the mean over three seeds, the
    default forest over nine, because the middle of the leaderboard hangs on it."""
    files, grade = build_files(spec, seed), load_grade(spec)
    x_train, x_test = features_of(files, spec)
    scores: dict[str, list] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for repeat in range(9):
            for name, model in pipelines(spec, repeat).items():
                if repeat >= 3 and name != "forest":
                    continue
                if name == "dummy":
                    scores[name] = [grade(files.sample, files.answers)]
                elif repeat == 0 or is_seeded(model):
                    submission = submission_of(spec, files, model, x_train, x_test)
                    scores.setdefault(name, []).append(grade(submission, files.answers))
    return {name: float(f"{np.mean(each):.6g}") for name, each in scores.items()}


# ---------------------------------------------------------------------------------------------
# Leaderboard
# ---------------------------------------------------------------------------------------------

def leaderboard(spec: Spec, scores: dict[str, float], seed: int) -> np.ndarray:
    """Scores of 1,000 to 1,399 teams, best first: a quantile function through the references.

    Human rank 0.05 is the dummy, 0.50 the default forest, 0.99 the best pipeline; the other
    references lie evenly between their neighbours, and teams are spread smoothly with some jitter.
    """
    sign = -1.0 if METRICS[spec.metric].lower_is_better else 1.0
    value = {name: sign * score for name, score in scores.items()}
    low, middle, top = value["dummy"], value["forest"], max(value.values())
    if not low < middle < top:
        raise BuildError(f"{spec.id}: the references must order dummy < forest < best; "
                         f"found {scores['dummy']}, {scores['forest']}, {sign * top}")

    def stretch(start, end, worst, best):
        """Human ranks start..end for the scores worst..best and the references between them."""
        inner = {v for v in value.values() if worst < v < best}
        return list(np.linspace(start, end, len(inner) + 2)), [worst, *sorted(inner), best]

    ranks1, marks1 = stretch(PINS["dummy"], PINS["forest"], low, middle)
    ranks2, marks2 = stretch(PINS["forest"], PINS["best"], middle, top)
    bottom = min(low - 0.2 * (middle - low), *value.values())  # some references lose to the dummy
    perfect = 0.0 if METRICS[spec.metric].lower_is_better else 1.0
    champion = min(top + 0.3 * (top - middle), perfect)
    ranks = [0.0, *ranks1, *ranks2[1:], 1.0]
    marks = [bottom, *marks1, *marks2[1:], champion]
    rng = generator(spec, seed, "leaderboard")
    teams = int(rng.integers(1000, 1400))
    u = (np.arange(teams) + 0.5) / teams + rng.normal(0, 0.3 / teams, teams)
    board = np.interp(np.clip(u, 0, 1), ranks, marks)
    return np.round(np.sort(board)[::-1] * sign, 6) + 0.0


def thresholds(board: np.ndarray) -> dict[str, float]:
    """MLE-bench's medal scores for 1,000 teams and more, and the median."""
    n = len(board)
    return {"gold": board[10 + n // 500 - 1], "silver": board[n // 20 - 1],
            "bronze": board[n // 10 - 1], "median": float(np.median(board))}


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------

def description(spec: Spec, files: Files) -> str:
    """description.md: a story, then lines of fixed wording that a small policy can learn."""
    metric = METRICS[spec.metric]
    columns = spec.submission_columns
    content = {
        "number": "a number",
        "label": "one of " + ", ".join(map(str, spec.labels)),
        "probability": "probability of 1" if len(columns) == 2 else "one probability per class",
    }[metric.form]
    features = files.train[list(spec.features)]
    texts = sum(not pd.api.types.is_numeric_dtype(features[c]) for c in features)
    return "\n".join([
        f"# {spec.title}", "", spec.story, "",
        f"Task: {spec.kind}.",
        f"Metric: {metric.plain} ({'lower' if metric.lower_is_better else 'higher'} is better).",
        f"Submission columns: {', '.join(columns)}.",
        f"Submission values: {content}.",
        f"Data: {len(features)} training rows, {len(spec.features)} features, "
        f"{texts} text columns, "
        f"{'some' if features.isna().any().any() else 'no'} missing values.",
        f"Origin: {'generated' if spec.origin == 'generated' else 'real, disguised'}.", ""])


def config(spec: Spec) -> dict:
    """config.yaml in MLE-bench's fields; `split` and `origin` are ours."""
    return {
        "id": spec.id, "name": spec.title, "competition_type": "simple", "awards_medals": True,
        "prizes": None, "description": f"{spec.id}/description.md",
        "dataset": {"answers": f"{spec.id}/prepared/private/test.csv",
                    "sample_submission": f"{spec.id}/prepared/public/sample_submission.csv"},
        "grader": {"name": spec.metric, "grade_fn": "file:grade.py:grade"},
        "preparer": "file:mini_mlebench.py:write_competition",
        "split": spec.split, "origin": spec.origin,
    }


def write_competition(spec: Spec, directory: Path, seed: int, scores: dict) -> np.ndarray:
    """Writes <directory>/<id>/, returns the leaderboard. Same arguments, same bytes."""
    files = build_files(spec, seed)
    board = leaderboard(spec, scores, seed)
    root = Path(directory) / spec.id
    public, private = root / "prepared" / "public", root / "prepared" / "private"
    public.mkdir(parents=True, exist_ok=True)
    private.mkdir(parents=True, exist_ok=True)
    private.chmod(0o700)  # even `stat` of the answers tells something
    for path, frame in ((public / "train.csv", files.train), (public / "test.csv", files.test),
                        (public / "sample_submission.csv", files.sample),
                        (private / "test.csv", files.answers)):
        frame.to_csv(path, index=False, lineterminator="\n")
    teams = pd.DataFrame({"teamId": np.arange(1, len(board) + 1), "score": board})
    teams.to_csv(root / "leaderboard.csv", index=False, lineterminator="\n")
    (root / "description.md").write_text(description(spec, files))
    (root / "grade.py").write_text(grader_source(spec))
    (root / "config.yaml").write_text(yaml.safe_dump(config(spec), sort_keys=False))
    return board


def all_column_names() -> set[str]:
    """Every column name of every competition, ids, features, targets and class columns."""
    return {name for spec in SPECS
            for name in (*spec.features, spec.target, *spec.submission_columns)}


def load_references(seed: int, path: Path = REFERENCES) -> dict[str, dict[str, float]]:
    """competition id -> pipeline -> private score; BuildError when they are of another seed."""
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BuildError(f"cannot read the reference scores {path}: {error}") from error
    missing = [spec.id for spec in SPECS if spec.id not in stored["scores"]]
    if stored["seed"] != seed or missing:
        what = f"seed {seed}" if stored["seed"] != seed else missing[0]
        raise BuildError(f"{path} holds no reference scores for {what}; "
                         "add --recompute-references (takes some minutes)")
    return stored["scores"]


def save_references(scores: dict, seed: int, path: Path) -> None:
    """One competition a line, so that changes can be read in a diff."""
    lines = [f"    {json.dumps(id)}: {json.dumps(scores[id])}" for id in sorted(scores)]
    path.write_text(f'{{\n  "seed": {seed},\n  "scores": {{\n' + ",\n".join(lines) + "\n  }\n}\n")


def check_out(out: Path) -> None:
    """Refuses a directory whose competitions would mix with ours; a rebuild in place is fine."""
    for split in SPLITS:
        known = {spec.id for spec in SPECS if spec.split == split}
        folder = out / split
        if folder.exists() and not folder.is_dir():
            raise BuildError(f"{folder} is not a directory; choose another --out")
        found = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
        strange = [name for name in found if name not in known]
        if strange:
            raise BuildError(f"{folder} holds {strange[0]}, not one of ours; choose another --out")


def table_line(spec: Spec, board: np.ndarray, scores: dict[str, float]) -> str:
    marks = thresholds(board)
    lower = METRICS[spec.metric].lower_is_better
    best = (min if lower else max)(scores, key=scores.get)
    return (f"{spec.split:8}{spec.id:20}{spec.origin:14}{spec.kind.split()[0]:12}{spec.metric:9}"
            f"{spec.rows[0]:5}+{spec.rows[1]:<4}{len(spec.features):3}  {scores['dummy']:9.4g}"
            f"{scores['forest']:9.4g}{marks['bronze']:9.4g}{marks['gold']:9.4g}  {best}")


def main(argv=None) -> int:
    """Exit status 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        description="Write small Kaggle-style competitions in MLE-bench's prepared layout: "
                    "OUT/train/<id> and OUT/heldout/<id>.",
        epilog="Seed 0 uses the stored reference scores. Another seed draws other data and "
               "therefore needs --recompute-references.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of all data, >= 0 (default 0)")
    parser.add_argument("--recompute-references", action="store_true",
                        help="fit all reference pipelines again and write their scores to "
                             "OUT/references.json (some minutes on one core)")
    args = parser.parse_args(argv)
    try:
        if args.seed < 0:
            raise BuildError(f"--seed must be >= 0; found {args.seed}")
        check_out(args.out)
        scores = None if args.recompute_references else load_references(args.seed)
        args.out.mkdir(parents=True, exist_ok=True)
        if scores is None:
            scores = {spec.id: reference_scores(spec, args.seed)
                      for spec in tqdm(SPECS, desc="reference pipelines", unit="competition")}
            save_references(scores, args.seed, args.out / "references.json")
        boards = {}
        for spec in tqdm(SPECS, desc="competitions", unit="competition"):
            folder = args.out / spec.split
            boards[spec.id] = write_competition(spec, folder, args.seed, scores[spec.id])
    except (BuildError, OSError) as error:
        print(f"mini_mlebench: error: {error}", file=sys.stderr)
        return 2
    print(f"{'split':8}{'id':20}{'origin':14}{'kind':12}{'metric':9}{'rows':>10}{'p':>3}  "
          f"{'dummy':>9}{'forest':>9}{'bronze':>9}{'gold':>9}  best reference")
    for spec in SPECS:
        print(table_line(spec, boards[spec.id], scores[spec.id]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
