"""A picture of the speed of models: for each quantity a bar a model (matplotlib, the extra ``[plot]``)."""

from pathlib import Path

from wanda_lightning.runs.plotting import picture
from wanda_lightning.runs.speed_report import SpeedReport, Spread


def plot_speed(report: SpeedReport, file: str | Path) -> None:
    """Draw tokens a second with their quartiles, memory and file size; above each bar its ratio to the first model.

    Args:
        report: What was measured.
        file: Where the picture goes; its suffix, .png or .svg, says what it is.

    Raises:
        ValueError: If the file is neither PNG nor SVG, or matplotlib is not installed.
    """
    speeds = {
        f"{what}\n(tokens/s)": [Spread.of(model.tokens_per_second[what]) for model in report.models]
        for what in report.models[0].tokens_per_second
    }
    gains = [
        [Spread.of(gain.ratios).median for gain in report.gains(model).values()]
        + [model.memory / report.models[0].memory, model.file / report.models[0].file]
        for model in report.models
    ]
    for title, sizes in {
        "peak memory\n(MiB)": [model.memory / 2**20 for model in report.models],
        "file\n(MiB)": [model.file / 2**20 for model in report.models],
    }.items():
        speeds[title] = [Spread(size, size, size) for size in sizes]

    with picture(file, (2 * len(speeds), 3.6)) as figure:
        panels = figure.subplots(1, len(speeds), squeeze=False)[0]
        for column, (axes, (title, spreads)) in enumerate(zip(panels, speeds.items(), strict=True)):
            for number, (model, spread) in enumerate(zip(report.models, spreads, strict=True)):
                error = [[spread.median - spread.low], [spread.high - spread.median]]
                bar = axes.bar(number, spread.median, yerr=error, capsize=4, color=f"C{number}", label=model.name)
                if number:
                    axes.bar_label(bar, [f"{gains[number][column]:.2f} x"], padding=2, fontsize="small")
            axes.set_title(title, fontsize="small")
            axes.set_xticks([])
            axes.margins(y=0.15)
            axes.tick_params(labelsize="x-small")
            axes.spines[["top", "right"]].set_visible(False)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 3), fontsize="small")
