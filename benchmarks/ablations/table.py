"""The results of benchmarks/ablations as docs/ablations.md and its figures.

    python -m benchmarks.ablations.table

Parts of the page that have no results here stay as they are. Every difference is paired: the same training seed
(data order, first weights, noise) and the same sampling seeds. Its interval is Student's over training seeds, and
Holm's correction runs over all differences of one table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from benchmarks.ablations import gpu, growth
from benchmarks.ablations.run import FOLDER, SHOWN, yaml_of
from benchmarks.measure import table

DOCS = Path("docs")
Results = Mapping[str, Mapping[int, Mapping[str, Any]]]  # {name: {seed: numbers}}

BASELINE = "plain"
SMALL = "small-"  # prefix of gpu.py's results
AGAINST = {
    "R0-heun": "R0", "R0-dpmpp": "R0", "R1": "R0", "R2": "R0", "R3": "R2", "R4": "R0", "R5": "R0", "R7": "R2",
    "K1": "K0", "K2": "K0", "K3": "K0", "K4": "K0",
    "T0": "T4", "T1": "T4", "T2": "T0", "T3": "T0", "T5": "T0", "T6": "T0", "T7": "T5",
}  # fmt: skip
WHAT = {
    "plain": "one level everywhere, no kernels",
    "regions": "maps of levels, half of the images",
    "detail_maps": "maps that follow the clean image's detail",
    "independent_maps": "maps of independent levels",
    "bridge_maps": "maps of the network's own estimate, by a bridge",
    "kernels_fixed": "kernels, a third each",
    "kernels_noise": "kernels mixed by noise",
    "kernels_content": "kernels mixed by content",
    "kernels_both": "kernels mixed by both",
    "no_text": "never told a caption",
    "R0": "plain, SDE-DPM++(2M)",
    "R0-heun": "plain, Heun",
    "R0-dpmpp": "plain, DPM++(2M)",
    "R1": "trained with maps, sampled without (SDE)",
    "R2": "trained with maps, easy patches first",
    "R3": "trained with maps, patches in random order",
    "R4": "maps of the clean image's detail, sampled by the estimate's",
    "R5": "independent maps, easy patches first",
    "R7": "maps by a bridge, easy patches first",
    "K0": "no kernels",
    "K1": "a third each",
    "K2": "mixed by noise",
    "K3": "mixed by content",
    "K4": "mixed by both",
    "T0": "guidance 1.5 away from no text, within [0.3, 5]",
    "T1": "no text",
    "T2": "as T0, at all levels",
    "T3": "guidance 2 away from early weights, within [0.3, 5]",
    "T4": "no guidance",
    "T5": "as T0, SDE-DPM++(2M)",
    "T6": "guidance 1.3 away from early weights, within [0.3, 5]",
    "T7": "as T6, SDE-DPM++(2M)",
}
TESTED = (
    "kid_lite2",
    "kid_randconv",
)  # the others are fractions of few samples, which Student's test does not suit
METRICS = {
    "kid_lite2": "KID lite2",
    "kid_randconv": "KID randconv",
    "recall": "recall",
    "coverage": "coverage",
    "retrieval": "top-1",
}

GROWN = {
    "A0": "grown: core, then shells around it one by one, what is below frozen",
    "A0-long": "as A0, 2.5 times as long",
    "A0-shells": "as A0, less of the cost for the core",
    "A1": "a plain network from scratch",
    "A1-half": "a plain network, half as long",
    "A1-long": "a plain network, 2.5 times as long",
    "A1b": "core and shells at once, from random weights",
    "A1b-long": "core and shells at once, 2.5 times as long",
    "A2": "a plain network, first at 32 px, then octave by octave",
    "A2-low": "the same, after 32 px at lr / 10",
    "A3-tuned": "as A0, fewer images, core tuned beside the shell",
    "A3-joint": "as A0, fewer images, the shell's loss trains the core as well",
    "M2": "as A0, the shell's low band with a clock of its own (`upscale_probability` 0.2)",
}
WAYS = {"M1-full": "all steps at full resolution", "M1-4": "lift 4", "A0": "lift 8", "M1-16": "lift 16"}
UPSCALED = {
    "M2-bicubic": "bicubic",
    "M2-lanczos": "Lanczos",
    "M2-shell": "A0, 8 steps",
    "M2-bands": "M2, 8 steps",
}
QUALITY = {
    "error": "held-out error",
    "kid_lite2": "KID lite2",
    "kid_lite2_fine": "KID lite2, all pixels",
    "kid_randconv": "KID randconv",
}
SCRATCH = (("A1-half", "A1", "A1-long"), ("A1b", "A1b-long"))  # trained at full resolution, by cost
TARGET = 0.4  # limit of growing's time, as a fraction of from-scratch's


class Difference(NamedTuple):
    """A mean over seeds with its 95% interval, and the p-value that it is 0."""

    mean: float
    half: float
    p: float
    seeds: int


def paired(ours: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """ours - base by seed; None with fewer than two seeds in common."""
    seeds = sorted(set(ours) & set(base))
    if len(seeds) < 2:
        return None
    d = np.array([ours[seed] - base[seed] for seed in seeds])
    error = float(d.std(ddof=1)) / len(d) ** 0.5
    if error == 0:
        return Difference(float(d.mean()), 0.0, 1.0 if d.mean() == 0 else 0.0, len(d))
    half = float(stats.t.ppf(0.975, len(d) - 1)) * error
    return Difference(float(d.mean()), half, float(stats.ttest_1samp(d, 0).pvalue), len(d))


def holm(ps: Sequence[float]) -> list[bool]:
    """Which of several differences are real at 5% in all (Holm 1979)."""
    real, passed = [False] * len(ps), True
    for rank, i in enumerate(np.argsort(ps, kind="stable")):
        passed = passed and ps[i] <= 0.05 / (len(ps) - rank)
        real[i] = passed
    return real


def load_results(folder: Path) -> Results:
    """All results in a folder."""
    results: dict[str, dict[int, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        name, _, seed = path.stem.rpartition("-")
        results.setdefault(name, {})[int(seed)] = json.loads(path.read_text())
    return results


def show(d: Difference | None, real: bool) -> str:
    """`-0.12 ±0.05 **`; bold if Holm's correction leaves it, one star if only its own interval is clear of 0."""
    if d is None:
        return "one seed"
    text = f"{d.mean:+.3g} ±{d.half:.2g}"
    return f"**{text}**" if real else text + (" *" if abs(d.mean) > d.half else "")


def mean(values: Mapping[int, float]) -> float:
    """Over seeds."""
    return float(np.mean(list(values.values())))


def networks_table(results: Results, networks: Sequence[Mapping[str, Any]]) -> str:
    """Held-out error of each network, and its difference to the plain one."""
    parts = ("error", "plain", "medium", "fine")
    rows = [n for n in networks if n["name"] in results]
    cells = {
        (n["name"], part): paired(
            {s: r[part] for s, r in results[n["name"]].items()},
            {s: r[part] for s, r in results[BASELINE].items()},
        )
        for n in rows
        for part in parts
        if n["name"] != BASELINE
    }
    real = dict(zip(cells, holm([1.0 if d is None else d.p for d in cells.values()]), strict=True))
    body = []
    for n in rows:
        name, own = n["name"], results[n["name"]]
        errors = f"{mean({s: r['error'] for s, r in own.items()}):.4f}"
        spearman = [r["spearman"] for r in own.values() if "spearman" in r]
        differences = [
            "" if name == BASELINE else show(cells[name, part], real[name, part]) for part in parts
        ]
        body.append(
            [
                f"`{name}`: {WHAT[name]}",
                f"{n['images']:,}",
                str(len(own)),
                errors,
                *differences,
                f"{np.mean(spearman):.2f}" if spearman else "",
            ]
        )
    head = [
        "network",
        "images",
        "seeds",
        "held-out error",
        "- plain's",
        "plainest third",
        "medium",
        "finest third",
        "Spearman",
    ]
    return table(head, body)


def rows_table(results: Results, rows: Sequence[Mapping[str, Any]]) -> str:
    """Each row at each number of calls, and its difference to the row it is compared with."""
    body, cells = [], {}
    for row in rows:
        for i in range(len(row["steps"])):
            for metric in TESTED:
                if AGAINST.get(row["name"]) in results and row["name"] in results:
                    ours, base = (
                        by_seed(results[name], i, metric) for name in (row["name"], AGAINST[row["name"]])
                    )
                    cells[row["name"], i, metric] = paired(ours, base)
    real = dict(zip(cells, holm([1.0 if d is None else d.p for d in cells.values()]), strict=True))
    for row in rows:
        own = results.get(row["name"])
        for i in range(len(row["steps"]) if own else 0):
            nfe = next(iter(own.values()))["runs"][i]["nfe"]
            line = [f"{row['name']}: {WHAT[row['name']]}" if i == 0 else row["name"], str(len(own)), str(nfe)]
            for metric in METRICS:
                value = mean(by_seed(own, i, metric))
                cell = (row["name"], i, metric)
                line.append(f"{value:.3g}" + (f" ({show(cells[cell], real[cell])})" if cell in cells else ""))
            body.append(line)
    return table(["row", "seeds", "calls", *METRICS.values()], body)


def by_seed(own: Mapping[int, Mapping[str, Any]], i: int, metric: str) -> dict[int, float]:
    """{seed: number} of one metric at the i-th number of steps."""
    return {seed: float(r["runs"][i][metric]) for seed, r in own.items()}


def draw(
    path: Path, results: Results, networks: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Held-out error of the networks beside the plain one's, and KID against calls of the rows R."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = [n["name"] for n in networks if n["name"] in results and n["name"] not in (BASELINE, "no_text")]
    for y, name in enumerate(names):
        base = results[BASELINE]
        d = [r["error"] - base[s]["error"] for s, r in results[name].items() if s in base]
        left.plot(d, [y] * len(d), "o", alpha=0.5, color="C0")
        left.plot(np.mean(d), y, "|", markersize=18, color="C0")
    left.axvline(0, color="grey", linewidth=0.8)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.locator_params(axis="x", nbins=5)
    left.set(xlabel="held-out error less the plain network's, by seed", title="Training, at equal cost")
    for row in rows:
        if row["name"].startswith("R") and row["name"] in results:
            own = results[row["name"]]
            nfe = [run["nfe"] for run in next(iter(own.values()))["runs"]]
            right.plot(
                nfe,
                [mean(by_seed(own, i, "kid_lite2")) for i in range(len(nfe))],
                marker=".",
                label=row["name"],
            )
    right.set(xlabel="calls of the network", ylabel="KID (lite2)", yscale="log", title="Sampling")
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)


def draw_samples(path: Path, folder: Path, names: Sequence[str], scale: int, count: int = SHOWN // 2) -> None:
    """`count` samples of each row, of the first seed, `scale` times as large; in two columns."""
    from PIL import Image, ImageDraw

    grids = {name: Image.open(file) for name in names if (file := folder / f"{name}-0.png").is_file()}
    width, height = next(iter(grids.values())).size
    width = count * (width // (SHOWN // 2))
    line, label, half = height // 2 + 1, 80, -(-len(grids) // 2)  # the upper line of each grid
    sheet = Image.new("RGB", (2 * (scale * width + label), half * scale * line), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (name, grid) in enumerate(grids.items()):
        left, top = i // half * (scale * width + label), i % half * scale * line
        pen.text((left + 4, top + scale * line // 2 - 6), name, fill="black")
        upper = grid.crop((0, 0, width, line))
        upper = upper.resize((scale * width, scale * line), Image.Resampling.NEAREST)
        sheet.paste(upper, (left + label, top))
    sheet.save(path, optimize=True)


# --- Growth.


def compared(
    results: Results, rows: Sequence[str], base: str, metrics: Sequence[str]
) -> dict[tuple[str, str], str]:
    """Each row's means, and in brackets its differences to `base`, by (row, metric)."""
    values = {
        (row, metric): {seed: float(r[metric]) for seed, r in results[row].items()}
        for row in rows
        for metric in metrics
        if all(metric in r for r in results[row].values())
    }
    differences = {
        (row, metric): paired(own, values[base, metric])
        for (row, metric), own in values.items()
        if row != base
    }
    real = dict(
        zip(differences, holm([1.0 if d is None else d.p for d in differences.values()]), strict=True)
    )
    return {
        cell: f"{mean(own):.4g}"
        + (f" ({show(differences[cell], real[cell])})" if cell in differences else "")
        for cell, own in values.items()
    }


def growth_table(results: Results) -> str:
    """Cost and quality of each way of training."""
    rows = [row for row in GROWN if row in results]
    titles = {"error": QUALITY["error"], "error_high": "of it, high band"} | QUALITY
    names = {metric: titles[metric] for metric in judged_by(results, titles)}
    cells = compared(results, rows, "A0", list(names))
    body = []
    for row in rows:
        own = results[row]
        images = " + ".join(f"{n:,}" for n in next(iter(own.values()))["images"])
        seconds = f"{mean({s: r['seconds'] for s, r in own.items()}):.0f}"
        qualities = [cells[row, metric] for metric in names]
        body.append([f"{row}: {GROWN[row]}", images, str(len(own)), seconds, *qualities])
    return table(["row", "images", "seeds", "CPU s", *names.values()], body)


def judged_by(results: Results, metrics: Iterable[str]) -> list[str]:
    """The metrics that A0 has; small images do not have all."""
    known = next(iter(results["A0"].values()))
    return [metric for metric in metrics if metric in known]


def points(results: Results, row: str, seed: int, metric: str) -> list[tuple[float, float]]:
    """(CPU seconds, quality) during one training, if its curve is there, and after it."""
    during = results.get(f"{row}-curve", {}).get(seed, {}).get("curve", ())
    return [(p["seconds"], p[metric]) for p in (*during, results[row][seed])]


def reached(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """When the best so far first is at most `target`, linear between points; None: never."""
    before: tuple[float, float] | None = None
    for seconds, value in sorted(curve):
        if value <= target:
            if before is None:
                return seconds
            return before[0] + (seconds - before[0]) * (before[1] - target) / (before[1] - value)
        best = value if before is None else min(value, before[1])
        before = seconds, best
    return None


def gate_table(results: Results, scratch: Sequence[str]) -> str:
    """By seed: when a network trained from scratch for so long (rows of one network) is as good as A0, and A0's
    fraction of that time."""
    body, rows = [], [row for row in scratch if row in results]
    for metric in judged_by(results, QUALITY):
        for seed, grown in results["A0"].items():
            own = {row: results[row][seed] for row in rows if seed in results[row]}
            if not own:
                continue
            curve = [p for row in own for p in points(results, row, seed, metric)]
            when, first, last = reached(curve, grown[metric]), min(curve)[0], max(curve)[0]
            fraction = grown["seconds"] / (when or last)
            within = round(fraction, 2) <= TARGET
            if when is None:
                verdict = [f"not in {last:.0f} s", f"below {fraction:.0%}", "yes" if within else "open"]
            elif when == first:
                verdict = [
                    f"less than {when:.0f} s",
                    f"above {fraction:.0%}",
                    "no" if fraction > TARGET - 0.005 else "open",
                ]
            else:
                verdict = [f"{when:.0f} s", f"{fraction:.0%}", "yes" if within else "no"]
            numbers = [f"{own[row][metric]:.4g}" if row in own else "" for row in rows]
            first_cells = [QUALITY[metric], str(seed), f"{grown[metric]:.4g}", *numbers]
            body.append([*first_cells, f"{grown['seconds']:.0f} s", *verdict])
    head = [
        "quality",
        "seed",
        "A0",
        *rows,
        "A0 takes",
        f"{rows[-1].removesuffix('-long')} is as good after",
        "A0's share",
        f"at most {TARGET:.0%}",
    ]
    return table(head, body)


def ways_table(results: Results) -> str:
    """A0's models sampled in several ways."""
    rows = [row for row in WAYS if row in results]
    names = {metric: QUALITY[metric] for metric in judged_by(results, QUALITY) if metric != "error"}
    cells = compared(results, rows, "A0", list(names))
    macs = {row: mean({s: r["macs"] for s, r in results[row].items()}) for row in rows}
    highest = max(macs.values())
    body = [
        [
            f"{row}: {WAYS[row]}",
            str(len(results[row])),
            f"{macs[row] / 1e9:.3g}",
            f"{highest / macs[row]:.2f}x",
            *(cells[row, metric] for metric in names),
        ]
        for row in rows
    ]
    return table(["way", "seeds", "GMAC a picture", "ratio", *names.values()], body)


def upscaled_table(results: Results) -> str:
    """Held-out images at twice the size; differences to A0's shell."""
    rows, metrics = [row for row in UPSCALED if row in results], ("psnr", "ssim", "kid_lite2", "kid_randconv")
    cells = compared(results, rows, "M2-shell", metrics)
    body = [
        [f"{row}: {UPSCALED[row]}", str(len(results[row])), *(cells[row, m] for m in metrics)] for row in rows
    ]
    return table(["2x", "seeds", "PSNR", "SSIM", "KID lite2", "KID randconv"], body)


def draw_growth(path: Path, results: Results) -> None:
    """Held-out error and KID against CPU seconds: curves of A0 and A1 by seed, the ends of the other rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = judged_by(results, ("error", "kid_lite2", "kid_lite2_fine"))
    figure = Figure(figsize=(5.5 * len(metrics), 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, metric in zip(figure.subplots(1, len(metrics)), metrics, strict=True):
        for i, row in enumerate(row for row in GROWN if row in results):
            for j, seed in enumerate(results[row]):
                line = points(results, row, seed, metric)
                label = row if j == 0 else None
                style = "-" if len(line) > 1 else ""
                axes.plot(*zip(*line, strict=True), style, color=f"C{i}", lw=0.9, marker=".", ms=4, alpha=0.7)
                axes.plot(*line[-1], marker="os^Dv<>PXh"[i], ls="", ms=6, color=f"C{i}", label=label)
        axes.set(xlabel="CPU s of training, one thread", ylabel=QUALITY[metric], xlim=(0, None))
        if metric.startswith("kid"):
            axes.set(yscale="log")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)


# --- The page.


def put(page: Path, mark: str, end: str, text: str) -> None:
    """Replace what lies between two lines of a page."""
    before, opened, rest = page.read_text(encoding="utf-8").partition(f"{mark}\n")
    _, closed, after = rest.partition(f"{end}\n")
    assert opened and closed, f"{page} has no {mark}"
    page.write_text(f"{before}{mark}\n{text}{end}\n{after}", encoding="utf-8")


def main() -> None:
    """Write the tables between the marks in docs/ablations.md, and the figures beside it."""
    plan = yaml_of(FOLDER / "params.yaml")
    results = load_results(FOLDER / "results")
    networks, rows = plan["networks"], plan["rows"]
    page = DOCS / "ablations.md"
    if BASELINE in results:
        parts = [networks_table(results, networks)]
        parts += [rows_table(results, [r for r in rows if r["name"].startswith(group)]) for group in "RKT"]
        put(page, "<!-- tables -->", "<!-- end -->", "\n".join(parts))
        draw(DOCS / "ablations.png", results, networks, rows)
        draw_samples(DOCS / "ablations-samples.png", FOLDER / "results", [r["name"] for r in rows], 2)
    small = {n.removeprefix(SMALL): r for n, r in results.items() if n.startswith(SMALL)}
    if BASELINE in small:
        of = [{"name": name.removeprefix(SMALL), "images": gpu.IMAGES} for name in gpu.NETWORKS]
        ways = [
            {"name": name.removeprefix(SMALL), "steps": steps} for name, (_, _, steps) in gpu.ROWS.items()
        ]
        put(
            page,
            "<!-- small -->",
            "<!-- end of small -->",
            f"{networks_table(small, of)}\n{rows_table(small, ways)}",
        )
        draw_samples(DOCS / "ablations-small.png", FOLDER / "results", list(gpu.ROWS), 2)
    for resolution in growth.studies():
        tell_growth(page, resolution)


def tell_growth(page: Path, resolution: int) -> None:
    """One study of growth.py, if its results are there."""
    folder = growth.place(FOLDER / "results", resolution)
    results = load_results(folder)
    if "A0" not in results:
        return
    gates = [gate_table(results, rows) for rows in SCRATCH if rows[-1] in results]
    parts = [growth_table(results), *gates, ways_table(results)]
    if "M2-shell" in results:
        parts.append(upscaled_table(results))
    mark = f"growth, {resolution} px"
    put(page, f"<!-- {mark} -->", f"<!-- end of {mark} -->", "\n".join(parts))
    draw_growth(DOCS / f"ablations-growth-{resolution}.png", results)
    shown = [*GROWN, *(way for way in WAYS if way not in GROWN and resolution < 256)]
    few = {64: SHOWN // 2, 128: 3}.get(resolution, 2)  # no megabytes
    draw_samples(DOCS / f"ablations-growth-{resolution}-samples.png", folder, shown, 1, few)


if __name__ == "__main__":
    main()
