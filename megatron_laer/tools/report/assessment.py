"""The share of perfectly balanced speed that a run kept, and the cost of its imbalance.

Between a dispatch and the end of its combine a layer waits for its busiest rank, so this time
grows with the busiest rank's tokens. With max/mean = r, the share 1 - 1/r of it is lost to
imbalance; stock, with r', would have lost (r' - 1)/r of it. Perfect balance loses neither that
nor FSEP's own waits: for restores, exchanges of gradients and decisions.

Legend: T steps, L MoE layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_laer.telemetry.log import in_words
from megatron_laer.tools.report.logs import Logs, Measured
from megatron_laer.tools.report.metrics_recording import Float64, MetricsRecording

# Number of layers named as causes, and the share of the time from which on they are named.
_NAMED = 3
_WORTH_NAMING = 0.002
# Factor between the measured and the estimated gain from which on neither is claimed.
_DOUBTFUL = 1.3


@dataclass(frozen=True)
class Assessment:
    """Assessment of a run over some iterations.

    `balanced_s` is the time with perfect balance, and `stock_s` the time that stock's placement
    would have lost to imbalance. `measured` are times of the run and of stock, if both have logs.
    """

    iterations: range
    total_s: float
    balanced_s: float
    imbalance_s: float
    exchanges_s: float
    stock_s: float
    lost_ms_L: Float64
    measured: Measured | None = None

    @property
    def kept(self) -> float:
        return self.balanced_s / self.total_s if self.total_s > 0 else 1.0

    @property
    def kept_by_stock(self) -> float:
        total_s = self.total_s - self.imbalance_s - self.exchanges_s + self.stock_s
        return self.balanced_s / total_s if total_s > 0 else 1.0

    @property
    def gain(self) -> float:
        """Return the run's estimated speed over that of stock's placement.

        It is usually too high: not all of the time around the experts grows with their tokens.
        """
        return self.kept / self.kept_by_stock if self.kept_by_stock > 0 else 1.0

    @property
    def is_doubtful(self) -> bool:
        """Return whether the measured gain is far from the estimated one."""
        if self.measured is None or self.total_s <= 0:
            return False
        apart = self.measured.gain / self.gain
        return not 1 / _DOUBTFUL <= apart <= _DOUBTFUL

    def sentence(self) -> str:
        """Return the verdict: the measured gain if stock's log is there, and the estimate."""
        shares = (
            f"FSEP kept {percent(self.kept)} of perfectly balanced speed; stock's placement of the "
            f"same tokens would have kept about {percent(self.kept_by_stock)}"
        )
        when, found = in_words(self.iterations), self.measured
        if found is None:
            return (
                f"{shares}. Both shares are of the {when}; stock's is an estimate from this run "
                "alone, and usually too low"
            )
        logs = f"{', '.join(found.own_logs)} and {found.stock_log}"
        if self.is_doubtful:
            return (
                f"No speedup is claimed: in the {when} of {logs} stock's step takes "
                f"{found.gain:.2f} times as long as FSEP's, but {self.gain:.2f} times is estimated "
                f"from FSEP's run alone. They are more than a factor of {_DOUBTFUL} apart, so "
                "another program, machine or setting has probably slowed one of the runs; train "
                f"both again, one after the other. {shares}"
            )
        return (
            f"FSEP is {found.gain:.2f} times as fast as stock, measured in the {when} of {logs}. "
            f"The estimate from FSEP's run alone is {self.gain:.2f} times, and usually too high: "
            f"{shares}"
        )

    def causes(self, layers: tuple[str, ...]) -> str:
        """Name the layers with most of the lost time; "" if hardly any was lost."""
        total_ms = float(self.lost_ms_L.sum())
        if total_ms * 1e-3 <= _WORTH_NAMING * self.total_s or len(layers) <= _NAMED:
            return ""
        worst = np.argsort(-self.lost_ms_L, kind="stable")[:_NAMED]
        share = float(self.lost_ms_L[worst].sum()) / total_ms
        names = ", ".join(layers[layer] for layer in worst.tolist())
        return f"The layers {names} cause {100 * share:.0f} % of the time lost to imbalance."


def assess(recording: MetricsRecording, logs: Logs) -> Assessment:
    run = recording.during(logs.iterations)
    ratio_TL = np.maximum(run.imbalance_TL, 1.0)
    lost_ms_TL = run.layer_ms_TL * (1 - 1 / ratio_TL)
    stock_lost_ms_TL = run.layer_ms_TL * (np.maximum(run.stock_TL, 1.0) - 1) / ratio_TL
    lost_ms_L = np.nansum(lost_ms_TL, axis=0)
    imbalance_s = float(lost_ms_L.sum()) * 1e-3
    total_s = float(np.nansum(run.of_steps["step_ms"])) * 1e-3
    waits = ("restore_wait_ms", "reduce_wait_ms", "decide_ms")
    exchanges_s = sum(float(np.nansum(run.of_steps[name])) for name in waits) * 1e-3
    return Assessment(
        logs.iterations,
        total_s,
        total_s - imbalance_s - exchanges_s,
        imbalance_s,
        exchanges_s,
        float(np.nansum(stock_lost_ms_TL)) * 1e-3,
        lost_ms_L,
        logs.measured,
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def seconds(value: float) -> str:
    """Format seconds with few digits: 41 s, 4.1 s, 410 ms, 4.1 ms."""
    if value >= 10 or value == 0:
        return f"{value:,.0f} s"
    if value >= 1:
        return f"{value:.1f} s"
    milliseconds = value * 1e3
    return f"{milliseconds:.0f} ms" if milliseconds >= 10 else f"{milliseconds:.2g} ms"
