"""The page of bogensperger_2024_ct: table, verdicts on the order of the methods, and pictures with an enlarged part."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import common

ORDER = (
    ("FBP, ram-lak", "TV"),
    ("TV", "FoE"),
    ("FoE", "ICNN, bilevel"),
    ("ICNN, adversarial", "ICNN, bilevel"),
    ("ICNN, bilevel", "LPD, 2 layers"),
)
METHODS = (
    "FBP, ram-lak", "FBP, best window", "TV", "FoE, MAID on piggyback", "FoE", "ICNN, adversarial", "ICNN, bilevel",
    "LPD, 2 layers", "LPD, 6 layers",
)  # fmt: skip


def encoded(image) -> str:
    """A picture in a JSON line: bytes of grey values."""
    return base64.b64encode(np.round(255 * np.clip(image, 0, 1)).astype(np.uint8).tobytes()).decode()


def decoded(text: str) -> np.ndarray:
    pixels = np.frombuffer(base64.b64decode(text), np.uint8)
    return pixels.reshape(2 * (math.isqrt(pixels.size),))


def _methods(rows: Sequence[dict]) -> dict[str, dict]:
    found = {row["case"]["method"]: row["figures"] for row in rows if "method" in row["case"]}
    return {name: found[name] for name in METHODS if name in found}


def render(rows: Sequence[dict]) -> str:
    methods, settings = _methods(rows), rows[0]["settings"]
    base = np.array(methods["TV"]["psnr"])
    header = ["method", "parameters", "PSNR", "SSIM", "over TV", "of slices", "least slice", "steps", "s"]
    lines = []
    for name, found in methods.items():
        gain = np.array(found["psnr"]) - base
        lines.append([
            name, found.get("parameters", "–"), f"{np.mean(found['psnr']):.2f}", f"{np.mean(found['ssim']):.3f}",
            f"{gain.mean():+.2f}", f"± {gain.std(ddof=1):.2f}", f"{gain.min():+.2f}", found.get("steps", "–"),
            common.whole(found.get("seconds")),
        ])  # fmt: skip
    source = settings["data"] if settings["data"] else "drawn abdomens"
    intro = (
        f"{base.size} test slices ({source}) of {settings['sizes'][0]}², {settings['views']} views, noise "
        f"{settings['noise']:g}, learned from {settings['batch'][0]}; gains are paired by slice.\n"
    )
    verdicts = []
    for worse, better in ORDER:
        if worse in methods and better in methods:
            gain = np.array(methods[better]["psnr"]) - np.array(methods[worse]["psnr"])
            sure = gain.mean() > 2 * gain.std(ddof=1) / math.sqrt(gain.size)  # two standard errors
            met = "met" if sure else "NOT met"
            verdicts.append(
                f"- {worse} < {better}: {gain.mean():+.2f} ± {gain.std(ddof=1):.2f} dB, better on "
                f"{np.sum(gain > 0)} of {gain.size} slices: {met}.\n"
            )
    for row in rows:
        if "hypergradient" in row["case"]:
            found = row["figures"]
            verdicts.append(
                f"- Hypergradients of FoE at the start by piggyback ({common.rounded(found['seconds_piggyback'])} s) "
                f"and implicit differentiation ({common.rounded(found['seconds_implicit'])} s) differ by "
                f"{common.scientific(found['difference'])}.\n"
            )
    scan = [
        [
            row["case"]["solver"], f"{row['case']['ratio']:g}",
            row["figures"]["steps"] if row["figures"]["converged"] else f"> {row['figures']['steps']}",
            common.scientific(row["figures"]["distance"]), common.rounded(row["figures"]["ms"], 2),
        ]
        for row in rows
        if "solver" in row["case"]
    ]  # fmt: skip
    parts = [intro, common.table(header, lines), "".join(verdicts)]
    parts.append("![Reconstructions of a drawn slice](figures/bogensperger_2024_ct.png)\n")
    if scan:
        parts.append("Iterations of PDHG to a residual of 1e-3 by the balance of its steps:\n")
        parts.append(
            common.table(["regulariser", "ratio", "iterations", "distance", "ms per iteration and slice"], scan)
        )
    return "\n".join(parts)


def figures(rows: Sequence[dict], folder: Path) -> None:
    from matplotlib.figure import Figure

    shown = {row["case"].get("method", row["case"].get("picture")): row for row in rows if "picture" in row["figures"]}
    order = [name for name in ("ground truth", *METHODS) if name in shown]
    pictures = {name: decoded(shown[name]["figures"]["picture"]) for name in order}
    truth, size = pictures["ground truth"] / 255, len(pictures["ground truth"])
    zoom = slice(int(0.38 * size), int(0.62 * size) + 1), slice(int(0.50 * size), int(0.74 * size) + 1)
    figure = Figure(figsize=(1.75 * len(pictures), 3.9), layout="constrained")
    axes = figure.subplots(2, len(pictures))
    for (whole, part), (name, picture) in zip(axes.T, pictures.items(), strict=True):
        psnr = 10 * np.log10(1 / max(np.mean((picture / 255 - truth) ** 2), 1e-12))
        whole.set_title(name if name == "ground truth" else f"{name}\n{psnr:.2f} dB", fontsize=8)
        for axis, pixels in ((whole, picture), (part, picture[zoom])):
            axis.imshow(pixels, cmap="gray", vmin=0.5 * 255, vmax=0.95 * 255, interpolation="nearest")
            axis.axis("off")
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "bogensperger_2024_ct.png", dpi=100)
