"""What was measured of the speed of models, and what may be said of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import comb
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from wanda_lightning.atomic_files import write_text
from wanda_lightning.json_files import write_json
from wanda_lightning.report.tables import in_bytes, markdown_table, terminal_table

CHANCE = 0.05
"""How likely a difference that is called one may be by chance."""


@dataclass(frozen=True)
class ModelSpeed:
    """One model.

    Attributes:
        name: As it was given.
        dtype: Of its weights.
        parameters: How many it has.
        multiplied: How many of them every token is multiplied by: all but an embedding that is only looked up.
        zeros: The share of its parameters that is zero, in [0, 1].
        file: Bytes of its weight files.
        memory: Bytes of its weights, and of all tensors that live at once while it generates.
        tokens_per_second: For each quantity one measurement a round.
    """

    name: str
    dtype: str
    parameters: int
    multiplied: int
    zeros: float
    file: int
    memory: int = 0
    tokens_per_second: dict[str, list[float]] = field(default_factory=dict)

    def __repr__(self) -> str:
        medians = [f"{what} {median(speeds):,.4g} tokens/s" for what, speeds in self.tokens_per_second.items()]
        return f"{self.name}: {', '.join(medians)}"


@dataclass(frozen=True)
class Spread:
    """The quartiles of some measurements."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Compute the quartiles; between two measurements they are interpolated."""
        return cls(*(quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [values[0]]))

    def __str__(self) -> str:
        median, low, high = (
            f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"
            for value in (self.median, self.low, self.high)
        )
        return f"{median} ({low} to {high})"


@dataclass(frozen=True)
class Gain:
    """How many times as fast as the first model another is, round by round.

    Attributes:
        ratios: Its speed by that of the first model in the same round.
    """

    ratios: list[float]

    @property
    def verdict(self) -> str:
        """Say whether it is faster, by a two-sided sign test over the rounds; not what rounds to 1.00 times."""
        rounds = len(self.ratios)
        ahead = sum(ratio > 1 for ratio in self.ratios)
        most = max(ahead, sum(ratio < 1 for ratio in self.ratios))
        if 2 / 2**rounds > CHANCE:
            return "too few rounds to tell"
        by_chance = 2 * sum(comb(rounds, count) for count in range(most, rounds + 1)) / 2**rounds
        if by_chance > CHANCE or f"{Spread.of(self.ratios).median:.2f}" == "1.00":
            return "no faster"
        return "faster" if ahead == most else "slower"

    def __str__(self) -> str:
        return f"{Spread.of(self.ratios)} x, {self.verdict}"


@dataclass(frozen=True)
class SpeedReport:
    """Models side by side; what they are compared with is the first.

    Attributes:
        models: What was measured of each.
        settings: How many tokens, and rounds.
        machine: The device, its threads, versions.
    """

    models: list[ModelSpeed]
    settings: dict[str, int]
    machine: dict[str, Any]

    def __repr__(self) -> str:
        return "; ".join(map(repr, self.models))

    def gains(self, model: ModelSpeed) -> dict[str, Gain]:
        """Compare a model with the first, by quantity."""
        first = self.models[0].tokens_per_second
        return {
            what: Gain([own / other for own, other in zip(speeds, first[what], strict=True)])
            for what, speeds in model.tokens_per_second.items()
        }

    def findings(self) -> list[str]:
        """Say in sentences what the figures mean."""
        dense, *others = self.models
        found = []
        for model in others:
            gains = self.gains(model)
            verdicts: dict[str, list[str]] = {}
            for what, gain in gains.items():
                verdicts.setdefault(gain.verdict, []).append(what)
            found.append(f"{model.name}: " + "; ".join(f"{', '.join(at)}: {v}" for v, at in verdicts.items()))
            if model.multiplied < dense.multiplied:
                share = model.multiplied / dense.multiplied
                promise = f"which promises {1 / share:.2f} x"
                found.append(f"{model.name}: a token is multiplied by {share:.2f} of the weights, {promise}")
            elif model.zeros > dense.zeros and "faster" not in verdicts:
                found.append(
                    f"{model.name}: {model.zeros:.1%} of its weights are zero, and are stored and multiplied like "
                    "others: zeros in ordinary dense kernels save nothing"
                )
        if len({model.dtype for model in self.models}) > 1:
            found.append("The models differ in dtype, which changes speed and size too: set one with dtype")
        return found

    def notes(self) -> list[str]:
        """Say what the figures are."""
        new_tokens, context, rounds = (self.settings[name] for name in ("new_tokens", "context", "rounds"))
        threads = self.machine["threads"]
        cores = f" with {threads} thread{'s' if threads > 1 else ''}" if self.machine["device"] == "cpu" else ""
        return [
            f"Median and quartiles of {rounds} rounds in turns on {self.machine['device']}{cores} "
            f"({self.machine['environment']['device']}); decoding is of {new_tokens} tokens behind {context}",
            "Faster or slower is what chance alone would show in at most 1 of 20 measurements (sign test)",
        ]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and the rows, as text."""
        rows = [
            ["parameters", *(f"{model.parameters / 1e6:,.1f}M" for model in self.models)],
            ["dtype", *(model.dtype for model in self.models)],
            ["zeros", *(f"{model.zeros:.1%}" for model in self.models)],
            ["file", *(in_bytes(model.file) for model in self.models)],
            ["peak memory", *(in_bytes(model.memory) for model in self.models)],
        ]
        for what in self.models[0].tokens_per_second:
            rows.append(
                [f"{what}: tokens/s", *(f"{Spread.of(model.tokens_per_second[what])}" for model in self.models)]
            )
        for what in self.models[0].tokens_per_second if len(self.models) > 1 else []:
            rows.append([f"{what}: as fast", "1", *(str(self.gains(model)[what]) for model in self.models[1:])])
        return ["", *(model.name for model in self.models)], rows

    def to_markdown(self) -> str:
        """Return the table and the findings as Markdown."""
        return "\n".join([*markdown_table(*self.table()), *(f"\n{line}." for line in self._lines())]) + "\n"

    def to_table(self) -> Any:
        """Return the table and the findings for a rich console."""
        from rich.console import Group
        from rich.text import Text

        return Group(terminal_table(*self.table()), *(Text(f"{line}.") for line in self._lines()))

    def to_dict(self) -> dict[str, Any]:
        """Return every measurement and all that is said of it, for JSON."""
        plain = [
            asdict(model)
            | {
                "gains": {
                    what: asdict(Spread.of(gain.ratios)) | {"verdict": gain.verdict}
                    for what, gain in self.gains(model).items()
                }
            }
            for model in self.models
        ]
        return {**self.machine, "settings": self.settings, "models": plain, "findings": self.findings()}

    def save(self, folder: str | Path) -> None:
        """Write ``speed.json``, ``speed.md`` and the picture ``speed.png`` into a folder.

        Args:
            folder: Where they go; made if needed.

        Raises:
            ValueError: If matplotlib is not installed.
        """
        from wanda_lightning.runs.speed_plotting import plot_speed

        plot_speed(self, Path(folder) / "speed.png")
        write_text(Path(folder) / "speed.md", self.to_markdown())
        write_json(Path(folder) / "speed.json", self.to_dict())

    def _lines(self) -> list[str]:
        return [*self.findings(), *self.notes()]
